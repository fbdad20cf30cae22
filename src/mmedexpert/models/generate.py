"""Sampling with transformers: an image is seen once, a prompt is read once, and both are shared by G completions.

Shapes: B prompts, G completions of each, T tokens of the longest, V vocabulary size, N rows still in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from mmedexpert.models.backbone import core_of
from mmedexpert.models.cache import RowCache, move_up
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import micro_batches, pack

BLOCK = 128  # ours: vocabulary entries summed at a time to find the one that is drawn
LEAVE = 8  # ours: finished rows leave the batch when they are one in so many
PREFILL = 16384  # ours: tokens of prompts read together
PATCHES = 16384  # ours: in one call of the vision tower, 8 images of 400,000 pixels
CACHE_BYTES = 24 * 2**30  # ours: keys and values of the rows in flight


@dataclass(frozen=True)
class Said:
    """One completion of n tokens: ids, their log-probabilities [n], and whether an end token closed it."""

    ids: list[int]
    logps: Tensor
    finished: bool


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


def _warp(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Probabilities of the sampling distribution [N, V]."""
    chances = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k:
        floor = chances.topk(min(top_k, chances.shape[-1])).values[:, -1:]
        chances = chances.masked_fill(chances < floor, 0.0)
    if top_p < 1.0:
        ordered, order = (chances / chances.sum(-1, keepdim=True)).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        chances = chances.masked_fill(drop.scatter(1, order, drop), 0.0)
    return chances / chances.sum(-1, keepdim=True) if top_k or top_p < 1.0 else chances


def _draw(chances: Tensor, chance: Tensor) -> Tensor:
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


def _chances(seeds: Sequence[int], num_generations: int, max_new_tokens: int) -> Tensor:
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
            probabilities = _warp(logits, self.temperature, self.top_p, self.top_k)
            token = _draw(probabilities, chance)
        return token, probabilities.gather(1, token[:, None]).squeeze(1).log()


class Flight:
    """The rows in flight, R at most, and what they have said; `number` is each one's among all rows."""

    def __init__(self, rows: int, tokens: int, rule: Rule, chances: Tensor | None, device: Any) -> None:
        self.rule, self.all_chances = rule, chances
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
        if self.all_chances is not None:
            self.chances[at] = self.all_chances[list(numbers)].to(at.device)
        self.say(logits, at, torch.zeros_like(at))

    def say(self, logits: Tensor, at: Any, steps: Tensor) -> None:
        """The rows at places `at` [N] say their next token; what one says that is over is not counted."""
        places = self.places[at]
        chance = self.chances[places, steps] if self.all_chances is not None else None
        token, logps = self.rule.choose(logits, chance)
        self.token[at] = token
        self.ids[places, steps], self.logps[places, steps] = token, logps
        self.lengths[at] += ~self.over[at]
        self.over[at] |= torch.isin(token, self.rule.ends)

    def leave(self, gone: Sequence[int]) -> list[tuple[int, Said]]:
        """What these rows said."""
        at = list(gone)
        ids, logps, lengths, over = (x[at].cpu() for x in (self.ids, self.logps, self.lengths, self.over))
        found = zip(at, ids.tolist(), logps, lengths.tolist(), over.tolist(), strict=True)
        return [(self.number[place], Said(i[:n], l[:n].clone(), ended)) for place, i, l, n, ended in found]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in ascending order, go on; they move up."""
        self.number = [self.number[row] for row in rows]
        for held in (self.ids, self.logps, self.chances, self.lengths, self.following, self.token, self.over):
            move_up(held, rows)


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
    chances = _chances(seeds, num_generations, max_new_tokens) if temperature else None
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
            staying = [row for row in range(n) if row not in {*gone}]
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


def generate(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    num_generations: int = 1,
    **how: Any,
) -> Completions:
    """Sample `num_generations` completions per prompt, by the prompt's seed; temperature 0 is greedy.

    The model runs in eval mode (no dropout while sampling). `logps` are those of the distribution sampled from (when
    greedy of the softmax). A row ends with a token of `end_ids` (None: the encoder's); finished rows leave the batch,
    some at a time. `banned_ids` have no chance from the start, before top-k and top-p: an image placeholder in a
    completion would ask the next forward pass for an image that is not there. The distribution is that of the allowed
    tokens, here and in the update (`packing.token_logps`). The other keywords are those of `decode`.
    """
    said: dict[int, Said] = {}
    for left in decode(model, encoder, prompts, max_new_tokens=max_new_tokens, num_generations=num_generations, **how):
        said.update(left)
    width = max((len(one.ids) for one in said.values()), default=0)
    ids = torch.full((len(said), width), encoder.pad_id)
    logps, mask = torch.zeros(len(said), width), torch.zeros(len(said), width, dtype=torch.long)
    for row, one in said.items():
        length = len(one.ids)
        ids[row, :length], logps[row, :length], mask[row, :length] = torch.tensor(one.ids), one.logps, 1
    finished = torch.tensor([said[row].finished for row in range(len(said))], dtype=torch.bool)
    device = core_of(model).device
    return Completions(ids.to(device), mask.to(device), logps.to(device), finished.to(device))
