"""Where the time of one GBA step goes, and how far each part is from its floor.

The step is that of gba.py, with the clock read between its parts (on CUDA after a synchronisation): process seconds on
CPU, wall seconds on CUDA, the median of `--steps` steps after a warm-up, every step with new images. A part's floor is
max(FLOPs / GEMM rate, bytes / copy rate). Both rates are measured before and after the steps in the same process, the
GEMM in the model's dtype, the copy by what it reads and writes; floors and shares take the mean of the two. Weights
which fit a CPU's caches can be read faster than a copy of large blocks suggests.

gba_flops.py says how FLOPs and bytes are counted. MFU of the update (packing to optimizer) is its model FLOPs, without
the second forward pass of gradient checkpointing, over its seconds and the GEMM rate. The last line is one JSON object.

On a GPU machine with torch, transformers and peft, from the repository's root:

    export PYTHONPATH=src PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    gpu="--device cuda --dtype bfloat16 --image-size 952"
    for model in 3b 7b; do for length in 256 1024; do
      python experiments/speed/gba_profile.py --model $model $gpu --case 1300,$length,8
      python experiments/speed/gba_profile.py --model $model $gpu --case 1300,$length,8 --gradient-checkpointing
    done; done
    pip install trl==1.16.0
    for model in 3b 7b; do for length in 256 1024; do
      python experiments/speed/gba.py --model $model $gpu --cases 1300,$length,8
    done; done

Without checkpointing an update on 1024 new tokens keeps about 86 GB of activations for 3b, 117 GB for 7b (256: 30 and
41 GB), counted on one layer of their widths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gba_flops import reading, vision_flops, work
from peft import get_peft_model
from tiny_vl import (
    LR,
    MAX_GRAD_NORM,
    SIZES,
    Question,
    Stopwatch,
    build_encoder,
    build_model,
    byte_tokenizer,
    lora_config,
    rates,
    reward,
    text,
    text_length,
    write_images,
)

import mmedexpert.models.generate as sampler
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.lean import streamline
from mmedexpert.models.logps import selected_logps
from mmedexpert.models.packing import Pack, pack
from mmedexpert.training.advantages import group_relative
from mmedexpert.training.losses import policy_loss

WARMUP = 1
UPDATE = ("packing", "forward", "head", "backward", "optimizer")
PARTS = ("images", "vision tower", "prefill", "decoding", *UPDATE, "rest")


class Clock:
    """Seconds of the parts of one step."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Seconds of the process on CPU, of the wall clock on CUDA."""
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part."""
        began = self.now()
        yield
        self.seconds[name] = self.now() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def step(
    model: Any,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    questions: Sequence[Question],
    seed: int,
    clock: Clock,
    *,
    num_generations: int,
    max_new_tokens: int,
) -> tuple[list[Prompt], Pack]:
    """The step of gba.py in parts; returns what it was about."""
    core = core_of(model)
    with clock.part("step"):
        with clock.part("images"):
            images = [encoder.image(question.image) for question in questions]
        prompts = [encoder.chat(question.text, [image]) for question, image in zip(questions, images, strict=True)]
        with clock.part("vision tower"):
            encoder.encode_images(core, prompts)
        with clock.part("decoding"), patch.object(sampler, "prefill", clock.timed("prefill", sampler.prefill)):
            sampled = sampler.generate(
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
        with clock.part("packing"):
            packed = pack(model, encoder, [p for p in prompts for _ in range(num_generations)], completions)
        with clock.part("forward"):
            hidden = core.model(**packed.inputs, scored=packed.at, use_cache=False).last_hidden_state[0]
        with clock.part("head"):
            scores, _, _ = selected_logps(hidden, core.lm_head.weight, packed.targets)
        logps = packed.matrix(scores, max_new_tokens)
        loss, _ = policy_loss(logps, logps.detach(), advantages, sampled.mask, loss_type="dapo")
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
    clock.seconds["decoding"] -= clock.seconds["prefill"]
    clock.seconds["rest"] = 2 * clock.seconds["step"] - sum(clock.seconds.values())
    return prompts, packed


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps; the measured and computed figures of all parts and of the whole."""
    size, dtype, device = SIZES[options.model], getattr(torch, options.dtype), options.device
    prompt_tokens, max_new_tokens, num_generations = options.case
    tokenizer = byte_tokenizer()
    encoder, other = (build_encoder(tokenizer, options.image_size) for _ in range(2))
    steps = options.steps + WARMUP
    watch, laps = Stopwatch(device), []
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), steps * options.prompts, options.image_size)
        length = text_length(other, images[0], prompt_tokens)
        questions = [Question(text(number, length), image) for number, image in enumerate(images)]
        model = get_peft_model(build_model(size, tokenizer, dtype=dtype, device=device), lora_config()).train()
        streamline(model)
        core = core_of(model)
        if options.gradient_checkpointing:
            core.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
        vision = vision_flops(core, other, images[0])
        before = rates(dtype, device)
        for number in range(steps):
            clock = Clock(device)
            batch = questions[number * options.prompts : (number + 1) * options.prompts]
            with watch.lap():
                prompts, packed = step(
                    model, encoder, optimizer, batch, number * options.prompts, clock,
                    num_generations=num_generations, max_new_tokens=max_new_tokens,
                )  # fmt: skip
            laps.append(clock.seconds)
        after = rates(dtype, device)
    assert len(packed.targets) == options.prompts * num_generations * max_new_tokens
    prompt_tree = pack(model, encoder, prompts, [[]] * len(prompts)).inputs["tree"]
    todo = work(
        core, prompts, prompt_tree, packed, num_generations=num_generations, max_new_tokens=max_new_tokens,
        vision=vision, gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    gemm, copy = (statistics.mean(pair) for pair in zip(before, after, strict=True))
    spent = {name: statistics.median(lap[name] for lap in laps[WARMUP:]) for name in (*PARTS, "step")}
    parts = {}
    for name in PARTS:
        floor = max(todo[name].flops / gemm, todo[name].bytes / copy) if name in todo else None
        parts[name] = {
            "s": round(spent[name], 5),
            "share": round(spent[name] / spent["step"], 4),
            "gflop": round(todo[name].flops / 1e9, 3) if name in todo else None,
            "mib": round(todo[name].bytes / 2**20, 1) if name in todo else None,
            "floor_s": None if floor is None else round(floor, 6),
            "times_floor": None if floor is None else round(spent[name] / floor, 2),
        }
    update = sum(spent[name] for name in UPDATE)
    model_flops = sum(reading(core, packed.inputs["tree"])) + todo["head"].flops
    sampled = options.prompts * num_generations * max_new_tokens
    return {
        "step_s": round(spent["step"], 4),
        "decode_s_per_token": round(spent["decoding"] / max_new_tokens, 6),
        "update_s": round(update, 4),
        "sampled_tokens": sampled,
        "row_tokens": sum(packed.inputs["tree"].lengths),
        "step_tokens_per_s": round(sampled / spent["step"], 1),
        "decode_tokens_per_s": round(sampled / spent["decoding"], 1),
        "update_tokens_per_s": round(sum(packed.inputs["tree"].lengths) / update, 1),
        "update_mfu": round(model_flops / update / gemm, 4),
        "decode_bandwidth_use": round(todo["decoding"].bytes / spent["decoding"] / copy, 4),
        "peak_mib": watch.result(WARMUP)["mib"],
        "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20),
        "gemm_tflops": [round(pair[0] / 1e12, 4) for pair in (before, after)],
        "copy_gb_per_s": [round(pair[1] / 1e9, 2) for pair in (before, after)],
        "parts": parts,
    }


def main() -> None:
    """Profile one case, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=(261, 32, 8), metavar="P,C,G", type=lambda s: tuple(map(int, s.split(","))))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--model", choices=SIZES, default="s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = profile(options)
    print(f"{'part':<13} {'seconds':>9} {'share':>6} {'GFLOP':>11} {'MiB':>10} {'floor s':>9} {'x floor':>8}")
    for name, part in found["parts"].items():
        gflop, mib, floor, times = (part[key] or "-" for key in ("gflop", "mib", "floor_s", "times_floor"))
        print(f"{name:<13} {part['s']:>9} {part['share']:>6.1%} {gflop:>11} {mib:>10} {floor:>9} {times:>8}")
    for name, value in found.items():
        if name != "parts":
            print(f"{name:<20} {value}")
    cuda = options.device.startswith("cuda")
    print(json.dumps({
        **vars(options), **found, "machine": torch.cuda.get_device_name() if cuda else "CPU",
        "clock": "wall" if cuda else "process CPU", "torch": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
