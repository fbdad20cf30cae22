"""Engine `transformers`: answers on this machine; prompts of like length together, each image seen once, and who waits
takes the place of who has answered."""

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
WINDOW_TOKENS = 2**18  # ours: of their prompts, for all their images are in memory: 16 images of 16,384 tokens


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
        """Replies as they end. Questions on one image come near each other, so that its features are still kept.

        A question whose image or text cannot be encoded gets a `refusal`.
        """
        order = sorted(range(len(asks)), key=lambda place: (asks[place].images, place))
        window: list[tuple[int, Prompt]] = []
        encoded: dict[tuple[Any, ...], Prompt] = {}  # the samples of a question share their prompt
        tokens = 0
        for place in order:
            ask = asks[place]
            key = (ask.text, ask.images)
            try:
                if key not in encoded:
                    encoded[key] = self.encoder.chat(ask.text, [self.encoder.image(path) for path in ask.images])
                    tokens += len(encoded[key].input_ids)
                window.append((place, encoded[key]))
            except (UserError, ValueError) as error:  # an image; what the image processor or the template refuses
                yield place, refusal(" ".join(str(error).split())[:200])
            if len(window) == self.batch_size * WINDOW or tokens >= WINDOW_TOKENS:
                yield from self._answer(window, asks)
                window, encoded, tokens = [], {}, 0
        if window:
            yield from self._answer(window, asks)

    def _answer(self, window: list[tuple[int, Prompt]], asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        from mmedexpert.models.generate import decode  # lazily, as models/backbone.py says

        window.sort(key=lambda item: len(item[1].input_ids))
        places, prompts = zip(*window, strict=True)
        start = time.perf_counter()
        for left in decode(
            self.model, self.encoder, prompts, banned_ids=self.encoder.banned_ids, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, rows=self.batch_size,
            seeds=[seed_of(self.seed, asks[place]) for place in places],
        ):  # fmt: skip
            seconds = (time.perf_counter() - start) / len(left)
            for row, said in left:
                mean = float(said.logps.mean())
                yield places[row], reply_to(self.encoder, prompts[row], said.ids, said.finished, mean, seconds)
            start = time.perf_counter()


def reply_to(
    encoder: Encoder, prompt: Prompt, ids: Sequence[int], finished: bool, mean_logp: float, seconds: float
) -> Reply:
    """The reply that a completion of a prompt is."""
    return Reply(
        encoder.decode(ids),
        len(ids),
        "stop" if finished else "length",
        seconds,
        mean_logp,
        prompt_tokens=len(prompt.input_ids),
        image_tokens=prompt.input_ids.count(encoder.image_token_id),
    )


def seed_of(seed: int, ask: Ask) -> int:
    """The seed of one sample of one question: neither its company nor the place of its images is part of it."""
    told = hashlib.sha256(f"{seed}\0{ask.id}\0{ask.sample}\0{ask.text}".encode()).digest()
    return int.from_bytes(told[:8], "big") >> 1
