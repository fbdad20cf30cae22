"""Attention over packed rows against sdpa over each whole sequence: values, gradients and seconds, in bf16 and fp32.

Both are held to sdpa in fp64 on the same (rounded) numbers. Shapes: L tokens, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gpu_clock import timed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmedexpert.models.attention import Tree, by_family, by_kernel

HEADS = (28, 4, 128)  # H, K, D of Qwen2.5-VL-7B
TREES = {  # lengths and parents; ours: a group of GBA, and the images, questions and answers of a DSA step
    "group": ([700, *[1024] * 8], [-1, *[0] * 8]),
    "ragged": ([484, 90, 60, 17, 33, 300, 128, 1, 64], [-1, -1, 0, 0, 1, 2, 2, 3, 3]),
}
TINY_HEADS, TINY_SHARE = (4, 2, 16), 16  # ours: on the CPU lengths are so many times smaller
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # ours, relative: those of tests/test_packing.py
LAPS = 3  # ours: the fastest counts, after one that does not
NAMES = ("values", "query gradient", "key gradient", "value gradient")


def whole(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
    """The definition: each segment is the end of a sequence of its own, [L, H, D] -> [L, H, D]."""
    places = torch.arange(len(query), device=query.device).split(list(tree.lengths))
    outputs = []
    for segment, length in enumerate(tree.lengths):
        chain = torch.cat([places[s] for s in (*tree.ancestors(segment), segment)])
        q, k, v = (x[chain].transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1)[-length:])
    return torch.cat(outputs)


def graded(function: Callable[..., Tensor], inputs: Sequence[Tensor], tree: Tree, upstream: Tensor) -> list[Tensor]:
    """Values and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, tree, inputs[0].shape[-1] ** -0.5)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Of values and gradients: the largest absolute error, and the norm of all errors over that of the exact."""
    return {
        name: {
            "max_abs": float((one.double() - other).abs().max()),
            "relative": float((one.double() - other).norm() / other.norm()),
        }
        for name, one, other in zip(NAMES, found, exact, strict=True)
    }


def rows(device: str, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each tree, dtype and path; `by_kernel` is CUDA's in 16 bits, `by_family` that of all else."""
    heads, key_heads, size = TINY_HEADS if tiny else HEADS
    for name, (lengths, parents) in TREES.items():
        lengths = [max(1, length // TINY_SHARE) if tiny else length for length in lengths]
        tree, generator = Tree(lengths, parents, torch.device(device)), torch.Generator(device).manual_seed(0)
        for dtype, tolerance in TOLERANCE.items():
            query, upstream, key, value = (
                torch.randn(sum(lengths), count, size, generator=generator, device=device).to(dtype)
                for count in (heads, heads, key_heads, key_heads)
            )
            inputs = [query, key, value]
            exact = graded(whole, [x.double() for x in inputs], tree, upstream.double())
            paths = [whole, by_family]
            if device.startswith("cuda") and dtype == torch.bfloat16:
                paths.append(by_kernel)
            for path in paths:
                laps = [timed(device, graded, path, inputs, tree, upstream) for _ in range(1 + LAPS)]
                found, seconds = laps[0][0], min(spent for _, spent in laps[1:])
                off = errors(found, exact)
                worst = max(error["relative"] for error in off.values())
                called = "sdpa" if path is whole else path.__name__
                yield {
                    "case": f"{name}, {str(dtype).removeprefix('torch.')}, {called}",
                    "tokens": sum(lengths),
                    "seconds": seconds,
                    "errors": off,
                    "relative_error": worst,
                    "tolerance": tolerance,
                    "within": worst <= tolerance,
                }
