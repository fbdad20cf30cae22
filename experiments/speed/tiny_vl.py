"""What both sides of a training comparison share: a random Qwen2.5-VL, its questions, a reward and the stopwatch.

Nothing is downloaded, and only torch, transformers and peft (with what they install) are imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from mmedexpert.models.encode import Encoder
from mmedexpert.models.shapes import known
from mmedexpert.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, build_image_processor, build_tokenizer

warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # peft and TRL

LR = 1e-4
MAX_GRAD_NORM = 1.0
Row = tuple[tuple[int, ...], int]  # a sequence's token ids and how many tokens of it are trained on


@dataclass(frozen=True)
class Size:
    """Sizes of a Qwen2.5-VL: language model first, then vision tower (`v`)."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    v_hidden: int
    v_inner: int
    v_layers: int
    v_heads: int
    full_attention: tuple[int, ...]


def _published(model: str) -> Size:
    shape = known()[model]
    return Size(
        shape.hidden, shape.inner, shape.layers, shape.heads, shape.kv_heads, shape.vocab, shape.tied, shape.v_hidden,
        shape.v_inner, shape.v_layers, shape.v_heads, shape.v_full,
    )  # fmt: skip


SIZES = {
    "s": Size(256, 768, 4, 4, 2, 8192, False, 160, 320, 4, 4, (3,)),
    "3b": _published("Qwen/Qwen2.5-VL-3B-Instruct"),
    "7b": _published("Qwen/Qwen2.5-VL-7B-Instruct"),
}


@dataclass(frozen=True)
class Question:
    """One prompt: text and an image file; for SFT also the answer."""

    text: str
    image: Path
    answer: str = ""


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A Qwen2 tokenizer without merges: one token for each byte, so that texts have the length that is asked for."""
    tokenizer = build_tokenizer([], 256)
    tokenizer.padding_side = "left"
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> ImageTextProcessor:
    """Tokenizer and image processor as one, the way TRL takes them."""
    return ImageTextProcessor(
        image_processor=build_image_processor(image_size), tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )


def build_model(
    size: Size, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, device: str, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL; the same arguments give the same weights."""
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}  # type: ignore[arg-type]
    half = size.hidden // size.heads // 2
    side = half * 3 // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "vocab_size": size.vocab,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * side, side, side],
            },
            "max_window_layers": size.layers,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": size.tied,
        },
        vision_config={
            "depth": size.v_layers,
            "hidden_size": size.v_hidden,
            "intermediate_size": size.v_inner,
            "num_heads": size.v_heads,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(size.full_attention),
            "window_size": 112,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=size.tied,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def lora_config() -> LoraConfig:
    """LoRA of rank 8 on the attention projections of the language model."""
    return LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
        task_type="CAUSAL_LM",
    )


def build_encoder(tokenizer: PreTrainedTokenizerBase, image_size: int) -> Encoder:
    """Our side's counterpart of the processor."""
    return Encoder(tokenizer, build_image_processor(image_size))


def write_images(folder: Path, count: int, image_size: int) -> list[Path]:
    """PNG files of noise, each different."""
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


def text(number: int, length: int) -> str:
    """A question of `length` bytes."""
    return (f"Case {number:05d}. Look at the scan and pick A, B, C or D. " * (length // 40 + 1))[:length]


def text_length(encoder: Encoder, image: Path, prompt_tokens: int) -> int:
    """How many bytes of text bring a prompt with this image to `prompt_tokens`.

    Raises:
        ValueError: the image and the chat template alone are longer.
    """
    rest = prompt_tokens - len(encoder.chat("", [encoder.image(image)]).input_ids)
    if rest < 12:  # less, and the questions would be the same
        raise ValueError(f"{prompt_tokens} tokens leave {rest} for the text: ask for more or a smaller image")
    return rest


def reward(texts: Sequence[str]) -> list[float]:
    """A cheap reward with some spread, in [0, 1)."""
    return [sum(map(ord, text)) % 7 / 7 for text in texts]


class Stopwatch:
    """Seconds (CPU: of the process, all threads; CUDA: wall) and peak memory in MiB above the start, of each lap."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device.startswith("cuda")
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated() / 2**20
            self._began = time.perf_counter()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what the other side freed goes back to the system
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._held = _resident("VmRSS")
        self._began = time.process_time()

    def stop(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._began)
            self.memory.append(torch.cuda.max_memory_allocated() / 2**20 - self._held)
            return
        self.seconds.append(time.process_time() - self._began)
        self.memory.append(_resident("VmHWM") - self._held)

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        """One lap."""
        self.start()
        yield
        self.stop()

    def result(self, warmup: int) -> dict[str, float | None]:
        """Medians of the laps after the first `warmup`: `cpu_s`, and `mib`, None where the system does not tell."""
        memory = float(np.median(self.memory[warmup:]))
        return {
            "cpu_s": round(float(np.median(self.seconds[warmup:])), 3),
            "mib": None if np.isnan(memory) else round(memory),
        }


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """The machine's FLOP/s in a square matrix product, and bytes/s, read and written, in a copy; medians of five."""
    size, mib, repeats = (8192, 4096, 10) if device.startswith("cuda") else (1024, 256, 1)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)

    def seconds(function: Callable[[], Any]) -> float:
        watch = Stopwatch(device)
        for _ in range(6):
            with watch.lap():
                for _ in range(repeats):
                    function()
        return float(np.median(watch.seconds[1:])) / repeats

    return 2 * size**3 / seconds(lambda: a @ b), 2 * block.numel() / seconds(lambda: target.copy_(block))


def _resident(name: str) -> float:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")
