"""Group-relative and guideline-based advantages: the whole of what GBA adds to GRPO.

Shapes: B prompts, G completions per prompt (`num_generations`), K clinical reasoning perspectives.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

RewardScale = Literal["group", "batch", "none"]

_STD_EPSILON = 1e-4  # peers: TRL


def _unbiased_std(centred: Tensor, valid: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Standard deviation of centred values over the valid ones; 0 where fewer than two are."""
    return (centred.square().sum(dim, keepdim=True) / (valid.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()


def group_relative(rewards: Tensor, scale: RewardScale = "group") -> Tensor:
    """GRPO advantages: how much better each completion is than its group's mean.

    Source: GRPO (arXiv 2402.03300, 4.1.2) with TRL's unbiased std + 1e-4 and `scale_rewards` group | batch | none.

    Args:
        rewards: `[B, G]`. NaN marks a completion that got no reward (TRL's `None`): it is left out of mean and std
            and gets advantage 0.
        scale: divide by the std of the group, by the std of the whole batch, or not at all.

    Returns:
        `[B, G]`; exact zeros for a group of equal rewards and for G = 1.

    Raises:
        ValueError: rewards are not two-dimensional, or the scale is unknown.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape [B, G], got {tuple(rewards.shape)}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    valid = ~rewards.isnan()

    # Measured from the group's lowest reward, so that equal rewards give exact zeros whatever their mean rounds to.
    lowest = rewards.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    above = (rewards - lowest).masked_fill(~valid, 0.0)
    mean = above.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    centred = (above - mean).masked_fill(~valid, 0.0)

    if scale == "none":
        return centred
    if scale == "group":
        return centred / (_unbiased_std(centred, valid, dim=(1,)) + _STD_EPSILON)
    batch_mean = rewards.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
    batch_centred = (rewards - batch_mean).masked_fill(~valid, 0.0)
    return centred / (_unbiased_std(batch_centred, valid, dim=(0, 1)) + _STD_EPSILON)


def perspective_terms(
    adherence: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
    reward_scale: RewardScale = "group",
) -> Tensor:
    """What each perspective adds to each completion's advantage: scale * w_k / sum(w) * g_i * A(s_k)_i.  # ours

    Args:
        adherence: `[B, G, K]` scores in [0, 1]; NaN where the completion was prompted under another perspective, so
            that each perspective is normalised within its own completions and adds 0 to the others.
        weights: K finite, non-negative numbers; all zero gives zeros.
        scale: weight of all perspectives together against the outcome.
        gate: optional `[B, G]` multiplier (bool or float), for example 1 only where the answer is right.
        reward_scale: how each perspective's scores are normalised, see `group_relative`.

    Returns:
        `[B, G, K]`.

    Raises:
        ValueError: shapes do not match, or a weight is negative or not finite.
    """
    if adherence.dim() != 3:
        raise ValueError(f"adherence must have shape [B, G, K], got {tuple(adherence.shape)}")
    if not adherence.is_floating_point():
        adherence = adherence.float()
    weights = torch.as_tensor(weights, dtype=adherence.dtype, device=adherence.device)
    if weights.shape != adherence.shape[2:]:
        raise ValueError(f"weights {tuple(weights.shape)} must match the K of adherence {tuple(adherence.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"weights must be finite and non-negative, got {weights.tolist()}")
    if gate is not None and gate.shape != adherence.shape[:2]:
        raise ValueError(f"gate {tuple(gate.shape)} must match the [B, G] of adherence {tuple(adherence.shape)}")

    total = weights.sum()
    if not total > 0:
        return torch.zeros_like(adherence)
    terms = torch.stack([group_relative(scores, reward_scale) for scores in adherence.unbind(2)], dim=2)
    terms = scale * weights / total * terms
    return terms if gate is None else terms * gate.to(terms.dtype).unsqueeze(2)


def guideline_based(
    outcome: Tensor,
    adherence: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
    reward_scale: RewardScale = "group",
) -> Tensor:
    """Guideline-based advantages (GBA): the outcome's advantage plus every perspective's.  # ours

    A_i = A(r)_i + scale * sum_k w_k / sum(w) * g_i * A(s_k)_i; with all weights zero, bit for bit plain GRPO.

    Args:
        outcome: `[B, G]` outcome rewards (accuracy and format).
        adherence, weights, scale, gate, reward_scale: see `perspective_terms`.

    Returns:
        `[B, G]`.

    Raises:
        ValueError: shapes do not match, or a weight is negative or not finite.
    """
    if adherence.shape[:-1] != outcome.shape:
        raise ValueError(f"outcome {tuple(outcome.shape)} must match the [B, G] of adherence {tuple(adherence.shape)}")
    terms = perspective_terms(adherence, weights, scale=scale, gate=gate, reward_scale=reward_scale)
    base = group_relative(outcome, reward_scale)
    # Adding a zero would turn -0.0 into 0.0.
    return base + terms.sum(2) if any(float(weight) > 0 for weight in weights) else base
