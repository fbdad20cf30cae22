"""Log-probabilities of chosen tokens from hidden states, without the logits of a whole batch in memory.

Shapes: N states, H hidden size, V vocabulary size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LOGITS, _ROWS = 2**22, 256  # ours: logits at a time (16 MB in fp32 stay near a CPU), and positions at least


_NEVER = -1e30  # a logit without a chance that stays finite: its share of the entropy is 0 and not NaN


def selected_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    rows: int | None = None,
    *,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each chosen token, the entropy of its distribution, and whether the token is the likeliest.

    No `[S, V]` tensor of all positions exists: the vocabulary projection runs over `rows` positions at a time. With a
    frozen head the gradient is known in the same pass, d logp / d hidden = W[id] - p W, and the backward pass projects
    nothing; with a trained head each block is computed again there.

    Args:
        hidden: `[..., H]` last hidden states, already shifted: a position predicts the token of its place.
        lm_head_weight: `[V, H]`.
        token_ids: `[...]`, in [0, V).
        temperature: logits are divided by it, as they were when sampling.
        banned_ids: ids that have no chance, as when sampling; none of `token_ids` is one.

    Returns:
        Three `[...]`: log-probabilities and detached entropies (nats; fp32, or fp64 for fp64 inputs), and bool.

    Raises:
        ValueError: shapes do not match, or temperature or rows is not positive.
    """
    if hidden.shape[:-1] != token_ids.shape or hidden.shape[-1:] != lm_head_weight.shape[1:]:
        raise ValueError(
            f"expected hidden [..., H], lm_head_weight [V, H], token_ids [...]; got {tuple(hidden.shape)}, "
            f"{tuple(lm_head_weight.shape)}, {tuple(token_ids.shape)}"
        )
    rows = max(_ROWS, _LOGITS // len(lm_head_weight)) if rows is None else rows
    if not temperature > 0 or rows < 1:
        raise ValueError(f"temperature and rows must be positive, got {temperature} and {rows}")
    trained, whole = lm_head_weight.requires_grad and torch.is_grad_enabled(), token_ids.numel() <= rows
    parts = []
    states = hidden.reshape(-1, hidden.shape[-1])
    for part, ids in zip(states.split(rows), token_ids.flatten().split(rows), strict=True):
        if not trained:
            parts.append(_FrozenHead.apply(part, lm_head_weight, ids, temperature, banned_ids))
        elif whole:
            parts.append(_block(part, lm_head_weight, ids, temperature, banned_ids))
        else:
            parts.append(checkpoint(_block, part, lm_head_weight, ids, temperature, banned_ids, use_reentrant=False))
    logps, entropy, likeliest = (torch.cat(column).view(token_ids.shape) for column in zip(*parts, strict=True))
    return logps, entropy, likeliest


def _block(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, banned_ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if banned_ids:
        logits[..., list(banned_ids)] = _NEVER
    logits = logits / temperature
    logps = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
        likeliest = logits.argmax(-1) == ids
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy, likeliest


class _FrozenHead(torch.autograd.Function):
    """One block of `selected_logps` whose gradient with respect to the hidden states is formed at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, banned_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ weight.t()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if banned_ids:
            logits[..., list(banned_ids)] = _NEVER
        all_logps = (logits if temperature == 1 else logits.div_(temperature)).log_softmax(-1)
        logps = all_logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        likeliest = logps >= all_logps.amax(-1)
        chances = torch.exp(all_logps, out=logits)
        entropy = -(chances * all_logps).sum(-1)  # not vecdot, which autocast would do in 16 bits
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((weight[ids] - chances.to(weight.dtype) @ weight).div_(temperature))
        ctx.mark_non_differentiable(entropy, likeliest)
        return logps, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * gradients[0].unsqueeze(-1).to(direction.dtype), None, None, None, None
