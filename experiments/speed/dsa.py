"""An SFT step on image questions: ours against TRL's SFTTrainer, in turns in one run, on one thread.

A step is one AdamW update of a LoRA on eight samples of 336-pixel images, answers of 16 to 128 tokens, encoding of the
samples included; every step has new images. Case 1: every sample has its own image; case 2: the eight questions of a
step share one. Both sides start from the same random Qwen2.5-VL and train on the same tokens, which is checked at every
step. The last line is one JSON object; `ratio` is that of case 1, `ratio_shared_image` that of case 2, `ideal_ratio`
and `ideal_ratio_shared_image` those of the tokens read: padded rows, against each sample's own tokens after what all
samples of the step have in common. Without trl only our side runs.

    python experiments/speed/dsa.py [--turns 5] [--model s] [--device cpu]
"""

from __future__ import annotations

import argparse
import itertools
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
    text,
    write_images,
)

from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder
from mmedexpert.models.lean import streamline
from mmedexpert.models.packing import pack, token_logps

MISSING = ""  # why the peer is not here
try:
    import trl_peer
except ImportError as error:
    trl_peer = None
    MISSING = f"TRL is not here ({error}): only our side runs; the peers are in requirements-bench.txt"

BATCH = 8
WARMUP = 1
QUESTION = 64  # tokens of a question
SHORTEST, LONGEST = 16, 128  # tokens of an answer, with the two that end the turn


def sft_step(model: Any, encoder: Encoder, optimizer: torch.optim.Optimizer, samples: Sequence[Question]) -> list[Row]:
    """Loss and update on the answers; returns each sample's ids and number of trained tokens."""
    prompts = [encoder.chat(sample.text, [encoder.image(sample.image)]) for sample in samples]
    # TRL trains on the template's line break after the end of the turn too
    answers = [encoder.tokenizer(f"{sample.answer}<|im_end|>\n")["input_ids"] for sample in samples]
    encoder.encode_images(core_of(model), prompts)
    logps, _, _ = token_logps(model, pack(model, encoder, prompts, answers))
    (-logps.mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return [((*prompt.input_ids, *answer), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def samples_of(images: Sequence[Path], steps: int, *, shared: bool) -> list[Question]:
    """`BATCH` samples a step; answer lengths are spread evenly and shuffled, the same in every step."""
    spread = torch.linspace(SHORTEST, LONGEST, BATCH).round().int()
    lengths = spread[torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))].tolist()
    return [
        Question(text(n, QUESTION), images[n // BATCH if shared else n], text(n + 7, lengths[n % BATCH] - 2))
        for n in range(steps * BATCH)
    ]


def ideal(rows: Sequence[Row], *, shared: bool) -> float:
    """Tokens of the padded batch over those that have to be read."""
    ids = [row[0] for row in rows]
    columns = zip(*ids, strict=False)  # up to the end of the shortest
    prefix = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns))) if shared else 0
    padded = len(ids) * max(len(row) for row in ids)
    return padded / (prefix + sum(len(row) - prefix for row in ids))


def compare(options: argparse.Namespace, *, shared: bool) -> dict[str, Any]:
    """Both sides in turns on one case: median seconds and peak memory of each."""
    size, dtype, device = SIZES[options.model], getattr(torch, options.dtype), options.device
    tokenizer = byte_tokenizer()
    encoder = build_encoder(tokenizer, options.image_size)
    steps = options.turns + WARMUP
    ours, theirs = Stopwatch(device), Stopwatch(device)
    ideals: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), steps if shared else steps * BATCH, options.image_size)
        samples = samples_of(images, steps, shared=shared)
        model = get_peft_model(build_model(size, tokenizer, dtype=dtype, device=device), lora_config()).train()
        streamline(model)  # as load_model and add_lora do
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
        batches = iter([samples[start : start + BATCH] for start in range(0, len(samples), BATCH)])

        def turn(peer_rows: list[Row]) -> None:
            batch = next(batches)
            with ours.lap():
                rows = sft_step(model, encoder, optimizer, batch)
            ideals.append(ideal(rows, shared=shared))
            assert not peer_rows or sorted(peer_rows) == sorted(rows), "the sides trained on different tokens"

        if trl_peer is None:
            for _ in range(steps):
                turn([])
        else:
            trl_peer.sft(
                build_model(size, tokenizer, dtype=dtype, device=device),
                build_processor(tokenizer, options.image_size),
                samples,
                batch_size=BATCH,
                watch=theirs,
                turn=turn,
            )
    found: dict[str, Any] = {"shared_image": shared, "ideal_ratio": round(ideals[-1], 2)}
    found |= {f"ours_{name}": value for name, value in ours.result(WARMUP).items()}
    if trl_peer is not None:
        found |= {f"peer_{name}": value for name, value in theirs.result(WARMUP).items()}
        found["ratio"] = round(found["peer_cpu_s"] / found["ours_cpu_s"], 2)
    return found


def main() -> None:
    """Run both cases, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--model", choices=SIZES, default="s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if trl_peer is None:
        print(MISSING)
    print(f"{'images':>8} {'ours s':>8} {'peer s':>8} {'ratio':>6} {'ideal':>6} {'ours MiB':>9} {'peer MiB':>9}")
    table = []
    for shared in (False, True):
        row = compare(options, shared=shared)
        table.append(row)
        peer_s, ratio, ours_mib, peer_mib = (
            row.get(key) or "-" for key in ("peer_cpu_s", "ratio", "ours_mib", "peer_mib")
        )
        print(
            f"{'one' if shared else 'eight':>8} {row['ours_cpu_s']:>8} {peer_s:>8} {ratio:>6} "
            f"{row['ideal_ratio']:>6} {ours_mib:>9} {peer_mib:>9}",
            flush=True,
        )
    own, common = table
    print(json.dumps({
        **{key: own.get(key) for key in ("ours_cpu_s", "peer_cpu_s", "ratio")},
        "ratio_shared_image": common.get("ratio"), "ideal_ratio": own["ideal_ratio"],
        "ideal_ratio_shared_image": common["ideal_ratio"], "peer": trl_peer.NAME if trl_peer else None,
        "model": options.model, "device": options.device, "dtype": options.dtype, "image_size": options.image_size,
        "threads": options.threads, "turns": options.turns,
        "clock": "wall" if options.device.startswith("cuda") else "process CPU", "table": table,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
