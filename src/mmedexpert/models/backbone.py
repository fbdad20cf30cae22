"""Load and save Qwen-VL backbones and put LoRA adapters on their language model.

transformers and PEFT take seconds to import: what calls them imports them, so a command that finds all done need not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmedexpert.errors import UserError
from mmedexpert.models.encode import Encoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

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
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    from mmedexpert.models.lean import streamline

    disable_progress_bar()  # a bar of every load, between our own
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
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
    encoder = Encoder(tokenizer, images, system_prompt=loading.system_prompt, style=loading.instructions)
    encoder.end_ids += [token for token in _ends(folder) if token not in encoder.end_ids]
    return encoder


def _ends(folder: Path) -> list[int]:
    """Tokens that end a completion by the folder's own word: Qwen's models may end with <|endoftext|>, too."""
    path = folder / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [told] if isinstance(told, int) else list(told or [])


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
    from peft import LoraConfig, PeftModel, get_peft_model

    from mmedexpert.models.lean import streamline

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
