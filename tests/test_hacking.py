"""Signs of a hacked reward: what is paid rises and accuracy does not; longer, or repeated, completions."""

from __future__ import annotations

import pytest

from mmedexpert.reporting.finals import ends
from mmedexpert.training.hacking import rows, signs


def found(**curves):
    """Each curve as two rollouts, first and last."""
    values = {"accuracy": (0.5, 0.5), "reward": (0.6, 0.6), "adherence": (0.5, 0.5), "length": (40, 40)}
    values |= {"repetition": (0.0, 0.0), **curves}
    return {key: value for name, two in values.items() for key, value in ends(name, two).items()}


def test_a_quiet_run_has_no_sign():
    assert signs(found()) == [] == signs(found(reward=(0.6, 0.61), judge=(5.0, 5.05), length=(40, 47)))


@pytest.mark.parametrize(
    ("curves", "word"),
    [
        ({"reward": (0.6, 0.7)}, "outcome reward rose by 0.100 while accuracy went by +0.000"),
        ({"adherence": (0.5, 0.6), "accuracy": (0.5, 0.4)}, "adherence rose by 0.100 while accuracy went by -0.100"),
        ({"judge": (5.0, 5.5)}, "judge's score rose by 0.500"),
        ({"length": (40, 60)}, "grew from 40 to 60 tokens"),
    ],
)
def test_what_is_paid_rises_alone(curves, word):
    (line,) = signs(found(**curves))
    assert word in line
    better = {**curves, "accuracy": (0.5, 0.6)}
    assert signs(found(**better)) == []  # it answers better, too


def test_repetition_counts_however_right_the_answers_are():
    (line,) = signs(found(repetition=(0.01, 0.2), accuracy=(0.5, 0.9)))
    assert "20% stood before" in line and "1% at the start" in line


def test_the_table_holds_what_was_watched():
    told = {row["of completions"]: row for row in rows(found(judge=(5.0, 5.5)))}
    assert told["tokens"]["last fifth"] == "40" and told["judge's score"]["first fifth"] == "5.000"
    assert "judge's score" not in {row["of completions"] for row in rows(found())}
