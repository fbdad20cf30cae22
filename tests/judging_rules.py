"""Reference outputs of the rules by which judges are asked, read and counted (tests/test_versions.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from preferring import pair, png, rows_of, verdict, write

from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.data.records import plain
from mmedexpert.judging import verdicts
from mmedexpert.judging.ask import controlled
from mmedexpert.judging.controls import CONTROLS
from mmedexpert.judging.numbers import numbers_of
from mmedexpert.judging.prompts import ask_of
from mmedexpert.sources import med_rewardbench, multimodal_rewardbench, preference_pairs, vl_rewardbench
from mmedexpert.sources.phantom import phantom_pairs

REPLIES = [
    verdict("A"), f"So: {verdict('b')}!", verdict("tie"), json.dumps({"accuracy": "A"}), "[[B]]", "a better one", "",
    "\n".join(f"{name}: A" for name in DIMENSIONS), f"{verdict('A')}{verdict('B')}", "A and B", verdict("A")[:50],
]  # fmt: skip


def asked(protocol: str) -> Any:
    found = [
        ask_of(pair(number), order, Path("images"), protocol=protocol, ties=number == 1, seed=number, blind=number == 2)
        for number in range(3)
        for order in ("ab", "ba")
    ]
    read = [verdicts.read(text, DIMENSIONS, protocol) for text in REPLIES]
    return [[[ask.text, ask.format, list(names)] for ask, names in found], [[one.said, one.rule] for one in read]]


def published(folder: Path) -> Any:
    labels, answers = rows_of("eye", 4)
    labels[3]["human_answer"]["overall"] = "C"
    records, _, bad = med_rewardbench.load(write(folder / "root", "eye", labels, answers), folder / "out")
    return [asked("med_rewardbench"), [json.loads(json.dumps(plain(one))) for one in records], sorted(bad)]


def own(folder: Path) -> Any:
    rows = [
        {"id": "a", "question": "q", "answer_a": "x", "answer_b": "y", "labels": {"overall": "tie"}, "images": "1.png"},
        {"id": "b", "question": "q", "answer_a": "y", "answer_b": "x", "labels": {"overall": "tie"}, "images": "1.png"},
        {"id": "c", "question": "r", "answer_a": "x", "answer_b": "y", "labels": {"accuracy": "B"}, "organ": "eye"},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _, bad = preference_pairs.load(folder, folder / "out")
    return [[json.loads(json.dumps(plain(one))) for one in records], bad]


def chosen(_: Path) -> Any:
    pairs = [pair(number) for number in range(3)] + [pair(4, answers={"A": "one", "B": "two"})]
    return {n: [r["verdicts"] for r in controlled(n, pairs, protocol="pairwise", seed=1)] for n in CONTROLS}


def counted(_: Path) -> Any:
    pairs = [
        pair(n, part="eye" if n % 2 else "heart", labels=dict.fromkeys(DIMENSIONS, "ABA"[n % 3])) for n in range(7)
    ]
    return [
        numbers_of(pairs, controlled(name, pairs, protocol=protocol, seed=1), num_resamples=100, seed=0)
        for name in ("random", "longer_answer")
        for protocol in ("pairwise", "med_rewardbench")
    ]


def vl(folder: Path) -> Any:
    row = {"query": "What?", "image": {"bytes": png(1), "path": None}, "response": ["one", "two"]}
    rows = [
        {**row, "id": "wildvision-1", "human_ranking": [0, 1]},
        {**row, "id": "RLAIF-V-1", "human_ranking": [1, 0], "query": "Which?"},
        {**row, "id": "RLAIF-V-1", "human_ranking": [1, 0], "query": "Where?"},
        {**row, "id": "mathverse-1", "human_ranking": [0, 0]},
        {**row, "id": "mathverse-2", "human_ranking": [0, 1], "query": "How many?"},
    ]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    return read(vl_rewardbench.load, folder)


def multimodal(folder: Path) -> Any:
    row = {"Image": "x.png", "Text": "What?", "Output1": "one", "Output2": "two", "Better": "Output2"}
    rows = [
        {**row, "ID": "pairs_1", "Category": "safety"}, {**row, "ID": "tox_1", "Category": "safety", "Text": "b"},
        {**row, "ID": "math_1", "Category": "reasoning", "Text": "c", "Better": "Output1"},
        {**row, "ID": "code_1", "Category": "reasoning", "Text": "d"},
        {**row, "ID": "v", "Category": "vqa", "Better": "?"},
        {**row, "ID": "w", "Category": "vqa", "Text": "e", "Output1": ""},
    ]  # fmt: skip
    (folder / "all_data.json").write_text(json.dumps(rows))
    return read(multimodal_rewardbench.load, folder)


def read(load: Callable[..., Any], folder: Path) -> Any:
    records, _, bad = load(folder, folder / "out")
    return [[json.loads(json.dumps(plain(one))) for one in records], sorted(bad)]


JUDGING: dict[str, Callable[[Path], Any]] = {
    "pairwise": lambda _: asked("pairwise"), "med_rewardbench": published, "preference_pairs": own,
    "phantom_pairs": partial(read, partial(phantom_pairs.load, count=20)), "vl_rewardbench": vl,
    "multimodal_rewardbench": multimodal, "judge_controls": chosen, "pair_numbers": counted,
}  # fmt: skip
