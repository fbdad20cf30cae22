"""Training on preferences: DPO between two replies, and a reward head between two answers (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder
from mmedexpert.models.packing import Pack, pack, token_logps
from mmedexpert.models.reward_head import RewardHead, scores
from mmedexpert.training.batches import Preferences
from mmedexpert.training.module import TrainingModule


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """The loss of each pair and its margin, from log-probabilities of whole replies: all [P].

    Source: DPO (arXiv 2305.18290, eq. 7); `beta` > 0 is how hard the policy is held to its reference.
    """
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins), margins


def bradley_terry(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of scores [P, D] against labels [P, D] (see `Preferences`); NaN labels add nothing.

    Source: Bradley and Terry (1952), as reward models are trained (InstructGPT, arXiv 2203.02155, eq. 1); a tie is
    half a win of each.
    """
    told = ~labels.isnan()
    return F.binary_cross_entropy_with_logits((first - second)[told], labels[told], reduction="sum")


class _PairModule(TrainingModule):
    """What both share: pairs in micro-batches, each image seen once."""

    def __init__(self, model: nn.Module, encoder: Encoder, *, lr: float, weight_decay: float, **training: Any) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.lr, self.weight_decay = model, encoder, lr, weight_decay

    def parts(self, batch: Preferences) -> list[tuple[list[int], float]]:
        """Pairs in passes, both continuations in one; a part of weight 0 keeps step alone."""
        self.encoder.encode_images(core_of(self.model), batch.prompts)
        both = [[*one, *two] for one, two in zip(batch.first, batch.second, strict=True)]
        return self.weighted(self.passes.cut(self.encoder, batch.prompts, both))


class DpoModule(_PairModule):
    """Direct preference optimisation of LoRA weights; the reference is the same model without them.

    `sft_weight` times the mean negative log-likelihood of the better replies' tokens is added, which keeps their
    probability from falling with the worse ones' (Iterative RPO, arXiv 2404.19733, eq. 2). Logs TRL's names.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, *, beta: float, sft_weight: float, **training: Any) -> None:
        super().__init__(model, encoder, **training)
        self.beta, self.sft_weight = beta, sft_weight

    def update(self, batch: Preferences) -> None:
        parts = self.parts(batch)
        pairs = self.over_ranks(torch.tensor(float(len(batch.prompts)), device=self.device))
        words = self.over_ranks(torch.tensor(float(sum(map(len, batch.first))), device=self.device))
        sums = torch.zeros(5, device=self.device)

        def losses() -> Iterator[Tensor]:
            for places, weight in parts:
                packed = pack(self.model, self.encoder, *batch.rows(places))
                with torch.no_grad(), self.model.disable_adapter():
                    reference = self._whole(packed, len(places))
                logps = self._whole(packed, len(places))
                loss, margins = dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], beta=self.beta)
                told = logps[:, 0].sum() / words
                gains = self.beta * (logps.detach() - reference).sum(0) / pairs
                right = (margins.detach() > 0).float().sum() / pairs
                found = [loss.detach().sum() / pairs, right, gains[0], gains[1], -told.detach()]
                sums.add_(weight * torch.stack(found))
                yield weight * (loss.sum() / pairs - self.sft_weight * told)

        self.descend(losses(), len(parts))
        loss, right, chosen, rejected, nll = self.over_ranks(sums)
        self.log_dict({"loss": loss + self.sft_weight * nll, "rewards/accuracies": right}, prog_bar=True)
        self.log_dict({"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected})
        self.log("nll_loss", nll)

    def _whole(self, packed: Pack, pairs: int) -> Tensor:
        """Log-probabilities of whole replies: [P, 2], better and worse."""
        values, _, _ = token_logps(self.model, packed)
        return values.new_zeros(2 * pairs).index_add(0, packed.rows.to(values.device), values).view(pairs, 2)


class RewardModule(_PairModule):
    """A reward head and LoRA weights, by the Bradley-Terry loss over all labelled dimensions of a step."""

    def __init__(self, model: nn.Module, encoder: Encoder, head: RewardHead, **training: Any) -> None:
        super().__init__(model, encoder, **training)
        self.head = head

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def update(self, batch: Preferences) -> None:
        assert batch.labels is not None
        parts, labels = self.parts(batch), batch.labels.to(self.device)
        told = self.over_ranks((~labels.isnan()).sum()).clamp(min=1e-9)  # a batch may hold none
        decisions = self.over_ranks(((labels == 0) | (labels == 1)).sum()).clamp(min=1e-9)
        sums = torch.zeros(3, device=self.device)

        def losses() -> Iterator[Tensor]:
            for places, weight in parts:
                found = scores(self.model, self.encoder, self.head, *batch.rows(places))
                first, second = found.view(len(places), 2, -1).unbind(1)
                loss, margins = bradley_terry(first, second, labels[places]), (first - second).detach()
                decided = labels[places].nan_to_num(0.5) - 0.5
                sums.add_(weight * torch.stack([
                    loss.detach(), ((margins * decided) > 0).float().sum(), (margins.abs() * (decided != 0)).sum(),
                ]))  # fmt: skip
                yield weight * loss / told

        self.descend(losses(), len(parts))
        loss, right, margin = self.over_ranks(sums)
        self.log_dict({"loss": loss / told, "rewards/accuracies": right / decisions}, prog_bar=True)
        self.log("rewards/margins", margin / decisions)
