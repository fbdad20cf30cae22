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
    """What each perspective adds to each completion's advantage; it sums to zero over every group.  # ours

    t_ik = scale * (v_ik - mean_G v_k) with v_ik = g_i * w_k * A(s_k)_i / n_i, where n_i perspectives were asked of i.
    Centred again behind the gate: without it the gate's zeros would leave a group a sum above zero (docs/usage.md).

    Args:
        adherence: `[B, G, K]` scores in [0, 1]; NaN where the perspective was not asked of the completion, so that
            each perspective is normalised within its own completions and adds nothing to the others but the centre.
        weights: K finite, non-negative multipliers, never normalised: changing one changes that perspective's term.
        scale: multiplier of all terms, against the outcome's advantage.
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

    terms = torch.stack([group_relative(scores, reward_scale) for scores in adherence.unbind(2)], dim=2)
    asked = (~adherence.isnan()).sum(2, keepdim=True).clamp(min=1)
    terms = weights * terms / asked
    if gate is not None:
        terms = terms * gate.to(terms.dtype).unsqueeze(2)
    return scale * (terms - terms.mean(1, keepdim=True))


def followed_and_right(adherence: Tensor, right: Tensor) -> Tensor:
    """How much more often a group's completions are right the more they follow each perspective.  # ours

    p_k = mean over the completions asked of A(s_k)_i * (r_i - mean r): the covariance of being right with what
    `perspective_terms` pays for, a standard deviation of following; exactly 0 where all follow alike, are all right or
    all wrong.

    Args:
        adherence: `[B, G, K]` scores in [0, 1]; NaN where the perspective was not asked of the completion.
        right: `[B, G]`, 1 where the answer is right.

    Returns:
        `[B, K]`, in [-1, 1].

    Raises:
        ValueError: shapes do not match.
    """
    if adherence.shape[:-1] != right.shape:
        raise ValueError(f"right {tuple(right.shape)} must match the [B, G] of adherence {tuple(adherence.shape)}")
    followed = torch.stack([group_relative(scores) for scores in adherence.unbind(2)], dim=2)
    asked = ~adherence.isnan()
    given = right.unsqueeze(2).where(asked, torch.nan)
    more = torch.stack([group_relative(one, "none") for one in given.unbind(2)], dim=2)
    return (followed * more).sum(1) / asked.sum(1).clamp(min=1)


def within_perspectives(
    rewards: Tensor, asked: Sequence[int], weights: Sequence[float] | Tensor, scale: RewardScale = "group"
) -> Tensor:
    """`group_relative` among the completions of a group that one perspective was asked of, times its weight.  # ours

    Args:
        rewards: `[B, G]`.
        asked: the perspective of each of the G completions, as a place in `weights`.
        weights, scale: see `perspective_terms`, `group_relative`.

    Returns:
        `[B, G]`.

    Raises:
        ValueError: as many places as completions are needed.
    """
    if len(asked) != rewards.shape[1]:
        raise ValueError(f"{len(asked)} completions were asked for, {rewards.shape[1]} have rewards")
    found = torch.zeros_like(rewards if rewards.is_floating_point() else rewards.float())
    for place in sorted(set(asked)):
        columns = [g for g, name in enumerate(asked) if name == place]
        found[:, columns] = float(weights[place]) * group_relative(rewards[:, columns], scale)
    return found


def guideline_based(
    outcome: Tensor,
    adherence: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
    reward_scale: RewardScale = "group",
    asked: Sequence[int] | None = None,
) -> Tensor:
    """Guideline-based advantages (GBA): the outcome's advantage plus every perspective's term.  # ours

    A_i = A(r)_i + sum_k t_ik (docs/usage.md); with all weights or the scale zero, bit for bit plain GRPO.

    Args:
        outcome: `[B, G]` outcome rewards (accuracy and format).
        adherence, weights, scale, gate, reward_scale: see `perspective_terms`.
        asked: the perspective of each of the G completions; A(r) is then `within_perspectives`, weights and all.

    Returns:
        `[B, G]`.

    Raises:
        ValueError: shapes do not match, or a weight is negative or not finite.
    """
    if adherence.shape[:-1] != outcome.shape:
        raise ValueError(f"outcome {tuple(outcome.shape)} must match the [B, G] of adherence {tuple(adherence.shape)}")
    terms = perspective_terms(adherence, weights, scale=scale, gate=gate, reward_scale=reward_scale)
    if asked is None:
        base = group_relative(outcome, reward_scale)
    else:
        base = within_perspectives(outcome, asked, weights, reward_scale)
    # Adding a zero would turn -0.0 into 0.0.
    return base + terms.sum(2) if scale and any(float(weight) > 0 for weight in weights) else base
