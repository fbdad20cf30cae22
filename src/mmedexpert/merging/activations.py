"""Merge rules on LoRA updates and what the layers see: RegMean, nearest to every expert's outputs on its own inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmedexpert.merging.grams import Span, energy
from mmedexpert.merging.low_rank import Factors, check_factors
from mmedexpert.merging.rule import declare
from mmedexpert.merging.votes import weights_like


def regmean(
    experts: Factors,
    reasoners: Factors,
    *,
    expert_weights: Sequence[float] | None = None,
    reasoner_weights: Sequence[float] | None = None,
    expert_scaling: float = 1.0,
    reasoner_scaling: float = 1.0,
    ridge: float = 1e-2,
    grams: Iterable[Tensor] | None = None,
    spanned: bool = False,
) -> tuple[Tensor, Tensor]:
    """The update M that interferes least with each expert where its activations live, and the reasoners' on top:

        M = argmin sum_i w_i ||(M - t_i) X_i||^2 / ||t_i X_i||^2 + lambda ||M - mean||^2
          = (sum_i t_i H_i + lambda mean) (sum_i H_i + lambda I)^-1,   H_i = w_i G_i / tr(t_i G_i t_i^T)
        out = expert_scaling * M + reasoner_scaling * mean_w(reasoners)

    RegMean (arXiv 2212.09849, section 3) on the updates t_i = B_i A_i, with G_i = X_i X_i^T of the layer's inputs under
    expert i. Ours: each term is measured against the expert's own output, so that no expert counts more because its
    update or its activations are large; and lambda = ridge * the mean diagonal of sum_i H_i, so that it has no unit and
    does not depend on the number of records. Where no input speaks the ridge gives `mean` = sum_i w_i t_i; weights are
    normalised within a role. A reasoner's update is relative to where GBA started and adds, as in `methods.caci`.

    M has the experts' B side by side and is so a LoRA of the summed ranks, exactly. `grams`, one per expert, are read
    one after another: memory holds two of them. `spanned`: they are A X X^T A^T of all factors A, experts' first, then
    reasoners', and M's row space is kept inside that of the experts' A. None: white inputs. An expert whose update is
    zero here takes no part. ValueError as in `low_rank`, for negative weights, and for a ridge that is not positive.
    """
    check_factors([*experts, *reasoners])
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    merged = _closed_form(experts, _shares(experts, expert_weights), grams, spanned, ridge) if experts else []
    parts = [(a, expert_scaling * b) for a, b in merged]
    if reasoners:
        pairs = zip(reasoners, _shares(reasoners, reasoner_weights), strict=True)
        parts += [(a, reasoner_scaling * share * b) for (a, b), share in pairs]
    none = (experts or reasoners)[0]
    parts = parts or [(none[0][:0], none[1][:, :0])]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)


declare(regmean, "factor_roles", "grams")


def _closed_form(
    experts: Factors, shares: Sequence[float], grams: Iterable[Tensor] | None, spanned: bool, ridge: float
) -> Factors:
    """M as the factors (A, B) of its parts B_i A_i (H_i + lambda w_i I) (sum_j H_j + lambda I)^-1; in fp64 inside."""
    rows = [a.double() for a, _ in experts]
    space = Span.of(torch.cat(rows)) if spanned and grams is not None else None
    seen = rows if space is None else [a @ space.directions for a in rows]
    system = seen[0].new_zeros(seen[0].shape[1], seen[0].shape[1])
    grams = [torch.eye(len(system))] * len(experts) if grams is None else grams
    heard: list[tuple[Tensor, Tensor, Tensor, float]] = []  # B, A, A H, w of each expert that changes this tensor
    for a, (_, b), share, gram in zip(seen, experts, shares, grams, strict=True):
        gram = gram.double() if space is None else space.gram(gram)
        own = energy(a, b, gram)
        if own > 0 and share > 0:
            system.add_(gram, alpha=share / own)
            heard.append((b, a, a @ gram * (share / own), share))
    if not heard:
        return []
    pull = ridge * float(system.diagonal().mean())
    system.diagonal().add_(pull)
    total = sum(share for *_, share in heard)
    wanted = torch.cat([image + pull * share / total * a for _, a, image, share in heard])
    found = torch.linalg.solve(system, wanted.T).T
    found = (found if space is None else found @ space.directions.T).float()
    return list(zip(found.split([len(a) for _, a, *_ in heard]), (b for b, *_ in heard), strict=True))


def _shares(factors: Factors, weights: Sequence[float] | None) -> list[float]:
    """The weights of one role as shares of their sum; ValueError as `weights_like`, and for a negative one."""
    values: list[float] = weights_like([b[:, :0] for _, b in factors], weights, normalize=True).flatten().tolist()
    if min(values) < 0:
        raise ValueError(f"weights must not be negative, got {values}")
    return [value / sum(values) for value in values]
