"""Prompts of ours sent to vLLM servers, and an engine that asks them: ids compared, images in the trainer's size."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.engines.completions import Asking, Wanted
from mmedexpert.engines.messages import messages_of
from mmedexpert.engines.transformers import reply_to, seed_of
from mmedexpert.engines.vllm import Servers
from mmedexpert.engines.vllm_server import PROBE
from mmedexpert.errors import UserError
from mmedexpert.models.encode import Encoder, Prompt

IMAGES = 64  # ours: images kept as PNG, for the instructions of one record
WINDOW = 4  # ours: questions sent together, in multiples of the requests that servers take at once


class ServedEngine:
    """An Engine of `engines.asking`: the model or adapter that `servers` answer with, as `TransformersEngine` asks it.

    Greedy by default; above temperature 0 each sample is drawn by `transformers.seed_of`. The adapter, a name and the
    folder that servers can read, is theirs while they are asked, or from `hold` on. A question whose image or
    text cannot be encoded, or that servers refuse, gets a refusal; UserError as `Servers` raises it.
    """

    def __init__(
        self,
        servers: Servers,
        encoder: Encoder,
        *,
        adapter: tuple[str, Path] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.servers, self.encoder, self.adapter, self.seed = servers, encoder, adapter, seed
        self.asking = Asking(max_new_tokens, temperature, encoder.end_ids, encoder.banned_ids, top_p)

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Replies window by window; questions on one image go to one server. UserError where servers have no room for
        the longest."""
        longest = max((self._length(ask) for ask in asks), default=0) + self.asking.max_new_tokens
        if longest > (self.servers.longest or 0):
            self.servers.check(longest)
        if self.servers.adapter or not self.adapter:
            yield from self._replies(asks)
            return
        try:
            self.hold()
            yield from self._replies(asks)
        finally:
            if self.servers.adapter:
                self.servers.withdraw()

    def _length(self, ask: Ask) -> int:
        try:
            return self.encoder.length_of(ask.text, ask.images)
        except (UserError, ValueError):  # it is refused when its turn comes
            return 0

    def hold(self) -> None:
        """Let servers have the adapter from now on: for one that is asked again and again. UserError where one refuses
        it or does not apply it."""
        if self.adapter:
            self.servers.publish(*self.adapter)
            refuse_silent(self.servers, f"the adapter {self.adapter[1]}")

    def _replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        wanted_of = wanted_with(self.encoder)
        order = sorted(range(len(asks)), key=lambda place: (asks[place].images, place))
        step = self.servers.concurrency * len(self.servers.servers) * WINDOW
        for start in range(0, len(order), step):
            window: list[tuple[int, Prompt]] = []
            for place in order[start : start + step]:
                ask = asks[place]
                try:
                    images = [self.encoder.image(path) for path in ask.images]
                    window.append((place, self.encoder.chat(ask.text, images, ask.images)))
                except (UserError, ValueError) as error:
                    yield place, refusal(" ".join(str(error).split())[:200])
            began = time.perf_counter()
            wanted = [wanted_of(prompt, 1, seed_of(self.seed, asks[place])) for place, prompt in window]
            refused: dict[int, str] = {}
            drawn = self.servers.complete(wanted, self.asking, refused)
            if len(refused) == len(window) > 1:  # it is not the questions
                raise UserError(refused[0])
            seconds = (time.perf_counter() - began) / max(len(window), 1)
            for number, (place, prompt) in enumerate(window):
                if number in refused:
                    yield place, refusal(refused[number])
                    continue
                (said,) = drawn[number]
                mean = sum(said.logps) / max(len(said.logps), 1)
                yield place, reply_to(self.encoder, prompt, said.ids, said.finished, mean, seconds)


def refuse_silent(servers: Servers, what: str) -> None:
    """UserError for a server that takes an adapter and answers like its base, as where its modules have other names."""
    adapted, plain = servers.first_tokens(PROBE), servers.first_tokens(PROBE, of_base=True)
    for server in adapted.keys() & plain.keys():
        if adapted[server] == plain[server]:
            raise UserError(
                f"{server} takes {what} and answers like its base: the adapter's modules are none of the served "
                "model's; serve the folder of stage=serve"
            )


def wanted_with(encoder: Encoder) -> Callable[[Prompt, int, int], Wanted]:
    """(prompt, n, seed) -> what a server is asked for; it is called by its first image, or by how its text begins."""
    url = lru_cache(maxsize=IMAGES)(lambda path: _png_url(encoder, path))

    def wanted(prompt: Prompt, n: int, seed: int) -> Wanted:
        ask = Ask("", prompt.text, prompt.paths)
        name = str(prompt.paths[0]) if prompt.paths else repr(prompt.text[:60])
        # the last completion's seed, too, is one of 63 bits
        seed = min(seed, 2**63 - 1 - n)
        return Wanted(name, lambda: messages_of(ask, encoder.system_prompt or "", url), prompt.input_ids, n, seed)

    return wanted


def _png_url(encoder: Encoder, path: Path) -> str:
    buffer = io.BytesIO()
    encoder.resized(path).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
