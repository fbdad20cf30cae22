"""What hostile texts and values are drawn from: fragments that such texts are made of, and what breaks readers."""

from __future__ import annotations

import random
from typing import Any

OPTIONS = {"A": "Cyst", "B": "Mass (2 cm)", "C": "cyst", "D": "None of these"}
ODD = ["\0", "\ud800", "\udfff", "\u2028", "\u202e", "\ufeff", "\u0130", "e\u0301", "\U0001f9e0", "\r", "\x85", "  \n"]
TAGS = [
    "<think>", "</think>", "<answer>", "</answer>", "<ANSWER>", "\\boxed{", "}", "**", "```json\n", "```", "</", "<",
]  # fmt: skip
WORDS = """A B C D E (A) B. C: answer is the not no yes or and neither cyst mass none of these 2 cm because However ,
Option differential most likely probability 0.7 95% rules out therefore""".split()
LONG = [
    "<answer>", "A or ", "not ", "(", "{", "[[", "\\boxed{", "the answer is ", "cyst, ", " ", "1", "\n", "A B C D ",
    '"a":',
]  # fmt: skip
WEIRD: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), "", " ", "\0", "A", {}, [], [[]], [None], {"A": None},
]  # fmt: skip


def text(rng: random.Random, words: list[str]) -> str:
    """A text of such words; one in twenty has a run of some thousand."""
    made = [
        rng.choice(rng.choice([words, TAGS, ODD] if rng.random() < 0.5 else [words, TAGS]))
        for _ in range(rng.randrange(40))
    ]
    if rng.random() < 0.05:
        made.insert(rng.randrange(len(made) + 1), rng.choice(LONG) * rng.randrange(100, 5000))
    return rng.choice(["", " "]).join(made)


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, and some that are none."""
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(WEIRD) if rng.random() < 0.6 else text(rng, WORDS)
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(["A", "a", "", "text", "verdict"])): value(rng, depth - 1) for _ in range(rng.randrange(4))}
