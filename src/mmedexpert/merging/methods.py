"""Merge rules: pure functions from task vectors (deltas to the base weights) to one merged task vector.

Every rule works on one tensor at a time. `deltas` is a list of equal-shape floating point tensors (fp32), `weights`
one number per delta (None: all equal to 1) and `density` the kept share in (0, 1], one number or one per delta. Entries
that are zero never vote and are never counted. All rules raise ValueError for an empty list, unequal shapes, a density
outside (0, 1], weights that are not finite or not one per delta, and weights summing to zero where normalised.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def trim(delta: Tensor, density: float, scope: str = "tensor") -> Tensor:
    """Zero all but the largest `density` share of the entries by magnitude; same shape.

    TIES-Merging (arXiv 2306.01708), step 1. scope="tensor" keeps exactly max(1, int(density * n)) entries, mergekit's
    count. Only when equal magnitudes straddle the threshold does it sort, and keeps those that `torch.argsort` puts
    first: mergekit's choice too, but one that may differ between machines. scope="global" is the authors' rule for a
    whole flattened task vector: keep all entries not below the (n - int(density * n))-th smallest magnitude, so one
    more than int(density * n), and all equals.
    """
    (density,), n = _densities([delta], density), delta.numel()
    magnitude = delta.abs().flatten()
    if scope == "global":
        keep = magnitude >= magnitude.kthvalue(max(1, n - int(density * n))).values
    elif scope == "tensor":
        k = max(1, int(density * n))
        if k >= n:
            return delta
        threshold = magnitude.kthvalue(n - k + 1).values
        keep = magnitude >= threshold
        if threshold > 0 and keep.sum() > k:
            keep = torch.zeros_like(keep).index_fill(0, magnitude.argsort(descending=True)[:k], True)
    else:
        raise ValueError(f"scope must be 'tensor' or 'global', not {scope!r}")
    return torch.where(keep.view_as(delta), delta, 0)


def elect_sign(votes: Tensor, vote: str = "mass") -> Tensor:
    """The majority sign of each entry, +1 or -1, from weighted votes `[N, *shape]`; a tie elects +1 (mergekit, PEFT).

    TIES-Merging (arXiv 2306.01708), step 2. vote="mass": sign of the sum; "count": sign of the number of plus minus
    the number of minus signs.
    """
    if vote not in ("mass", "count"):
        raise ValueError(f"vote must be 'mass' or 'count', not {vote!r}")
    total = (votes if vote == "mass" else votes.sign()).sum(0)
    return torch.where(total >= 0, 1.0, -1.0).to(votes.dtype)


def disjoint_merge(weighted: Tensor, weights: Tensor, elected: Tensor, normalize: bool = True) -> Tensor:
    """Sum of the weighted deltas `[N, *shape]` of the elected sign, divided by their weights' sum if `normalize`.

    TIES-Merging (arXiv 2306.01708), step 3. `weights` is `[N, 1, ..]`. Where nobody agrees, or the agreeing weights
    cancel, the divisor is 1.
    """
    agrees = weighted.sign() == elected
    merged = (weighted * agrees).sum(0)
    if not normalize:
        return merged
    mass = (weights * agrees).sum(0)
    return merged / mass.masked_fill(mass == 0, 1)


def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    scope: str = "tensor",
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> Tensor:
    """TIES: trim each delta, elect a sign per entry, average the entries that agree with it.

    TIES-Merging (arXiv 2306.01708): scaling * sum_{i agrees} w_i d_i / sum_{i agrees} w_i, d_i = trim(delta_i).
    With scope="tensor" the result on fp32 equals mergekit 0.1.5's (`normalize`: its default). scope="global" only
    changes how d_i is trimmed; the caller then passes whole flattened task vectors, not one tensor after another.
    """
    w = _weights(deltas, weights, normalize)
    return scaling * _elect_and_merge(_trim_all(deltas, density, scope), w, vote, normalize)


def linear(deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of the deltas: sum_i w_i delta_i / sum_i w_i.

    Model soups (arXiv 2203.05482): for deltas of one base it is the weighted mean of the models.
    """
    w = _weights(deltas, weights, normalize=True)
    return (w * torch.stack(list(deltas))).sum(0) / w.sum()


def task_arithmetic(
    deltas: Sequence[Tensor], weights: Sequence[float] | None = None, *, scaling: float = 1.0
) -> Tensor:
    """Weighted sum of the deltas: scaling * sum_i w_i delta_i. Task arithmetic (arXiv 2212.04089)."""
    return scaling * (_weights(deltas, weights, normalize=False) * torch.stack(list(deltas))).sum(0)


def drop(
    deltas: Sequence[Tensor],
    density: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Drop entries at random with probability 1 - density and divide the rest by density (expectation unchanged).

    DARE (arXiv 2311.03099). The masks depend on `seed`, `name` (the tensor's name, so that tensors of one shape do not
    share a mask) and the delta's place in the list, and not on the device; `masks` (bool, as the deltas) replaces them.
    """
    densities = _densities(deltas, density)
    if masks is None:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        masks = [torch.rand(d.shape, generator=generator) < p for d, p in zip(deltas, densities, strict=True)]
    if [m.shape for m in masks] != [d.shape for d in deltas]:
        raise ValueError("masks must be one per delta and of the deltas' shape")
    return [delta * mask.to(delta.device) / p for delta, mask, p in zip(deltas, masks, densities, strict=True)]


def dare_linear(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    masks: Sequence[Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """DARE, then task arithmetic: scaling * sum_i w_i drop(delta_i). DARE (arXiv 2311.03099); masks as in `drop`."""
    dropped = drop(deltas, density, seed=seed, name=name, masks=masks)
    return task_arithmetic(dropped, weights, scaling=scaling)


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    masks: Sequence[Tensor] | None = None,
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> Tensor:
    """TIES with DARE's random drop and rescale in place of the trim. DARE (arXiv 2311.03099); masks as in `drop`."""
    w = _weights(deltas, weights, normalize)
    dropped = torch.stack(drop(deltas, density, seed=seed, name=name, masks=masks))
    return scaling * _elect_and_merge(dropped, w, vote, normalize)


def caci(
    experts: Sequence[Tensor],
    reasoners: Sequence[Tensor],
    *,
    expert_weights: Sequence[float] | None,
    reasoner_weights: Sequence[float] | None,
    expert_density: float | Sequence[float],
    reasoner_density: float | Sequence[float],
    expert_scaling: float,
    reasoner_scaling: float,
    equalize_vote: bool = True,
) -> Tensor:
    """Conflict-aware merge of experts (SFT) and reasoners (RL): one election, one disjoint mean per role.

    MMedExpert-R1 (arXiv 2601.10949) names the step and says TIES; this rule is ours:
        d_i = trim(delta_i, density of its role)
        s   = sign(sum over both roles of w_i d_i / ||d_i||_2)      # w_i d_i when not equalize_vote
        out = expert_scaling * mean_w{experts' d_i agreeing with s} + reasoner_scaling * mean_w{reasoners' ...}
    Only the vote is equalised: RL updates are ten to thirty times smaller than SFT updates and would be outvoted, but
    rescaling their values would blow them up. The two roles add because a reasoner's delta is relative to where GBA
    started, not to the base; otherwise the experts' part would count twice. Either list may be empty.
    """
    _check_shapes([*experts, *reasoners])
    roles = [
        (_trim_all(deltas, density), _weights(deltas, weights, normalize=True), scaling)
        for deltas, weights, density, scaling in (
            (experts, expert_weights, expert_density, expert_scaling),
            (reasoners, reasoner_weights, reasoner_density, reasoner_scaling),
        )
        if deltas
    ]
    votes = torch.cat([w * (trimmed / _norms(trimmed) if equalize_vote else trimmed) for trimmed, w, _ in roles])
    elected = elect_sign(votes)
    return torch.stack([scale * disjoint_merge(w * trimmed, w, elected) for trimmed, w, scale in roles]).sum(0)


def _trim_all(deltas: Sequence[Tensor], density: float | Sequence[float], scope: str = "tensor") -> Tensor:
    """The trimmed deltas, stacked to `[N, *shape]`."""
    _check_shapes(deltas)
    pairs = zip(deltas, _densities(deltas, density), strict=True)
    return torch.stack([trim(delta, share, scope) for delta, share in pairs])


def _elect_and_merge(deltas: Tensor, weights: Tensor, vote: str, normalize: bool) -> Tensor:
    weighted = weights * deltas
    return disjoint_merge(weighted, weights, elect_sign(weighted, vote), normalize)


def _norms(deltas: Tensor) -> Tensor:
    """L2 norm of each of the stacked deltas, `[N, 1, ..]`; 1 for an all-zero delta, which casts no vote."""
    norms = torch.stack([torch.linalg.vector_norm(delta) for delta in deltas]).view(-1, *[1] * (deltas.dim() - 1))
    return norms.masked_fill(norms == 0, 1)


def _check_shapes(deltas: Sequence[Tensor]) -> None:
    if not deltas:
        raise ValueError("no deltas to merge")
    if any(delta.shape != deltas[0].shape for delta in deltas):
        raise ValueError(f"deltas must have one shape, got {[tuple(delta.shape) for delta in deltas]}")


def _weights(deltas: Sequence[Tensor], weights: Sequence[float] | None, normalize: bool) -> Tensor:
    """The weights, checked, as a `[N, 1, ..]` tensor of the deltas' dtype and device."""
    _check_shapes(deltas)
    values = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(values) != len(deltas):
        raise ValueError(f"{len(values)} weights for {len(deltas)} deltas")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"weights must be finite, got {values}")
    if normalize and abs(math.fsum(values)) < 1e-8:
        raise ValueError(f"weights sum to zero and cannot be normalised: {values}")
    return deltas[0].new_tensor(values).view(-1, *[1] * deltas[0].dim())


def _densities(deltas: Sequence[Tensor], density: float | Sequence[float]) -> list[float]:
    values = [float(d) for d in density] if isinstance(density, Sequence) else [float(density)] * len(deltas)
    if len(values) != len(deltas):
        raise ValueError(f"{len(values)} densities for {len(deltas)} deltas")
    if not all(0 < d <= 1 for d in values):
        raise ValueError(f"density must be in (0, 1], got {values}")
    return values
