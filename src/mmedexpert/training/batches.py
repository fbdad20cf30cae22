"""What a step trains on, and its seed: any step can be made again, by any of several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from mmedexpert.models.encode import Prompt

Stream = Callable[[int], Iterator[Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Samples:
    """The prompts of one optimiser step and their completions; `scored` says which tokens count (None: all)."""

    prompts: Sequence[Prompt]
    completions: Sequence[Sequence[int]]
    scored: Sequence[Sequence[bool]] | None = None


@dataclass(frozen=True)
class Preferences:
    """The pairs of one optimiser step: P prompts and two continuations (token ids) of each.

    `labels` [P, D]: the chance that the first is the better one in a dimension (1, 0, 0.5 for a tie), NaN where nobody
    said; None where the first is the better one.
    """

    prompts: Sequence[Prompt]
    first: Sequence[Sequence[int]]
    second: Sequence[Sequence[int]]
    labels: Tensor | None = None

    def rows(self, places: Sequence[int]) -> tuple[list[Prompt], list[Sequence[int]]]:
        """Prompts and continuations of some pairs, first and second in turn: [2P]."""
        return (
            [self.prompts[place] for place in places for _ in range(2)],
            [words for place in places for words in (self.first[place], self.second[place])],
        )


def step_seed(seed: int, step: int, *place: int) -> int:
    """A 63-bit seed for one step of one run, or for one place in it."""
    return int(np.random.SeedSequence([seed, step, *place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_indices(size: int, batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """Endless batches of shuffled indices, epoch after epoch, from batch number `start` on; the same for one seed."""
    position = start * batch_size
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            epoch, offset = divmod(position, size)
            order = np.random.default_rng([seed, epoch]).permutation(size)
            taken = order[offset : offset + batch_size - len(batch)]
            batch += taken.tolist()
            position += len(taken)
        yield batch


def share(items: Sequence[Item], rank: int, ranks: int) -> Sequence[Item]:
    """The part of a batch that a rank works on: parts follow each other and differ by one item at most."""
    return items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]
