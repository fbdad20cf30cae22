"""How hard a record is: how often a reference model solves it when it samples at temperature 1.

As MedVLThinker does (UCSC-VLAA/MedVLThinker@a3163b1: 16 rollouts, 1 to 7 passes kept for its training).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mmedexpert.curation.replies import BATCH, UNJUDGED, Question, asked, passed, refusals, rows_of, unjudged
from mmedexpert.curation.steps import Records, Verdict, checked
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Engine
from mmedexpert.errors import UserError
from mmedexpert.models.encode import prompt_text
from mmedexpert.runtime.drawing import save_drawing

NAME = "difficulty"
REFUSED = "the reference model refuses it"
ROLLOUT = "rollout"


def difficulty(
    records: Records,
    engine: Engine,
    kept: Path,
    *,
    rollouts: int = 16,  # peers: MedVLThinker
    keep: tuple[int, int] = (1, 15),  # ours: what is solved never, or always, teaches nothing
    hard: tuple[int, int] = (1, 7),  # peers: MedVLThinker
    mode: str = "drop",
    batch: int = BATCH,
) -> Iterator[Verdict]:
    """Keep what a reference model solves `keep` times of `rollouts` (ends included); mark what it solves `hard` times.

    Each rollout is another sample of one prompt, that of evaluation (`prompt_text`, images first). A record of which
    any rollout was refused, or had no reply, has no pass count: it is dropped for that, never as unsolved.  # ours
    Mode flag drops nothing. Replies are kept in the file `kept` (`replies.asked`).
    """
    if mode not in ("drop", "flag"):
        raise ValueError(f"mode is 'drop' or 'flag', not {mode!r}")
    for name, (low, high) in (("keep", keep), ("hard", hard)):
        if not 0 <= low <= high <= rollouts:
            raise UserError(f"{NAME}: {name} [{low}, {high}] is no range of 0 to {rollouts} passes: mend it")
    drop = mode == "drop"
    ask = partial(_questions, root=records.image_root, rollouts=rollouts)
    for record, row in asked(records, ask, engine, kept, batch=batch):
        if fault := unjudged(record):
            yield Verdict(record, UNJUDGED, fault) if drop else Verdict(checked(record, NAME, unjudged=fault))
            continue
        count, refused = passed(row, ROLLOUT), refusals(row)
        if refused:
            marked = checked(record, NAME, passed=count, of=rollouts, refused=len(refused))
            reason, detail = REFUSED, f"{len(refused)} of {rollouts}: {refused[0]}"
        else:
            marked = checked(record, NAME, passed=count, of=rollouts, hard=hard[0] <= count <= hard[1])
            reason = _outside(count, rollouts, keep)
            detail = f"solved in {count} of {rollouts}" if reason else ""
        yield Verdict(marked, reason, detail) if drop else Verdict(marked)


def histogram(kept: Path, rollouts: int = 16) -> tuple[list[int], int]:
    """How many records were solved 0, 1, ... `rollouts` times, and how many were refused, from the file of replies."""
    counts, refused = [0] * (rollouts + 1), 0
    for row in rows_of(kept):
        if refusals(row):
            refused += 1
        elif row["replies"]:
            counts[passed(row, ROLLOUT)] += 1
    return counts, refused


def figure(counts: Mapping[int, int] | list[int], path: Path, *, keep: tuple[int, int] = (1, 15)) -> Path:
    """Draw a histogram of pass counts; what is kept is dark. The kind of file follows the name (png, svg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazily: half a second, and only this draws
    from matplotlib.figure import Figure

    passes = dict(counts) if isinstance(counts, Mapping) else dict(enumerate(counts))
    most = max(passes, default=0)
    drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(drawn)  # no window, and no state that other figures share
    axes = drawn.add_subplot()
    colours = ["#1f4e79" if keep[0] <= number <= keep[1] else "#c3c9d0" for number in passes]
    bars = axes.bar(list(passes), list(passes.values()), color=colours, width=0.85)
    axes.bar_label(bars, fontsize=7)
    axes.set_xticks(range(most + 1))
    axes.set_xlabel(f"rollouts solved, of {most} (dark: kept)")
    axes.set_ylabel("records")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_drawing(drawn, path)
    return path


def _questions(record: Record, root: Path, rollouts: int) -> list[Question]:
    if unjudged(record):
        return []
    text, images = prompt_text(record), tuple(root / name for name in record.images)
    return [Question(ROLLOUT, record, Ask(record.id, text, images, sample)) for sample in range(rollouts)]


def _outside(count: int, rollouts: int, keep: tuple[int, int]) -> str:
    low, high = keep
    if count < low:
        return f"never solved in {rollouts}" if low == 1 else f"solved in fewer than {low} of {rollouts}"
    if count > high:
        return f"solved in all {rollouts}" if high == rollouts - 1 else f"solved in more than {high} of {rollouts}"
    return ""
