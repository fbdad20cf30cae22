"""What a judge says of the samples of each question, kept as it comes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mmedexpert.evaluation.asked import lines
from mmedexpert.judging.scorer import Group, Scorer
from mmedexpert.runtime.files import sync, write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.progress import Bar

FILE, COLUMNS = "scores.jsonl", ("id", "answers", "scores", "counts")
TOGETHER = 64  # ours: questions judged together; what a kill may lose of a judge without a ledger


def scores_of(
    scorer: Scorer, groups: Sequence[Group], path: Path, *, title: str
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """Of each group the score of each text among its answers (None: the judge failed), and the judge's counts.

    Equal texts are judged once, and of one text alone no judge is asked: its score is 0. # ours
    A line a group in `path`, with the counts of its batch in the first; what is there is not judged again, but for
    failures. The counts are of all tries.
    """
    rows = read_lines(path, COLUMNS)
    write_atomic(path, lines(rows))  # without a line that a kill cut off
    texts = {one.id: tuple(dict.fromkeys(one.answers)) for one in groups}
    kept = {(row["id"], row["answers"]): row["scores"] for row in rows if None not in row["scores"]}
    todo = [one for one in groups if len(texts[one.id]) > 1 and (one.id, _digest(texts[one.id])) not in kept]
    with Bar(f"pick {title}", len(todo)) as bar, path.open("ab") as file:
        for start in range(0, len(todo), TOGETHER):
            asked = [Group(one.id, one.question, one.images, texts[one.id]) for one in todo[start : start + TOGETHER]]
            found = scorer(asked)
            new: list[dict[str, Any]] = [
                {
                    "id": one.id, "answers": _digest(one.answers), "counts": {} if place else found.counts,
                    "scores": [None if math.isnan(value) else value for value in values],
                }
                for place, (one, values) in enumerate(zip(asked, found.values, strict=True))
            ]  # fmt: skip
            file.write(lines(new))
            file.flush()
            sync(path)
            rows += new
            kept |= {(row["id"], row["answers"]): row["scores"] for row in new}
            bar.show(start + len(asked), {"missing": sum(None in row["scores"] for row in rows)})
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["counts"])
    return {
        name: dict(zip(told, kept.get((name, _digest(told)), [0.0] * len(told)), strict=True))
        for name, told in texts.items()
    }, dict(counts)


def _digest(answers: Sequence[str]) -> str:
    return sha256(json.dumps(list(answers)).encode()).hexdigest()[:16]
