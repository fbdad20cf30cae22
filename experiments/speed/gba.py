"""A full GRPO step on image prompts: ours against TRL's GRPOTrainer, in turns in one run, on one thread.

A step is a rollout of G completions of exactly C tokens for each of two prompts of P tokens (image included), a cheap
reward, advantages, and one AdamW update of a LoRA; every step has new images. Both sides start from the same random
Qwen2.5-VL and train on the same prompts and numbers of tokens, which is checked at every step. The last line is one
JSON object; `ratio` and `ratio_128` are those of 261 prompt tokens, G = 8 and 32 or 128 new tokens, `ideal_ratio` that
of the tokens read, G (P + C) / (P + G C). Without trl only our side runs.

    python experiments/speed/gba.py [--cases 261,32,8 261,128,8] [--turns 3] [--model s] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    reward,
    text,
    text_length,
    write_images,
)

from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder
from mmedexpert.models.generate import generate
from mmedexpert.models.lean import streamline
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.training.advantages import group_relative
from mmedexpert.training.losses import policy_loss

try:
    import trl_peer
except ImportError as error:
    trl_peer = None
    MISSING = f"TRL is not here ({error}): only our side runs; the peers are in requirements-bench.txt"

PROMPTS = 2
WARMUP = 1
CASES = ["261,32,8", "261,128,8", "261,32,16", "645,32,8", "645,128,8", "261,32,4"]


def grpo_step(
    model: Any,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    questions: Sequence[Question],
    *,
    num_generations: int,
    max_new_tokens: int,
    seed: int,
) -> list[Row]:
    """Rollout, reward, advantages and update; returns each row's prompt ids and number of trained tokens."""
    prompts = [encoder.chat(question.text, [encoder.image(question.image)]) for question in questions]
    encoder.encode_images(core_of(model), prompts)
    sampled = generate(
        model,
        encoder,
        prompts,
        max_new_tokens=max_new_tokens,
        num_generations=num_generations,
        temperature=1.0,
        end_ids=(),
        banned_ids=encoder.banned_ids,
        seeds=range(seed, seed + len(prompts)),
    )
    completions = sampled.rows()
    rewards = torch.tensor(reward([encoder.decode(row) for row in completions]), device=model.device)
    advantages = group_relative(rewards.view(-1, num_generations)).flatten()
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    packed = pack(model, encoder, repeated, completions)
    scores, _, _ = token_logps(model, packed)
    logps = packed.matrix(scores, max_new_tokens)
    loss, _ = policy_loss(logps, logps.detach(), advantages, sampled.mask, loss_type="dapo")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    trained = sampled.mask.sum(1).tolist()
    return [(tuple(prompt.input_ids), count) for prompt, count in zip(repeated, trained, strict=True)]


def compare(
    options: argparse.Namespace, prompt_tokens: int, max_new_tokens: int, num_generations: int
) -> dict[str, Any]:
    """Both sides in turns on one case: median seconds and peak memory of each."""
    size, dtype, device = SIZES[options.model], getattr(torch, options.dtype), options.device
    tokenizer = byte_tokenizer()
    encoder = build_encoder(tokenizer, options.image_size)
    steps = options.turns + WARMUP
    ours, theirs = Stopwatch(device), Stopwatch(device)
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), steps * PROMPTS, options.image_size)
        length = text_length(build_encoder(tokenizer, options.image_size), images[0], prompt_tokens)
        questions = [Question(text(number, length), image) for number, image in enumerate(images)]
        policy = get_peft_model(build_model(size, tokenizer, dtype=dtype, device=device), lora_config()).train()
        streamline(policy)  # as load_model and add_lora do
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=LR, fused=True)
        starts = iter(range(0, len(questions), PROMPTS))

        def turn(peer_rows: list[Row]) -> None:
            start = next(starts)
            batch = questions[start : start + PROMPTS]
            with ours.lap():
                rows = grpo_step(
                    policy, encoder, optimizer, batch,
                    num_generations=num_generations, max_new_tokens=max_new_tokens, seed=start,
                )  # fmt: skip
            expected = [(prompt_tokens, max_new_tokens)] * PROMPTS * num_generations
            assert [(len(ids), count) for ids, count in rows] == expected, "our side trained on other numbers of tokens"
            assert not peer_rows or sorted(peer_rows) == sorted(rows), "the sides trained on different tokens"

        if trl_peer is None:
            for _ in range(steps):
                turn([])
        else:
            trl_peer.grpo(
                build_model(size, tokenizer, dtype=dtype, device=device),
                build_processor(tokenizer, options.image_size),
                questions,
                num_generations=num_generations,
                prompts_per_step=PROMPTS,
                max_new_tokens=max_new_tokens,
                micro_batch=num_generations,
                banned_ids=encoder.banned_ids,
                watch=theirs,
                turn=turn,
            )
    found: dict[str, Any] = {"P": prompt_tokens, "C": max_new_tokens, "G": num_generations}
    found["ideal_ratio"] = round(
        num_generations * (prompt_tokens + max_new_tokens) / (prompt_tokens + num_generations * max_new_tokens), 2
    )
    found |= {f"ours_{name}": value for name, value in ours.result(WARMUP).items()}
    if trl_peer is not None:
        found |= {f"peer_{name}": value for name, value in theirs.result(WARMUP).items()}
        found["ratio"] = round(found["peer_cpu_s"] / found["ours_cpu_s"], 2)
    return found


def main() -> None:
    """Run the cases, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="P,C,G")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--model", choices=SIZES, default="s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if trl_peer is None:
        print(MISSING)
    names = f"{'ours s':>8} {'peer s':>8} {'ratio':>6} {'ideal':>6} {'ours MiB':>9} {'peer MiB':>9}"
    print(f"{'P':>5} {'C':>5} {'G':>3} {names}")
    table = []
    for case in options.cases:
        row = compare(options, *(int(number) for number in case.split(",")))
        table.append(row)
        peer_s, ratio, ours_mib, peer_mib = (
            row.get(key) or "-" for key in ("peer_cpu_s", "ratio", "ours_mib", "peer_mib")
        )
        print(
            f"{row['P']:>5} {row['C']:>5} {row['G']:>3} {row['ours_cpu_s']:>8} {peer_s:>8} {ratio:>6} "
            f"{row['ideal_ratio']:>6} {ours_mib:>9} {peer_mib:>9}",
            flush=True,
        )
    by_case = {(row["P"], row["C"], row["G"]): row for row in table}
    main_row = by_case.get((261, 32, 8), table[0])
    print(json.dumps({
        **{key: main_row.get(key) for key in ("ours_cpu_s", "peer_cpu_s", "ratio")},
        "ratio_128": by_case.get((261, 128, 8), {}).get("ratio"), "ideal_ratio": main_row["ideal_ratio"],
        "peer": trl_peer.NAME if trl_peer else None, "model": options.model, "device": options.device,
        "dtype": options.dtype, "image_size": options.image_size, "threads": options.threads, "turns": options.turns,
        "clock": "wall" if options.device.startswith("cuda") else "process CPU", "table": table,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
