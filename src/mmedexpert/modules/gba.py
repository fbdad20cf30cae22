"""GBA: GRPO whose advantages carry the four clinical reasoning perspectives. One `training_step` per update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from mmedexpert.data.encode import Encoder, to_device
from mmedexpert.data.record import Record
from mmedexpert.engines.generate import core_of, positions
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.losses import LossType, masked_mean, policy_loss, selected_logps_and_entropy
from mmedexpert.modules.fit import Stream, TrainingModule, batch_indices, step_seed
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
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.lr, self.weight_decay = model, encoder, lr, weight_decay
        self.loss_type: LossType = loss_type
        self.epsilon, self.epsilon_high, self.beta = epsilon, epsilon_high, beta
        self.temperature, self.max_completion_length = temperature, max_completion_length
        self.mask_truncated_completions = mask_truncated_completions

    def logps(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Per-token log-probabilities and entropy [N, T] of the completions under the model as it is now.

        A prompt is read once, with its gradient, by all of its completions.
        """
        core = core_of(self.model)
        self.encoder.see(core, rollout.prompts)
        if core.model.language_model.gradient_checkpointing:  # transformers then keeps no cache
            return self._logps_of_whole_sequences(core, rollout)
        prompts = list({id(prompt): prompt for prompt in rollout.prompts}.values())
        place = {id(prompt): row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([place[id(prompt)] for prompt in rollout.prompts], device=self.device)
        batch = to_device(self.encoder.collate_prompts(prompts), self.device)
        position_ids, following = positions(core, batch)
        cache = DynamicCache(config=core.config.get_text_config())
        read = core.model(**batch, position_ids=position_ids, past_key_values=cache, use_cache=True).last_hidden_state
        cache.batch_select_indices(rows)
        ids = torch.full(rollout.mask.shape, self.encoder.pad_id)
        for row, completion in enumerate(rollout.completions):
            ids[row, : len(completion)] = torch.tensor(completion)
        ids, steps = ids.to(self.device), torch.arange(ids.shape[1], device=self.device)
        at = read[rows, -1:]  # the last place of the prompt predicts the first token, token t - 1 predicts token t
        if len(steps) > 1:
            said = core.model.language_model(
                inputs_embeds=core.get_input_embeddings()(ids[:, :-1]),
                position_ids=(following[rows, None] + steps[:-1]).expand(3, -1, -1),
                attention_mask=torch.cat([batch["attention_mask"][rows], rollout.mask[:, :-1].to(self.device)], dim=1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            at = torch.cat([at, said], dim=1)
        return selected_logps_and_entropy(at, core.lm_head.weight, ids, self.temperature, chunk=256)

    def _logps_of_whole_sequences(self, core: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
        batch, _ = self.encoder.collate(rollout.prompts, rollout.completions)
        hidden = core.model(**to_device(batch, self.device), use_cache=False).last_hidden_state
        starts = torch.tensor([len(prompt.input_ids) for prompt in rollout.prompts], device=hidden.device)
        offsets = torch.arange(rollout.mask.shape[1], device=hidden.device)
        # position start-1+t predicts token t; beyond the completion any position does, its mask is 0
        places = (starts[:, None] - 1 + offsets).clamp(max=hidden.shape[1] - 1)
        at = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        ids = batch["input_ids"].to(hidden.device).gather(1, (places + 1).clamp(max=hidden.shape[1] - 1))
        return selected_logps_and_entropy(at, core.lm_head.weight, ids, self.temperature, chunk=256)

    def transfer_batch_to_device(self, batch: Rollout, device: torch.device, dataloader_idx: int) -> Rollout:
        """Rollouts stay where they are; `training_step` moves what it needs."""
        return batch

    def training_step(self, rollout: Rollout, batch_idx: int) -> Tensor:
        mask = rollout.mask.to(self.device)
        if self.mask_truncated_completions:
            mask = mask * rollout.finished[:, None].to(self.device)
        logps, entropy = self.logps(rollout)
        reference = None
        if self.beta > 0:
            with torch.no_grad(), self.model.disable_adapter():
                reference, _ = self.logps(rollout)
        loss, metrics = policy_loss(
            logps,
            rollout.old_logps.to(self.device),
            rollout.advantages.flatten().to(self.device),
            mask,
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            ref_per_token_logps=reference,
            max_completion_length=self.max_completion_length,
        )
        self.log_dict({"loss": loss, "entropy": masked_mean(entropy, mask), **metrics})
        reported = report(rollout)
        self.log_dict({key: reported.pop(key) for key in ("reward", "adherence")}, prog_bar=True)
        self.log_dict(reported)
        return loss

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
