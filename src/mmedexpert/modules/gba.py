"""GBA: GRPO whose advantages carry the four clinical reasoning perspectives. One `training_step` per update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mmedexpert.data.encode import Encoder
from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.losses import LossType, masked_mean, policy_loss
from mmedexpert.modules.fit import Stream, TrainingModule, batch_indices, step_seed
from mmedexpert.packing import micro_batches, pack, token_logps
from mmedexpert.rollouts import Rollout


class GbaModule(TrainingModule):
    """The policy is a LoRA on a frozen start; the reference is that start, the same model with its adapter off."""

    def __init__(
        self,
        model: PeftModel,
        encoder: Encoder,
        *,
        lr: float,
        weight_decay: float,
        loss_type: LossType,
        epsilon: float,
        epsilon_high: float | None,
        beta: float,
        temperature: float,
        max_completion_length: int,
        mask_truncated_completions: bool,
        micro_batch_tokens: int | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.lr, self.weight_decay = model, encoder, lr, weight_decay
        self.loss_type: LossType = loss_type
        self.epsilon, self.epsilon_high, self.beta = epsilon, epsilon_high, beta
        self.temperature, self.max_completion_length = temperature, max_completion_length
        self.mask_truncated_completions = mask_truncated_completions
        self.micro_batch_tokens = micro_batch_tokens

    def training_step(self, rollout: Rollout, batch_idx: int) -> None:
        mask = rollout.mask.to(self.device)
        if self.mask_truncated_completions:
            mask = mask * rollout.finished[:, None].to(self.device)
        parts = micro_batches(self.encoder, rollout.prompts, rollout.completions, self.micro_batch_tokens)
        whole = {
            "num_completions": self.over_ranks(torch.tensor(len(mask), device=self.device)),
            "num_items": self.over_ranks(mask.sum()),
        }
        logps, entropy = torch.zeros(2, *mask.shape, device=self.device)
        reference = torch.zeros_like(logps) if self.beta > 0 else None
        advantages = rollout.advantages.flatten().to(self.device)
        old = rollout.old_logps

        def loss(logps: Tensor, rows: Any, **normalisers: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return policy_loss(
                logps,
                # at the first update the policy is the one that sampled: its log-probabilities are these, detached
                logps.detach() if old is None else old[rows],
                advantages[rows],
                mask[rows],
                loss_type=self.loss_type,
                epsilon=self.epsilon,
                epsilon_high=self.epsilon_high,
                beta=self.beta,
                ref_per_token_logps=None if reference is None else reference[rows],
                max_completion_length=self.max_completion_length,
                **normalisers,
            )

        def losses() -> Iterator[Tensor]:
            width = mask.shape[1]
            for rows in parts:
                packed = pack(
                    self.model, self.encoder, [rollout.prompts[row] for row in rows],
                    [rollout.completions[row] for row in rows],
                )  # fmt: skip
                if reference is not None:
                    with torch.no_grad(), self.model.disable_adapter():
                        frozen, _, _ = token_logps(self.model, packed, self.temperature)
                    reference[rows] = packed.matrix(frozen, width)
                values, spread, _ = token_logps(self.model, packed, self.temperature)
                now = packed.matrix(values, width)
                logps[rows], entropy[rows] = now.detach(), packed.matrix(spread, width)
                yield loss(now, rows, **whole)[0]

        self.descend(losses(), len(parts))
        total, metrics = loss(logps, slice(None))
        rollout.old_logps = logps if old is None else old
        self.log_dict({"loss": total, "entropy": masked_mean(entropy, mask), **metrics})
        reported = report(rollout)
        self.log_dict({key: reported.pop(key) for key in ("reward", "adherence")}, prog_bar=True)
        self.log_dict(reported)

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)


def report(rollout: Rollout) -> dict[str, float]:
    """TRL's metric names, and ours under `advantages/` and `adherence/`.

    `reward_std` is the mean deviation within groups; `reward_std_batch` that of the whole batch.
    """
    lengths = rollout.mask.sum(1).float()
    rewards = rollout.outcome
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(dim=1).mean(),
        "reward_std_batch": rewards.std(),
        "frac_reward_zero_std": (rewards.std(dim=1) == 0).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.float().mean(),
        "advantages/std": rollout.advantages.std(),
        "adherence": rollout.adherence.nanmean().nan_to_num(),
    }
    for name, values in rollout.parts.items():
        metrics[f"rewards/{name}/mean"] = torch.tensor(values).mean()
        metrics[f"rewards/{name}/std"] = torch.tensor(values).std()
    for k, name in enumerate(PERSPECTIVES):
        if not rollout.adherence[..., k].isnan().all():
            metrics[f"adherence/{name}"] = rollout.adherence[..., k].nanmean()
            # the mean of centred terms says little: their mean size says how much a perspective steers
            metrics[f"advantages/{name}/mean"] = rollout.terms[..., k].mean()
            metrics[f"advantages/{name}/mean_abs"] = rollout.terms[..., k].abs().mean()
    return {key: float(value) for key, value in metrics.items()}


def rollout_stream(
    records: Sequence[Record],
    sample: Callable[[list[Record], torch.Generator], Rollout],
    *,
    prompts_per_step: int,
    num_iterations: int,
    seed: int,
    watch: Callable[[int, list[Record], Rollout], None] | None = None,
) -> Stream:
    """Rollouts of the current policy, each used for `num_iterations` updates; starts at a rollout boundary."""

    def stream(step: int) -> Iterator[Rollout]:
        for number, chosen in enumerate(
            batch_indices(len(records), prompts_per_step, seed, step // num_iterations), step // num_iterations
        ):
            generator = torch.Generator().manual_seed(step_seed(seed, number))
            batch = [records[i] for i in chosen]
            rollout = sample(batch, generator)
            if watch is not None:
                watch(number, batch, rollout)
            for _ in range(num_iterations):
                yield rollout

    return stream


def completion_rows(step: int, records: Sequence[Record], rollout: Rollout, image_root: Any) -> list[dict[str, Any]]:
    """The completions table: one row per completion, with its image, rewards, adherence and advantage."""
    group = rollout.outcome.shape[1]
    rows = []
    for i, text in enumerate(rollout.texts):
        record, b, g = records[i // group], i // group, i % group
        row: dict[str, Any] = {"step": step, "image": str(image_root / record.images[0]), "question": record.question}
        row |= {"perspective": rollout.perspectives[i] or "none", "completion": text, "answer": record.answer}
        row |= {name: values[i] for name, values in rollout.parts.items()}
        row |= {f"adherence_{name}": float(rollout.adherence[b, g, k]) for k, name in enumerate(PERSPECTIVES)}
        rows.append({**row, "advantage": float(rollout.advantages[b, g])})
    return rows
