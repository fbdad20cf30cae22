"""Reference outputs of the rules by which judges are asked, read and counted (tests/test_versions.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from preferring import pair, png, rows_of, verdict, write

from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.data.records import plain
from mmedexpert.engines.asking import Reply
from mmedexpert.judging import lessons, scorer, verdicts
from mmedexpert.judging.ask import controlled
from mmedexpert.judging.controls import CONTROLS
from mmedexpert.judging.numbers import numbers_of
from mmedexpert.judging.prompts import ask_of
from mmedexpert.models.reward_head import RewardHead
from mmedexpert.sources import med_rewardbench, multimodal_rewardbench, preference_pairs, vl_rewardbench
from mmedexpert.sources.phantom import phantom_pairs
from mmedexpert.training.preferences import bradley_terry, dpo_loss

REPLIES = [
    verdict("A"), f"So: {verdict('b')}!", verdict("tie"), json.dumps({"accuracy": "A"}), "[[B]]", "a better one", "",
    "\n".join(f"{name}: A" for name in DIMENSIONS), f"{verdict('A')}{verdict('B')}", "A and B", verdict("A")[:50],
]  # fmt: skip


TAGGED = ["<answer>A, b, A,B,tie,A</answer>", "<think>A</think><answer>A</answer>", "<answer>A</answer> or so"]


def asked(protocol: str) -> Any:
    found = [
        ask_of(pair(number), order, Path("images"), protocol=protocol, ties=number == 1, seed=number, blind=number == 2)
        for number in range(3)
        for order in ("ab", "ba")
    ]
    replies = [*REPLIES, *(TAGGED if protocol == "pairwise" else ())]
    read = [verdicts.read(text, DIMENSIONS, protocol) for text in replies]
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


def taught(_: Path) -> Any:
    reason = {"reason": "{better} is shown, {worse} is not."}
    pairs = [pair(0, **reason), pair(1, labels={"accuracy": "tie", "overall": "B"}, **reason), pair(2)]
    return [
        lessons.replies(one, order, list(one.labels), style)
        for one in pairs for order in ("ab", "ba") for style in ("small", "full")
    ]  # fmt: skip


def preferred(_: Path) -> Any:
    values = torch.tensor([[-3.0, -9.0], [-4.0, -5.0], [-3.5, -8.0], [-3.0, -7.0]])
    return [one.tolist() for one in dpo_loss(*values, beta=0.2)]


def scored(_: Path) -> Any:
    head = RewardHead(3, DIMENSIONS)
    head.shared.data, head.own.data = torch.tensor([1.0, 0.0, -1.0]), torch.arange(18.0).view(6, 3) / 10
    found = head(torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.0, -1.0]]))
    labels = torch.tensor([[lessons.CHANCE.get(letter, float("nan")) for letter in ("A", "B", "tie", "", "A", "B")]])
    return [found.tolist(), float(bradley_terry(found[:1], found[1:], labels))]


def opinions(_: Path) -> Any:
    """By the length of an answer; one that says "no" gets no readable reply."""

    def judge(asks: Any) -> Any:
        for place, ask in enumerate(asks):
            first, second = (json.loads(line[10:]) for line in ask.text.splitlines() if line.startswith("Answer "))
            better = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "tie"
            text = "" if "no" in (first, second) else json.dumps({"accuracy": better, "overall": "tie"})
            yield place, Reply(text, 5, "stop", 0.0, None)

    groups = [scorer.Group("q", "Large?", (), answers) for answers in (("a", "bb", "ccc", "no", "a"), ("x", "yy"))]
    found = scorer.VerdictScorer(judge, name="m", where="reward.judge", style="full")(groups)
    counts = {name: value for name, value in found.counts.items() if name != "seconds"}
    values = [[None if value != value else value for value in row] for row in found.values]
    return [values, counts, scorer.SCORED_BY]


JUDGING: dict[str, Callable[[Path], Any]] = {
    "pairwise": lambda _: asked("pairwise"), "med_rewardbench": published, "preference_pairs": own,
    "phantom_pairs": partial(read, partial(phantom_pairs.load, count=20)), "vl_rewardbench": vl,
    "multimodal_rewardbench": multimodal, "judge_controls": chosen, "pair_numbers": counted,
    "judge_sft": taught, "judge_dpo": preferred, "judge_scalar": scored, "judge_scores": opinions,
}  # fmt: skip
