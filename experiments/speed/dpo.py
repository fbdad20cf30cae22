"""A DPO step on image questions: ours against TRL's DPOTrainer, in turns in one run, on one thread.

A step is one AdamW update of a LoRA on eight pairs of replies to questions about 336-pixel images, replies of 16 to 128
tokens, encoding included; every step has new images. The reference is the model without its adapter, read anew in each
step on both sides. Both start from the same random Qwen2.5-VL and train on the same tokens, which is checked at every
step. The last line is one JSON object. Without trl only our side runs.

    python experiments/speed/dpo.py [--turns 5] [--model s]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dsa import BATCH, MISSING, QUESTION, WARMUP, samples_of, trl_peer
from peft import get_peft_model
from tiny_vl import (
    LR,
    MAX_GRAD_NORM,
    SIZES,
    Question,
    Row,
    Stopwatch,
    build_encoder,
    build_model,
    build_processor,
    byte_tokenizer,
    lora_config,
    text,
    write_images,
)

from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder
from mmedexpert.models.lean import streamline
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.training.batches import Preferences
from mmedexpert.training.preferences import dpo_loss

BETA = 0.1


def dpo_step(
    model: Any, encoder: Encoder, optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Question, str]]
) -> list[Row]:
    """Loss and update on the pairs; returns each reply's ids and number of trained tokens."""
    prompts = [encoder.chat(one.text, [encoder.image(one.image)]) for one, _ in pairs]
    better, worse = (
        [encoder.tokenizer(f"{answer}<|im_end|>\n")["input_ids"] for answer in answers]  # as TRL trains
        for answers in ([one.answer for one, _ in pairs], [other for _, other in pairs])
    )
    encoder.encode_images(core_of(model), prompts)
    packed = pack(model, encoder, *Preferences(prompts, better, worse).rows(range(len(pairs))))
    sums = torch.zeros(2, 2 * len(pairs))
    with torch.no_grad(), model.disable_adapter():
        reference = sums[0].index_add(0, packed.rows, token_logps(model, packed)[0]).view(-1, 2)
    whole = sums[1].index_add(0, packed.rows, token_logps(model, packed)[0]).view(-1, 2)
    loss, _ = dpo_loss(*whole.T, *reference.T, beta=BETA)
    loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    said = [*zip(prompts, better, strict=True), *zip(prompts, worse, strict=True)]
    return [((*prompt.input_ids, *answer), len(answer)) for prompt, answer in said]


def main() -> None:
    """Both sides in turns: the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--model", choices=SIZES, default="s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if trl_peer is None:
        print(MISSING)
    size, tokenizer, steps = SIZES[options.model], byte_tokenizer(), options.turns + WARMUP
    encoder = build_encoder(tokenizer, options.image_size)
    ours, theirs = Stopwatch("cpu"), Stopwatch("cpu")
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), steps * BATCH, options.image_size)
        questions = samples_of(images, steps, shared=False)
        pairs = [(one, text(n + 3 * QUESTION, max(2, len(one.answer) // 2))) for n, one in enumerate(questions)]
        model = get_peft_model(build_model(size, tokenizer, dtype=torch.float32, device="cpu"), lora_config()).train()
        streamline(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
        batches = iter([pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)])

        def turn(peer_rows: list[Row]) -> None:
            batch = next(batches)
            with ours.lap():
                rows = dpo_step(model, encoder, optimizer, batch)
            assert not peer_rows or sorted(peer_rows) == sorted(rows), "the sides trained on different tokens"

        if trl_peer is None:
            for _ in range(steps):
                turn([])
        else:
            trl_peer.dpo(
                build_model(size, tokenizer, dtype=torch.float32, device="cpu"),
                build_processor(tokenizer, options.image_size), pairs, batch_size=BATCH, beta=BETA, watch=theirs,
                turn=turn,
            )  # fmt: skip
    found: dict[str, Any] = {f"ours_{name}": value for name, value in ours.result(WARMUP).items()}
    if trl_peer is not None:
        found |= {f"peer_{name}": value for name, value in theirs.result(WARMUP).items()}
        found["ratio"] = round(found["peer_cpu_s"] / found["ours_cpu_s"], 2)
    print(json.dumps({**found, "peer": trl_peer.NAME if trl_peer else None, "turns": options.turns}))


if __name__ == "__main__":
    main()
