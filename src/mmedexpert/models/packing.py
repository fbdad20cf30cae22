"""Prompts that share beginnings, and their completions, as one row of tokens without padding.

One mechanism for three uses: the prefill of a sampler (one image and question under four instructions), the group
update `[prompt | c1 | .. | cG]`, and supervised samples `[image | q1 a1 | q2 a2 | ..]`. A token is read once, however
many completions continue it; positions restart after the shared part; attention follows the tree (attention.py).

Shapes: N rows (a prompt with its completion), P tokens of a prompt, T of the longest completion, L of the packed row,
S of all completions together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmedexpert.models.attention import Tree, enable
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Batch, EncodedImage, Encoder, Prompt
from mmedexpert.models.logps import selected_logps

MIN_SHARED = 16  # ours: a shorter common beginning is read again, for a call of the attention costs more
_OWN = 2**40  # keys above every token id


@dataclass(frozen=True)
class Pack:
    """One row of L tokens: `inputs` for `core.model(**inputs)`, with the tree its attention follows.

    `prompts`: the places [P] of each row's prompt; `following` [N]: the position behind it. For the S tokens of all
    completions, row after row: `at` [S] the places whose hidden states predict them, `targets` [S] their ids, `rows`
    and `columns` [S] where they stand in a matrix [N, T].
    """

    inputs: Batch
    prompts: list[Tensor]
    following: Tensor
    at: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor

    def matrix(self, values: Tensor, width: int) -> Tensor:
        """Values [S] of the completion tokens as [N, width], 0 where a completion has no token."""
        return values.new_zeros(len(self.prompts), width).index_put((self.rows, self.columns), values)


@dataclass(eq=False)
class _Node:
    """Tokens `begin` to `end` of row `row` and of all rows that share them; `children` go on from there."""

    row: int
    begin: int
    end: int
    parent: _Node | None = None
    children: list[_Node] = field(default_factory=list)
    number: int = -1
    first: int = -1  # the place of its first token

    def places(self) -> list[int]:
        """The places of the tokens of its ancestors and its own."""
        before = self.parent.places() if self.parent else []
        return [*before, *range(self.first, self.first + self.end - self.begin)]


def pack(model: Any, encoder: Encoder, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> Pack:
    """Prompts, and for each a completion (empty for a prompt alone), as one row that holds each shared token once.

    The model is set to attend by trees. Positions are its own three-dimensional ones (M-RoPE, arXiv 2409.12191, 2.1).
    The last token of a completion predicts nothing and is not read.
    """
    core = core_of(model)
    enable(core)
    ids = [[*prompt.input_ids, *words[:-1]] for prompt, words in zip(prompts, completions, strict=True)]
    located = {id(prompt): positions(core, encoder, prompt) for prompt in {id(p): p for p in prompts}.values()}
    # no completion shares a token with another: what the policy said is read as often as it was said
    unique = itertools.count(_OWN)
    keys = [
        np.concatenate([key, np.fromiter(unique, key.dtype, len(tokens) - len(key))])
        for key, tokens in zip(token_keys(prompts, encoder), ids, strict=True)
    ]
    leaves: dict[int, _Node] = {}
    nodes = list(_rows_of_tree(_grow(keys, list(range(len(keys))), 0, None, leaves)))
    chains = [torch.tensor(leaves[row].places()) for row in range(len(keys))]
    lengths = torch.tensor([len(words) for words in completions])
    before = [len(prompt.input_ids) for prompt in prompts]
    device = core.device
    where = torch.cat([_between(*located[id(prompts[n.row])], n) for n in nodes], dim=1)
    inputs: Batch = {
        "input_ids": torch.tensor([[token for n in nodes for token in ids[n.row][n.begin : n.end]]], device=device),
        "position_ids": where[:, None].to(device),
        "tree": Tree([n.end - n.begin for n in nodes], [n.parent.number if n.parent else -1 for n in nodes], device),
        **encoder.image_inputs([image for n in nodes for image in _images(prompts[n.row], encoder, n)], device),
    }  # fmt: skip
    return Pack(
        inputs,
        [chain[:length].to(device) for chain, length in zip(chains, before, strict=True)],
        torch.tensor([located[id(prompt)][1] for prompt in prompts], device=device),
        torch.cat([c[n - 1 : n - 1 + k] for c, n, k in zip(chains, before, lengths.tolist(), strict=True)]).to(device),
        torch.tensor([token for words in completions for token in words], dtype=torch.long, device=device),
        torch.arange(len(keys)).repeat_interleave(lengths).to(device),
        torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device),
    )


def token_logps(
    model: Any,
    packed: Pack,
    temperature: float = 1.0,
    counted: Tensor | None = None,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and whether it is the likeliest, of each completion token of a pack: three [S].

    `counted` [S] bool keeps some tokens alone. Only hidden states of these go through the vocabulary projection.
    `banned_ids` have no chance: those of the sampler, so that the update's distribution is the one sampled from.
    """
    core = core_of(model)
    at, targets = (packed.at, packed.targets) if counted is None else (packed.at[counted], packed.targets[counted])
    hidden = core.model(**packed.inputs, scored=at, use_cache=False).last_hidden_state[0]
    return selected_logps(hidden, core.lm_head.weight, targets, temperature, banned_ids=banned_ids)


def positions(core: Any, encoder: Encoder, prompt: Prompt) -> tuple[Tensor, int]:
    """The M-RoPE positions [3, P] of a prompt's tokens, and the position of what follows it."""
    ids = torch.tensor([prompt.input_ids])
    grids = torch.stack([image.grid for image in prompt.images]) if prompt.images else None
    kinds = (ids == encoder.image_token_id).int()  # without these transformers falls back to 1-D positions in silence
    found, _ = core.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    return found[:, 0], int(found.max()) + 1


def token_keys(prompts: Sequence[Prompt], encoder: Encoder) -> list[np.ndarray]:
    """Each prompt's tokens [P], where those of an image are a negative number of that image's own."""
    numbers: dict[int, int] = {}
    keys = []
    for prompt in prompts:
        key = np.array(prompt.input_ids)
        names = [-1 - numbers.setdefault(id(image), len(numbers)) for image in prompt.images]
        sizes = [encoder.image_tokens(image) for image in prompt.images]
        key[key == encoder.image_token_id] = np.repeat(np.array(names, dtype=key.dtype), sizes)
        keys.append(key)
    return keys


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    short = min(len(one), len(other))
    if not short or one[0] != other[0]:
        return 0
    differ = np.flatnonzero(one[:short] != other[:short])
    return int(differ[0]) if len(differ) else short


def micro_batches(
    encoder: Encoder, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], max_tokens: int | None
) -> list[list[int]]:
    """Rows in packs of at most `max_tokens` tokens each (one longer row makes a pack of its own), shared ones once.

    Rows on the same images, then of the same prompt, come together; None: one pack of all.
    """
    keys = dict(zip(map(id, prompts), token_keys(prompts, encoder), strict=True))
    seen: dict[int, int] = {}
    for prompt in prompts:
        for image in prompt.images:
            seen.setdefault(id(image), len(seen))
    order = sorted(range(len(prompts)), key=lambda row: ([seen[id(image)] for image in prompts[row].images], row))
    packs: list[list[int]] = []
    room = 0
    for row in order:
        key, spoken = keys[id(prompts[row])], max(len(completions[row]) - 1, 0)
        shared = shared_length(keys[id(prompts[packs[-1][-1]])], key) if packs else 0
        cost = len(key) - (shared if shared >= MIN_SHARED else 0) + spoken
        if not packs or (max_tokens is not None and cost > room):
            packs.append([])
            cost, room = len(key) + spoken, max_tokens or 0
        packs[-1].append(row)
        room -= cost
    return packs


def _grow(
    keys: Sequence[np.ndarray], rows: list[int], depth: int, parent: _Node | None, leaves: dict[int, _Node]
) -> list[_Node]:
    """The radix tree of rows that agree up to `depth`; `leaves` gets the node at which each row ends."""
    heads: dict[bytes, list[int]] = {}  # rows with the same next tokens; short ones are alone but for their equals
    for row in rows:
        heads.setdefault(keys[row][depth : depth + MIN_SHARED].tobytes(), []).append(row)
    nodes = []
    for together in heads.values():
        first, *others = (keys[row][depth:] for row in together)
        end = depth + min([len(first), *(shared_length(first, other) for other in others)])
        node = _Node(together[0], depth, end, parent)
        leaves |= {row: node for row in together if len(keys[row]) == end}
        node.children = _grow(keys, [row for row in together if len(keys[row]) > end], end, node, leaves)
        nodes.append(node)
    return nodes


def _rows_of_tree(roots: list[_Node]) -> Iterator[_Node]:
    """The nodes level by level, siblings side by side; numbers them and gives them their places."""
    number = place = 0
    families = [roots]
    while families:
        family = families.pop(0)
        for node in family:
            node.number, node.first = number, place
            number, place = number + 1, place + node.end - node.begin
            yield node
        families += [node.children for node in family if node.children]


def _between(found: Tensor, following: int, node: _Node) -> Tensor:
    """The positions [3, n] of a node's tokens, given those of its prompt and the next."""
    spoken = torch.arange(max(node.end - found.shape[1], 0)) + following
    return torch.cat([found, spoken.expand(3, -1)], dim=1)[:, node.begin : node.end]


def _images(prompt: Prompt, encoder: Encoder, node: _Node) -> list[EncodedImage]:
    """The images whose tokens stand in a node: none is cut in two."""
    starts, place = [], 0
    for image in prompt.images:
        place = prompt.input_ids.index(encoder.image_token_id, place)
        starts.append(place)
        place += encoder.image_tokens(image)
    return [image for image, start in zip(prompt.images, starts, strict=True) if node.begin <= start < node.end]
