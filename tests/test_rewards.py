"""Outcome rewards, as the trainer and TRL call them."""

from __future__ import annotations

import pytest

from mmedexpert.errors import UserError
from mmedexpert.training.rewards import accuracy, answer_format, outcome

OPTIONS = {"A": "Normal heart", "B": "Cardiomegaly"}
GOOD = "<think>Pattern: wide heart shadow. So cardiomegaly B.</think><answer>B</answer>"
WRONG = "<think>Pattern: slim heart shadow. So normal heart A.</think><answer>A</answer>"
UNTAGGED = "The answer is B."
TEXTS = [GOOD, WRONG, UNTAGGED, ""]


def columns(texts: list[str]) -> dict[str, list]:
    return {"options": [OPTIONS] * len(texts), "answer": ["B"] * len(texts)}


def test_accuracy_reads_the_letter_or_the_text() -> None:
    assert accuracy(TEXTS, **columns(TEXTS)) == [1.0, 0.0, 1.0, 0.0]
    assert accuracy(["<answer>Cardiomegaly</answer>"], options=[OPTIONS], answer=["B"]) == [1.0]


def test_accuracy_follows_the_protocol() -> None:
    empty = {"options": [OPTIONS], "answer": ["A"]}
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
    assert accuracy([text], options=[None], answer=[gold]) == [right]


def test_errors_of_accuracy() -> None:
    with pytest.raises(ValueError, match="gold"):
        accuracy([GOOD], options=[OPTIONS], answer=["E"])
    with pytest.raises(ValueError):
        accuracy([GOOD, GOOD], options=[OPTIONS], answer=["B"])


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
    first = {"options": [OPTIONS], "answer": ["A"], "weights": {"accuracy": 1.0}}
    assert [outcome([""], **first, protocol=name)[0] for name in ("robust", "medevalkit")] == [[0.0], [1.0]]


def test_outcome_refuses_a_weight_of_no_reward() -> None:
    with pytest.raises(UserError, match=r"'length'.*accuracy, format"):
        outcome(TEXTS, **columns(TEXTS), weights={"accuracy": 1.0, "length": 0.1})
