"""`stage=list` and `stage=clean`: what lies in the outputs folder, and what of it no finished pipeline needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from mmedexpert.errors import UserError, suggestion
from mmedexpert.reporting.tables import Row, print_table
from mmedexpert.runtime.inventory import (
    DONE,
    FAILED,
    PREPARED,
    RUNNING,
    UNFINISHED,
    YOUNG,
    Found,
    needed,
    runs_in,
)  # fmt: skip
from mmedexpert.runtime.runs import Run, console
from mmedexpert.schema import Config


def show(config: Config) -> dict[str, Run]:
    """Print every run with its state, its most telling number, age and size; changes nothing."""
    outputs = Path(config.paths.outputs)
    if not (found := runs_in(outputs)):
        raise UserError(f"{outputs} holds no run: give paths.outputs=<folder>, or make one with python run.py")
    failed = [one for one in found if one.state == FAILED]
    lines = [f"failed: {one.folder.relative_to(outputs)}/FAILED says why" for one in failed]
    print_table(rows_of(found), f"Runs in {outputs}", "\n".join([*lines, total(found)]))
    return {}


def clean(config: Config) -> dict[str, Run]:
    """Print the runs that nothing needs; with `runs.delete` remove them.

    Needed is what a finished pipeline, a report, an experiment's table, a run under way or one of `runs.keep` was made
    of. Data (`inventory.PREPARED`) and what is younger than a day stay. UserError where no pipeline is finished,
    nothing is compared and nothing kept, and for a `runs.keep` that is none.
    """
    outputs, keep = Path(config.paths.outputs), config.runs.keep
    found = runs_in(outputs)
    roots = {one.run_id for one in found if one.stage == "pipeline" and one.state == DONE}
    for given in keep:
        run_id = Path(given).name.rpartition("-")[2]
        if run_id not in (known := {one.run_id: one.folder.name for one in found}):
            fix = suggestion(given, list(known.values()))
            raise UserError(f"runs.keep: {given} is no run in {outputs}; name its folder, <name>-<run id>{fix}")
        roots.add(run_id)
    roots |= _compared(outputs)
    if not roots:
        raise UserError(
            f"{outputs} holds no finished pipeline and no comparison, so nothing says which runs are needed: name what "
            "to keep in runs.keep=[<run id>,...]"
        )
    roots |= {one.run_id for one in found if one.state in (RUNNING, UNFINISHED)}
    reached = needed(found, roots)
    spare = [
        one for one in found
        if one.run_id not in reached and one.stage not in PREPARED and one.seconds_old > YOUNG
    ]  # fmt: skip
    if not spare:
        _say(f"{outputs}: every run is needed, kept, under way, of data, or younger than a day")
        return {}
    print_table(rows_of(spare), "Runs that nothing needs", total(spare))
    if not config.runs.delete:
        _say(
            "Nothing was deleted. The same command with runs.delete=true deletes these; runs.keep=[<run id>,...] keeps "
            "some, with what they were made of."
        )
        return {}
    gone = [one for one in spare if _delete(one)]
    _say(f"deleted {len(gone)} runs, {_size(sum(one.size for one in gone))}")
    return {}


def rows_of(found: Sequence[Found]) -> list[Row]:
    """A line a run, as people read it."""
    return [
        {
            "stage": one.stage, "name": one.name, "run_id": one.run_id, "state": one.state,
            "seed": "-" if one.seed is None else str(one.seed), "numbers": one.number or "-",
            "age": _age(one.seconds_old), "size": _size(one.size),
        }
        for one in found
    ]  # fmt: skip


def total(found: Sequence[Found]) -> str:
    """How many there are, and how large they are together."""
    return f"{len(found)} runs, {_size(sum(one.size for one in found))}"


def _compared(outputs: Path) -> set[str]:
    """The run_ids of the evaluations that stand in a report or an experiment's table."""
    found = set()
    for path in outputs.glob("*/*/comparison.json"):
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
            found |= {Path(one["path"]).parent.name.rpartition("-")[2] for one in runs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not tell what it compares: move it away, or make it anew") from error
    return found


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _delete(one: Found) -> bool:
    """Remove a run's folder, unless somebody works in it by now."""
    try:
        with FileLock(one.folder.parent / f".{one.run_id}.lock", timeout=0):
            (one.folder / "DONE").unlink(missing_ok=True)  # a folder half deleted is not taken for finished
            shutil.rmtree(one.folder)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(f"{one.folder} cannot be deleted ({error.strerror}): the others before it are gone") from error
    return True


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
