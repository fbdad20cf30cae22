"""Where compared models come from: the run folders they were made in, found by the run ids in each manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmedexpert.reporting.tables import Row
from mmedexpert.runtime.identity import folder_of
from mmedexpert.runtime.jsonl import read_object
from mmedexpert.runtime.privacy import redacted, without_places

ORDER = (
    "data",
    "benchmark",
    "overlap",
    "pretrain",
    "dsa",
    "start",
    "difficulty",
    "weights",
    "gba",
    "grams",
    "caci",
    "distil",
    "eval",
)
NOT_TOLD = "not recorded"


@dataclass(frozen=True)
class Made:
    """A run folder as it lies there: a file that is missing or damaged is empty."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_object(self.folder / "manifest.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return read_object(self.folder / "metrics.json")

    @property
    def stage(self) -> str:
        return str(self.manifest.get("stage") or NOT_TOLD)

    @property
    def name(self) -> str:
        return without_places(str(self.manifest.get("name") or "(no manifest.json)"))

    @property
    def run_id(self) -> str:
        return str(self.manifest.get("run_id") or NOT_TOLD)

    @property
    def inputs(self) -> dict[str, str]:
        found = self.manifest.get("inputs")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def questions_of(folder: Path) -> Path | None:
    """The folder of the questions that an eval run asked: as it noted it, else beside it in the same outputs."""
    noted = (read_object(folder / "summary.json").get("question_set") or {}).get("folder")
    if not isinstance(noted, str):
        return None
    near = folder.parent.parent / Path(noted).parent.name / Path(noted).name
    return next((place for place in (Path(noted), near) if (place / "records.jsonl").is_file()), None)


def lineage(folders: Iterable[Path]) -> list[Made]:
    """The runs in these folders and all that they were made from, each once, in the order of the stages."""
    found: dict[Path, Made] = {}
    todo = [folder.resolve() for folder in folders]
    while todo:
        folder = todo.pop(0)
        if folder in found:
            continue
        made = found[folder] = Made(folder)
        places = [folder_of(folder.parent.parent, identity) for identity in made.inputs.values()]
        todo += [place.resolve() for place in (*places, questions_of(folder)) if place is not None]
    return sorted(found.values(), key=lambda made: ORDER.index(made.stage) if made.stage in ORDER else len(ORDER))


def run_rows(runs: Sequence[Made]) -> list[Row]:
    """A row a run: what it is, its commit, seed, hardware, and when and how long."""
    return [
        {
            "stage": made.stage,
            "name": made.name,
            "run_id": made.run_id,
            "commit": told(made.manifest.get("git_sha")),
            "seed": told(made.manifest.get("seed")),
            "hardware": without_places(told(made.manifest.get("device"))),
            "finished": told(made.manifest.get("finished")),
            "seconds": told(made.manifest.get("wall_seconds")),
            "tries": told(made.manifest.get("tries")),
        }
        for made in runs
    ]


def command_rows(runs: Sequence[Made]) -> list[Row]:
    """Each command once, without folders outside the working one, with the runs that it made."""
    made_by: dict[str, list[str]] = {}
    for made in runs:
        words = made.manifest.get("command")
        line = " ".join(public_word(str(word)) for word in words) if isinstance(words, list) else NOT_TOLD
        made_by.setdefault(line, []).append(f"{made.stage} {made.name}")
    return [{"command": line, "run": ", ".join(names)} for line, names in made_by.items()]


def version_rows(runs: Sequence[Made]) -> list[Row]:
    """Each set of package versions once."""
    made_with: dict[str, list[str]] = {}
    for made in runs:
        found = made.manifest.get("versions")
        told_ = ", ".join(f"{name} {number}" for name, number in found.items()) if isinstance(found, dict) else NOT_TOLD
        made_with.setdefault(told_, []).append(f"{made.stage} {made.name}")
    return [{"packages": line, "run": ", ".join(names)} for line, names in made_with.items()]


def input_rows(runs: Sequence[Made]) -> list[Row]:
    """What each run read: run ids, and sha256 of data, questions and weights."""
    rows = []
    for made in runs:
        inputs = dict(made.inputs)
        if fingerprint := made.manifest.get("data_fingerprint"):
            inputs["(its own records and images)"] = str(fingerprint)
        rows += [
            {"stage": made.stage, "name": made.name, "input": name, "sha256 or id": without_places(value)}
            for name, value in inputs.items()
        ]
    return rows


def public_word(word: str) -> str:
    """A word of a command line without places of this machine; a path may hold blanks, until a list goes on."""
    parts = re.split(r"""([=,\[\]{}'"])""", redacted([word])[0])
    return "".join("<folder>" if part.startswith(("/", "~", "..")) else without_places(part) for part in parts)


def told(value: Any) -> str:
    """A value as text, and that it is not recorded."""
    return NOT_TOLD if value is None else str(value)
