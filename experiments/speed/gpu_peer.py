"""TRL's DSA and GBA steps on the shapes, the LoRA and the checkpointing of gpu_steps.py; importing this needs trl."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trl_peer
from gpu_clock import release
from gpu_steps import GPU, TINY, Shapes, dtype_of, memory, settings
from peft import LoraConfig
from tiny_vl import (
    SIZES,
    Question,
    Row,
    Stopwatch,
    build_encoder,
    build_model,
    build_processor,
    byte_tokenizer,
    text,
    text_length,
    write_images,
)

__all__ = ["GPU", "TINY", "step"]


def step(device: str, *, size: str, shapes: Shapes, stage: str) -> Iterator[dict[str, Any]]:
    """Images, sampling and update count together; GRPO is one cold step, SFT the faster of two after the first."""
    lora = settings(size)["lora"]
    config = LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    plain, watch, held = trl_peer.common, Stopwatch(device), {}
    tokenizer = byte_tokenizer()
    encoder = build_encoder(tokenizer, shapes.image_size)
    model = build_model(SIZES[size], tokenizer, dtype=dtype_of(device), device=device)
    processor = build_processor(tokenizer, shapes.image_size)
    release()

    def common(*arguments: Any) -> dict[str, Any]:
        return plain(*arguments) | {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }

    def turn(trained: list[Row]) -> None:
        assert {(len(ids), count) for ids, count in trained} == {lengths}, "TRL trained on other numbers of tokens"
        held.update(memory(device, None))

    # a row's ids are its prompt's in GRPO, all in SFT; and the tokens trained on
    lengths = (shapes.prompt, shapes.completion) if stage == "gba" else (shapes.prompt + shapes.answer, shapes.answer)
    changed = patch.multiple(trl_peer, common=common, lora_config=lambda: config)
    with tempfile.TemporaryDirectory() as folder, changed:
        count = shapes.groups if stage == "gba" else 3 * shapes.records[0]
        images = write_images(Path(folder), count, shapes.image_size)
        length = text_length(encoder, images[0], shapes.prompt)
        answer = "" if stage == "gba" else text(7, shapes.answer - 2)  # and the two that end the turn
        questions = [Question(text(number, length), image, answer) for number, image in enumerate(images)]
        if stage == "gba":
            trl_peer.grpo(
                model, processor, questions, num_generations=shapes.group, prompts_per_step=shapes.groups,
                max_new_tokens=shapes.completion, micro_batch=shapes.group, banned_ids=encoder.banned_ids,
                watch=watch, turn=turn,
            )  # fmt: skip
            tokens = shapes.groups * shapes.group * shapes.completion
        else:
            trl_peer.sft(model, processor, questions, batch_size=shapes.records[0], watch=watch, turn=turn)
            tokens = shapes.records[0] * (shapes.prompt + shapes.answer)
    seconds = min(watch.seconds[1:] or watch.seconds)
    case = {"case": f"{trl_peer.NAME}, {stage} {size}, its step", "tokens": tokens, "seconds": seconds}
    yield case | {"tokens_per_s": tokens / seconds, **held}
