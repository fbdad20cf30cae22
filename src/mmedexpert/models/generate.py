"""Sampling with transformers: an image is seen once, a prompt is read once, and both are shared by G completions.

Shapes: B prompts, G completions of each, T tokens of the longest, V vocabulary size, N rows still in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmedexpert.models.attention import Prefix
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import pack

BLOCK = 128  # ours: vocabulary entries summed at a time to find the one that is drawn
ROOM = 64  # ours: tokens a cache grows by at a time
LEAVE = 8  # ours: finished rows leave the batch when they are one in so many; each leaving copies the cache


class RoomyLayer(DynamicLayer):
    """A cache layer with spare room: a token is written behind the others, where the parent copies all of them."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D] keys and values; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room: dict[str, Tensor] = {}
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        held, room = getattr(self, name), self.room.get(name)
        length = held.shape[-2] if held.numel() else 0
        end = length + new.shape[-2]
        # rows that were taken out are in a tensor of their own
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < end:
            room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            if length:
                room[..., :length, :] = held
            self.room[name] = room
        room[..., length:end, :] = new
        return room[..., :end, :]


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


def prefill(model: Any, encoder: Encoder, prompts: Sequence[Prompt]) -> tuple[Prefix, Tensor, Tensor]:
    """Read prompts, each shared token once: keys and values, states [B, H] at the ends, positions [B] behind them."""
    core = core_of(model)
    packed = pack(model, encoder, prompts, [[]] * len(prompts))
    cache = DynamicCache(config=core.config.get_text_config())
    ends = torch.stack([places[-1] for places in packed.prompts])
    last = core.model(**packed.inputs, scored=ends, past_key_values=cache, use_cache=True).last_hidden_state[0]
    longest = max(len(places) for places in packed.prompts)
    # padding on the left; it repeats the first token and is masked
    places = pad_sequence(packed.prompts, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(places) for places in packed.prompts], device=last.device)
    padding = torch.arange(longest, device=last.device) < longest - lengths[:, None]
    keys, values = (
        [getattr(layer, name)[0].transpose(0, 1)[places].transpose(1, 2).contiguous() for layer in cache.layers]
        for name in ("keys", "values")
    )
    owner = torch.arange(len(prompts), device=last.device)
    prefix = Prefix.of(keys, values, padding if bool(padding.any()) else None, owner)
    return prefix, last, packed.following


def _chances(seeds: Sequence[int], num_generations: int, max_new_tokens: int) -> Tensor:
    """Uniform numbers [prompts * num_generations, max_new_tokens], each prompt's by its seed."""
    drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [torch.rand(num_generations, max_new_tokens, generator=one, dtype=torch.float64) for one in drawn]
    return torch.cat(rows)


@torch.no_grad()
def generate(
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
) -> Completions:
    """Sample `num_generations` completions per prompt, by the prompt's seed; temperature 0 is greedy.

    The model runs in eval mode (no dropout while sampling). `logps` are those of the distribution sampled from (when
    greedy of the softmax). A row ends with a token of `end_ids` (None: the encoder's); finished rows leave the batch,
    some at a time. `banned_ids` have no chance from the start, before top-k and top-p: an image placeholder in a
    completion would ask the next forward pass for an image that is not there. The distribution is that of the allowed
    tokens, here and in the update (`packing.token_logps`).
    """
    if temperature and len(seeds) != len(prompts):
        raise ValueError(f"sampling needs a seed for each of {len(prompts)} prompts, got {len(seeds)}")
    core = core_of(model)
    was_training = model.training
    model.eval()
    prefix, last, following = prefill(model, encoder, prompts)
    device = last.device
    owner = torch.arange(len(prompts), device=device).repeat_interleave(num_generations)
    logits = core.lm_head(last).float()[owner]
    following = following[owner]
    prefix = prefix.keep(owner)
    cache = Cache(layers=[RoomyLayer() for _ in range(core.config.get_text_config().num_hidden_layers)])

    total = len(owner)
    ids = torch.full((total, max_new_tokens), encoder.pad_id, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    lengths = torch.full((total,), max_new_tokens, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    ends = torch.tensor(list(encoder.end_ids if end_ids is None else end_ids), dtype=torch.long, device=device)
    banned = torch.tensor(list(banned_ids), dtype=torch.long, device=device)
    # drawn at once: what a row says does not depend on its company, nor on who is still in the batch
    chances = _chances(seeds, num_generations, max_new_tokens).to(device) if temperature else None
    alive = torch.arange(total, device=device)  # rows in the batch
    over = torch.zeros(total, dtype=torch.bool, device=device)  # of these, finished
    for step in range(max_new_tokens):
        logits = logits.index_fill_(1, banned, -torch.inf)
        probabilities = _warp(logits, temperature or 1.0, top_p if temperature else 1.0, top_k if temperature else 0)
        token = probabilities.argmax(-1) if chances is None else _draw(probabilities, chances[alive, step])
        going = ~over
        ids[alive[going], step] = token[going]
        logps[alive[going], step] = probabilities.gather(1, token[:, None]).squeeze(1).log()[going]
        ended = torch.isin(token, ends) & going
        lengths[alive[ended]] = step + 1
        finished[alive[ended]] = True
        over = over | ended
        if step + 1 == max_new_tokens or bool(over.all()):
            break
        if int(over.sum()) * LEAVE >= len(over):
            keep = (~over).nonzero().squeeze(1)
            if step:
                cache.batch_select_indices(keep)
            alive, token, owner, following, over = alive[keep], token[keep], owner[keep], following[keep], over[keep]
            prefix = prefix.keep(owner)
        hidden = core.model.language_model(
            inputs_embeds=core.get_input_embeddings()(token[:, None]),
            position_ids=(following + step).view(1, -1, 1).expand(3, -1, 1),
            past_key_values=cache,
            use_cache=True,
            prefix=prefix,
        ).last_hidden_state
        logits = core.lm_head(hidden[:, -1]).float()
    model.train(was_training)
    width = int(lengths.max())
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    return Completions(ids[:, :width], mask, logps[:, :width], finished)
