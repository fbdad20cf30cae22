"""Asking any OpenAI-compatible server (vLLM, SGLang, `transformers serve`): several questions at once, nothing twice.

Start vLLM with `--generation-config vllm`: it otherwise applies the model's own sampling defaults (a repetition penalty
of 1.05 for Qwen2.5-VL), which MedEvalKit does not.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal

from mmedexpert.engines.asking import Ask, BudgetReached, Reply, refusal
from mmedexpert.engines.ledger import Ledger, canonical, key_of
from mmedexpert.engines.messages import hash_url, messages_of
from mmedexpert.engines.replies import Prices, kept_reply, reason_of
from mmedexpert.engines.sending import Sending
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import hide, hide_address, without_password
from mmedexpert.schema_data import EndpointConfig


class OpenAIEngine:
    """Answers of `model` at `base_url` (with its `/v1`) to questions about images, `concurrency` at a time.

    An Engine of `engines.asking`. 429, 5xx, lost connections and time-outs are tried again `retries` times by the
    openai client, with exponential back-off and jitter, or when the server says. `timeout_s` is the longest silence of
    the server per try. `api_key` None sends no key that the environment may hold: the server may be anyone's. `address`
    is base_url without its password, for messages.

    *Sampling.* Greedy by default. With `seed`, the n-th sample of a question (`Ask.sample`) is drawn with seed + n.

    *Ledger.* With `ledger` a reply that is there is given without asking, and a new one is on the disk before it is
    given: a killed run asks nothing twice. `revision` is any name for what is served under `model` now, and part of a
    row's key; the server's address is none. What is asked again: `ledger.Row`; `retry_refused` asks refusals, too.

    *Limits.* `requests_per_minute` counts every try, `tokens_per_minute` what replies have read and written. The budget
    of this engine: `max_requests` questions (tries again are not counted), `max_cost` USD by `prices`; those in flight
    when it is reached, `concurrency` at most, still come.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        revision: str | None = None,
        api_key: str | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 8192,  # peers: MedEvalKit
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        concurrency: int = 16,
        timeout_s: float = 600.0,
        retries: int = 5,
        ledger: Ledger | None = None,
        retry_refused: bool = False,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_requests: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout_s <= 0 or max_new_tokens < 1 or temperature < 0:
            raise ValueError("concurrency and max_new_tokens start at 1, retries and temperature at 0, timeout_s above")
        if any(n is not None and n <= 0 for n in (requests_per_minute, tokens_per_minute, max_requests, max_cost)):
            raise ValueError("requests_per_minute, tokens_per_minute, max_requests and max_cost are above 0, or None")
        if not base_url.startswith(("http://", "https://")):
            shown = base_url.rpartition("@")[2]  # before it stands a user and password
            raise UserError(f"base_url {shown!r} is no web address: write it as http://localhost:8000/v1")
        if max_cost is not None and prices is None:
            raise UserError("max_cost needs prices, in USD per million tokens: give them, or max_requests in its place")
        self.base_url = base_url
        self.address = without_password(base_url)
        self.model = model
        self.revision = revision
        self.api_key = api_key
        hide([api_key])
        hide_address(base_url)
        self.system_prompt = system_prompt
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retries = retries
        self.ledger, self.retry_refused = ledger, retry_refused
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.max_requests, self.max_cost, self.prices = max_requests, max_cost, prices
        self.asked, self.spent = 0, 0.0  # questions sent, and USD
        self.takes_logprobs = self.takes_formats = True  # until the server refuses

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """(place in `asks`, reply), each as soon as it is there; images are read when their question's turn comes.

        An ask's `format` is a wish: a server that refuses it is asked without, and a reply may be of another form.

        A question that the server refuses for good (HTTP 400, 413, 415, 422: too long, an image it does not take), or
        whose image cannot be opened, gets a `refusal`.

        With a ledger the replies that it holds come first, a question that stands twice in `asks` is asked once, and
        where all is known no server is needed.

        Raises UserError before the first question where the server is not there, refuses the key, is no such server or
        does not serve the model; and after the last reply where questions stayed without one, BudgetReached where a
        limit is the cause.
        """
        replies = self._replies(asks)
        alive = weakref.ref(replies)
        # One left half-read would, when the interpreter ends, wait for the event loop's thread, which no longer runs.
        atexit.register(_close, alive)
        return replies

    def request(self, ask: Ask) -> str:
        """What the ledger keeps of a question, canonical JSON whose SHA-256 is its key; OSError for a lost image."""
        sampling = {"temperature": float(self.temperature), "max_tokens": self.max_new_tokens}
        sampling |= {"top_p": float(self.top_p)} if self.top_p is not None else {}
        sampling |= {"seed": self.seed} if self.seed is not None else {}
        told: dict[str, Any] = {
            "model": self.model,
            "messages": messages_of(ask, self.system_prompt, hash_url),
            "sampling": sampling,
            "sample": ask.sample,
        }
        told |= {"revision": self.revision} if self.revision is not None else {}
        told |= {"response_format": ask.format} if ask.format is not None else {}
        return canonical(told)

    def kept(self, request: str) -> Reply | None:
        """The reply or refusal that the ledger holds for a `request`; None where it is to be asked."""
        assert self.ledger is not None
        return kept_reply(self.ledger.get(key_of(request)), retry_refused=self.retry_refused)

    def forget(self, ask: Ask) -> None:
        """Have a question asked again the next time: its reply cannot be read. Does nothing without a ledger."""
        if self.ledger is not None:
            try:
                self.ledger.forget([key_of(self.request(ask))])
            except OSError:  # its image is gone: it was never asked
                return

    @property
    def budget_reached(self) -> str:
        """The limit that is reached, with its value; empty while there is room."""
        if self.max_requests is not None and self.asked >= self.max_requests:
            return f"max_requests={self.max_requests}"
        if self.max_cost is not None and self.spent >= self.max_cost:
            return f"max_cost={self.max_cost} (spent: {self.spent:.4f} USD)"
        return ""

    def _replies(self, asks: Sequence[Ask]) -> Generator[tuple[int, Reply], None, None]:
        same: dict[Any, list[int]] = {}  # the places of one question
        for place, ask in enumerate(asks):
            if self.ledger is None:
                same[place] = [place]
                continue
            try:
                request = self.request(ask)
            except OSError as error:
                yield place, refusal(reason_of(UserError(f"an image of {ask.id} cannot be read ({error})")))
                continue
            if (key := key_of(request)) in same:
                same[key].append(place)
            elif found := self.kept(request):
                yield place, found
            else:
                same[key] = [place]
        places = {first: others for first, *others in same.values()}
        if not places:
            return
        send, receive = anyio.create_memory_object_stream[tuple[int, Reply]](self.concurrency)
        sending = Sending(self, asks, list(places), send)
        # The event loop has its own thread: requests go on while the caller writes a reply to disk. Leaving the block
        # by an exception (Ctrl-C, the caller's own) cancels them.
        with receive, start_blocking_portal() as portal:
            work = portal.start_task_soon(sending.run)
            while True:
                try:
                    place, reply = portal.call(receive.receive)
                except anyio.EndOfStream:
                    break
                yield place, reply
                for other in places[place]:
                    yield other, replace(reply, kept=True)
            work.result()
        if missing := len(places) - sending.answered:
            raise self._missing(missing, len(places), sending.failed)

    def _missing(self, missing: int, count: int, failed: Sequence[str]) -> UserError:
        """What to tell where questions stayed without an answer."""
        unsent = missing - len(failed)
        if (limit := self.budget_reached) and unsent:
            also = f", and {len(failed)} failed (first: {failed[0]})" if failed else ""
            return BudgetReached(
                f"{limit} is reached: {unsent} of {count} questions were not sent to {self.address}{also}; the answers "
                "that came are kept, the same command goes on with the rest under the same limit, or raise it"
            )
        stopped = f", then {unsent} were not sent" if unsent else ""
        first = f"first: {failed[0]}" if failed else "those before them had failed in each of several runs"
        return UserError(
            f"{missing} of {count} questions got no answer from {self.address}: {len(failed)} failed{stopped} "
            f"({first}); the other answers are kept, the same command asks only these again"
        )


def engine_of(
    endpoint: EndpointConfig, where: str, *, max_new_tokens: int, system_prompt: str = "",
    ledger: Ledger | None = None, retry_refused: bool = False, temperature: float = 0.0, top_p: float | None = None,
    seed: int | None = None,
) -> OpenAIEngine:  # fmt: skip
    """The engine of a config's server; `where` is the key it stands under.

    Raises UserError where the environment variable that should hold its key is empty.
    """
    assert endpoint.base_url is not None and endpoint.model is not None  # checks.check
    variable = endpoint.api_key_env
    if variable is not None and not os.environ.get(variable):
        raise UserError(
            f"the environment variable {variable} ({where}.api_key_env) is empty: export it, or set "
            f"{where}.api_key_env=null"
        )
    told = endpoint.prices
    prices = None
    if told.input is not None and told.output is not None and told.version is not None:
        prices = Prices(told.input, told.output, told.version)
    return OpenAIEngine(
        endpoint.base_url, endpoint.model, revision=endpoint.revision,
        api_key=os.environ[variable] if variable else None, system_prompt=system_prompt,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        concurrency=endpoint.concurrency, timeout_s=endpoint.timeout_s, retries=endpoint.retries, ledger=ledger,
        retry_refused=retry_refused, requests_per_minute=endpoint.requests_per_minute,
        tokens_per_minute=endpoint.tokens_per_minute, max_requests=endpoint.max_requests, max_cost=endpoint.max_cost,
        prices=prices,
    )  # fmt: skip


def _close(alive: weakref.ref[Generator[tuple[int, Reply], None, None]]) -> None:
    if replies := alive():
        replies.close()
