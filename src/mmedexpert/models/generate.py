"""Sampling with transformers: an image is seen once, a prompt is read once, and both are shared by G completions.

Shapes: B prompts, G completions of each, T tokens of the longest, V vocabulary size, N rows still in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from mmedexpert.models.backbone import core_of
from mmedexpert.models.cache import RowCache
from mmedexpert.models.encode import PATCHES, Encoder, Prompt
from mmedexpert.models.flight import Flight, Rule, Said, uniform
from mmedexpert.models.packing import micro_batches, pack

LEAVE = 8  # ours: finished rows leave the batch when they are one in so many
PREFILL = 16384  # ours: tokens of prompts read together
CACHE_BYTES = 24 * 2**30  # ours: keys and values of the rows in flight


@dataclass(frozen=True)
class Completions:
    """Sampled completions of B prompts with G each, row b*G+g: ids and logps [B*G, T], mask [B*G, T] (1 up to and with
    the end token), `finished` [B*G] false where the length limit cut a completion off."""

    ids: Tensor
    mask: Tensor
    logps: Tensor
    finished: Tensor

    def rows(self) -> list[list[int]]:
        """The ids of each completion without padding."""
        return [ids[: int(n)].tolist() for ids, n in zip(self.ids, self.mask.sum(1), strict=True)]


def prefill(model: Any, encoder: Encoder, prompts: Sequence[Prompt]) -> tuple[Cache, list[Tensor], Tensor, Tensor]:
    """Read prompts, each shared token once: keys and values of the packed row and each prompt's places in it, states
    [B, H] at the ends, positions [B] behind them."""
    core = core_of(model)
    packed = pack(model, encoder, prompts, [[]] * len(prompts))
    cache = DynamicCache(config=core.config.get_text_config())
    ends = torch.stack([places[-1] for places in packed.prompts])
    last = core.model(**packed.inputs, scored=ends, past_key_values=cache, use_cache=True).last_hidden_state[0]
    return cache, packed.prompts, last, packed.following


def parts(encoder: Encoder, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompts in packed rows of at most PREFILL tokens, or of one longer prompt: what memory reading takes."""
    if sum(len(prompt.input_ids) for prompt in prompts) <= PREFILL:
        return [[*range(len(prompts))]]
    return [sorted(part) for part in micro_batches(encoder, prompts, [[]] * len(prompts), PREFILL)]


def fitting(core: Any, prompts: int, longest: int, new_tokens: int) -> int:
    """How many rows' keys and values fit into CACHE_BYTES, at least one, where their prompts are `prompts` at most."""
    text = core.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = CACHE_BYTES // (2 * text.num_hidden_layers * text.num_key_value_heads * size * core.dtype.itemsize)
    return max(1, tokens // (longest + new_tokens), (tokens - prompts * longest) // new_tokens)


class Reader:
    """Reads prompts into a cache when a row is to continue them; keeps the state behind each."""

    def __init__(self, model: Any, encoder: Encoder, prompts: Sequence[Prompt], cache: RowCache) -> None:
        self.model, self.encoder, self.prompts, self.cache = model, encoder, prompts, cache
        self.behind: dict[int, tuple[Tensor, Tensor]] = {}  # by prompt in a slot: state [H] at its end, next position

    def read(self, wanted: Sequence[int], staying: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Logits [N, V], positions [N] and slots [N] of rows that continue the prompts `wanted` [N]."""
        owner, new = self.cache.slots(wanted, staying)
        for part in parts(self.encoder, [self.prompts[number] for number in new]) if new else ():
            numbers = [new[place] for place in part]
            prompts = [self.prompts[number] for number in numbers]
            self.encoder.encode_images(core_of(self.model), prompts, patches_together=PATCHES)
            packed, places, last, following = prefill(self.model, self.encoder, prompts)
            self.cache.read(numbers, packed, places)
            self.behind |= zip(numbers, zip(last, following, strict=True), strict=True)
        self.behind = {number: self.behind[number] for number in self.cache.held if number is not None}
        distinct = [*dict.fromkeys(wanted)]
        states, after = (torch.stack(column) for column in zip(*map(self.behind.__getitem__, distinct), strict=True))
        of = [distinct.index(number) for number in wanted]
        return core_of(self.model).lm_head(states).float()[of], after[of], owner


@torch.no_grad()
def decode(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    num_generations: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    end_ids: Sequence[int] | None = None,
    banned_ids: Sequence[int] = (),
    seeds: Sequence[int] = (),
    rows: int | None = None,
) -> Iterator[list[tuple[int, Said]]]:
    """As `generate`, row by row: the rows b*G+g that have left, as soon as they have.

    At most `rows` are in flight (None: all; never more than memory is meant to hold, `fitting`), and those that wait
    take the places of those that leave, in the order of the prompts.
    """
    if temperature and len(seeds) != len(prompts):
        raise ValueError(f"sampling needs a seed for each of {len(prompts)} prompts, got {len(seeds)}")
    total = len(prompts) * num_generations
    if not total:
        return
    core, device = core_of(model), core_of(model).device
    longest = max(len(prompt.input_ids) for prompt in prompts)
    rows = min(total, rows or total, fitting(core, len(prompts), longest, max_new_tokens))
    # drawn at once: what a row says does not depend on its company, nor on who is still in the batch
    chances = uniform(seeds, num_generations, max_new_tokens) if temperature else None
    ends, banned = (
        torch.tensor(list(ids), dtype=torch.long, device=device)
        for ids in (encoder.end_ids if end_ids is None else end_ids, banned_ids)
    )
    flight = Flight(rows, max_new_tokens, Rule(temperature, top_p, top_k, ends, banned), chances, device)
    cache = RowCache(
        core.config.get_text_config(), rows=rows, prompts=min(rows, len(prompts)), longest=longest,
        new_tokens=max_new_tokens, device=device,
    )  # fmt: skip
    reader = Reader(model, encoder, prompts, cache)
    waiting = 0  # the first row that waits
    was_training = model.training
    model.eval()
    try:
        while True:
            n = len(cache)
            if n and int(flight.over[:n].sum()) * LEAVE < n and cache.oldest < max_new_tokens:
                token, where = flight.token[:n], flight.following[:n] + cache.steps[:n]
                hidden = core.model.language_model(
                    inputs_embeds=core.get_input_embeddings()(token[:, None]),
                    position_ids=where.view(1, -1, 1).expand(3, -1, 1),
                    past_key_values=cache,
                    use_cache=True,
                    prefix=cache.advance(),
                ).last_hidden_state
                flight.say(core.lm_head(hidden[:, -1]).float(), slice(n), cache.steps[:n])
                continue
            over = flight.over[:n].tolist()
            gone = [row for row in range(n) if over[row] or cache.said(row) == max_new_tokens]
            if gone:
                yield flight.leave(gone)
            staying = sorted({*range(n)}.difference(gone))
            fresh = range(waiting, min(total, waiting + rows - len(staying)))
            if len(fresh) < len(gone):
                flight.keep(staying)
                cache.keep(staying)
                gone, staying = [], [*range(len(staying))]
            if fresh:
                waiting = fresh.stop
                logits, following, owner = reader.read([row // num_generations for row in fresh], staying)
                places = [*gone, *range(len(staying) + len(gone), rows)][: len(fresh)]
                cache.admit(places, owner)
                flight.begin(places, fresh, logits, following)
            elif not staying:
                return
    finally:
        model.train(was_training)


def generate(model: Any, encoder: Encoder, prompts: Sequence[Prompt], **how: Any) -> Completions:
    """Sample `num_generations` completions per prompt, by the prompt's seed; temperature 0 is greedy.

    The model runs in eval mode (no dropout while sampling). `logps` are those of the distribution sampled from (when
    greedy of the softmax). A row ends with a token of `end_ids` (None: the encoder's); finished rows leave the batch,
    some at a time. `banned_ids` have no chance from the start, before top-k and top-p: an image placeholder in a
    completion would ask the next forward pass for an image that is not there. The distribution is that of the allowed
    tokens, here and in the update (`packing.token_logps`). Keywords are those of `decode`.
    """
    said = {row: one for left in decode(model, encoder, prompts, **how) for row, one in left}
    width = max((len(one.ids) for one in said.values()), default=0)
    ids = torch.full((len(said), width), encoder.pad_id)
    logps, mask = torch.zeros(len(said), width), torch.zeros(len(said), width, dtype=torch.long)
    for row, one in said.items():
        length = len(one.ids)
        ids[row, :length], logps[row, :length], mask[row, :length] = torch.tensor(one.ids), one.logps, 1
    finished = torch.tensor([said[row].finished for row in range(len(said))], dtype=torch.bool)
    device = core_of(model).device
    return Completions(ids.to(device), mask.to(device), logps.to(device), finished.to(device))
