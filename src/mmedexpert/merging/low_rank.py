"""Merge rules on LoRA factors, which never form the full update; each returns one LoRA of rank <= the sum of ranks.

`factors` holds one pair per adapter, experts first, then reasoners: A `[r_i, in]` and B `[out, r_i]`, scaling folded
into B, so that its update is B @ A. The result is such a pair, fp32, on the first factor's device; its rank may differ
from layer to layer, and is 0 where all updates are zero. Inside, everything is fp64: bases and solves are small. All
rules raise ValueError for an empty list, factors that do not fit together, and weights or densities as in `methods`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmedexpert.merging.methods import linear, ties
from mmedexpert.merging.rule import declare
from mmedexpert.merging.votes import weights_like

Factors = Sequence[tuple[Tensor, Tensor]]


def core_space(
    factors: Factors,
    weights: Sequence[float] | None = None,
    *,
    inner: str = "tsv",
    density: float | Sequence[float] = 1.0,
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Merge in the span of all factors: U, V = bases (SVD) of [B_1 .. B_N] and of [A_1; ..; A_N], and

        M_i = U^T B_i A_i V^T;   update = scaling * U inner(M_1, .., M_N) V

    Core Space (arXiv 2509.17786): nothing is lost, since U U^T B_i = B_i and A_i V^T V = A_i. `inner` is a rule on the
    small cores: "linear" (weighted mean; then exactly the mean of the updates), "ties" (2306.01708, with density, vote
    and normalize), "tsv" (`tsv`, 2412.00081) or "iso" (`isotropic`, 2502.04959), the last two on the weighted sum.
    """
    check_factors(factors)
    v, u = _basis(torch.cat([a for a, _ in factors]).double().T), _basis(torch.cat([b for _, b in factors], 1).double())
    cores = [(u.T @ b.double()) @ (a.double() @ v) for a, b in factors]
    if inner == "linear":
        merged = linear(cores, weights)
    elif inner == "ties":
        merged = ties(cores, weights, density, vote=vote, normalize=normalize) if cores[0].numel() else cores[0]
    elif inner == "tsv":
        merged = tsv(cores, weights, [a.shape[0] for a, _ in factors])
    elif inner == "iso":
        merged = isotropic(cores, weights)
    else:
        raise ValueError(f"inner must be 'linear', 'ties', 'tsv' or 'iso', not {inner!r}")
    if u.shape[1] < v.shape[1]:
        return (scaling * merged @ v.T).float(), u.float()
    return v.T.float().contiguous(), (scaling * u @ merged).float()


declare(core_space, "factors", scalings=("scaling",))


def tsv(matrices: Sequence[Tensor], weights: Sequence[float] | None, ranks: Sequence[int]) -> Tensor:
    """Sum of the matrices after their singular vectors are made orthogonal to one another.

    TSV-M (arXiv 2412.00081): keep each one's share of the leading singular triplets, put the vectors side by side as
    U = [U_1 .. U_N] and V, replace both by the nearest orthogonal matrices (polar factors), and return
    polar(U) diag(w_1 S_1, .., w_N S_N) polar(V)^T. The paper's shares are 1/N of the rank each; ours follow `ranks`,
    which is the same where all are equal. Triplets of singular value zero are left out: their vectors mean nothing.
    """
    w = weights_like(matrices, weights, normalize=False).flatten()
    size = min(matrices[0].shape)
    parts = []
    for matrix, weight, rank in zip(matrices, w, ranks, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        k = min(int(_nonzero(s, max(matrix.shape)).sum()), max(1, size * rank // max(1, sum(ranks))))  # ours: by rank
        parts.append((u[:, :k], weight * s[:k], vh[:k].T))
    left, values, right = (torch.cat(list(part), -1) for part in zip(*parts, strict=True))
    return _polar(left) @ (values.unsqueeze(1) * _polar(right).T)


def isotropic(matrices: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """The weighted sum with all singular values replaced by their mean. Iso-C (arXiv 2502.04959).

    The mean is over the nonzero ones: a direction that the sum has not is not invented.
    """
    u, s, vh = torch.linalg.svd((weights_like(matrices, weights, normalize=False) * torch.stack(list(matrices))).sum(0))
    k = int(_nonzero(s, max(u.shape[0], vh.shape[1])).sum())
    return u[:, :k] @ vh[:k] * s[:k].mean() if k else torch.zeros_like(matrices[0])


def knots(
    factors: Factors,
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] = 1.0,
    *,
    vote: str = "mass",
    normalize: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """TIES in the common left basis of the updates: [dW_1 .. dW_N] = U S [V_1 .. V_N] (SVD), and

        update = scaling * U ties(S V_1, .., S V_N)

    KnOTS (arXiv 2410.19735). With A_i^T = Q_i R_i (QR), the SVD is that of [B_1 R_1^T .. B_N R_N^T], `[out, sum r]`,
    and V_i its right vectors times Q_i^T. S stays with V, as in the authors' code: it counts in the trim, not the vote.
    """
    check_factors(factors)
    bases, columns = zip(*((q, b.double() @ r.T) for q, r, b in ((*_qr(a), b) for a, b in factors)), strict=True)
    u, s, wh = torch.linalg.svd(torch.cat(columns, 1), full_matrices=False)
    keep, signs = _nonzero(s, max(u.shape[0], wh.shape[1])), _signs(u)
    u, swh = (u * signs)[:, keep], (signs.T * s.unsqueeze(1) * wh)[keep]
    parts = swh.split([q.shape[1] for q in bases], 1)
    aligned = [(part @ q.T).float() for part, q in zip(parts, bases, strict=True)]
    merged = ties(aligned, weights, density, vote=vote, normalize=normalize) if len(u.T) else aligned[0]
    return merged, (scaling * u).float()


declare(knots, "factors", scalings=("scaling",))


def wudi(
    factors: Factors,
    weights: Sequence[float] | None = None,
    *,
    ridge: float = 1e-3,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The update that interferes least with each task on that task's own input directions, in closed form.

    WUDI-Merging (arXiv 2503.08099) minimises sum_i w_i ||(M - t_i) t_i^T||^2 / ||t_i||^2 over M, t_i = B_i A_i, with
    Adam from M = sum_i t_i. Its minimum solves, with G_i = w_i t_i^T t_i / ||t_i||^2,

        M = T + D,   T = sum_i t_i,   D (sum_i G_i + ridge * mean eigenvalue * I) = sum_i (t_i - T) G_i

    inside the span of the stacked A. The ridge pulls towards Adam's start, the plain sum, where no task speaks;
    so one adapter alone comes back unchanged. Weights must be positive or zero.
    """
    check_factors(factors)
    v = _basis(torch.cat([a for a, _ in factors]).double().T)
    tasks = [b.double() @ (a.double() @ v) for a, b in factors]
    w = weights_like(tasks, weights, normalize=False).flatten()
    if (w < 0).any() or not ridge > 0:
        raise ValueError(f"weights must not be negative and ridge must be positive, got {w.tolist()} and {ridge}")
    total = torch.stack(tasks).sum(0)
    grams = [wi * (t.T @ t) / t.square().sum().clamp(min=1e-300) for wi, t in zip(w, tasks, strict=True)]
    system, wanted = torch.stack(grams).sum(0), sum((t - total) @ g for t, g in zip(tasks, grams, strict=True))
    # ours: towards T and not 0
    system.diagonal().add_(ridge * system.diagonal().mean().clamp(min=1e-300))
    change = torch.linalg.solve(system, wanted.T).T
    return v.T.float().contiguous(), (scaling * (total + change)).float()


declare(wudi, "factors", scalings=("scaling",))


def check_factors(factors: Factors) -> None:
    """ValueError for no factors, or pairs that do not make updates of one shape."""
    if not factors:
        raise ValueError("no factors to merge")
    shape = factors[0][1].shape[0], factors[0][0].shape[1]
    for a, b in factors:
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
            raise ValueError(f"factors {tuple(a.shape)} and {tuple(b.shape)} do not make an update of shape {shape}")


def _basis(matrix: Tensor) -> Tensor:
    """Orthonormal basis of a matrix's columns: its left singular vectors, without those of zero singular values."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return (u * _signs(u))[:, _nonzero(s, max(matrix.shape))]


def _signs(u: Tensor) -> Tensor:
    """Of each column, the sign of its largest entry: makes singular vectors the same on any machine.

    A tie of a vote elects +1, so a rule's result would otherwise depend on signs which an SVD is free to choose.
    """
    return torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u.dtype)  # peers: scikit-learn


def _nonzero(s: Tensor, size: int) -> Tensor:
    """Which singular values are above rounding: numpy's rule for a matrix's rank, in fp64."""
    return s > s.amax() * size * torch.finfo(s.dtype).eps if len(s) else s > 0


def _qr(a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(a.double().T)


def _polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to one: U V^T of its SVD (Procrustes)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
