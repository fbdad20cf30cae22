"""What lies in an outputs folder: every run with its state, size and inputs, and which runs others were made of.

Data are known to what was made of them by their content, not by the run that holds them: no run can tell which data
runs it needs, so these are never counted as spare.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mmedexpert.errors import UserError
from mmedexpert.runtime import identity
from mmedexpert.runtime.jsonl import read_object
from mmedexpert.runtime.runs import PREPARING

DONE, FAILED, RUNNING, UNFINISHED = "done", "failed", "running", "unfinished"
PREPARED = (*PREPARING, "curate", "pretrain")  # stages whose runs others know by content
YOUNG = 86400.0  # ours: seconds; a younger run may belong to a command that is still going on
# of a stage the metric that says most, as it stands in its metrics.json; of others the first one
KEY_NUMBERS = {
    "data": "records/train",
    "gba": "accuracy/end",
    "dsa": "loss",
    "distil": "loss",
    "eval": "macro_accuracy",
    "verdicts": "acc_single/mean",
    "best_of": "best_of/mean",
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
    """Every run below `outputs`, by stage and age, the newest last; folders that are none are passed over.

    UserError for a finished one that does not tell what it was made of.
    """
    folders = {path.parent for name in (identity.FILE, "DONE") for path in outputs.glob(f"*/*/{name}")}
    found = []
    for folder in folders:
        try:
            found += [] if folder.is_symlink() else [_found(folder)]  # links are names of others
        except FileNotFoundError:  # deleted or renamed by another command meanwhile
            continue
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
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a file that is being written is renamed
            size += path.lstat().st_size if path.is_symlink() or path.is_file() else 0
    return size


def _found(folder: Path) -> Found:
    tree = identity.read(folder) or read_object(folder / "manifest.json")
    inputs = tree.get("inputs")
    if not isinstance(inputs, dict):
        if (folder / "DONE").exists():
            raise UserError(f"{folder} is finished and does not tell what it was made of: move it away, or mend it")
        inputs = {}
    name, _, run_id = folder.name.rpartition("-")
    told = folder / "DONE" if (folder / "DONE").exists() else folder
    return Found(
        folder.parent.name, name, run_id, folder, _state(folder, run_id), tree.get("seed"), _number(folder),
        time.time() - told.stat().st_mtime, size_of(folder), tuple(map(str, inputs.values())),
    )  # fmt: skip


def _state(folder: Path, run_id: str) -> str:
    if (folder / "DONE").exists():
        return DONE
    lock = folder.parent / f".{run_id}.lock"
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except (Timeout, OSError):  # or it cannot be told, in a folder that only others may write to
            return RUNNING
    return FAILED if (folder / "FAILED").exists() else UNFINISHED


def _number(folder: Path) -> str:
    metrics = {key: x for key, x in read_object(folder / "metrics.json").items() if isinstance(x, int | float)}
    key = KEY_NUMBERS.get(folder.parent.name, "")
    key = key if key in metrics else next(iter(metrics), "")
    return f"{key} {metrics[key]:.4g}" if key else ""
