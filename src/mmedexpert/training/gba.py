"""GBA: GRPO whose advantages carry the four clinical reasoning perspectives. One `training_step` per update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.models.encode import Encoder
from mmedexpert.models.packing import micro_batches, pack, token_logps
from mmedexpert.runtime.ranks import gather
from mmedexpert.training.fit import Stream, TrainingModule, batch_indices, gathered, share, step_seed
from mmedexpert.training.losses import LossType, masked_mean, policy_loss
from mmedexpert.training.rollouts import Rollout


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
        self.num_tokens, self.clock = 0, 0.0

    def training_step(self, rollout: Rollout, batch_idx: int) -> None:
        mask = rollout.mask.to(self.device)
        if self.mask_truncated_completions:
            mask = mask * rollout.finished[:, None].to(self.device)
        parts = self.weighted(
            micro_batches(self.encoder, rollout.prompts, rollout.completions, self.micro_batch_tokens)
        )
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
            width, banned = mask.shape[1], self.encoder.banned_ids
            for rows, weight in parts:
                packed = pack(
                    self.model, self.encoder, [rollout.prompts[row] for row in rows],
                    [rollout.completions[row] for row in rows],
                )  # fmt: skip
                if reference is not None:
                    with torch.no_grad(), self.model.disable_adapter():
                        frozen, _, _ = token_logps(self.model, packed, self.temperature, banned_ids=banned)
                    reference[rows] = packed.matrix(frozen, width)
                values, spread, _ = token_logps(self.model, packed, self.temperature, banned_ids=banned)
                now = packed.matrix(values, width)
                if weight:
                    logps[rows], entropy[rows] = now.detach(), packed.matrix(spread, width)
                yield weight * loss(now, rows, **whole)[0]

        self.descend(losses(), len(parts))
        total, metrics = loss(logps, slice(None), **whole)
        rollout.old_logps = logps if old is None else old
        difference = (logps - rollout.sampling_logps.to(self.device)).abs() * rollout.mask.to(self.device)
        drawn = self.over_ranks(rollout.mask.sum().to(self.device))
        self.log("sampling/sampling_logp_difference/mean", self.over_ranks(difference.sum()) / drawn)
        metrics["sampling/sampling_logp_difference/max"] = difference.max()
        metrics["entropy"] = masked_mean(entropy, mask)
        tokens = mask.sum() / whole["num_items"].clamp(min=1)  # of this rank, as a share of the mean
        for name, value in metrics.items():
            extreme = name[-3:] if name.endswith(("min", "max")) else None
            self.log(name, self.over_ranks(value, extreme) if extreme else self.over_ranks(value * tokens))
        self.log("loss", self.over_ranks(total))
        self.log_dict(self.pace(rollout))
        reported = report(gather_rollout(rollout))
        self.log_dict({key: reported.pop(key) for key in ("reward", "adherence")}, prog_bar=True)
        self.log_dict(reported)

    def pace(self, rollout: Rollout) -> dict[str, float]:
        """TRL's `step_time` and `num_tokens`, and verl's `timing_s/` and `perf/`: rollout and update together."""
        now = time.perf_counter()
        tokens = sum(map(len, rollout.completions)) + sum(len(prompt.input_ids) for prompt in rollout.prompts)
        tokens = sum(gather(tokens))
        self.num_tokens += tokens
        step, self.clock = now - self.clock, now
        return {
            "step_time": step,
            "num_tokens": float(self.num_tokens),
            "perf/throughput": tokens / step,
            **{f"timing_s/{name}": seconds for name, seconds in rollout.seconds.items()},
            "timing_s/update_actor": step - sum(rollout.seconds.values()),
        }

    def on_train_start(self) -> None:
        self.clock = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_tokens"] = self.num_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.num_tokens = checkpoint["num_tokens"]


def gather_rollout(rollout: Rollout) -> Rollout:
    """The shares of all ranks as one rollout in the order of the batch, for what is logged: without prompts and ids."""
    logged = {name: getattr(rollout, name).cpu() for name in ("sampling_logps", "mask", "finished")}
    return reduce(Rollout.join, gather(replace(rollout, prompts=[], completions=[], old_logps=None, **logged)))


def report(rollout: Rollout) -> dict[str, float]:
    """TRL's metric names, and ours under `advantages/` and `adherence/`.

    `reward_std` is the deviation of all rewards, as in TRL; `reward_std_group` the mean of those within groups.
    """
    lengths = rollout.mask.sum(1).float()
    ended = lengths[rollout.finished] if rollout.finished.any() else torch.zeros(1)
    rewards = rollout.outcome
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_std_group": rewards.std(dim=1).mean(),
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.float().mean(),
        "completions/mean_terminated_length": ended.mean(),
        "completions/min_terminated_length": ended.min(),
        "completions/max_terminated_length": ended.max(),
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
    dynamic_sampling: int = 0,
    settle: Callable[[Rollout], None] | None = None,
    watch: Callable[[int, list[Record], Rollout], None] | None = None,
    policy: nn.Module | None = None,
    rank: int = 0,
    ranks: int = 1,
    draws: int = 0,
) -> Stream:
    """Rollouts of the current policy, each used for `num_iterations` updates; starts at a rollout boundary.

    With `dynamic_sampling` (DAPO, arXiv 2503.14476, 3.2), groups whose advantages are all zero are replaced by those of
    other records, at most so many times for a rollout. `settle` gets the complete rollout before it is used.

    Of several ranks each samples for its share of the prompts, with the weights of `policy` whole; `watch` gets the
    rollout of all, on each. `draws`: the random numbers a prompt takes; those of the prompts of the ranks before are
    passed over, so that completions do not depend on the number of ranks.
    """

    def stream(step: int) -> Iterator[Rollout]:
        for number, chosen in enumerate(
            batch_indices(len(records), prompts_per_step, seed, step // num_iterations), step // num_iterations
        ):
            generator = torch.Generator().manual_seed(step_seed(seed, number))
            batch = [records[i] for i in share(chosen, rank, ranks)]
            torch.rand(len(chosen) * rank // ranks * draws, generator=generator, dtype=torch.float64)
            with gathered(policy):
                rollout = sample(batch, generator)
                for _ in range(dynamic_sampling):
                    kept = rollout.informative()
                    missing = len(batch) - len(kept)
                    if not missing:
                        break
                    other = [records[int(i)] for i in torch.randint(len(records), (missing,), generator=generator)]
                    batch = [batch[b] for b in kept] + other
                    rollout = rollout.take(kept).join(sample(other, generator))
            if settle is not None:
                settle(rollout)
            if watch is not None:
                watch(number, [record for part in gather(batch) for record in part], gather_rollout(rollout))
            for _ in range(num_iterations):
                yield rollout

    return stream


def completion_rows(step: int, records: Sequence[Record], rollout: Rollout, image_root: Any) -> list[dict[str, Any]]:
    """The completions table: one row per completion, with its image, rewards, adherence and advantage."""
    group = rollout.outcome.shape[1]
    rows = []
    for i, text in enumerate(rollout.texts):
        record, b, g = records[i // group], i // group, i % group
        row: dict[str, Any] = {"step": step, "record": record.id, "image": str(image_root / record.images[0])}
        row["question"] = record.question
        row |= {"perspective": rollout.perspectives[i] or "none", "completion": text, "answer": record.answer}
        row |= {name: values[i] for name, values in rollout.parts.items()}
        row |= {f"adherence_{name}": float(rollout.adherence[b, g, k]) for k, name in enumerate(PERSPECTIVES)}
        rows.append({**row, "advantage": float(rollout.advantages[b, g])})
    return rows
