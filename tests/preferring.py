"""A folder in the layout of Med-RewardBench, drawn here, and a judge whose replies are scripted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmedexpert.data.pairs import DIMENSIONS, Pair
from mmedexpert.engines.asking import Ask, Reply

LABELS = dict.fromkeys(DIMENSIONS, "A")


def pair(number: int = 0, **changes) -> Pair:
    values = {
        "id": f"p{number}", "images": (f"{number}.png",), "question": f"What is shown in {number}?",
        "answers": {"A": f"A large heart {number}.", "B": f"A normal heart, ratio 0.4 of picture {number}."},
        "labels": dict(LABELS), "group": f"{number}.png", "part": "heart", "specialty": "adult_medicine",
    }  # fmt: skip
    return Pair(**{**values, **changes})


def png(seed: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def rows_of(organ: str, count: int, first: int = 0) -> tuple[list[dict], list[dict]]:
    """Labels, and the rows of the Parquet file: question i of an organ prefers A in the dimensions up to i % 7."""
    labels, answers = [], []
    for i in range(first, first + count):
        told = {name: "A" if place < i % 7 else "B" for place, name in enumerate(DIMENSIONS)}
        labels.append({"question_id": f"{i}", "human_answer": told})
        answers.append({
            "question_id": f"{i}", "question": f"What does picture {i} of the {organ} show?",
            "image": {"bytes": png(i), "path": None}, "answer1_text": f"It shows a mass {i}.",
            "answer2_text": f"It shows no mass {i}, and it is a long answer.", "modality_type": organ,
        })  # fmt: skip
    return labels, answers


def write(root: Path, organ: str, labels: Sequence[dict], answers: Sequence[dict] | None) -> Path:
    folder = root / "data/pair_gt_all"
    (folder / "parquet").mkdir(parents=True, exist_ok=True)
    (folder / f"{organ}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    if answers is not None:
        pq.write_table(pa.Table.from_pylist(list(answers)), folder / "parquet" / f"{organ}.parquet")
    return root


def benchmark(root: Path, **counts: int) -> Path:
    """A whole folder: so many pairs of each organ."""
    first = 0
    for organ, count in (counts or {"brain": 4, "heart": 5}).items():
        write(root, organ, *rows_of(organ, count, first))
        first += count
    return root


class Judge:
    """An engine that replies by a function of the question; `asked` are all questions so far."""

    def __init__(self, reply: Callable[[Ask], str | Reply]) -> None:
        self.reply, self.asked = reply, list[Ask]()

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        for place, ask in enumerate(asks):
            self.asked.append(ask)
            text = self.reply(ask)
            yield place, text if isinstance(text, Reply) else Reply(text, 5, "stop", 0.1, None)


def verdict(letter: str, names: Sequence[str] = DIMENSIONS) -> str:
    return json.dumps(dict.fromkeys(names, letter))
