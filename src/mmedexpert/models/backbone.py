"""Load and save Qwen-VL backbones and put LoRA adapters on their language model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmedexpert.errors import UserError
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.deltas import apply_deltas_
from mmedexpert.models.encode import Encoder

KINDS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)  # model types whose positions and prefix sharing models/generate.py knows


@dataclass(frozen=True)
class Loading:
    """How a backbone is loaded: `attn_implementation` auto takes flash-attn on CUDA where importable, else sdpa."""

    dtype: str
    attn_implementation: str
    min_pixels: int
    max_pixels: int
    system_prompt: str | None
    device: str
    instructions: str = "small"  # style of the perspectives' instructions


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its layers keep their adapters)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    """A frozen linear layer in 16 bits and the LoRA that training starts from, kept as factors beside it.

    Summed into a bf16 weight most of the start would be lost: its entries lie below the weights' rounding step.
    """

    start_A: Tensor
    start_B: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: W x + B (A x)."""
        out = F.linear(input, self.weight, self.bias)
        low = F.linear(input, self.start_A).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), low, self.start_B.t()).view_as(out)


@torch.no_grad()
def start_from_(model: nn.Module, start: LoraAdapter) -> None:
    """Let a model start from an adapter, in place and frozen: what is then trained on it, and saved beside it, is the
    policy that was sampled, at any dtype.

    fp32 weights take the update in (rounding 2^-24); 16-bit weights keep its factors in their own dtype, as LoRA
    layers compute. UserError for factors that are not finite.
    """
    for name in start.modules:
        module = model.get_submodule(name.removesuffix(".weight"))
        weight: Any = module.weight
        if weight.dtype == torch.float32:
            apply_deltas_(model, [(name, start.delta(name))])
            continue
        assert type(module) is nn.Linear, f"{name} is {type(module)}"
        module.__class__ = StartedLinear
        for key, factor in zip(("start_A", "start_B"), start.scaled_factors(name), strict=True):
            module.register_buffer(key, factor.to(weight.device, weight.dtype), persistent=False)


def streamline(model: Any) -> None:
    """Let a model do the same with less: patches by a matrix product, LoRA without extra passes; weights keep names."""
    core_of(model).model.visual.patch_embed.proj.__class__ = PatchProjection
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = LeanLora


def resolve(name_or_path: str, revision: str | None) -> Path:
    """The local folder of a model, downloading a pinned hub revision when it is no folder; UserError if it cannot."""
    if Path(name_or_path).is_dir():
        folder = Path(name_or_path)
    else:
        try:
            folder = Path(
                snapshot_download(name_or_path, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.py"])
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"model.name_or_path={name_or_path} is neither a folder nor a hub model that can be downloaded here "
                f"({type(error).__name__}): give the folder of a downloaded model"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path={folder} has no config.json: give a Hugging Face model folder")
    return folder


def attention(choice: str, device: str) -> str:
    """The attention implementation for `auto`: flash_attention_2 on CUDA where flash-attn is importable, else sdpa."""
    if choice != "auto":
        return choice
    return "flash_attention_2" if device.startswith("cuda") and find_spec("flash_attn") else "sdpa"


def load_model(folder: Path, loading: Loading) -> PreTrainedModel:
    """The model of a folder, in eval mode on its device; UserError for another architecture or missing weights."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, loading.dtype),
            attn_implementation=attention(loading.attn_implementation, loading.device),
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be loaded as a vision-language model: {str(error).splitlines()[0]}"
        ) from error
    if model.config.model_type not in KINDS:
        raise UserError(f"{folder} is a {model.config.model_type}; this release handles {', '.join(KINDS)}")
    streamline(model)
    return model.to(loading.device).eval()  # type: ignore[arg-type]  # transformers wraps `to`, and mypy loses self


def load_encoder(folder: Path, loading: Loading) -> Encoder:
    """Tokenizer and image processor of a folder, with the pixel limits of `loading`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        images = Qwen2VLImageProcessorPil.from_pretrained(
            folder, min_pixels=loading.min_pixels, max_pixels=loading.max_pixels, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no usable tokenizer or image processor: {str(error).splitlines()[0]}") from error
    older = folder / "chat_template.json"  # Qwen2-VL's hub folders keep it beside the tokenizer
    if older.is_file():
        tokenizer.chat_template = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder} has no chat template: add chat_template.json or chat_template.jinja from the model hub"
        )
    return Encoder(tokenizer, images, system_prompt=loading.system_prompt, style=loading.instructions)


def save_backbone(folder: Path, model: PreTrainedModel, encoder: Encoder) -> None:
    """A Hugging Face folder: safetensors, config, tokenizer, image processor."""
    model.save_pretrained(folder)
    encoder.save_pretrained(folder)


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str,
    gradient_checkpointing: bool,
    seed: int,
) -> PeftModel:
    """A fresh LoRA (Hu et al. 2021) on the modules whose names match; all else, the vision tower too, is frozen."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):  # the same initial A whatever ran before
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    streamline(adapted)
    if gradient_checkpointing:
        # only the language model: the frozen vision tower must not build a graph (TRL and HF hook every embedding)
        language: Any = model.model.language_model
        language.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert isinstance(adapted, PeftModel)
    return adapted.train()
