"""Merge rules on the deltas (task vectors) of several models to one tensor; pure functions.

Shared conventions. The driver (`stream`) gives a rule what its declaration (`rule`) asks for: `deltas` is a list of
equal-shape floating point tensors (fp32), experts first, then reasoners, and `experts`, `reasoners` are the two lists
apart; `weights` holds one number per delta (None: all equal to 1), `density` the kept share in (0, 1], one number or
one per delta. All rules work on a whole tensor or on any block of its rows, given what was measured on the whole:
`thresholds` (the smallest magnitude kept), `norms` (L2, of the trimmed deltas) and `counts` (of `overlap_counts`), one
per delta, `first_row` and `name`. Without these a rule measures what it is given. Entries that are zero never vote and
are never counted. All rules raise ValueError for an empty list, unequal shapes, a density outside (0, 1], weights that
are not finite or not one per delta, and weights summing to zero where normalised. Rules on LoRA factors: `low_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmedexpert.merging.rule import declare
from mmedexpert.merging.sparsify import crumbs, drop, per_delta, trim
from mmedexpert.merging.votes import check_shapes, disjoint_merge, elect_sign, norms_of, weights_like


def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    scope: str = "tensor",
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """TIES: trim each delta, elect a sign per entry, average the entries that agree with it.

    TIES-Merging (arXiv 2306.01708): scaling * sum_{i agrees} w_i d_i / sum_{i agrees} w_i, d_i = trim(delta_i).
    With scope="tensor" the result on fp32 equals mergekit 0.1.5's (`normalize`: its default). scope="global" only
    changes how d_i is trimmed; the caller then passes whole flattened task vectors, not one tensor after another.
    """
    w = weights_like(deltas, weights, normalize)
    return scaling * _elect_and_merge(_trim_all(deltas, density, scope, thresholds), w, vote, normalize)


declare(ties, "deltas", "thresholds", scalings=("scaling",))


def linear(deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of the deltas: sum_i w_i delta_i / sum_i w_i.

    Model soups (arXiv 2203.05482): for deltas of one base it is the weighted mean of the models.
    """
    w = weights_like(deltas, weights, normalize=True)
    return (w * torch.stack(list(deltas))).sum(0) / w.sum()


declare(linear, "deltas", sums=True)


def task_arithmetic(
    deltas: Sequence[Tensor], weights: Sequence[float] | None = None, *, scaling: float = 1.0
) -> Tensor:
    """Weighted sum of the deltas: scaling * sum_i w_i delta_i. Task arithmetic (arXiv 2212.04089)."""
    return scaling * (weights_like(deltas, weights, normalize=False) * torch.stack(list(deltas))).sum(0)


declare(task_arithmetic, "deltas", scalings=("scaling",), sums=True)


def dare_linear(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    masks: Sequence[Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """DARE, then task arithmetic: scaling * sum_i w_i drop(delta_i). DARE (arXiv 2311.03099); masks as in `drop`."""
    dropped = drop(deltas, density, seed=seed, name=name, first_row=first_row, masks=masks)
    return task_arithmetic(dropped, weights, scaling=scaling)


declare(dare_linear, "deltas", "place", scalings=("scaling",))


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    masks: Sequence[Tensor] | None = None,
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> Tensor:
    """TIES with DARE's random drop and rescale in place of the trim. DARE (arXiv 2311.03099); masks as in `drop`."""
    w = weights_like(deltas, weights, normalize)
    dropped = drop(deltas, density, seed=seed, name=name, first_row=first_row, masks=masks)
    return scaling * _elect_and_merge(dropped, w, vote, normalize)


declare(dare_ties, "deltas", "place", scalings=("scaling",))


def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    masks: Sequence[Tensor] | None = None,
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> Tensor:
    """TIES' election after a random drop which spares large entries: with rank k (0 the smallest) among n in its row,

        p = density - epsilon + 2 epsilon k / (n - 1);   d_i = delta_i * Bernoulli(p) / p

    DELLA-Merging (arXiv 2406.11617), in mergekit's terms: density and epsilon are those of keeping, where the paper's
    are those of dropping. epsilon = 0 is `dare_ties`. Rows must be whole; masks as in `drop`.
    """
    w = weights_like(deltas, weights, normalize)
    dropped = drop(deltas, density, epsilon=epsilon, seed=seed, name=name, first_row=first_row, masks=masks)
    return scaling * _elect_and_merge(dropped, w, vote, normalize)


declare(della, "deltas", "place", scalings=("scaling",))


def breadcrumbs(
    deltas: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    gamma: float,
    *,
    scaling: float = 1.0,
    thresholds: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """Task arithmetic without the outliers and the small: scaling * sum_i w_i crumbs(delta_i).

    Model Breadcrumbs (arXiv 2312.06795), per tensor, with mergekit's `density` (share kept) and `gamma` (share of the
    largest that goes). `thresholds` are pairs (low, high): entries with low <= |delta| <= high stay.
    """
    check_shapes(deltas)
    bounds = [None] * len(deltas) if thresholds is None else thresholds
    pairs = zip(deltas, per_delta(deltas, density), bounds, strict=True)
    return task_arithmetic([crumbs(delta, share, gamma, b) for delta, share, b in pairs], weights, scaling=scaling)


declare(breadcrumbs, "deltas", "thresholds", bands=True, scalings=("scaling",))


def overlap_counts(deltas: Sequence[Tensor], epsilon: float = 1e-5) -> Tensor:
    """For each delta, how many of its entries above epsilon are above it in another delta too, and how many alone.

    int64 `[N, 2]`: shared, unique. RAM (arXiv 2601.13572). Counts of blocks, or of tensors, add up.
    """
    check_shapes(deltas)
    active = torch.stack([delta.abs() > epsilon for delta in deltas])
    shared = active & (active.sum(0) > 1)
    total = active.flatten(1).sum(1)
    return torch.stack([shared.flatten(1).sum(1), total - shared.flatten(1).sum(1)], 1)


def ram(
    deltas: Sequence[Tensor],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    scaling: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean of what several deltas changed, and in full, or a little more, what only one of them did:

        c = number of deltas with |delta_i| > epsilon there
        out = scaling * sum_i {delta_i / c if c > 1;  (1 + r min(shared_i / unique_i, alpha)) delta_i if c = 1}

    Reinforced Agent Merging (arXiv 2601.13572), made for the sparse updates of RL; r = 0 is mergekit's `ram`, r > 0 its
    `ramplus_tl`. shared_i and unique_i are `counts`, measured on what is given if None; the paper's are over the whole
    model, mergekit's over one tensor.
    """
    if not (r >= 0 and alpha >= 0 and epsilon >= 0):
        raise ValueError(f"r, alpha and epsilon must not be negative, got {r}, {alpha} and {epsilon}")
    counts = overlap_counts(deltas, epsilon) if counts is None else counts
    shared, unique = counts.to(deltas[0].device).unbind(1)
    boost = (1 + r * (shared / unique.clamp(min=1)).clamp(max=alpha)).to(deltas[0].dtype)
    stacked = torch.stack([torch.where(delta.abs() > epsilon, delta, 0) for delta in deltas])
    sharers = (stacked != 0).sum(0)
    boost = boost.view(-1, *[1] * deltas[0].dim())
    return scaling * torch.where(sharers > 1, stacked / sharers.clamp(min=1), stacked * boost).sum(0)


declare(ram, "deltas", "counts", scalings=("scaling",))


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
    vote: str = "mass",
    scope: str = "tensor",
    thresholds: Sequence[float] | None = None,
    norms: Sequence[float] | None = None,
) -> Tensor:
    """Conflict-aware merge of experts (SFT) and reasoners (RL): one election, one disjoint mean per role.

    MMedExpert-R1 (arXiv 2601.10949) names the step and says TIES; this rule is ours:
        d_i = trim(delta_i, density of its role)
        s   = sign(sum over both roles of w_i d_i / ||d_i||_2)      # w_i d_i when not equalize_vote
        out = expert_scaling * mean_w{experts' d_i agreeing with s} + reasoner_scaling * mean_w{reasoners' ...}
    Only the vote is equalised: RL updates are ten to thirty times smaller than SFT updates and would be outvoted, but
    rescaling their values would blow them up. The two roles add because a reasoner's delta is relative to where GBA
    started, not to the base; otherwise the experts' part would count twice. Weights are normalised within a role, so
    multiplying a role's weights changes its say in the vote and nothing else. Either list may be empty. `thresholds`
    and `norms`: experts first, then reasoners.
    """
    deltas, n = [*experts, *reasoners], len(experts)
    check_shapes(deltas)
    pairs = ((experts, expert_weights), (reasoners, reasoner_weights))
    w = [weight for role, weights in pairs if role for weight in weights_like(role, weights, True).flatten().tolist()]
    densities = [*per_delta(experts, expert_density), *per_delta(reasoners, reasoner_density)]
    trimmed = _trim_all(deltas, densities, scope, thresholds)
    weighted = votes = _weighted(trimmed, w)
    if equalize_vote:
        votes = _weighted([delta / size for delta, size in zip(trimmed, norms_of(trimmed, norms), strict=True)], w)
    elected = elect_sign(votes, vote)
    roles = ((slice(0, n), expert_scaling), (slice(n, None), reasoner_scaling))
    parts = [scale * disjoint_merge(weighted[role], w[role], elected) for role, scale in roles if w[role]]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


declare(caci, "roles", "thresholds", "norms", scalings=("expert_scaling", "reasoner_scaling"))


def winner_take_all(
    experts: Sequence[Tensor],
    reasoners: Sequence[Tensor],
    *,
    expert_scaling: float = 1.0,
    reasoner_scaling: float = 1.0,
) -> Tensor:
    """Of each entry the experts' largest change, and on top of it the reasoners' largest:

        out = expert_scaling * e_j + reasoner_scaling * r_k,   j = argmax_i |e_i|,  k = argmax_i |r_i|

    MagMax (arXiv 2407.06322) for one role; that the roles add is `caci`'s reason. Among equal magnitudes the first
    wins. Either list may be empty.
    """
    check_shapes([*experts, *reasoners])
    roles = ((experts, expert_scaling), (reasoners, reasoner_scaling))
    return torch.stack([scale * _largest(torch.stack(list(role))) for role, scale in roles if role]).sum(0)


declare(winner_take_all, "roles", scalings=("expert_scaling", "reasoner_scaling"))


def _largest(deltas: Tensor) -> Tensor:
    return deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


def _trim_all(
    deltas: Sequence[Tensor], density: float | Sequence[float], scope: str, thresholds: Sequence[float] | None
) -> list[Tensor]:
    """The trimmed deltas."""
    check_shapes(deltas)
    bounds = [None] * len(deltas) if thresholds is None else thresholds
    triples = zip(deltas, per_delta(deltas, density), bounds, strict=True)
    return [trim(delta, share, scope, bound) for delta, share, bound in triples]


def _weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [delta if weight == 1 else weight * delta for delta, weight in zip(deltas, weights, strict=True)]


def _elect_and_merge(deltas: Sequence[Tensor], weights: Tensor, vote: str, normalize: bool) -> Tensor:
    says = weights.flatten().tolist()
    weighted = _weighted(deltas, says)
    return disjoint_merge(weighted, says, elect_sign(weighted, vote), normalize)
