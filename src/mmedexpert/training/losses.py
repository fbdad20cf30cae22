"""Policy-gradient losses with TRL's definitions.

Shapes: N completions, T completion tokens.
"""

from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "gspo"]
Correction = Literal["none", "truncate", "sequence_mask"]

_MAX_LOG_RATIO = 20.0  # peers: verl, EasyR1 (exp(89) overflows fp32)
_MAX_KL = 10.0  # peers: verl, EasyR1


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true, over `dim` (None: over everything); 0 where nothing is.

    A masked entry never reaches the result or the gradient, not even when it is NaN or infinite.
    """
    mask = mask.bool()
    kept = values.masked_fill(~mask, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def kl_k3(per_token_logps: Tensor, ref_per_token_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token, clamped; shape of its inputs, in [0, 10].

    Source: GRPO (arXiv 2402.03300), eq. 4; log-ratio and value clamped as verl and EasyR1 do.
    """
    log_ratio = (ref_per_token_logps - per_token_logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1).clamp(max=_MAX_KL)


def sampler_weights(
    per_token_logps: Tensor,
    sampling_logps: Tensor,
    completion_mask: Tensor,
    correction: Correction,
    *,
    truncate_at: float = 2.0,
    mask_above: float = 3.0,
) -> Tensor:
    """How much likelier the trainer holds what another engine sampled: importance weights [N, T], or [N, 1], detached.

    With d the trainer's log-probability less the sampler's:

    - `truncate` (truncated importance sampling; Ionides 2008, verl's `rollout_is`): min(exp(d), truncate_at) per token;
    - `sequence_mask` (TRL's default): exp(sum of d over the completion), and 0 where that is above `mask_above`.

    A masked entry has weight 1, or does not count towards its completion's; ValueError for another correction.
    """
    mask = completion_mask.bool()
    difference = (per_token_logps.detach() - sampling_logps).masked_fill(~mask, 0.0)
    if correction == "truncate":
        return difference.clamp(max=_MAX_LOG_RATIO).exp().clamp(max=truncate_at)
    if correction == "sequence_mask":
        weights = difference.sum(1, keepdim=True).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        return weights.masked_fill(weights > mask_above, 0.0)
    raise ValueError(f"correction must be truncate or sequence_mask, got {correction!r}")


def policy_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    loss_type: LossType = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_per_token_logps: Tensor | None = None,
    max_completion_length: int | None = None,
    num_items: int | Tensor | None = None,
    num_completions: int | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss of GRPO and three of its variants, TRL's definitions.

    With r the policy ratio, m the mask and l = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta * kl:

    - `grpo` (arXiv 2402.03300): mean over completions of sum(l m) / sum(m);
    - `dr_grpo` (arXiv 2503.20783): sum(l m) / (N * max_completion_length);
    - `dapo` (arXiv 2503.14476): sum(l m) / num_items;
    - `gspo` (arXiv 2507.18071): as `grpo`, with one ratio per completion, r = exp(mean over tokens of the log-ratio).

    Args:
        per_token_logps, old_per_token_logps, ref_per_token_logps: `[N, T]` log-probabilities (nats) of the sampled
            tokens under the policy, the policy that sampled them, and the frozen reference.
        advantages: `[N]`.
        completion_mask: `[N, T]`, true on tokens that count. An all-false row (a truncated completion) adds nothing.
        epsilon, epsilon_high: clip range; `epsilon_high` (clip-higher) is `epsilon` when None.
        beta: weight of the KL penalty; above 0 it needs `ref_per_token_logps`.
        max_completion_length: normaliser of `dr_grpo`.
        num_items: normaliser of `dapo`: counted tokens of the whole generation batch; those of this call when None.
        num_completions: N of the whole generation batch, for the other losses; that of this call when None. With both
            given, the losses of a batch's parts add up to the loss of the batch.
        weights: `[N, T]` or `[N, 1]` of `sampler_weights`, by which the clipped term (not the KL) is multiplied, as
            TRL does; None where the policy itself has sampled, which is weight 1.

    Returns:
        The scalar loss, and detached scalars `clip_ratio/low_mean`, `clip_ratio/low_min`, `clip_ratio/high_mean`,
        `clip_ratio/high_max`, `clip_ratio/region_mean` and, given a reference, `kl`.

    Raises:
        ValueError: shapes do not match, the loss type is unknown, or an argument it needs is missing.
    """
    shape = per_token_logps.shape
    if len(shape) != 2 or old_per_token_logps.shape != shape or completion_mask.shape != shape:
        raise ValueError("per_token_logps, old_per_token_logps and completion_mask must share one shape [N, T]")
    if advantages.shape != shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} must be [N] for log-probabilities {tuple(shape)}")
    if ref_per_token_logps is not None and ref_per_token_logps.shape != shape:
        raise ValueError(f"ref_per_token_logps {tuple(ref_per_token_logps.shape)} must have shape {tuple(shape)}")
    if beta != 0 and ref_per_token_logps is None:
        raise ValueError("beta > 0 needs ref_per_token_logps")

    mask = completion_mask.bool()
    # Masked before exp: a padded position may hold -inf, and inf * 0 is NaN.
    log_ratio = (per_token_logps - old_per_token_logps).masked_fill(~mask, 0.0)
    if loss_type == "gspo":
        log_ratio = masked_mean(log_ratio, mask, dim=1).unsqueeze(1).expand(shape)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    lower, upper = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    advantage = advantages.unsqueeze(1)
    per_token_loss = -torch.min(ratio * advantage, ratio.clamp(lower, upper) * advantage)
    if weights is not None:
        per_token_loss = per_token_loss * weights

    low = ((ratio < lower) & (advantage < 0)).to(ratio.dtype)
    high = ((ratio > upper) & (advantage > 0)).to(ratio.dtype)

    def clip_mean(clipped: Tensor) -> Tensor:
        # TRL counts tokens, and for sequence-level ratios completions.
        return masked_mean(clipped[:, 0], mask.any(1)) if loss_type == "gspo" else masked_mean(clipped, mask)

    rows = mask.any(1)

    def by_row(clipped: Tensor) -> Tensor:
        shares = masked_mean(clipped, mask, dim=1)[rows]
        return shares if len(shares) else shares.new_zeros(1)

    metrics = {
        "clip_ratio/low_mean": clip_mean(low),
        "clip_ratio/low_min": by_row(low).min(),
        "clip_ratio/high_mean": clip_mean(high),
        "clip_ratio/high_max": by_row(high).max(),
        "clip_ratio/region_mean": clip_mean(low + high),
    }
    if ref_per_token_logps is not None:
        kl = kl_k3(per_token_logps.masked_fill(~mask, 0.0), ref_per_token_logps.masked_fill(~mask, 0.0))
        per_token_loss = per_token_loss + beta * kl
        metrics["kl"] = masked_mean(kl.detach(), mask)

    completions = torch.as_tensor(shape[0] if num_completions is None else num_completions)
    if loss_type in ("grpo", "gspo"):
        return masked_mean(per_token_loss, mask, dim=1).sum() / completions, metrics
    total = per_token_loss.masked_fill(~mask, 0.0).sum()
    if loss_type == "dapo":
        return total / torch.as_tensor(mask.sum() if num_items is None else num_items).clamp(min=1), metrics
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("dr_grpo needs max_completion_length")
        return total / (completions * max_completion_length), metrics
    raise ValueError(f"loss_type must be grpo, dr_grpo, dapo or gspo, got {loss_type!r}")
