"""Engine `transformers`: answers on this machine; prompts of like length in a batch, each image seen once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.errors import UserError
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt

WINDOW = 8  # ours: batches whose prompts are encoded together and sorted by length

PATCHES = 16384  # ours: in one call of the vision tower, 8 images of 400,000 pixels


class TransformersEngine:
    """Answers questions with a loaded model; an instance is an `asking.Engine`.

    `temperature` 0 is greedy; above it a reply is drawn by `seed` and the ask's own words, id and sample (`seed_of`).
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        *,
        batch_size: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> None:
        self.model, self.encoder = model, encoder
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        encoder.share_images(core_of(model))
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Replies batch by batch. Questions on one image come near each other, so that its features are still kept.

        A question whose image or text cannot be encoded gets a `refusal`.
        """
        order = sorted(range(len(asks)), key=lambda place: (asks[place].images, place))
        step = self.batch_size * WINDOW
        for start in range(0, len(order), step):
            window: list[tuple[int, Prompt]] = []
            encoded: dict[tuple[Any, ...], Prompt] = {}  # the samples of a question share their prompt
            for place in order[start : start + step]:
                ask = asks[place]
                key = (ask.text, ask.images)
                try:
                    if key not in encoded:
                        encoded[key] = self.encoder.chat(ask.text, [self.encoder.image(path) for path in ask.images])
                    window.append((place, encoded[key]))
                except (UserError, ValueError) as error:  # an image; what the image processor or the template refuses
                    yield place, refusal(" ".join(str(error).split())[:200])
            window.sort(key=lambda item: len(item[1].input_ids))
            for first in range(0, len(window), self.batch_size):
                places, prompts = zip(*window[first : first + self.batch_size], strict=True)
                seeds = [seed_of(self.seed, asks[place]) for place in places]
                yield from zip(places, self._answer(prompts, seeds), strict=True)

    def _answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Reply]:
        from mmedexpert.models.generate import generate  # lazily, as models/backbone.py says

        start = time.perf_counter()
        self.encoder.encode_images(core_of(self.model), prompts, patches_together=PATCHES)
        out = generate(
            self.model, self.encoder, prompts, banned_ids=self.encoder.banned_ids, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seeds=seeds,
        )  # fmt: skip
        lengths = out.mask.sum(1)
        means = ((out.logps * out.mask).sum(1) / lengths.clamp(min=1)).tolist()
        seconds = (time.perf_counter() - start) / len(prompts)
        return [
            Reply(
                self.encoder.decode(ids),
                len(ids),
                "stop" if finished else "length",
                seconds,
                mean,
                prompt_tokens=len(prompt.input_ids),
                image_tokens=prompt.input_ids.count(self.encoder.image_token_id),
            )
            for prompt, ids, finished, mean in zip(prompts, out.rows(), out.finished.tolist(), means, strict=True)
        ]


def seed_of(seed: int, ask: Ask) -> int:
    """The seed of one sample of one question: neither its company nor the place of its images is part of it."""
    told = hashlib.sha256(f"{seed}\0{ask.id}\0{ask.sample}\0{ask.text}".encode()).digest()
    return int.from_bytes(told[:8], "big") >> 1
