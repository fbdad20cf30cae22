"""How good each of several answers to one question is, by a judge: what a reward and the best of n are chosen by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Group:
    """A question and its answers, which are compared with each other alone. `id` names it in errors."""

    id: str
    question: str
    images: tuple[Path, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """`values`: a number for each answer of each group, higher is better, comparable within a group alone; NaN where
    the judge failed, which is never a bad answer. `counts`: calls, cached, tokens, prompt_tokens, seconds, judged and
    missing (answers), which add up over batches and ranks."""

    values: list[list[float]]
    counts: dict[str, float]


Scorer = Callable[[Sequence[Group]], Scores]
