"""Attention over sequences that share beginnings: the one piece transformers lacks for shared prompts and packing.

Registered with transformers' attention interface under the name `prefix_tree` and set on the language model alone. A
forward pass that brings a `Tree` (keyword `tree`) attends by it, one that brings a `Prefix` (keyword `prefix`) decodes
behind shared prompts, any other goes through transformers' sdpa.

Shapes: L tokens of a packed row, S segments of it, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

NAME = "prefix_tree"
PADDING = 1.25  # ours: pairs a padded segment may read for each one of its own


@dataclass(frozen=True)
class Tree:
    """Segments of one packed row of tokens [L]; each attends to all of its ancestors and, causally, to itself.

    `lengths` [S] of the segments in the order of the row and `parents` [S], -1 for a root; children of one parent stand
    side by side, and behind their parent.
    """

    lengths: Sequence[int]
    parents: Sequence[int]
    device: torch.device

    def ancestors(self, segment: int) -> list[int]:
        """The segments before this one, from the root on."""
        parent = self.parents[segment]
        return [] if parent < 0 else [*self.ancestors(parent), parent]

    @cached_property
    def families(self) -> list[Family]:
        """Siblings of like length: padding one of them to the longest reads at most a fourth more pairs."""
        by_parent: dict[int, list[int]] = {}
        for segment, parent in enumerate(self.parents):
            by_parent.setdefault(parent, []).append(segment)
        families = []
        for siblings in by_parent.values():
            before = sum(self.lengths[s] for s in self.ancestors(siblings[0]))
            left = sorted(siblings, key=lambda s: -self.lengths[s])
            while left:
                most = self.lengths[left[0]] * (before + self.lengths[left[0]])
                alike = [s for s in left if self.lengths[s] * (before + self.lengths[s]) * PADDING >= most]
                families.append(Family(self, alike))
                left = left[len(alike) :]
        return families

    @cached_property
    def ragged(self) -> dict[str, Any]:
        """The same for a kernel of variable lengths: the places of every segment's keys, and where segments begin."""
        firsts = [0]
        for length in self.lengths:
            firsts.append(firsts[-1] + length)
        keys = [[*self.ancestors(s), s] for s in range(len(self.lengths))]
        places = [torch.arange(firsts[s], firsts[s + 1]) for chain in keys for s in chain]
        key_lengths = [sum(self.lengths[s] for s in chain) for chain in keys]
        begins = torch.tensor([0, *key_lengths]).cumsum(0)
        return {
            "places": torch.cat(places).to(self.device),
            "cu_seq_q": torch.tensor(firsts, dtype=torch.int32, device=self.device),
            "cu_seq_k": begins.to(self.device, torch.int32),
            "max_q": max(self.lengths),
            "max_k": max(key_lengths),
        }


@dataclass(frozen=True)
class Family:
    """Segments of one parent: their queries are padded to one block, their ancestors' keys stand before their own."""

    tree: Tree
    members: Sequence[int]

    @cached_property
    def chain(self) -> list[int]:
        """The segments all members continue."""
        return self.tree.ancestors(self.members[0])

    @cached_property
    def mask(self) -> Tensor | None:
        """[C, P + C]: all P places of the ancestors, and the own ones up to the query; None without ancestors."""
        before = sum(self.tree.lengths[s] for s in self.chain)
        own = max(self.tree.lengths[s] for s in self.members)
        if not before:
            return None
        return torch.ones(own, before + own, dtype=torch.bool, device=self.tree.device).tril(before)

    @cached_property
    def pieces(self) -> list[int]:
        """The lengths into which the padded block [members * C] falls: of each member, tokens and padding."""
        longest = max(self.tree.lengths[s] for s in self.members)
        return [length for s in self.members for length in (self.tree.lengths[s], longest - self.tree.lengths[s])]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of shared prompts while their completions are decoded.

    `keys`, `values`: for each layer [B, K, P, D], padded on the left; `rows` [B, G]: the batch rows of each prompt, the
    first of them repeated where a prompt has fewer; `back` [N]: where each batch row stands in the flattened `rows`.
    `full`: every prompt has G rows, one prompt's behind another's. `hidden` [N, 1, 1, P + T] is true where a row does
    not look: padding of its prompt, columns of its own that it has not written. None: nowhere.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    rows: Tensor
    back: Tensor
    full: bool
    hidden: Tensor | None = None

    @classmethod
    def of(cls, keys: Sequence[Tensor], values: Sequence[Tensor], owner: Sequence[int]) -> Prefix:
        """With the prompt of each batch row."""
        members: list[list[int]] = [[] for _ in range(len(keys[0]))]
        for row, prompt in enumerate(owner):
            members[prompt].append(row)
        group = max(map(len, members))
        # a prompt without rows sees any, and is seen by none
        rows = [own + (own[:1] or [0]) * (group - len(own)) for own in members]
        back = [prompt * group + members[prompt].index(row) for row, prompt in enumerate(owner)]
        device = keys[0].device
        return cls(
            keys, values, torch.tensor(rows, device=device), torch.tensor(back, device=device),
            full=[row for own in rows for row in own] == [*range(len(owner))],
        )  # fmt: skip

    def group(self, x: Tensor) -> Tensor:
        """Batch rows [N, K, R, D] by prompt: [B, K, G * R, D]."""
        prompts, group = self.rows.shape
        by_prompt = x.view(prompts, group, *x.shape[1:]) if self.full else x[self.rows]
        return by_prompt.transpose(1, 2).flatten(2, 3)

    def ungroup(self, x: Tensor) -> Tensor:
        """The inverse of `group`."""
        by_row = x.unflatten(2, (self.rows.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return by_row if self.full else by_row[self.back]


def enable(core: Any) -> None:
    """Let a model attend by trees and prefixes; without either its language model goes on as with sdpa.

    Its last layer learns the keyword `scored`: the places whose hidden states are asked for. Behind the last attention
    nothing reads the others, so they skip its MLP and the norm, and the output holds the scored ones alone.

    Raises:
        ValueError: the model has sliding-window attention, or vision features added behind its last layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # lazily, as models/backbone.py says
    from transformers.masking_utils import sdpa_mask

    language_model = core.model.language_model
    if language_model.config._attn_implementation == NAME:
        return
    if "sliding_attention" in (getattr(language_model.config, "layer_types", None) or []):
        raise ValueError("prefix trees are not made for sliding-window attention")
    last = language_model.layers[-1]
    if len(language_model.layers) <= len(getattr(core.config.vision_config, "deepstack_visual_indexes", None) or []):
        raise ValueError("prefix trees need a layer behind those that get vision features")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.config._attn_implementation = NAME
    last.__class__ = type(f"Scored{type(last).__name__}", (type(last),), {"forward": _scored_forward})


def _scored_forward(self: Any, hidden_states: Tensor, *, scored: Tensor | None = None, **rest: Any) -> Tensor:
    """A decoder layer of the Qwen-VL family; with `scored` [S], hidden states [1, L, H] -> [1, S, H]."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **rest)
    hidden_states = hidden_states + attended
    if scored is not None:
        hidden_states = hidden_states[:, scored]
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    prefix: Prefix | None = None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Query [B, H, L, D], key and value [B, K, L, D] -> [B, L, H, D], as transformers calls it."""
    if tree is not None:
        attend = by_kernel if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else by_family
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend(q, k, v, tree, scaling)[None], None
    if prefix is not None:
        return behind_prefix(query, key, value, prefix, module.layer_idx, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)


def by_family(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None) -> Tensor:
    """Tree attention with one dense sdpa call for siblings of like length: [L, H, D] -> [L, H, D]."""
    queries, keys, values = (x.split(list(tree.lengths)) for x in (query, key, value))
    outputs: list[Tensor] = [query] * len(queries)
    for family in tree.families:
        q, k, v = (pad_sequence([x[s] for s in family.members], batch_first=True) for x in (queries, keys, values))
        if family.chain:
            k, v = (
                torch.cat([*(x[s].expand(len(q), -1, -1, -1) for s in family.chain), own], dim=1)
                for x, own in ((keys, k), (values, v))
            )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=family.mask, is_causal=family.mask is None, scale=scaling, enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2).flatten(0, 1)  # fmt: skip
        for segment, piece in zip(family.members, out.split(family.pieces)[::2], strict=True):
            outputs[segment] = piece
    return torch.cat(outputs)


def by_kernel(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None) -> Tensor:
    """Tree attention with one call of the flash kernel for variable lengths: [L, H, D] -> [L, H, D].

    Its causal mask is aligned with the ends of queries and keys, so a segment's keys are its ancestors' and its own.
    """
    from torch.nn.attention.varlen import varlen_attn  # it imports the compiler, two seconds

    ragged = tree.ragged
    k, v = (x.index_select(0, ragged["places"]) for x in (key, value))
    lengths = {name: ragged[name] for name in ("cu_seq_q", "cu_seq_k", "max_q", "max_k")}
    gqa = query.shape[1] != key.shape[1]
    out = varlen_attn(query.contiguous(), k, v, **lengths, scale=scaling, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out


def behind_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, layer: int, scaling: float | None
) -> Tensor:
    """One decoding step: query [N, H, 1, D], own keys and values so far [N, K, T, D] -> [N, 1, H, D].

    A prompt's keys are read once for all of its rows (Hydragen, arXiv 2402.05099): as a matrix product, not G times.
    """
    n, heads, _, size = query.shape
    kinds = key.shape[1]
    q = query.view(n, kinds, heads // kinds, size) * (size**-0.5 if scaling is None else scaling)
    shared = prefix.group(q) @ prefix.keys[layer].transpose(-1, -2)  # [B, K, G * H / K, P]
    length = shared.shape[-1]
    scores = torch.cat([prefix.ungroup(shared), q @ key.transpose(-1, -2)], dim=-1)  # [N, K, H / K, P + T]
    if prefix.hidden is not None:
        scores.masked_fill_(prefix.hidden, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    ahead = prefix.ungroup(prefix.group(weights[..., :length]) @ prefix.values[layer])
    return (ahead + weights[..., length:] @ value).reshape(n, 1, heads, size)
