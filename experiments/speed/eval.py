"""Questions per CPU-second of our transformers engine against a loop of one `generate` per question.

The loop is what MedEvalKit's Hugging Face path does: one question, one image decode, one processor call, one
`model.generate`. Same model (the tiny Qwen2.5-VL, random weights), same 336-pixel images, same greedy tokens, same run,
in turns. The last line is one JSON object; `ideal_ratio` is the peer's number of forward passes over ours.

    python experiments/speed/eval.py [--questions 64] [--per-image 1] [--batch-size 16] [--tokens 56] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmedexpert.data.images import open_image
from mmedexpert.engines.asking import Ask
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.models import tiny
from mmedexpert.models.encode import Encoder
from mmedexpert.runtime.quiet import silence
from mmedexpert.sources.phantom import lessons
from mmedexpert.stages.pretrain import corpus

SIDE = 336
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vision_hidden_size": 96, "vision_depth": 4, "vision_num_heads": 4,
}  # fmt: skip


def questions(folder: Path, count: int, per_image: int) -> list[Ask]:
    """Phantom questions on images of 336 pixels, `per_image` on each."""
    rng = np.random.default_rng(0)
    asks: list[Ask] = []
    while len(asks) < count:
        lesson = lessons.looking(rng)
        assert lesson.image is not None
        path = folder / f"{len(asks)}.png"
        lesson.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
        asks += [Ask(f"{path.stem}-{n}", lessons.looking(rng).prompt, (path,)) for n in range(per_image)]
    return asks[:count]


class Counter:
    """Counts calls of the language model: the prefills and decoding steps of either side."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls = 0
        model.model.language_model.register_forward_pre_hook(self._count)  # type: ignore[union-attr]

    def _count(self, *_: object) -> None:
        self.calls += 1

    def take(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@torch.no_grad()
def one_by_one(model: torch.nn.Module, encoder: Encoder, asks: list[Ask], tokens: int) -> list[str]:
    """One `generate` per question."""
    texts = []
    for ask in asks:
        prompt = encoder.chat(ask.text, [encoder.patches(open_image(path)) for path in ask.images])
        batch = encoder.collate_prompts([prompt])
        out = model.generate(  # type: ignore[operator]
            **batch, max_new_tokens=tokens, do_sample=False, eos_token_id=encoder.end_ids, pad_token_id=encoder.pad_id
        )
        texts.append(encoder.decode(out[0, batch["input_ids"].shape[1] :].tolist()))
    return texts


def main() -> None:
    """Time both in turns and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--per-image", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=56)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    silence(traceback=True)
    tokenizer = tiny.build_tokenizer(corpus(0), 1024)
    processor = tiny.build_image_processor(SIDE)
    model = tiny.build_model(tokenizer, seed=0, **SIZES).eval().requires_grad_(False)
    counter = Counter(model)
    ours: list[float] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        asks = questions(Path(folder), options.questions, options.per_image)
        for turn in range(options.turns + 1):  # the first warms up and does not count
            encoder = Encoder(tokenizer, processor)
            engine = TransformersEngine(model, encoder, batch_size=options.batch_size, max_new_tokens=options.tokens)
            start = time.process_time()
            answers = {place: reply.text for place, reply in engine(asks)}
            middle = time.process_time()
            our_calls = counter.take()
            theirs = one_by_one(model, encoder, asks, options.tokens)
            end = time.process_time()
            peer_calls = counter.take()
            same = sum(answers[i] == text for i, text in enumerate(theirs))
            if turn:
                ours.append(middle - start)
                peer.append(end - middle)
                print(f"turn {turn}: ours {ours[-1]:.2f} CPU-s, peer {peer[-1]:.2f} CPU-s, {same}/{len(asks)} the same")
    print(json.dumps({
        "ours_cpu_s": round(float(np.median(ours)), 3), "peer_cpu_s": round(float(np.median(peer)), 3),
        "ratio": round(float(np.median(peer) / np.median(ours)), 2), "ideal_ratio": round(peer_calls / our_calls, 2),
        "identical": same, "questions": len(asks), "batch_size": options.batch_size, "per_image": options.per_image,
        "questions_per_cpu_s": round(len(asks) / float(np.median(ours)), 2), "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
