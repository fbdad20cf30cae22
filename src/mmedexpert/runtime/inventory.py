"""What lies in an outputs folder: every run with its state, size and inputs, and which runs others were made of."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmedexpert.runtime import identity

DONE, FAILED, RUNNING, UNFINISHED = "done", "failed", "running", "unfinished"
# of a stage the metric that says most, as it stands in its metrics.json; of others the first one
KEY_NUMBERS = {
    "data": "records/train",
    "gba": "accuracy/end",
    "dsa": "loss",
    "distil": "loss",
    "eval": "macro_accuracy",
}


@dataclass(frozen=True)
class Found:
    """A run's folder as it lies there. `number` is the metric of KEY_NUMBERS, empty until it is done."""

    stage: str
    name: str
    run_id: str
    folder: Path
    state: str
    seed: int | None
    number: str
    seconds_old: float
    size: int
    inputs: tuple[str, ...]


def runs_in(outputs: Path) -> list[Found]:
    """Every run below `outputs`, by stage and age, the newest last; folders that are none are passed over."""
    folders = (path.parent for path in outputs.glob(f"*/*/{identity.FILE}"))
    found = [_found(folder) for folder in folders if not folder.is_symlink()]  # links are names of others
    return sorted(found, key=lambda one: (one.stage, -one.seconds_old, one.run_id))


def needed(runs: Iterable[Found], roots: Collection[str]) -> set[str]:
    """The run_ids of `roots` and of everything that they were made of."""
    inputs = {one.run_id: one.inputs for one in runs}
    waiting, reached = list(roots), set[str]()
    while waiting:
        if (one := waiting.pop()) not in reached:
            reached.add(one)
            waiting += inputs.get(one, ())
    return reached


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; what a link points to is not counted."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _found(folder: Path) -> Found:
    tree = identity.read(folder) or {}
    name, _, run_id = folder.name.rpartition("-")
    told = folder / ("DONE" if (folder / "DONE").exists() else identity.FILE)
    return Found(
        folder.parent.name, name, run_id, folder, _state(folder, run_id), tree.get("seed"), _number(folder),
        time.time() - told.stat().st_mtime, size_of(folder), tuple(map(str, tree.get("inputs", {}).values())),
    )  # fmt: skip


def _state(folder: Path, run_id: str) -> str:
    if (folder / "DONE").exists():
        return DONE
    lock = folder.parent / f".{run_id}.lock"
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            return RUNNING
    return FAILED if (folder / "FAILED").exists() else UNFINISHED


def _number(folder: Path) -> str:
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    key = KEY_NUMBERS.get(folder.parent.name, "")
    key = key if key in metrics else next(iter(metrics), "")
    return f"{key} {metrics[key]:.4g}" if key else ""
