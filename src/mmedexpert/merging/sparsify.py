"""Which entries of a delta a merge rule keeps: by magnitude (trim, breadcrumbs) or at random (DARE, DELLA).

A magnitude threshold belongs to a whole tensor or task vector; a random mask is a function of seed, tensor name, place
in the list, row and column. So blocks of rows of a tensor give what the tensor gives, once its thresholds are known.
All functions raise ValueError for a density outside (0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Threshold = float | tuple[float, float]  # a magnitude, or the lowest and the highest


def kept_ranks(n: int, density: float, gamma: float = 0.0, scope: str = "tensor") -> tuple[int, int]:
    """Which of n magnitudes, ranked from the largest (0), are kept: ranks start to stop - 1.

    gamma = 0 is TIES (arXiv 2306.01708): the first max(1, int(density * n)), as mergekit counts, or with scope="global"
    one more than int(density * n), as the authors do. gamma > 0 is Model Breadcrumbs (arXiv 2312.06795), in mergekit's
    terms: int(density * n) of them, after the int(gamma * n) largest or as few as leave that many. So the threshold of
    `trim` is the magnitude at stop - 1, and the bounds of `breadcrumbs` are those at stop - 1 and start.
    """
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', not {scope!r}")
    if not (0 < density <= 1 and 0 <= gamma < 1):
        raise ValueError(f"density must be in (0, 1] and gamma in [0, 1), got {density} and {gamma}")
    kept = int(density * n)
    if gamma > 0:
        start = min(int(gamma * n), n - kept)
        return start, start + kept
    return 0, max(1, kept) if scope == "tensor" else min(n, kept + 1)


def keep(delta: Tensor, threshold: Threshold) -> Tensor:
    """Zero the entries of a magnitude below a threshold, or outside two bounds [low, high]; same shape."""
    if isinstance(threshold, tuple):
        magnitude = delta.abs()
        return torch.where((magnitude >= threshold[0]) & (magnitude <= threshold[1]), delta, 0)
    if threshold <= 0:
        return delta
    # one pass, where a comparison and a choice are three: hardshrink keeps what is above its bound
    below = torch.tensor(threshold, dtype=delta.dtype).nextafter(torch.zeros((), dtype=delta.dtype))
    return F.hardshrink(delta, float(below))


def trim(delta: Tensor, density: float, scope: str = "tensor", threshold: float | None = None) -> Tensor:
    """Zero all but the largest `density` share of the entries by magnitude; same shape.

    TIES-Merging (arXiv 2306.01708), step 1. scope="tensor" keeps exactly max(1, int(density * n)) entries, mergekit's
    count. Only when equal magnitudes straddle the threshold does it sort, and keeps those that `torch.argsort` puts
    first: mergekit's choice too, but one that may differ between machines. scope="global" is the authors' rule for a
    whole flattened task vector: keep all entries not below the (n - int(density * n))-th smallest magnitude, so one
    more than int(density * n), and all equals. With `threshold` all entries of at least that magnitude are kept, and
    density and scope only checked.
    """
    n = delta.numel()
    _, k = kept_ranks(n, density, scope=scope)
    if threshold is not None:
        return keep(delta, threshold)
    if k >= n:
        return delta
    magnitude = delta.abs().flatten()
    bound = magnitude.kthvalue(n - k + 1).values
    kept = magnitude >= bound
    if scope == "tensor" and bound > 0 and kept.sum() > k:
        kept = torch.zeros_like(kept).index_fill(0, magnitude.argsort(descending=True)[:k], True)
    return torch.where(kept.view_as(delta), delta, 0)


def crumbs(delta: Tensor, density: float, gamma: float, bounds: tuple[float, float] | None = None) -> Tensor:
    """Zero the `gamma` largest share by magnitude and the smallest, so that `density` stays; same shape.

    Model Breadcrumbs (arXiv 2312.06795; its beta is our gamma), counted as `kept_ranks` says. With `bounds` all entries
    whose magnitude is in [low, high] are kept, so also those equal to a bound which the count would leave out.
    """
    start, stop = kept_ranks(delta.numel(), density, gamma)
    if bounds is not None:
        return keep(delta, bounds)
    kept = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    kept[delta.abs().flatten().argsort(descending=True)[start:stop]] = True
    return torch.where(kept.view_as(delta), delta, 0)


def uniform(like: Tensor, key: str, first_row: int = 0) -> Tensor:
    """Numbers in [0, 1) of the shape of `like`, fp32: a hash of `key`, row and column, the same on any device.

    `first_row` is the row of the whole tensor at which `like` begins; rows are its first dimension.
    """
    low = 0xFFFFFFFF

    # ours: two rounds as in "lowbias32", with factors of 31 bits, so that int64 never overflows
    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(low)
        x = x.bitwise_xor_(x >> 15).mul_(0x31848BAB).bitwise_and_(low)
        return x.bitwise_xor_(x >> 14)

    digest = hashlib.sha256(key.encode()).digest()
    row_key, column_key = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    rows = like.shape[0]
    row = torch.arange(first_row, first_row + rows, device=like.device).view(-1, 1)
    column = torch.arange(like.numel() // max(1, rows), device=like.device).view(1, -1)
    bits = mix((mix(row ^ row_key) + mix(column ^ column_key)).bitwise_and_(low))
    return (bits.bitwise_right_shift_(8).to(torch.float32) * 2.0**-24).view_as(like)


def row_ranks(delta: Tensor) -> Tensor:
    """Rank of each entry by magnitude within its row (the last dimension): 0 the smallest; equals by position."""
    return delta.abs().argsort(dim=-1, stable=True).argsort(-1)


def drop(
    deltas: Sequence[Tensor],
    density: float | Sequence[float],
    *,
    epsilon: float | Sequence[float] = 0.0,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Keep each entry at random with probability p and divide it by p (expectation unchanged), else zero it.

    epsilon = 0: p = density, DARE (arXiv 2311.03099). epsilon > 0: p rises evenly from density - epsilon for the
    smallest magnitude of a row to density + epsilon for its largest, DELLA's MagPrune (arXiv 2406.11617) in mergekit's
    terms; density - epsilon > 0 and density + epsilon <= 1, else ValueError. `name` is the tensor's (so that tensors of
    one shape do not share a mask) and `first_row` where in it the deltas begin; `masks` (bool, as the deltas) replaces
    the random ones.
    """
    densities = per_delta(deltas, density)
    epsilons = [float(e) for e in epsilon] if isinstance(epsilon, Sequence) else [float(epsilon)] * len(deltas)
    if len(epsilons) != len(deltas) or not all(
        e == 0 or (e > 0 and d - e > 0 and d + e <= 1) for d, e in zip(densities, epsilons, strict=True)
    ):
        raise ValueError(f"epsilon must keep density +- epsilon in (0, 1], got {epsilons} around {densities}")
    if masks is not None and [m.shape for m in masks] != [d.shape for d in deltas]:
        raise ValueError("masks must be one per delta and of the deltas' shape")
    dropped = []
    for place, (delta, d, e) in enumerate(zip(deltas, densities, epsilons, strict=True)):
        share = d if e == 0 else d - e + row_ranks(delta) * (2 * e / max(1, delta.shape[-1] - 1))
        if masks is None:
            mask = uniform(delta, f"{seed}:{name}:{place}", first_row) < share
        else:
            mask = masks[place].to(delta.device)
        dropped.append(delta * mask / share)
    return dropped


def per_delta(deltas: Sequence[Tensor], density: float | Sequence[float]) -> list[float]:
    """The density of each delta, checked; one number serves for all."""
    values = [float(d) for d in density] if isinstance(density, Sequence) else [float(density)] * len(deltas)
    if len(values) != len(deltas):
        raise ValueError(f"{len(values)} densities for {len(deltas)} deltas")
    if not all(0 < d <= 1 for d in values):
        raise ValueError(f"density must be in (0, 1], got {values}")
    return values
