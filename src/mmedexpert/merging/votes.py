"""What merge rules are made of: checked weights, the election of a sign, the mean of those who agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def elect_sign(votes: Sequence[Tensor], vote: str = "mass") -> Tensor:
    """The majority sign of each entry, +1 or -1, from weighted votes; a tie elects +1 (mergekit, PEFT).

    TIES-Merging (arXiv 2306.01708), step 2. vote="mass": sign of the sum; "count": sign of the number of plus minus
    the number of minus signs.
    """
    if vote not in ("mass", "count"):
        raise ValueError(f"vote must be 'mass' or 'count', not {vote!r}")
    total = torch.zeros_like(votes[0])
    for ballot in votes:
        total += ballot if vote == "mass" else ballot.sign()
    return torch.where(total >= 0, 1.0, -1.0).to(total.dtype)


def disjoint_merge(
    weighted: Sequence[Tensor], weights: Sequence[float], elected: Tensor, normalize: bool = True
) -> Tensor:
    """Sum of the weighted deltas of the elected sign, divided by their weights' sum if `normalize`.

    TIES-Merging (arXiv 2306.01708), step 3. Where nobody agrees, or the agreeing weights cancel, the divisor is 1.
    """
    merged, mass, agreeing = (torch.zeros_like(elected) for _ in range(3))
    for delta, weight in zip(weighted, weights, strict=True):
        # magnitudes: no boolean mask, which torch does not vectorise; one after the other: no stack, whose pages the
        # system would clear anew for every block
        torch.mul(delta, elected, out=agreeing).clamp_(min=0)
        merged += agreeing
        if normalize:
            mass.add_(agreeing.sign_(), alpha=weight)
    merged *= elected
    return merged.div_(mass.masked_fill_(mass == 0, 1)) if normalize else merged


def norms_of(deltas: Sequence[Tensor], norms: Sequence[float] | None) -> list[float]:
    """L2 norm of each delta; 1 for an all-zero delta, which casts no vote."""
    values = [float(torch.linalg.vector_norm(delta)) for delta in deltas] if norms is None else norms
    return [value or 1.0 for value in values]


def check_shapes(deltas: Sequence[Tensor]) -> None:
    """ValueError for no deltas, or unequal shapes."""
    if not deltas:
        raise ValueError("no deltas to merge")
    if any(delta.shape != deltas[0].shape for delta in deltas):
        raise ValueError(f"deltas must have one shape, got {[tuple(delta.shape) for delta in deltas]}")


def weights_like(deltas: Sequence[Tensor], weights: Sequence[float] | None, normalize: bool) -> Tensor:
    """The weights, checked, as a `[N, 1, ..]` tensor of the deltas' dtype and device."""
    check_shapes(deltas)
    values = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(values) != len(deltas):
        raise ValueError(f"{len(values)} weights for {len(deltas)} deltas")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"weights must be finite, got {values}")
    if normalize and abs(math.fsum(values)) < 1e-8:
        raise ValueError(f"weights sum to zero and cannot be normalised: {values}")
    return deltas[0].new_tensor(values).view(-1, *[1] * deltas[0].dim())
