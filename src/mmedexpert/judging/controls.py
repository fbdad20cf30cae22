"""Judges that need no model, which every other has to pass: always first, at random, the longer, our rubrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

from mmedexpert.data.pairs import OTHER, TIE, A, B, Order, Pair
from mmedexpert.guidelines.rubrics import grades

Control = Callable[[Pair, Order, str, int], str]


def always_first(pair: Pair, order: Order, dimension: str, seed: int) -> str:
    """The answer that stands first."""
    return A if order == "ab" else B


def at_random(pair: Pair, order: Order, dimension: str, seed: int) -> str:
    """By a hash of all that it is told: each order and dimension anew."""
    told = hashlib.sha256(f"{seed}\0{pair.id}\0{order}\0{dimension}".encode()).digest()
    return A if told[0] % 2 else B


def longer_answer(pair: Pair, order: Order, dimension: str, seed: int) -> str:
    """The answer of more characters."""
    return _larger({letter: len(pair.answers[letter].strip()) for letter in OTHER})


def rubrics(pair: Pair, order: Order, dimension: str, seed: int) -> str:
    """The answer that follows the four perspectives more, by the mean of our rubrics.  # ours"""
    return _larger({letter: _followed(pair.answers[letter]) for letter in OTHER})


@lru_cache  # both orders and every dimension ask of the same two texts
def _followed(text: str) -> float:
    scores = grades(text, None).scores
    return sum(scores.values()) / len(scores)


def _larger(found: dict[str, float] | dict[str, int]) -> str:
    return TIE if found[A] == found[B] else A if found[A] > found[B] else B


CONTROLS: dict[str, Control] = {
    "always_first": always_first, "random": at_random, "longer_answer": longer_answer, "rubrics": rubrics,
}  # fmt: skip
