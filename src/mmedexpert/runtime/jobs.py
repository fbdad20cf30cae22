"""What each job of a sweep leaves, in a file of its own: the command reads it there, wherever the job ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.privacy import redacted, without_password
from mmedexpert.schema import Config

if TYPE_CHECKING:
    from mmedexpert.runtime.runs import Run

sweep: Path | None = None  # the folder of this command's jobs; None where it is no sweep
NOT_ENDED = "ended without a word"  # what stands there from a job's beginning until its end


class Noted(Callback):
    """Notes the folder in the process that was called, which under some launchers runs no job (`hydra.callbacks`)."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra's: a command without -m."""
        _note(None)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra's: a sweep."""
        _note(Path(config.hydra.sweep.dir))


def _note(folder: Path | None) -> None:
    global sweep
    sweep = folder


def tidy(folder: Path) -> None:
    """Remove Hydra's own note of a sweep, every option as it was typed, passwords too; and a folder without a job."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # it is not empty, or of a command without -m
        folder.rmdir()


@dataclass
class Job:
    """A job as its command sees it: what it was given, and its runs by name, or the error in one line."""

    overrides: list[str]
    runs: Mapping[str, Run] = field(default_factory=dict)
    config: Config | None = None  # of a job that got so far; passwords in its addresses are not kept
    error: str | None = None


def leave(folder: Path, number: int, job: Job) -> None:
    """Write a job's file, `<folder>/<number>.json`, in place of what stands there; without passwords and keys."""
    runs = [
        {"as": name, **{key: getattr(run, key) for key in ("stage", "name", "run_id", "folder", "reused")}}
        for name, run in job.runs.items()
    ]
    told = {"overrides": redacted(job.overrides), "error": job.error, "runs": runs}
    text = json.dumps(told | {"config": asdict(job.config) if job.config else None}, indent=1, default=str)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{number}.json", (without_password(text) + "\n").encode())


def read(folder: Path, number: int) -> Job:
    """The job of a file; one that is gone or not whole has failed."""
    from mmedexpert.runtime.runs import Run

    path = folder / f"{number}.json"
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        runs = {
            one["as"]: Run(one["stage"], one["name"], one["run_id"], Path(one["folder"]), one["reused"])
            for one in told["runs"]
        }
        return Job(told["overrides"], runs, _config(told["config"]) if told["config"] else None, told["error"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Job([f"job {number}"], error=f"{path} cannot be read ({type(error).__name__})")


def _config(values: dict[str, Any]) -> Config:
    config = OmegaConf.to_object(OmegaConf.merge(_schema(), values))
    assert isinstance(config, Config)
    return config


@cache
def _schema() -> Any:
    """Made once: it takes longer than the merge."""
    return OmegaConf.structured(Config)


def left(folder: Path) -> list[Job]:
    """The jobs of a sweep in their order."""
    return [read(folder, number) for number in sorted(int(path.stem) for path in folder.glob("[0-9]*.json"))]


def varied(commands: Sequence[Sequence[str]]) -> list[str]:
    """Of each command the words that not all of them have."""
    common = set.intersection(*map(set, commands)) if len(commands) > 1 else set()
    return [" ".join(word for word in words if word not in common) for words in commands]
