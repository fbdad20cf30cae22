"""A real `transformers serve` with a model of a few thousand random weights, which knows nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """Where it answers, what its model is called there, and what it prints."""

    base_url: str
    model: str
    log: Path


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server that answers, with all that it needs in `folder`."""
    model, log = folder / "llava", folder / "log"
    save_tiny_llava(model)
    (folder / "hub").mkdir()
    port = closed_port()
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--device", "cpu",
    ]  # fmt: skip
    offline = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | offline, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}/v1", str(model), log)
    finally:
        process.terminate()
        process.wait(20)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def save_tiny_llava(folder: Path) -> None:
    """A random LLaVA of a few thousand weights with its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<unk>", "<pad>", "</s>", "<image>", *"what is this a heart lung image of : USER ASSISTANT".split()]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    template = (
        "{% for message in messages %}USER : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "ASSISTANT :"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_token_id=3)
    ).save_pretrained(folder)
