"""Sampling with transformers: one vision encode and one prefill per prompt, shared by its G completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mmedexpert.data.encode import Batch

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
        # rows that were repeated or taken out are in a tensor of their own
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


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its layers keep their adapters)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def positions(core: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """M-RoPE positions [3, B, P] and the next text position of each row [B] (Qwen2-VL, section 2.1)."""
    position_ids, _ = core.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )
    following = position_ids.masked_fill(batch["attention_mask"] == 0, -1).amax(dim=(0, 2)) + 1
    return position_ids, following


def _warp(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities of the sampling distribution [N, V]."""
    logps = torch.log_softmax(logits / temperature, dim=-1)
    if top_k:
        floor = logps.topk(min(top_k, logps.shape[-1])).values[:, -1:]
        logps = logps.masked_fill(logps < floor, -torch.inf)
    if top_p < 1.0:
        ordered, order = logps.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        logps = logps.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.log_softmax(logps, dim=-1) if top_k or top_p < 1.0 else logps


@torch.no_grad()
def generate(
    model: Any,
    batch: Batch,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    num_generations: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    banned_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Completions:
    """Sample `num_generations` completions per left-padded prompt; temperature 0 is greedy.

    The model runs in eval mode (no dropout while sampling). `logps` are those of the distribution sampled from (of the
    plain softmax when greedy). Finished rows leave the batch, some at a time. `banned_ids` are never chosen: an image
    placeholder in a completion would ask the next forward pass for an image that is not there.
    """
    core = core_of(model)
    was_training = model.training
    model.eval()
    device = batch["input_ids"].device
    position_ids, following = positions(core, batch)
    cache = Cache(layers=[RoomyLayer() for _ in range(core.config.get_text_config().num_hidden_layers)])
    hidden = core.model(**batch, position_ids=position_ids, past_key_values=cache, use_cache=True).last_hidden_state
    logits = core.lm_head(hidden[:, -1]).float().repeat_interleave(num_generations, dim=0)
    cache.batch_repeat_interleave(num_generations)
    attention = batch["attention_mask"].repeat_interleave(num_generations, dim=0)
    following = following.repeat_interleave(num_generations)

    total = logits.shape[0]
    ids = torch.full((total, max_new_tokens), pad_id, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    lengths = torch.full((total,), max_new_tokens, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    banned = torch.tensor(list(banned_ids), dtype=torch.long, device=device)
    alive = torch.arange(total, device=device)  # rows in the batch
    over = torch.zeros(total, dtype=torch.bool, device=device)  # of these, finished
    for step in range(max_new_tokens):
        scores = _warp(logits, temperature or 1.0, top_p if temperature else 1.0, top_k if temperature else 0)
        allowed = scores.index_fill(1, banned, -torch.inf)
        if temperature:
            token = torch.multinomial(allowed.exp(), 1, generator=generator).squeeze(1)
        else:
            token = allowed.argmax(-1)
        going = ~over
        ids[alive[going], step] = token[going]
        logps[alive[going], step] = scores.gather(1, token[:, None]).squeeze(1)[going]
        ended = torch.isin(token, ends) & going
        lengths[alive[ended]] = step + 1
        finished[alive[ended]] = True
        over = over | ended
        if step + 1 == max_new_tokens or bool(over.all()):
            break
        if int(over.sum()) * LEAVE >= len(over):
            keep = (~over).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            alive, token, attention, following = alive[keep], token[keep], attention[keep], following[keep]
            over = over[keep]
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
        hidden = core.model.language_model(
            inputs_embeds=core.get_input_embeddings()(token[:, None]),
            position_ids=(following + step).view(1, -1, 1).expand(3, -1, 1),
            attention_mask=attention,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = core.lm_head(hidden[:, -1]).float()
    model.train(was_training)
    width = int(lengths.max())
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    return Completions(ids[:, :width], mask, logps[:, :width], finished)
