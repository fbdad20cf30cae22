"""Prompts that share beginnings, and their completions, as one row of tokens without padding.

One mechanism for three uses: the prefill of a sampler (one image and question under four instructions), the group
update `[prompt | c1 | .. | cG]`, and supervised samples `[image | q1 a1 | q2 a2 | ..]`. A token is read once, however
many completions continue it; positions restart after the shared part; attention follows the tree (attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmedexpert.attention import Tree, enable
from mmedexpert.data.encode import Batch, EncodedImage, Encoder, Prompt
from mmedexpert.losses import selected_logps
from mmedexpert.modules.backbone import core_of

MIN_SHARED = 16  # ours: a shorter common beginning is read again, for a call of the attention costs more


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
    """A segment of the row: its tokens with their positions [3, n], and what continues it."""

    ids: Sequence[int]
    positions: Tensor
    images: Sequence[EncodedImage] = ()
    children: list[_Node] = field(default_factory=list)
    parent: _Node | None = None
    number: int = -1
    first: int = -1  # the place of its first token

    def places(self) -> list[int]:
        """The places of the tokens of its ancestors and its own."""
        before = self.parent.places() if self.parent else []
        return [*before, *range(self.first, self.first + len(self.ids))]


def pack(model: Any, encoder: Encoder, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> Pack:
    """Prompts, and for each a completion (empty for a prompt alone), as one row that holds each shared token once.

    The model is set to attend by trees. Positions are its own three-dimensional ones (M-RoPE, arXiv 2409.12191, 2.1).
    The last token of a completion predicts nothing and is not read.
    """
    core = core_of(model)
    enable(core.model.language_model)
    distinct = list({id(prompt): prompt for prompt in prompts}.values())
    number = {id(prompt): n for n, prompt in enumerate(distinct)}
    of = [number[id(prompt)] for prompt in prompts]
    keys = token_keys(distinct, encoder)
    located = [positions(core, encoder, prompt) for prompt in distinct]
    ends: list[_Node] = [_Node([], torch.zeros(3, 0))] * len(distinct)
    said: dict[int, _Node] = {}

    def grow(members: list[int], depth: int, parent: _Node | None) -> list[_Node]:
        nodes = []
        for group, end in _groups(keys, members, depth):
            source, where = distinct[group[0]], located[group[0]][0][:, depth:end]
            node = _Node(source.input_ids[depth:end], where, _images(source, encoder, depth, end), parent=parent)
            node.children = grow([n for n in group if len(keys[n]) > end], end, node)
            for ended in (n for n in group if len(keys[n]) == end):
                ends[ended] = node
                for row in (row for row, n in enumerate(of) if n == ended and len(completions[row]) > 1):
                    steps = located[ended][1] + torch.arange(len(completions[row]) - 1)
                    said[row] = _Node(completions[row][:-1], steps.expand(3, -1), parent=node)
                    node.children.append(said[row])
            nodes.append(node)
        return nodes

    nodes = list(_rows_of_tree(grow(list(range(len(distinct))), 0, None)))
    chains = [torch.tensor(node.places()) for node in ends]
    at = [
        torch.cat([chains[n][-1:], said[row].first + torch.arange(len(words) - 1)]) if len(words) > 1
        else chains[n][-1:][: len(words)]
        for row, (n, words) in enumerate(zip(of, completions, strict=True))
    ]  # fmt: skip
    device = core.device
    parents = [node.parent.number if node.parent else -1 for node in nodes]
    lengths = torch.tensor([len(words) for words in completions])
    inputs: Batch = {
        "input_ids": torch.tensor([[token for node in nodes for token in node.ids]], device=device),
        "position_ids": torch.cat([node.positions for node in nodes], dim=1)[:, None].to(device),
        "tree": Tree([len(node.ids) for node in nodes], parents, device),
        **encoder.image_inputs([image for node in nodes for image in node.images], device),
    }  # fmt: skip
    return Pack(
        inputs,
        [chains[n].to(device) for n in of],
        torch.tensor([located[n][1] for n in of], device=device),
        torch.cat(at).to(device),
        torch.tensor([token for words in completions for token in words], dtype=torch.long, device=device),
        torch.arange(len(of)).repeat_interleave(lengths).to(device),
        torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device),
    )


def token_logps(
    model: Any, packed: Pack, temperature: float = 1.0, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and whether it is the likeliest, of each completion token of a pack: three [S].

    `counted` [S] bool keeps some tokens alone. Only hidden states of these go through the vocabulary projection.
    """
    core = core_of(model)
    hidden = core.model(**packed.inputs, use_cache=False).last_hidden_state[0]
    at, targets = (packed.at, packed.targets) if counted is None else (packed.at[counted], packed.targets[counted])
    return selected_logps(hidden[at], core.lm_head.weight, targets, temperature)


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


def _groups(keys: Sequence[np.ndarray], members: list[int], depth: int) -> Iterator[tuple[list[int], int]]:
    """Members by what they share from `depth` on, and where each group stops sharing."""
    left = members
    while left:
        first, group, rest, end = keys[left[0]], [left[0]], [], len(keys[left[0]])
        for n in left[1:]:
            shared = shared_length(first[depth:], keys[n][depth:])
            if shared >= MIN_SHARED or len(keys[n]) == len(first) == depth + shared:
                group.append(n)
                end = min(end, depth + shared)
            else:
                rest.append(n)
        yield group, end
        left = rest


def _rows_of_tree(roots: list[_Node]) -> Iterator[_Node]:
    """The nodes level by level, siblings side by side; numbers them and gives them their places."""
    number = place = 0
    families = [roots]
    while families:
        family = families.pop(0)
        for node in family:
            node.number, node.first = number, place
            number, place = number + 1, place + len(node.ids)
            yield node
        families += [node.children for node in family if node.children]


def _images(prompt: Prompt, encoder: Encoder, begin: int, end: int) -> list[EncodedImage]:
    """The images whose tokens stand between two places of a prompt: a segment never cuts one in two."""
    starts, place = [], 0
    for image in prompt.images:
        place = prompt.input_ids.index(encoder.image_token_id, place)
        starts.append(place)
        place += encoder.image_tokens(image)
    return [image for image, start in zip(prompt.images, starts, strict=True) if begin <= start < end]
