"""GBA: GRPO whose advantages carry the four clinical reasoning perspectives. One `training_step` per update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from mmedexpert.data.record import Record
from mmedexpert.models.encode import Encoder
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.runtime.ranks import gather, rank, ranks
from mmedexpert.training.batches import Stream, batch_indices, share, step_seed
from mmedexpert.training.losses import Correction, LossType, masked_mean, policy_loss, sampler_weights
from mmedexpert.training.module import TrainingModule
from mmedexpert.training.rollout_report import report
from mmedexpert.training.rollouts import Rollout


@dataclass(frozen=True)
class Objective:
    """What an update minimises (`losses.policy_loss`), the temperature that completions were sampled at, and how what
    another engine sampled is weighed (`losses.sampler_weights`)."""

    loss_type: LossType
    epsilon: float
    epsilon_high: float | None
    beta: float
    temperature: float
    max_completion_length: int
    mask_truncated_completions: bool
    correction: Correction = "none"
    truncate_at: float = 2.0
    mask_above: float = 3.0


@dataclass
class _Batch:
    """The N completions of one update, T tokens at most; micro-batches fill in what the policy says of them."""

    mask: Tensor  # [N, T], the tokens that are trained
    advantages: Tensor  # [N]
    old: Tensor | None  # [N, T]; None at the first update, when the policy is the one that sampled
    normalisers: dict[str, Tensor]  # of the whole batch, over all ranks
    logps: Tensor  # [N, T]
    entropy: Tensor  # [N, T]
    reference: Tensor | None  # [N, T], None without a KL term
    sampled: Tensor | None  # [N, T], what the engine that sampled says of its tokens; None where that needs no weight


class GbaModule(TrainingModule):
    """The policy is a LoRA on a frozen start; the reference is that start, the same model with its adapter off."""

    def __init__(
        self,
        model: PeftModel,
        encoder: Encoder,
        objective: Objective,
        *,
        lr: float,
        weight_decay: float,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.objective = model, encoder, objective
        self.lr, self.weight_decay = lr, weight_decay
        self.num_tokens, self.clock = 0, 0.0

    def update(self, rollout: Rollout) -> None:
        parts = self.weighted(self.passes.cut(self.encoder, rollout.prompts, rollout.completions))
        batch = self._batch(rollout)
        self.descend((self._micro_batch_loss(rollout, batch, *part) for part in parts), len(parts))
        loss, metrics = self._loss(batch, batch.logps, slice(None))
        rollout.old_logps = batch.logps if batch.old is None else batch.old
        self._log_update(rollout, batch, loss, metrics)
        self.log_dict(self.pace(rollout))
        reported = report(gather_rollout(rollout))
        self.log_dict({key: reported.pop(key) for key in ("reward", "adherence")}, prog_bar=True)
        self.log_dict(reported)

    def _batch(self, rollout: Rollout) -> _Batch:
        mask = rollout.mask.to(self.device)
        if self.objective.mask_truncated_completions:
            mask = mask * rollout.finished[:, None].to(self.device)
        normalisers = {
            "num_completions": self.over_ranks(torch.tensor(len(mask), device=self.device)),
            "num_items": self.over_ranks(mask.sum()),
        }
        logps, entropy, reference = torch.zeros(3, *mask.shape, device=self.device)
        advantages = rollout.advantages.flatten().to(self.device)
        compared = reference if self.objective.beta > 0 else None
        sampled = None if self.objective.correction == "none" else rollout.sampling_logps.to(self.device)
        return _Batch(mask, advantages, rollout.old_logps, normalisers, logps, entropy, compared, sampled)

    def _micro_batch_loss(self, rollout: Rollout, batch: _Batch, rows: list[int], weight: float) -> Tensor:
        """The loss of some completions, with its graph; a part of weight 0 only keeps step with other ranks."""
        temperature, banned = self.objective.temperature, self.encoder.banned_ids
        prompts, completions = [rollout.prompts[row] for row in rows], [rollout.completions[row] for row in rows]
        packed, width = pack(self.model, self.encoder, prompts, completions), batch.mask.shape[1]
        if batch.reference is not None:
            with torch.no_grad(), self.model.disable_adapter():
                frozen, _, _ = token_logps(self.model, packed, temperature, banned_ids=banned)
            batch.reference[rows] = packed.matrix(frozen, width)
        values, entropies, _ = token_logps(self.model, packed, temperature, banned_ids=banned)
        logps = packed.matrix(values, width)
        if weight:
            batch.logps[rows], batch.entropy[rows] = logps.detach(), packed.matrix(entropies, width)
        return weight * self._loss(batch, logps, rows)[0]

    def _loss(self, batch: _Batch, logps: Tensor, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        objective = self.objective
        # at the first update the policy is the one that sampled: its log-probabilities are these, detached
        old = logps.detach() if batch.old is None else batch.old[rows]
        return policy_loss(
            logps,
            old,
            batch.advantages[rows],
            batch.mask[rows],
            loss_type=objective.loss_type,
            epsilon=objective.epsilon,
            epsilon_high=objective.epsilon_high,
            beta=objective.beta,
            ref_per_token_logps=None if batch.reference is None else batch.reference[rows],
            max_completion_length=objective.max_completion_length,
            weights=self._weights(batch, old, rows),
            **batch.normalisers,
        )

    def _weights(self, batch: _Batch, old: Tensor, rows: Any) -> Tensor | None:
        if batch.sampled is None:
            return None
        objective = self.objective
        return sampler_weights(
            old, batch.sampled[rows], batch.mask[rows], objective.correction, truncate_at=objective.truncate_at,
            mask_above=objective.mask_above,
        )  # fmt: skip

    def _log_update(self, rollout: Rollout, batch: _Batch, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        sampled = rollout.mask.to(self.device)
        difference = (batch.logps - rollout.sampling_logps.to(self.device)).abs() * sampled
        mean = self.over_ranks(difference.sum()) / self.over_ranks(sampled.sum())
        self.log("sampling/sampling_logp_difference/mean", mean)
        metrics["sampling/sampling_logp_difference/max"] = difference.max()
        metrics["entropy"] = masked_mean(batch.entropy, batch.mask)
        if batch.sampled is not None:
            weights = self._weights(batch, cast(Tensor, rollout.old_logps), slice(None))
            metrics |= _of_weights(cast(Tensor, weights).expand_as(batch.mask)[batch.mask.bool()])
        tokens = batch.mask.sum() / batch.normalisers["num_items"].clamp(min=1)  # this rank's share of the mean
        for name, value in metrics.items():
            extreme = name[-3:] if name.endswith(("min", "max")) else None
            self.log(name, self.over_ranks(value, extreme) if extreme else self.over_ranks(value * tokens))
        self.log("loss", self.over_ranks(loss))

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
        super().on_train_start()
        self.clock = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_tokens"] = self.num_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.num_tokens = checkpoint["num_tokens"]


def _of_weights(weights: Tensor) -> dict[str, Tensor]:
    """TRL's names of the importance weights' least, mean and greatest, and the share of the tokens that they are worth:
    (sum of w)^2 / (n * sum of w^2), Kish's effective sample size."""
    weights = weights if len(weights) else weights.new_ones(1)
    name = "sampling/importance_sampling_ratio/"
    effective = weights.sum().square() / (len(weights) * weights.square().sum()).clamp(min=1e-12)
    return {
        f"{name}min": weights.min(), f"{name}mean": weights.mean(), f"{name}max": weights.max(),
        "sampling/effective_sample_size": effective,
    }  # fmt: skip


def gather_rollout(rollout: Rollout) -> Rollout:
    """The shares of all ranks as one rollout in the order of the batch, for what is logged: without prompts and ids."""
    logged = {name: getattr(rollout, name).cpu() for name in ("sampling_logps", "mask", "finished")}
    return reduce(Rollout.join, gather(replace(rollout, prompts=[], completions=[], old_logps=None, **logged)))


def rollout_stream(
    records: Sequence[Record],
    sample: Callable[[list[Record], list[int]], Rollout],
    *,
    prompts_per_step: int,
    num_iterations: int,
    seed: int,
    dynamic_sampling: int = 0,
    settle: Callable[[Rollout], None] | None = None,
    watch: Callable[[int, list[Record], Rollout], None] | None = None,
) -> Stream:
    """Rollouts of the current policy, each used for `num_iterations` updates; starts at a rollout boundary.

    `sample` gets records and a seed for each. With `dynamic_sampling` (DAPO, arXiv 2503.14476, 3.2), groups whose
    advantages are all zero are replaced by those of other records, at most so many times for a rollout. `settle` gets
    the complete rollout before it is used. Of several ranks each samples for its share of the prompts, and `watch` gets
    the rollout of all, on each. A record's seed follows from `seed`, the rollout and its place in the batch: what is
    sampled does not depend on the number of ranks.
    """

    def draw(places: Sequence[int], number: int, attempt: int, chosen: Sequence[int]) -> Rollout:
        return sample([records[i] for i in chosen], [step_seed(seed, number, place, attempt) for place in places])

    def stream(step: int) -> Iterator[Rollout]:
        first = step // num_iterations
        for number, whole in enumerate(batch_indices(len(records), prompts_per_step, seed, first), first):
            places, chosen = zip(*share(list(enumerate(whole)), rank(), ranks()), strict=True)
            rollout = draw(places, number, 0, chosen)
            for attempt in range(1, dynamic_sampling + 1):
                kept = rollout.informative()
                empty = [b for b in range(len(chosen)) if b not in kept]
                if not empty:
                    break
                again = [places[b] for b in empty]
                other = [step_seed(seed, number, place, attempt, 1) % len(records) for place in again]
                rollout = rollout.take(kept).join(draw(again, number, attempt, other))
                places, chosen = (*(places[b] for b in kept), *again), (*(chosen[b] for b in kept), *other)
            if settle is not None:
                settle(rollout)
            if watch is not None:
                watch(number, [records[i] for part in gather(chosen) for i in part], gather_rollout(rollout))
            for _ in range(num_iterations):
                yield rollout

    return stream
