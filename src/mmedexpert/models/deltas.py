"""Updates of weights put into a model in memory, summed in fp32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mmedexpert.errors import UserError


def add_delta(weight: Tensor, delta: Tensor, name: str) -> Tensor:
    """weight + delta, summed in fp32 and rounded once to the weight's dtype.

    ValueError for unequal shapes; UserError for a quantised weight or a sum its dtype cannot hold.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"{name} is {list(weight.shape)} and its delta {list(delta.shape)}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UserError(f"{name} is stored as {weight.dtype}: merge into the base that is not quantised")
    merged = (weight.float() + delta.to(weight.device, torch.float32)).to(weight.dtype)
    if (
        not math.isfinite(float(merged.sum(dtype=torch.float32))) and not torch.isfinite(merged).all()
    ):  # a sum may overflow
        raise UserError(f"{name} is not finite in {weight.dtype} after merging: lower the scaling or use a bf16 base")
    return merged


def squared_norm(delta: Tensor) -> float:
    """The squared norm of an update."""
    return float(torch.linalg.vector_norm(delta)) ** 2


def rounded(weight: Tensor, delta: Tensor, merged: Tensor) -> tuple[float, float]:
    """Squared norms of a delta, and of what rounding weight + delta to `merged` has changed it by."""
    return squared_norm(delta), squared_norm(merged.float() - weight.float() - delta)


def share(parts: Iterable[tuple[float, float]]) -> float | None:
    """What rounding has changed, of all that `rounded` told: a share of the squared norm; None of nothing."""
    whole, changed = 0.0, 0.0
    for part in parts:
        whole, changed = whole + part[0], changed + part[1]
    return changed / whole if whole else None


@torch.no_grad()
def apply_deltas_(model: torch.nn.Module, deltas: Iterable[tuple[str, Tensor]]) -> float | None:
    """Add each (parameter name, delta) to a model in place; ValueError for a name the model has not.

    Returns what rounding to 16 bits changes, see `share`; None where no weight has 16 bits.
    """
    lost = []
    parameters = dict(model.named_parameters())
    for name, delta in deltas:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        merged = add_delta(parameters[name], delta, name)
        if merged.element_size() == 2:
            lost.append(rounded(parameters[name], delta.to(merged.device), merged))
        parameters[name].copy_(merged)
    return share(lost)
