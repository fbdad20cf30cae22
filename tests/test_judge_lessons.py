"""What judges are taught: every pair in both orders, replies that read as the labels, wrong ones as the contrary."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from preferring import pair

from mmedexpert.data.pairs import DIMENSIONS, ORDERS, OTHER, TIE
from mmedexpert.judging import lessons
from mmedexpert.judging.lessons import replies, reply_stream, score_stream, verdict_stream
from mmedexpert.judging.verdicts import canonical, read

ONE = {"batch_size": 4, "seed": 0, "rank": 0, "ranks": 1}


@pytest.mark.parametrize("style", ["small", "full"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_right_reply_reads_as_the_labels_and_the_wrong_one_as_the_contrary(style, order):
    labels = {"accuracy": "A", "relevance": TIE, "creativity": "B", "overall": "B"}
    one = pair(labels=labels, reason="{better} is shown, {worse} is not.")
    names = ["creativity", "accuracy", "overall", "relevance"]
    right, wrong = replies(one, order, names, style)
    for text, expected in ((right, labels), (wrong, {n: OTHER.get(v, v) for n, v in labels.items()})):
        found = read(text, names, "pairwise")
        assert found.rule == ("answer tag" if style == "small" else "json")
        said = {name: canonical(letter, order) for name, letter in found.said.items()}
        decided = {name: letter for name, letter in expected.items() if labels[name] != TIE}
        assert {name: said[name] for name in decided} == decided
    assert read(right, names, "pairwise").said["relevance"] == TIE != read(wrong, names, "pairwise").said["relevance"]
    better = "B" if order == "ab" else "A"  # overall, in the reply's own slots
    assert f"{better} is shown, {OTHER[better]} is not." in right and f"{OTHER[better]} is shown" in wrong


def test_a_reason_with_nothing_decided_is_not_written():
    right, wrong = replies(pair(labels={"overall": TIE}, reason="{better} it is"), "ab", ["overall"], "full")
    assert right == '{"overall": "tie"}' and wrong == '{"overall": "A"}'


@pytest.fixture()
def pairs(tmp_path, picture):
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
    labels = [{"accuracy": "A", "overall": "B"}, {"overall": TIE}, {"creativity": "B"}]
    answers = [{"A": f"low {number}", "B": "high"} for number in range(6)]
    return [pair(n, labels=labels[n % 3], answers=answers[n]) for n in range(6)], tmp_path


def test_every_pair_comes_in_both_orders_equally_often(tiny, pairs, monkeypatch):
    asked = []
    chat = tiny[1].chat
    monkeypatch.setattr(tiny[1], "chat", lambda text, images: (asked.append(text), chat(text, images))[1])
    given, root = pairs
    batches = list(islice(reply_stream(given, tiny[1], root, style="small", **ONE)(0), 3))  # 12 asks: one epoch
    assert Counter(text.index("low") < text.index("high") for text in asked) == {True: 6, False: 6}
    assert len(set(asked)) == 12
    assert all(right != wrong for one in batches for right, wrong in zip(one.first, one.second, strict=True))
    alone = next(iter(verdict_stream(given, tiny[1], root, style="small", **ONE)(0)))
    assert alone.completions == batches[0].first


def test_ranks_share_a_batch(tiny, pairs):
    given, root = pairs
    whole = next(iter(score_stream(given, tiny[1], root, **ONE)(0)))
    parts = [next(iter(score_stream(given, tiny[1], root, **{**ONE, "rank": r, "ranks": 2})(0))) for r in range(2)]
    assert [*parts[0].first, *parts[1].first] == whole.first
    torch.testing.assert_close(torch.cat([one.labels for one in parts]), whole.labels, equal_nan=True)


def test_labels_of_a_reward_model(tiny, pairs):
    given, root = pairs
    chances = {name: [] for name in DIMENSIONS}
    for batch in islice(score_stream(given, tiny[1], root, **{**ONE, "batch_size": 6})(0), 1):
        for column, name in enumerate(DIMENSIONS):
            chances[name] = sorted(batch.labels[:, column].nan_to_num(9).tolist())
    assert chances["accuracy"] == [1.0, 1.0, 9, 9, 9, 9] and chances["overall"] == [0.0, 0.0, 0.5, 0.5, 9, 9]
    assert chances["creativity"] == [0.0, 0.0, 9, 9, 9, 9] and chances["relevance"] == [9.0] * 6


def test_a_looping_answer_is_cut(tiny):
    assert len(lessons.answer_of(tiny[1], "so " * 9000)) == len(lessons.answer_of(tiny[1], "so " * 2667))
