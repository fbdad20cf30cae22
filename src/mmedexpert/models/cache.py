"""The key-value cache of a sampler's rows in flight: allocated once, whoever comes and goes.

A prompt's keys stand in one of S slots for as long as a row continues it; what a row says stands in its place of R. Who
leaves makes room for who waits, without a copy; only where nobody waits do the others move up.

Shapes: R places and S slots, N rows and B prompts in them now, P tokens of the longest prompt, T of the longest
completion, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from mmedexpert.models.attention import Prefix


class OwnLayer(DynamicLayer):
    """One layer's keys and values of what the rows said, [R, K, T, D], each row's from column 0 on."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self.own: list[Tensor] = []  # keys and values, once the first are there

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the [N, K, 1, D] of one token a row; returns the columns written so far, [N, K, width, D]."""
        new = (key_states, value_states)
        if not self.own:
            rows, columns = self.cache.rows, self.cache.columns
            self.own = [one.new_zeros(rows, one.shape[1], columns, one.shape[-1]) for one in new]
        for held, one in zip(self.own, new, strict=True):
            held.view(-1, held.shape[-1]).index_copy_(0, self.cache.at, one.reshape(-1, one.shape[-1]))
        keys, values = (held[: len(key_states), :, : self.cache.width] for held in self.own)
        return keys, values

    def get_seq_length(self) -> int:
        """The columns in use."""
        return self.cache.width


class RowCache(Cache):
    """What `rows` rows at most, of `prompts` prompts at most, attend to: their prompts' keys and their own.

    `steps` [R]: how many tokens each row has said beside its first. `width`: of the columns that are read.
    """

    def __init__(self, config: Any, *, rows: int, prompts: int, longest: int, new_tokens: int, device: Any) -> None:
        """For a text model's `config`, prompts of at most `longest` tokens and completions of `new_tokens`."""
        self.rows, self.prompts, self.longest = rows, prompts, longest
        self.columns = max(new_tokens - 1, 1)  # the last token is not read
        self.own = [OwnLayer(self) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=[*self.own])
        self.keys: list[Tensor] = []  # of prompts, for each layer [S, K, P, D], padded on the left
        self.values: list[Tensor] = []
        self.held: list[int | None] = [None] * prompts  # which prompt is in each slot
        self.lengths = [0] * prompts  # and how long it is
        self.owner: list[int] = []  # of each row in flight the slot of its prompt
        self.began: list[int] = []  # and the clock at its first token
        self.clock = self.width = self.reach = 0
        places = torch.arange(rows, device=device)
        self.steps = torch.zeros_like(places)
        heads = config.num_key_value_heads
        self.firsts = (places[:, None] * heads + torch.arange(heads, device=device)) * self.columns
        self.hidden = torch.ones(rows, longest + self.columns, dtype=torch.bool, device=device)  # from each row
        self.seen = places * self.hidden.shape[1] + longest
        self.at = self.firsts

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def oldest(self) -> int:
        """The most tokens that a row in flight has said."""
        return self.clock - min(self.began) + 1 if self.began else 0

    def said(self, row: int) -> int:
        """How many tokens a row has said."""
        return self.clock - self.began[row] + 1

    def slots(self, wanted: Sequence[int], staying: Sequence[int]) -> tuple[list[int], list[int]]:
        """The slots of `wanted` prompts, and which of these are to be read; those that `staying` rows or wanted ones
        have keep theirs."""
        kept = {self.held[self.owner[row]] for row in staying}.union(wanted)
        free = [slot for slot, prompt in enumerate(self.held) if prompt is None or prompt not in kept]
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self.held]
        for prompt, slot in zip(new, free, strict=False):
            self.held[slot] = prompt
        return [self.held.index(prompt) for prompt in wanted], new

    def read(self, prompts: Sequence[int], packed: Cache, places: Sequence[Tensor]) -> None:
        """Take over prompts from the keys of a packed row, where `places` says which are whose."""
        slots = [self.held.index(prompt) for prompt in prompts]
        longest = max(map(len, places))
        # padding on the left; it repeats the first token and is masked
        padded = pad_sequence(list(places), batch_first=True, padding_side="left")
        for slot, tokens in zip(slots, places, strict=True):
            self.lengths[slot] = len(tokens)
        for name, held in (("keys", self.keys), ("values", self.values)):
            for number, layer in enumerate(packed.layers):
                found = getattr(layer, name)[0]
                if len(held) == number:
                    held.append(found.new_zeros(self.prompts, found.shape[0], self.longest, found.shape[-1]))
                into = held[number][:, :, self.longest - longest :]
                into[slots] = found.transpose(0, 1)[padded].transpose(1, 2)

    def admit(self, places: Sequence[int], owner: Sequence[int]) -> None:
        """Rows that have said their first token begin at these places, behind the prompts in the slots `owner`."""
        for place, slot in zip(places, owner, strict=True):
            if place == len(self.owner):
                self.owner.append(slot)
                self.began.append(self.clock)
            self.owner[place], self.began[place] = slot, self.clock
        at = torch.tensor(places, device=self.steps.device)
        lengths = torch.tensor([self.lengths[slot] for slot in owner], device=at.device)
        columns = torch.arange(self.hidden.shape[1], device=at.device)
        self.steps[at] = 0
        self.hidden[at] = (columns < self.longest - lengths[:, None]) | (columns >= self.longest)
        self.reach = max(self.lengths[slot] for slot in self.owner)
        self._group()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in ascending order, and their prompts go on; they move up."""
        slots = sorted({self.owner[row] for row in rows})
        self.owner = [slots.index(self.owner[row]) for row in rows]
        self.began = [self.began[row] for row in rows]
        empty = self.prompts - len(slots)
        self.lengths = [self.lengths[slot] for slot in slots] + [0] * empty
        self.held = [*(self.held[slot] for slot in slots), *[None] * empty]
        for held in (self.steps, self.hidden):
            move_up(held, rows)
        for layer in self.own:
            for tensor in layer.own:
                move_up(tensor[:, :, : self.width], rows)
        for tensor in (*self.keys, *self.values):
            move_up(tensor, slots)
        if rows:
            self._group()

    def _group(self) -> None:
        count, begin = max(self.owner) + 1, self.longest - self.reach
        keys, values = ([tensor[:count, :, begin:] for tensor in held] for held in (self.keys, self.values))
        self.prefix = Prefix.of(keys, values, self.owner)
        self.masked = {self.lengths[slot] for slot in self.owner} != {self.reach} or len(set(self.began)) > 1

    def advance(self) -> Prefix:
        """Make room for the token that each row said last; what is attended to before the rows' own."""
        n, self.width = len(self), self.oldest
        self.clock += 1
        steps = self.steps[:n]
        self.at = (self.firsts[:n] + steps[:, None]).flatten()
        self.hidden.view(-1).index_fill_(0, self.seen[:n] + steps, False)
        steps += 1
        if not self.masked:
            return self.prefix
        begin, end = self.longest - self.reach, self.longest + self.width
        return replace(self.prefix, hidden=self.hidden[:n, None, None, begin:end])


def move_up(held: Tensor, kept: Sequence[int]) -> None:
    """Bring the rows `kept`, in ascending order, to the front of a tensor; those that stay are not copied."""
    first = next((place for place, row in enumerate(kept) if place != row), len(kept))
    if first < len(kept):
        held[first : len(kept)] = held[list(kept[first:])]
