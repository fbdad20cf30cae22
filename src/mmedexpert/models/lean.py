"""Layers of a backbone that do the same with less: patches, LoRA, and updates that 16 bits cannot take in."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import core_of
from mmedexpert.models.deltas import apply_deltas_
from mmedexpert.models.dense import DenseUpdate


class PatchProjection(nn.Conv3d):
    """A convolution over one patch at a time, as the matrix product it is: four times faster on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Patches [N, C, T, H, W], each of the kernel's size -> [N, out, 1, 1, 1]."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


class LeanLora(lora.Linear):
    """PEFT's LoRA on a linear layer in three products: no pass over the output only to scale and to add.

    Adapters compute in the input's dtype, as under autocast: PEFT keeps them in fp32 beside a bf16 model.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]: W x + scaling B (A x); anything but one plain adapter goes PEFT's way."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        if args or kwargs or self.disable_adapters or self.merged or not plain:
            return super().forward(x, *args, **kwargs)
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        low = F.linear(self.lora_dropout[name](x), down.to(x.dtype)).flatten(0, -2)
        out = self.base_layer(x)
        return torch.addmm(out.flatten(0, -2), low, up.to(low.dtype).t(), alpha=self.scaling[name]).view_as(out)


class StartedLinear(nn.Linear):
    """A frozen linear layer in 16 bits and a LoRA, kept as factors beside it.

    Summed into a bf16 weight most of it would be lost: its entries lie below the weights' rounding step.
    """

    start_A: Tensor
    start_B: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: W x + B (A x)."""
        out = F.linear(input, self.weight, self.bias)
        low = F.linear(input, self.start_A).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), low, self.start_B.t()).view_as(out)


class ShiftedLinear(nn.Linear):
    """A frozen linear layer in 16 bits and an update of any rank beside it, for what `StartedLinear` tells."""

    shift: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: W x + D x."""
        out = F.linear(input, self.weight, self.bias)
        return torch.addmm(out.flatten(0, -2), input.flatten(0, -2), self.shift.t()).view_as(out)


@torch.no_grad()
def start_from_(model: nn.Module, start: LoraAdapter | DenseUpdate) -> None:
    """Let a model start from an update, in place and frozen: what is then trained on it, and saved beside it, is the
    policy that was sampled, at any dtype.

    fp32 weights take the update in (rounding 2^-24); 16-bit weights keep its factors or rows in their own dtype, as
    LoRA layers compute. UserError for values that are not finite.
    """
    for name in start.shapes:
        module = model.get_submodule(name.removesuffix(".weight"))
        weight: Any = module.weight
        if weight.dtype == torch.float32:
            apply_deltas_(model, [(name, start.delta(name))])
        elif isinstance(start, DenseUpdate):
            shift_(module, start.delta(name))
        else:
            assert type(module) is nn.Linear, f"{name} is {type(module)}"
            module.__class__ = StartedLinear
            for key, factor in zip(("start_A", "start_B"), start.scaled_factors(name), strict=True):
                module.register_buffer(key, factor.to(weight.device, weight.dtype), persistent=False)


def shift_(module: nn.Module, delta: Tensor) -> None:
    """Put an update [out, in] beside a linear layer's weight, in its dtype and in the place of one that was there."""
    assert type(module) in (nn.Linear, ShiftedLinear), f"an update of {type(module)}"
    weight: Any = module.weight
    module.__class__ = ShiftedLinear
    module.register_buffer("shift", delta.to(weight.device, weight.dtype), persistent=False)


def unshift_(module: nn.Module) -> None:
    """Take the update of `shift_` away."""
    if isinstance(module, ShiftedLinear):
        del module.shift
        module.__class__ = nn.Linear  # type: ignore[assignment]  # back to what it was


def streamline(model: Any) -> None:
    """Let a model do the same with less: patches by a matrix product, LoRA without extra passes; weights keep names."""
    core_of(model).model.visual.patch_embed.proj.__class__ = PatchProjection
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = LeanLora
