"""Run folders: content-named, reused when finished, resumed when not (docs/usage.md)."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from mmedexpert.errors import UserError
from mmedexpert.runtime.clock import Clock
from mmedexpert.runtime.files import sync, write_atomic
from mmedexpert.runtime.identity import FILE as IDENTITY
from mmedexpert.runtime.identity import FORMAT, recipe_of, remember, run_id, why_anew
from mmedexpert.runtime.jsonl import read_object
from mmedexpert.runtime.privacy import redacted, without_password
from mmedexpert.runtime.ranks import gather, on_all, on_first, rank

# cheap, and what the others are decided by: made also where a command only asks what would be reused
PREPARING = ("data", "benchmark", "overlap")
FREE_BYTES = 200_000_000  # ours: asked for before a stage starts
SILENT_SECONDS = 2.0  # ours: of waiting for another process, before it is told
TEMPORARY = ("last.ckpt", "clock.json")  # what a run needs until it is DONE
LEFTOVERS = ("**/*.part", "**/*.partial")  # what a kill leaves of files and folders that were being written
FULL, SHUT = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)
console = Console(stderr=True)
_named: set[Path] = set()  # folders this command has named already
_made: set[str] = set()  # run_ids that this process has worked on
by_workers: set[str] = set()  # those that its workers have (`workers.py`): to this command they are new
explained: list[dict[str, str]] = []  # with runs.explain: of each run whether it is reused, and why


@dataclass
class Run:
    """One stage's folder. `run_id` hashes the stage and everything its result depends on."""

    stage: str
    name: str
    run_id: str
    folder: Path
    reused: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    logger: Any = None  # where its metrics go, while it is worked on

    def __post_init__(self) -> None:
        self.clock = Clock(self.folder / "clock.json")

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    @property
    def metrics(self) -> dict[str, float]:
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Adds the wall seconds of a block to the manifest, over all tries."""
        return self.clock.phase(name)


def execute(
    stage: str,
    name: str,
    key: Mapping[str, Any],
    work: Callable[[Run], Mapping[str, float]],
    *,
    outputs: str | Path,
    seed: int,
    inputs: Mapping[str, str] | None = None,
    every_rank: bool = False,
    trains: bool = True,
    explain: bool = False,
    config: Callable[[], str] | None = None,
) -> Run:
    """Run `work` in the folder of (stage, name, key), or return at once when that folder is DONE.

    `work(run)` returns flat metrics. A failure leaves FAILED and traceback.txt; an interruption leaves the folder for
    the next try, whose `work` finds its checkpoints there. Two processes never work in one folder at once.

    A run is found by what it depends on, whatever its name. `trains`: the seed is one of training, over which results
    are averaged, not a part of what is asked. With `explain` nothing but preparations is worked on: the run comes back
    as it is, and `explained` says whether and why it would be made. `config` gives the folder's config.yaml.

    Of several ranks rank 0 alone writes. `work` runs on it while the others wait, or with `every_rank` on all; where
    one fails, all raise.
    """
    inputs, key = dict(inputs or {}), _plain(dict(key))
    identity = run_id(stage, {**key, "seed": seed, "inputs": inputs})
    run = Run(stage, name, identity, Path(outputs) / stage / f"{name}-{identity}")
    recipe = run_id(
        stage, {**key, "inputs": {n: recipe_of(i) for n, i in inputs.items()}} | ({} if trains else {"seed": seed})
    )
    remember(identity, recipe)
    tree = {"stage": stage, "format": FORMAT, "key": key, "seed": seed, "inputs": inputs}

    def begin() -> None:
        home = run.folder.parent
        if not explain or stage in PREPARING:
            _make_folder(home)
            lock.enter_context(_held(home, identity, f"{stage:>8}  {name}"))
        run.folder = next(iter(sorted(home.glob(f"*-{identity}"))), run.folder)  # equal, under another name
        run.reused = run.done
        if explain:
            explained.append(_explained(run, tree))
        if run.done:
            clean(run.folder, TEMPORARY)  # left by a kill right after DONE
            _tell(run.folder, f"[dim]{stage:>8}  {name}  reused {run.folder}[/dim]")
        elif not explain or stage in PREPARING:
            run.folder.mkdir(exist_ok=True)
            _tell(run.folder, f"[bold]{stage:>8}[/bold]  {name}  -> {run.folder}")
            clean(run.folder, ("FAILED", "traceback.txt", *LEFTOVERS))
            if config is not None:
                write_atomic(run.folder / "config.yaml", config().encode())
            write_json(run.folder / IDENTITY, {**tree, "recipe": recipe})

    def finish() -> None:
        write_json(run.folder / "metrics.json", dict(metrics or {}))
        write_json(run.folder / "manifest.json", _manifest(run, seed, inputs))
        for path in run.folder.iterdir():  # DONE promises them; whole folders were synced when they got their names
            if path.is_file():
                sync(path)
        write_atomic(run.folder / "DONE", b"")

    with _told(run, FULL), ExitStack() as lock:
        with _told(run, SHUT):
            on_first(begin)
        run.folder, run.reused = gather((run.folder, run.reused))[0]
        run.clock.path = run.folder / run.clock.path.name
        if run.reused or (explain and stage not in PREPARING):
            run.reused = run.reused and identity not in by_workers
            return run
        try:
            tell = partial(_failed, run.folder)
            with run.clock.running() if rank() == 0 else nullcontext():
                metrics = on_all(lambda: work(run), tell) if every_rank else on_first(lambda: work(run))
                on_first(finish)
            on_first(lambda: clean(run.folder, TEMPORARY))
            _made.add(identity)
        except Exception as error:
            if rank() == 0 and getattr(error, "errno", None) not in FULL:
                _failed(run.folder, str(error), traceback.format_exc())
            raise
    return run


@contextmanager
def _held(home: Path, identity: str, what: str) -> Iterator[None]:
    """A run's lock. Who has to wait for another process says so in one line, and for whom."""
    lock, holder = FileLock(home / f".{identity}.lock"), home / f".{identity}.holder"
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        by = read_object(holder)
        line = f"waits for process {by.get('pid')} on {by.get('host')}, at work on it since {by.get('since')}"
        console.print(f"[yellow]{what}  {line}[/yellow]", highlight=False, soft_wrap=True)
        lock.acquire()
    try:
        by = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        holder.write_text(json.dumps(by), encoding="utf-8")  # the lock's own file is emptied by those who wait
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _told(run: Run, codes: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        if codes is FULL:
            fix = "free space or set paths.outputs=<folder>; the same command goes on"
            raise UserError(f"the disk is full at {run.folder}: {fix}") from error
        raise UserError(f"cannot write to {run.folder} ({error.strerror}): set paths.outputs=<folder>") from error


def _explained(run: Run, tree: Mapping[str, Any]) -> dict[str, str]:
    if run.done:
        state, why = "reused", "nothing that it depends on has changed"
    elif run.folder.exists():
        state, why = "resumed", "an earlier try did not finish"
        if (run.folder / "FAILED").exists():
            why += f": {' '.join((run.folder / 'FAILED').read_text(encoding='utf-8').split())[:200]}"
    else:
        state, why = "made", why_anew(run.folder.parent, tree)
    return {"stage": run.stage, "name": run.name, "run_id": run.run_id, "state": state, "why": why}


def clean(folder: Path, names: Sequence[str]) -> None:
    """Remove from a run's folder the files and folders that these patterns match."""
    for path in [path for name in names for path in folder.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _failed(folder: Path, error: str, trace: str) -> None:
    write_atomic(folder / "traceback.txt", without_password(trace).encode())
    write_atomic(folder / "FAILED", without_password(error).encode())


def _tell(folder: Path, line: str) -> None:
    if folder not in _named:
        console.print(line, highlight=False, soft_wrap=True)
        _named.add(folder)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): set paths.outputs=<folder>") from error
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise UserError(f"only {free / 1e6:.0f} MB are free at {folder}: free space or set paths.outputs=<folder>")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def write_json(path: Path, value: Any) -> None:
    """A JSON file written whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1, default=str) + "\n").encode())


def git_sha() -> str | None:
    """The checkout's commit, with `+` when files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    sha = git("rev-parse", "HEAD")
    return f"{sha}{'+' if git('status', '--porcelain', '-uno') else ''}" if sha else None


def _manifest(run: Run, seed: int, inputs: dict[str, str]) -> dict[str, Any]:
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)"
    return {
        "run_id": run.run_id,
        "stage": run.stage,
        "name": run.name,
        "git_sha": git_sha(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "lightning", "hydra-core", "wandb")},
        },
        "command": redacted(sys.argv),
        "seed": seed,
        "device": device,
        "inputs": inputs,
        "recipe": recipe_of(run.run_id),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        **run.clock.numbers(),
        "peak_memory_bytes": peak,
        **run.notes,
    }
