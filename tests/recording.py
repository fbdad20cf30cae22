"""Watches a stage at work: every optimiser step, with the weights, gradients and rates that were really there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmedexpert.training.module import TrainingModule


@dataclass
class Step:
    """One optimiser step: what `training_step` got, the trained parameters before and after, the gradient that the
    optimiser applied, its learning rate and settings, and what the module logged."""

    batch: Any
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    applied: dict[str, Tensor]
    rate: float
    logged: dict[str, float]


def trained(module: TrainingModule) -> dict[str, Tensor]:
    """The trained parameters by their names in PEFT's state dict."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.detach().clone()
        for name, p in module.model.named_parameters()
        if p.requires_grad
    }


def watch_steps(patch: pytest.MonkeyPatch) -> list[Step]:
    """From now on every optimiser step of any stage is written down in the list returned."""
    steps: list[Step] = []
    descend = TrainingModule.descend

    def watched(self: Any, losses: Any, parts: int) -> None:
        before, rate = trained(self), self.optimizers().param_groups[0]["lr"]
        descend(self, losses, parts)
        applied = {
            name.removeprefix("base_model.model.").replace(".default.", "."): p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        logged = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        steps.append(Step(self.batch_at_work, before, trained(self), applied, rate, logged))

    def before_batch(self: Any, batch: Any, batch_idx: int) -> None:
        self.batch_at_work = batch
        start(self, batch, batch_idx)

    start = TrainingModule.on_train_batch_start
    patch.setattr(TrainingModule, "descend", watched)
    patch.setattr(TrainingModule, "on_train_batch_start", before_batch)
    return steps


def adamw(steps: list[Step], *, weight_decay: float) -> list[dict[str, Tensor]]:
    """The parameters after each step by the textbook's AdamW (arXiv 1711.05101) on the gradients that were applied."""
    first = {name: torch.zeros_like(p) for name, p in steps[0].before.items()}
    second = {name: torch.zeros_like(p) for name, p in steps[0].before.items()}
    found = []
    for number, step in enumerate(steps, 1):
        after = {}
        for name, gradient in step.applied.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            size = (second[name] / (1 - 0.999**number)).sqrt() + 1e-8
            kept = step.before[name] * (1 - step.rate * weight_decay)
            after[name] = kept - step.rate * first[name] / (1 - 0.9**number) / size
        found.append(after)
    return found


def norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())
