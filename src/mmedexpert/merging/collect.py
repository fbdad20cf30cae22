"""Collecting Gram matrices: an expert reads training records of its own, and each LoRA layer's inputs are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmedexpert.models.backbone import core_of
from mmedexpert.models.checkpoint import new_folder
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import pack
from mmedexpert.runtime.progress import Bar

TOGETHER = 2**31  # ours: bytes of Gram matrices in memory; more take several passes over groups of layers


@torch.no_grad()
def collect(
    model: Any,
    encoder: Encoder,
    samples: Callable[[], Iterator[tuple[Prompt, list[int]]]],
    count: int,
    widths: Mapping[str, int],
    stacks: Callable[[str], Tensor] | None,
    out_folder: Path,
    *,
    title: str = "grams",
    together: int = TOGETHER,
) -> None:
    """Write the Gram matrices X X^T of each layer's inputs under a model, over `count` samples, into `out_folder`.

    RegMean (arXiv 2212.09849, section 3). `widths` maps the names of weights to their number of inputs; X [in, tokens]
    are those of all tokens of prompt and completion but the last. `samples()` gives them anew for each pass. fp32
    [in, in]; with `stacks(name)`, the factors A [k, in], fp64 [k, k] of A X: where experts' factors nearly coincide,
    rounding must not hide what parts them. One record a forward pass, so that the result depends on the records alone.
    """
    core = core_of(model)
    factors = {name: stacks(name).to(core.device) for name in widths} if stacks else {}
    sizes = {name: 8 * len(factors[name]) ** 2 if stacks else 4 * width**2 for name, width in widths.items()}
    groups = _groups(sizes, together)
    with new_folder(out_folder, sum(sizes.values()), replace=True) as folder, Bar(title, len(groups) * count) as bar:
        for number, names in enumerate(groups):
            grams: dict[str, Tensor] = {}
            with _watched(core, {name: _adder(grams, name, factors.get(name)) for name in names}):
                for place, (prompt, completion) in enumerate(samples()):
                    bar.show(number * count + place)
                    encoder.encode_images(core, [prompt])
                    core.model(**pack(model, encoder, [prompt], [completion]).inputs, use_cache=False)
            save_file({name: gram.cpu() for name, gram in grams.items()}, folder / f"{number:05d}.safetensors")


def _adder(grams: dict[str, Tensor], name: str, factor: Tensor | None) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """A forward pre-hook that adds a layer's inputs to its Gram matrix."""

    def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        x = x.float() if factor is None else x.double() @ factor.double().T
        if name not in grams:
            grams[name] = x.new_zeros(x.shape[1], x.shape[1])
        grams[name].addmm_(x.T, x)

    return add


@contextmanager
def _watched(core: Any, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [
        core.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(sizes: Mapping[str, int], together: int) -> Sequence[Sequence[str]]:
    """Names in their order, in groups of at most `together` bytes; a larger one is a group of its own."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = together
        groups[-1].append(name)
        room -= size
    return groups
