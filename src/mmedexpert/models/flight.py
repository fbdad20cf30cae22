"""The rows that a sampler has in flight, and how each says its next token.

Shapes: R places, N rows in them now, T tokens of the longest completion, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmedexpert.models.cache import move_up

BLOCK = 128  # ours: vocabulary entries summed at a time to find the one that is drawn


@dataclass(frozen=True)
class Said:
    """One completion of n tokens: ids, their log-probabilities [n], and whether an end token closed it."""

    ids: list[int]
    logps: Tensor
    finished: bool


def warp(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Probabilities of the sampling distribution [N, V]: temperature, then top-k, then top-p."""
    chances = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k:
        floor = chances.topk(min(top_k, chances.shape[-1])).values[:, -1:]
        chances = chances.masked_fill(chances < floor, 0.0)
    if top_p < 1.0:
        ordered, order = (chances / chances.sum(-1, keepdim=True)).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        chances = chances.masked_fill(drop.scatter(1, order, drop), 0.0)
    return chances / chances.sum(-1, keepdim=True) if top_k or top_p < 1.0 else chances


def draw(chances: Tensor, chance: Tensor) -> Tensor:
    """The token [N] at which the cumulative probability passes `chance` [N] in [0, 1), found in two levels.

    torch.multinomial draws a number for each entry of the vocabulary, which costs more than a small model's layers.
    """
    short = -chances.shape[-1] % BLOCK
    blocks = (F.pad(chances, (0, short)) if short else chances).unflatten(-1, (-1, BLOCK))
    passed = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    wanted = chance * passed[:, -1]
    block = torch.searchsorted(passed, wanted[:, None], right=True).squeeze(1)
    rows = torch.arange(len(block), device=block.device)
    within = blocks[rows, block].cumsum(-1, dtype=torch.float64)
    before = torch.where(block > 0, passed[rows, block - 1], 0.0)
    # rounding must not lead behind the block's last token that has a chance at all
    rest = (wanted - before).clamp(max=within[:, -1].nextafter(torch.zeros_like(wanted)))
    return block * BLOCK + torch.searchsorted(within, rest[:, None], right=True).squeeze(1)


def uniform(seeds: Sequence[int], num_generations: int, max_new_tokens: int) -> Tensor:
    """Uniform numbers [prompts * num_generations, max_new_tokens], each prompt's by its seed."""
    drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [torch.rand(num_generations, max_new_tokens, generator=one, dtype=torch.float64) for one in drawn]
    return torch.cat(rows)


@dataclass(frozen=True)
class Rule:
    """How a token follows from logits [N, V]: `ends` [..] close a row, `banned` [..] have no chance."""

    temperature: float
    top_p: float
    top_k: int
    ends: Tensor
    banned: Tensor

    def choose(self, logits: Tensor, chance: Tensor | None) -> tuple[Tensor, Tensor]:
        """The token [N] drawn by `chance` [N] (None: the likeliest), and its log-probability."""
        logits = logits.index_fill_(1, self.banned, -torch.inf)
        if chance is None:
            probabilities = logits.softmax(-1)
            token = probabilities.argmax(-1)
        else:
            probabilities = warp(logits, self.temperature, self.top_p, self.top_k)
            token = draw(probabilities, chance)
        return token, probabilities.gather(1, token[:, None]).squeeze(1).log()


class Flight:
    """The rows in flight, R at most, and what they have said; `number` is each one's among all rows."""

    def __init__(self, rows: int, tokens: int, rule: Rule, chances: Tensor | None, device: Any) -> None:
        self.rule, self.drawn = rule, chances  # of all rows, None where greedy
        self.number: list[int] = []
        self.ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(rows, tokens, device=device)
        self.chances = torch.zeros(rows, tokens if chances is not None else 0, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.following, self.token = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.over = torch.zeros(rows, dtype=torch.bool, device=device)
        self.places = torch.arange(rows, device=device)

    def begin(self, places: Sequence[int], numbers: Sequence[int], logits: Tensor, following: Tensor) -> None:
        """Rows take their places and say their first token."""
        for place, number in zip(places, numbers, strict=True):
            if place == len(self.number):
                self.number.append(number)
            self.number[place] = number
        at = torch.tensor(places, device=self.over.device)
        self.following[at] = following
        self.lengths[at], self.over[at] = 0, False
        if self.drawn is not None:
            self.chances[at] = self.drawn[list(numbers)].to(at.device)
        self.say(logits, at, torch.zeros_like(at))

    def say(self, logits: Tensor, at: Any, steps: Tensor) -> None:
        """The rows at places `at` [N] say their next token; what one says that is over is not counted."""
        places = self.places[at]
        chance = self.chances[places, steps] if self.drawn is not None else None
        token, logps = self.rule.choose(logits, chance)
        self.token[at] = token
        self.ids[places, steps], self.logps[places, steps] = token, logps
        self.lengths[at] += ~self.over[at]
        self.over[at] |= torch.isin(token, self.rule.ends)

    def leave(self, gone: Sequence[int]) -> list[tuple[int, Said]]:
        """What these rows said."""
        at = list(gone)
        ids, logps, lengths, over = (x[at].cpu() for x in (self.ids, self.logps, self.lengths, self.over))
        found = zip(at, ids.tolist(), lengths.tolist(), logps, over.tolist(), strict=True)
        return [
            (self.number[place], Said(said[:n], chance[:n].clone(), ended)) for place, said, n, chance, ended in found
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in ascending order, go on; they move up."""
        self.number = [self.number[row] for row in rows]
        for held in (self.ids, self.logps, self.chances, self.lengths, self.following, self.token, self.over):
            move_up(held, rows)
