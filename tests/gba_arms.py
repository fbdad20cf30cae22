"""Two arms of stage=gba with every setting unlike the default, run on the model that answers and written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain import Plain, added, deltas, mean
from recording import Step, watch_steps

from mmedexpert.data.records import load_records
from mmedexpert.models import generate as generating
from mmedexpert.models.backbone import core_of
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import dsa, gba
from mmedexpert.stages import policy as policies
from mmedexpert.stages.data import dataset
from mmedexpert.training import gba as gba_module

ARMS = {
    "guided": [
        "seed=3", "gba.weights=[1,0.5,2,0.25]", "gba.scale=0.7", "gba.gate=correct", "gba.init=merged_experts",
        "gba.scale_rewards=group", "gba.loss_type=grpo", "gba.steps=4", "gba.prompts_per_step=3",
        "gba.num_iterations=2", "gba.temperature=1.3", "gba.epsilon=0.02", "gba.epsilon_high=0.05", "gba.beta=0.1",
        "gba.mask_truncated_completions=true", "model.max_new_tokens=30", "gba.lr=0.004", "gba.warmup_ratio=0.5",
        "gba.weight_decay=0.3", "gba.max_grad_norm=0.01", "gba.checkpoint_every=4", "reward.weights.accuracy=0.8",
        "reward.weights.format=0.3", "trainer.micro_batch_tokens=200", "model.lora.alpha=12",
    ],
    "free": [
        "gba.weights=[0,3,1,0]", "gba.scale=0.4", "gba.gate=none", "gba.init=sft_all", "gba.conditioning=free",
        "gba.scale_rewards=batch", "gba.loss_type=dr_grpo", "gba.steps=3", "gba.num_generations=4",
        "gba.temperature=0.8", "gba.top_p=0.95", "gba.top_k=3", "gba.mask_truncated_completions=false",
        "model.max_new_tokens=12", "gba.lr=0.002", "gba.warmup_ratio=0", "gba.max_grad_norm=100",
        "trainer.micro_batch_tokens=null", "specialty.names=[pediatrics,oncology_surgery]",
    ],
}  # fmt: skip


@dataclass
class Sampled:
    """One call of `roll_out`: the records asked, what the sampler was given, the policy's weights, what came of it."""

    records: list[Any]
    asked: dict[str, Any]
    weights: dict[str, torch.Tensor]
    rollout: Any


@dataclass
class Arm:
    config: Config
    run: Run
    sampled: list[Sampled]
    steps: list[Step]
    packs: list[tuple[int, int, Any]]  # of each micro-batch: the update, its completions, and what was packed
    plain: Plain
    start: dict[str, torch.Tensor]  # the update of the base that the arm must start from, by plain torch

    def weights(self, step: Step) -> dict[str, torch.Tensor]:
        """The trained factors, as leaves of a graph."""
        return {name: p.clone().requires_grad_() for name, p in step.before.items()}

    def policy(self, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base's weights plus the start plus alpha / r * B A."""
        lora = self.config.model.lora
        update = {
            name.replace("lora_A.weight", "weight"): lora.alpha / lora.r * factors[name.replace("_A", "_B")] @ a
            for name, a in factors.items()
            if "lora_A" in name
        }
        return self.plain.changed(added(self.start, update))


def start_of(config: Config) -> dict[str, torch.Tensor]:
    if config.gba.init == "merged_experts":
        return mean([deltas(run.folder / "adapter") for run in dsa.run(config).values()])
    return deltas(dsa.expert(config, "all", config.specialty.names).folder / "adapter")


def trained(name: str, answering: Callable[..., Config]) -> Arm:
    """Train an arm and keep what was seen on the way."""
    config = answering(*ARMS[name], "dsa.lr=0.02")
    start, sampled = start_of(config), []
    with pytest.MonkeyPatch.context() as patch:
        roll_out, generate = policies.roll_out, generating.generate
        given: dict[str, Any] = {}

        def sampler(model, encoder, prompts, **options):
            given.update(prompts=[encoder.tokenizer.decode(p.input_ids) for p in prompts], **options)
            return generate(model, encoder, prompts, **options)

        def sample(policy, encoder, records, image_root, **options):
            weights = {
                name.replace(".base_layer.", "."): p.detach().clone()
                for name, p in core_of(policy).named_parameters()
                if "lora_" not in name
            }
            rollout = roll_out(policy, encoder, records, image_root, **options)
            sampled.append(Sampled(list(records), dict(given), weights, rollout))
            return rollout

        patch.setattr(generating, "generate", sampler)
        patch.setattr(policies, "roll_out", sample)
        steps, packs = watch_steps(patch), []

        def packing(model, encoder, prompts, completions):
            packs.append((len(steps), len(prompts), pack(model, encoder, prompts, completions)))
            return packs[-1][2]

        pack = gba_module.pack
        patch.setattr(gba_module, "pack", packing)
        (run,) = gba.run(config).values()
    _, image_root = load_records(dataset(config).folder)
    base = Plain(config.model.name_or_path, image_root)
    return Arm(config, run, sampled, steps, packs, base, start)
