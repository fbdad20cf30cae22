"""Supervised fine-tuning on reasoning traces (DSA), and the lessons of the tiny base (pretrain)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import _muon

from mmedexpert.data.record import Record
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt, target_text
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.training.batches import Samples, Stream, batch_indices, share
from mmedexpert.training.module import TrainingModule


class SftModule(TrainingModule):
    """Next-token loss on the completion alone; logs TRL's names `loss`, `entropy` and `mean_token_accuracy`.

    Samples are packed without padding, and what several share at their beginning (an image, a system prompt) is read
    once; the loss is the mean over all scored tokens of the step, however it is cut into micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        lr: float,
        weight_decay: float,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.lr, self.weight_decay = model, encoder, lr, weight_decay

    def update(self, samples: Samples) -> None:
        self.encoder.encode_images(core_of(self.model), samples.prompts)
        parts = self.weighted(self.passes.cut(self.encoder, samples.prompts, samples.completions))
        scored = samples.scored or [[True] * len(words) for words in samples.completions]
        count = torch.tensor(float(sum(map(sum, scored))), device=self.device)
        whole, sums = self.over_ranks(count), torch.zeros(3, device=self.device)

        def losses() -> Iterator[Tensor]:
            for rows, weight in parts:
                packed = pack(
                    self.model, self.encoder, [samples.prompts[row] for row in rows],
                    [samples.completions[row] for row in rows],
                )  # fmt: skip
                counted = torch.tensor([one for row in rows for one in scored[row]], device=self.device)
                logps, entropy, likeliest = token_logps(self.model, packed, counted=counted)
                sums.add_(weight * torch.stack([-logps.detach().sum(), entropy.sum(), likeliest.sum()]))
                yield -weight * logps.sum() / whole

        self.descend(losses(), len(parts))
        loss, entropy, accuracy = self.over_ranks(sums) / whole
        self.log_dict({"loss": loss, "mean_token_accuracy": accuracy}, prog_bar=True)
        self.log("entropy", entropy)


class PretrainModule(SftModule):
    """All weights: Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest."""

    def __init__(self, model: nn.Module, encoder: Encoder, *, muon_lr: float, **training: Any) -> None:
        super().__init__(model, encoder, **training)
        self.muon_lr = muon_lr

    def optimizer(self) -> torch.optim.Optimizer:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if hidden else rest).append(parameter)
        return MuonWithAdamW(matrices, rest, muon_lr=self.muon_lr, lr=self.lr, weight_decay=self.weight_decay)


def _orthogonal(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch's Newton-Schulz iteration in fp32: its bf16 takes 38 times as long on a CPU that emulates bf16, and then
    the base would depend on the machine."""
    a, b, c = coefficients
    wide = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    wide = wide.float() / wide.float().norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if gradient.size(0) > gradient.size(1) else wide


# torch is pinned to one version, and the rest of its Muon stays
_muon._zeropower_via_newtonschulz = _orthogonal  # type: ignore[assignment]


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


def sample(encoder: Encoder, image_root: Path, record: Record) -> tuple[Prompt, list[int]]:
    """Prompt and completion of a training record, under the perspective its trace was written from."""
    instruction = encoder.instructions[record.trace.perspective] if record.trace else ""
    return encoder.prompt(record, image_root, instruction), encoder.completion(target_text(record))


def sft_stream(
    records: Sequence[Record],
    encoder: Encoder,
    image_root: Path,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
) -> Stream:
    """Batches of (prompt, completion) samples in a shuffled order that depends on the seed alone.

    Samples are encoded as they come, images from the encoder's cache: a data set need not fit in memory. Of several
    ranks each has its share of a batch.
    """

    def stream(step: int) -> Iterator[Samples]:
        for chosen in batch_indices(len(records), batch_size, seed, step):
            mine = [sample(encoder, image_root, records[i]) for i in share(chosen, rank, ranks)]
            yield Samples(*zip(*mine, strict=True))

    return stream
