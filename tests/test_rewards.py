"""Outcome rewards, as the trainer and TRL call them."""

from __future__ import annotations

from typing import Any

import pytest

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.scoring import medevalkit, robust
from mmedexpert.training.rewards import accuracy, answer_format, outcome

OPTIONS = {"A": "Normal heart", "B": "Cardiomegaly"}
GOOD = "<think>Pattern: wide heart shadow. So cardiomegaly B.</think><answer>B</answer>"
WRONG = "<think>Pattern: slim heart shadow. So normal heart A.</think><answer>A</answer>"
UNTAGGED = "The answer is B."
TEXTS = [GOOD, WRONG, UNTAGGED, ""]


def asked(answer: str, options: dict[str, str] | None = OPTIONS, **changes: Any) -> Record:
    return Record(
        id="q", images=("q.png",), question="?", options=options, answer=answer, specialties=("adult_medicine",),
        source="s", license="CC0-1.0", split="train", image_group="q", **changes,
    )  # fmt: skip


def columns(texts: list[str]) -> dict[str, list]:
    return {"record": [asked("B")] * len(texts)}


def test_accuracy_reads_the_letter_or_the_text() -> None:
    assert accuracy(TEXTS, **columns(TEXTS)) == [1.0, 0.0, 1.0, 0.0]
    assert accuracy(["<answer>Cardiomegaly</answer>"], record=[asked("B")]) == [1.0]


def test_accuracy_follows_the_protocol() -> None:
    empty = {"record": [asked("A")]}
    assert accuracy([""], **empty) == [0.0]
    assert accuracy([""], **empty, protocol="medevalkit") == [1.0]  # its quirk: an empty response picks A


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("<think>x</think><answer>The left lung.</answer>", "left lung", 1.0),
        ("<answer>LEFT  LUNG</answer>", "Left lung", 1.0),
        ("<answer>2.5 cm</answer>", "2.5 cm", 1.0),
        ("<answer>25 cm</answer>", "2.5 cm", 0.0),
        ("<answer>no</answer> <answer>yes</answer>", "yes", 0.0),
        ("<answer>right lung</answer>", "left lung", 0.0),
        ("<answer>left lung and heart</answer>", "left lung", 0.0),
        ("left lung", "left lung", 1.0),
        ("left lung</answer>", "left lung", 1.0),
        ("<answer>left lung", "left lung", 0.0),
        ("<answer></answer>", "", 0.0),
        ("<answer>...</answer>", "?", 0.0),
    ],
)
def test_accuracy_of_open_answers(text: str, gold: str, right: float) -> None:
    assert accuracy([text], record=[asked(gold, None)]) == [right]


@pytest.mark.parametrize(
    ("text", "record", "right"),
    [
        ("<answer>Yes, there is.</answer>", asked("yes", None, kind="yes_no"), 1.0),
        ("<answer>yes or no</answer>", asked("yes", None, kind="yes_no"), 0.0),
        ("<answer>Yes</answer>", asked("Yes", None, kind="closed"), 1.0),
        ("<answer>Yes, there is.</answer>", asked("yes", None), 0.0),  # an open question: the text itself
        ("<answer>\u662f\u7684</answer>", asked("\u662f", None, kind="yes_no", language="zh"), 1.0),
        ("<answer>\u5de6\u80ba\u3002</answer>", asked("\u5de6\u80ba", None, language="zh"), 1.0),
        ("<answer>B</answer>", asked("B", {"A": "A: no", "B": "B: yes"}), 1.0),  # options that carry their own letters
    ],
)
@pytest.mark.parametrize("protocol", ["robust", "medevalkit"])
def test_what_is_paid_is_what_evaluation_calls_right(text: str, record: Record, right: float, protocol: str) -> None:
    (paid,) = accuracy([text], record=[record], protocol=protocol)
    judge = {"robust": robust.judge, "medevalkit": medevalkit.judge}[protocol]
    assert paid == judge(record, text).correct and (paid == right or protocol == "medevalkit")


def test_errors_of_accuracy() -> None:
    with pytest.raises(ValueError, match="gold"):
        accuracy([GOOD], record=[asked("E")])
    with pytest.raises(ValueError):
        accuracy([GOOD, GOOD], record=[asked("B")])


def test_rewards_take_trl_columns() -> None:
    extra = {"prompts": ["p"] * 4, "completion_ids": [[1]] * 4, "trainer_state": None}
    assert accuracy(TEXTS, **columns(TEXTS), **extra) == [1.0, 0.0, 1.0, 0.0]
    assert answer_format(TEXTS, **columns(TEXTS), **extra) == [1.0, 1.0, 0.0, 0.0]


def test_outcome_is_the_weighted_sum_of_its_parts() -> None:
    total, parts = outcome(TEXTS, **columns(TEXTS), weights={"accuracy": 1.0, "format": 0.2})
    assert parts == {"accuracy": [1.0, 0.0, 1.0, 0.0], "format": [1.0, 1.0, 0.0, 0.0]}
    assert total == pytest.approx([1.2, 0.2, 1.0, 0.0])
    only, parts = outcome(TEXTS, **columns(TEXTS), weights={"format": 3.0})
    assert only == pytest.approx([3.0, 3.0, 0.0, 0.0]) and parts["accuracy"] == [1.0, 0.0, 1.0, 0.0]
    first = {"record": [asked("A")], "weights": {"accuracy": 1.0}}
    assert [outcome([""], **first, protocol=name)[0] for name in ("robust", "medevalkit")] == [[0.0], [1.0]]


def test_outcome_refuses_a_weight_of_no_reward() -> None:
    with pytest.raises(UserError, match=r"'length'.*accuracy, format"):
        outcome(TEXTS, **columns(TEXTS), weights={"accuracy": 1.0, "length": 0.1})
