"""The lines of compared runs read again: what was said on the questions shown, and which images were given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedexpert.data.record import Record
from mmedexpert.data.records import load_records
from mmedexpert.errors import UserError
from mmedexpert.evaluation.finished import EvalRun
from mmedexpert.evaluation.predict import Prediction
from mmedexpert.reporting.lineage import questions_of

QUESTIONS = 5_000  # ours: on a page, over all benchmarks; what a browser filters at once


@dataclass
class Answers:
    """Of one run: `shown`, the lines of questions on the page, and of all questions `images`, the sha256 of each image
    file that was given (None: unreadable)."""

    shown: dict[str, list[Prediction]] = field(default_factory=dict)
    images: dict[str, tuple[str | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """All records of a benchmark's folder by id, the folder of their images, and why there are none."""

    records: dict[str, Record]
    image_root: Path | None
    why: str = ""


def drawn(members: Sequence[EvalRun], count: int) -> list[str]:
    """The ids of the questions shown of one benchmark: all, or `count` by a hash of their ids."""
    ids = list(members[0].questions)
    if len(ids) <= count:
        return ids
    chosen = set(sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())[:count])
    return [one for one in ids if one in chosen]


def answers_of(run: EvalRun, shown: Collection[str]) -> Answers:
    """A run's lines; of a question answered twice under one perspective the last, as in the numbers."""
    found, lines, wanted = Answers(), dict[tuple[str, str | None], Prediction](), set(shown)
    for row in _lines(run.path):
        identity = str(row.get("id"))
        if identity not in run.questions:
            continue
        found.images[identity] = tuple(row.get("image_sha256") or ())
        if identity in wanted:
            lines[identity, row.get("perspective")] = row
    for (identity, _), row in lines.items():
        found.shown.setdefault(identity, []).append(row)
    return found


def _lines(path: Path) -> Iterator[Prediction]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut off; `read_runs` tells of it
                continue
            yield row


def asked_of(members: Sequence[EvalRun]) -> Asked:
    """The records that these runs of one benchmark answered, from the folder that a run names, if they still fit."""
    why = "no run names the folder of its questions"
    for run in members:
        folder = questions_of(run.path.parent)
        if folder is None:
            continue
        try:
            records, image_root = load_records(folder)
        except UserError:
            why = "the folder of the questions cannot be read"
            continue
        known = {record.id: record for record in records}
        shared = [i for i in run.questions if i in known]
        if shared and all(known[i].answer == run.questions[i].gold for i in shared):
            return Asked(known, image_root)
        why = "the folder of the questions holds others by now"
    return Asked({}, None, why)
