"""Supervised fine-tuning on reasoning traces (DSA), and the lessons of the tiny base (pretrain)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedexpert.data.encode import IGNORE, Batch, Encoder, Prompt, to_device
from mmedexpert.data.record import Record
from mmedexpert.engines.generate import core_of
from mmedexpert.modules.fit import Stream, TrainingModule, batch_indices


def completion_loss(model: Any, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the labelled tokens, and the share of them predicted; logits only where labelled."""
    core = core_of(model)
    hidden = core.model(**batch, use_cache=False).last_hidden_state
    scored = labels[:, 1:] != IGNORE
    logits = core.lm_head(hidden[:, :-1][scored]).float()
    gold = labels[:, 1:][scored]
    return F.cross_entropy(logits, gold), (logits.argmax(-1) == gold).float().mean()


class SftModule(TrainingModule):
    """Next-token loss on the completion alone; logs TRL's names `loss` and `mean_token_accuracy`."""

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, **training: Any) -> None:
        super().__init__(**training)
        self.model, self.lr, self.weight_decay = model, lr, weight_decay

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Tensors alone: Lightning would take the vision outputs in the batch apart."""
        return to_device(batch[0], device), batch[1].to(device)

    def training_step(self, batch: tuple[Batch, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss, accuracy = completion_loss(self.model, inputs, labels)
        self.log_dict({"loss": loss, "mean_token_accuracy": accuracy}, prog_bar=True)
        return loss

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)


class PretrainModule(SftModule):
    """All weights: Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest."""

    def __init__(self, model: nn.Module, *, muon_lr: float, **training: Any) -> None:
        super().__init__(model, **training)
        self.muon_lr = muon_lr

    def optimizer(self) -> torch.optim.Optimizer:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if hidden else rest).append(parameter)
        return MuonWithAdamW(matrices, rest, muon_lr=self.muon_lr, lr=self.lr, weight_decay=self.weight_decay)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimiser, so that Lightning's automatic loop, schedule and checkpoints hold."""

    def __init__(
        self, matrices: list[Tensor], rest: list[Tensor], *, muon_lr: float, lr: float, weight_decay: float
    ) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True),  # ours: betas
        )
        super().__init__([*matrices, *rest], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def sft_stream(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    sample: Callable[[Record], tuple[Prompt, list[int]]],
    *,
    batch_size: int,
    accumulate: int,
    seed: int,
) -> Stream:
    """Batches of (prompt, completion) samples in a shuffled order that depends on the seed alone.

    Samples are encoded as they come, images from the encoder's cache: a data set need not fit in memory.
    """

    def stream(step: int) -> Iterator[tuple[Batch, Tensor]]:
        for chosen in batch_indices(len(records), batch_size, seed, step * accumulate):
            prompts, completions = zip(*(sample(records[i]) for i in chosen), strict=True)
            encoder.see(core_of(model), prompts)
            yield encoder.collate(prompts, completions)

    return stream
