"""Questions on their way to a server: several at once, at a bounded rate, each reply on the disk before it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import anyio
import openai
from aiolimiter import AsyncLimiter
from anyio.streams.memory import MemoryObjectSendStream

from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.engines.ledger import REFUSED, Ledger, Row
from mmedexpert.engines.messages import messages_of
from mmedexpert.engines.replies import (
    RUNS,
    Sent,
    body_of,
    counted,
    failed_row,
    own_fault,
    reason_of,
    replied_row,
    reply_of,
)  # fmt: skip
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_known

if TYPE_CHECKING:
    from mmedexpert.engines.openai import OpenAIEngine

GONE = 20  # ours: this many questions in a row that the server could not take (and `concurrency` more): it is gone
CONNECT_SECONDS = 5.0  # ours: the openai client's own default; a dead host is told apart from a slow answer
CHECK_RETRIES = 2  # ours: few, so that a server that is not there is told at once
Format = Mapping[str, Any] | None  # a `response_format`


class Sending:
    """One call of an engine: the questions at `places` of `asks`, whose replies go down the stream `send`.

    `answered` counts what was sent down, `failed` holds a reason for each question that got no answer.
    """

    def __init__(
        self, engine: OpenAIEngine, asks: Sequence[Ask], places: Sequence[int],
        send: MemoryObjectSendStream[tuple[int, Reply]],
    ) -> None:  # fmt: skip
        self.engine, self.asks, self.send = engine, asks, send
        self.turn: Iterator[int] = iter(places)  # shared by the workers: each question is taken once
        self.workers = min(engine.concurrency, len(places))
        self.answered = self.in_a_row = 0
        self.failed: list[str] = []
        self.waiting: list[Row] = []  # rows that are not in the ledger yet

    async def run(self) -> None:
        """Ask until all is answered, the server is gone or the budget reached; UserError where it cannot begin."""
        engine = self.engine
        self.writing = anyio.Lock()
        self.requests, self.tokens = _pace(engine.requests_per_minute, 1), _pace(engine.tokens_per_minute)
        async with (
            self.send,
            openai.AsyncOpenAI(
                base_url=engine.base_url,
                api_key=engine.api_key or "none",
                max_retries=engine.retries,
                timeout=openai.Timeout(engine.timeout_s, connect=CONNECT_SECONDS),
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._paced]}),
            ) as self.client,
        ):
            await self._check()
            try:
                async with anyio.create_task_group() as group:
                    for _ in range(self.workers):
                        group.start_soon(self._work)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                if self.waiting and engine.ledger is not None:  # stopped between a reply and its commit
                    engine.ledger.add(self.waiting)

    async def _work(self) -> None:
        engine = self.engine
        for place in self.turn:
            ask = self.asks[place]
            request, reply, fault = await anyio.to_thread.run_sync(self._look_up, ask)
            if reply is None and fault is None:
                if engine.budget_reached:
                    return
                engine.asked += 1
                reply, fault = await self._reply(ask, request)
            if fault is None:
                self.in_a_row = 0
            elif not own_fault(fault):  # also of a question that is given up: all may be, where a server is broken
                self.in_a_row += 1
            if reply is not None:
                await self._give(place, reply)
                await self._rest(reply.tokens + reply.prompt_tokens)
            else:
                self.failed.append(f"{ask.id}: {reason_of(cast(Exception, fault))}")
            if self.in_a_row >= GONE + self.workers:
                return

    def _look_up(self, ask: Ask) -> tuple[str, Reply | None, Exception | None]:
        """How the ledger names a question, and what another process has heard of it meanwhile."""
        if self.engine.ledger is None:
            return "", None, None
        try:
            request = self.engine.request(ask)
        except OSError as error:  # its image is gone since the call began
            return "", None, error
        return request, self.engine.kept(request), None

    def _known(self, key: str) -> Row | None:
        return self.engine.ledger.get(key) if self.engine.ledger is not None else None

    async def _give(self, place: int, reply: Reply) -> None:
        self.answered += 1
        await self.send.send((place, reply))

    async def _reply(self, ask: Ask, request: str) -> tuple[Reply | None, Exception | None]:
        """The reply or refusal, in the ledger by then, and what was raised."""
        engine, sent, reply, fault = self.engine, None, None, None
        try:
            sent = await self._answer(ask, engine.max_new_tokens, ask.format)
            reply = reply_of(body_of(sent.text), sent.seconds / self.workers)
        except Exception as error:  # a hostile body can raise almost anything
            fault = error
            reply = refusal(reason_of(error)) if own_fault(error) else None
        if sent is not None and reply is not None:
            engine.spent += engine.prices.cost(reply.prompt_tokens, reply.tokens) if engine.prices else 0.0
            row = replied_row(request, engine.model, sent, reply, engine.prices)
        elif isinstance(fault, UserError):  # an image that cannot be opened: nothing was sent
            return reply, fault
        else:
            row = failed_row(request, engine.model, sent, cast(Exception, fault))
            before = await anyio.to_thread.run_sync(self._known, row.key)
            row, runs = counted(before, row)
            if reply is None and runs >= RUNS:
                told = f"failed {row.error_text}"
                row, reply = replace(row, outcome=REFUSED, error_text=told), refusal(told)
        if engine.ledger is not None:
            await self._keep(engine.ledger, row)
            if fault is None and (first := await anyio.to_thread.run_sync(engine.kept, request)):
                # of two processes that asked at once, the first's reply
                reply = replace(first, seconds=cast(Reply, reply).seconds, kept=False)
        return reply, fault

    async def _keep(self, ledger: Ledger, row: Row) -> None:
        """Have a row on the disk. Whose turn it is commits the rows of all who wait."""
        self.waiting.append(row)
        async with self.writing:
            if rows := list(self.waiting):
                await anyio.to_thread.run_sync(ledger.add, rows)
                del self.waiting[: len(rows)]

    async def _check(self) -> None:
        """Raise UserError unless the server is there and serves the model."""
        address, model = self.engine.address, self.engine.model
        try:
            listed = await self.client.with_options(max_retries=CHECK_RETRIES).models.list()
            served = [str(one.id) for one in listed.data]
        except openai.APIConnectionError as error:
            fix = "start the server, or correct base_url"
            raise UserError(f"no server answers at {address} ({reason_of(error)}): {fix}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{address} refuses the api_key ({reason_of(error)}): give its key") from error
        except openai.APIStatusError as error:
            fix = "correct base_url (it often ends in /v1), or look at the server's log"
            raise UserError(f"{address} does not list its models ({reason_of(error)}): {fix}") from error
        except Exception as error:  # HTML, a list, half a JSON object: anything may come back
            told = f"/models gave no list ({reason_of(error)})"
            raise UserError(f"{address} is no OpenAI-compatible server, {told}: correct base_url") from error
        if model in served:
            return
        reason = ""
        # `transformers serve` lists its hub cache only, never the local folder it was started with: try such a name.
        if not served or Path(model).is_dir() or PurePath(model).is_absolute():
            try:
                reply_of(body_of((await self._answer(Ask("probe", "Hello", ()), 1)).text), 0.0)
                return
            except Exception as error:
                reason = f" ({reason_of(error)})"
        names = ", ".join(served[:20]) or "nothing"
        raise UserError(f"{address} does not serve {model!r}{reason} but {names}: name one of these")

    async def _answer(self, ask: Ask, max_tokens: int, wish: Format = None) -> Sent:
        """What the server sends; asked without log-probabilities or a format where it refuses them."""
        engine = self.engine
        messages = await anyio.to_thread.run_sync(messages_of, ask, engine.system_prompt)
        start = time.perf_counter()
        wanted, wish = engine.takes_logprobs, wish if engine.takes_formats else None
        try:
            raw = await self._ask(messages, max_tokens, wish, ask.sample)
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.InternalServerError) as error:
            told = error.response.text
            if wanted and "logprob" in told:
                engine.takes_logprobs = False  # the others in flight come here, too
                return await self._answer(ask, max_tokens, wish)
            # llama-cpp-python's server refuses what it does not know with HTTP 500
            if wish is None or (isinstance(error, openai.InternalServerError) and "response_format" not in told):
                raise
            # Servers word it in many ways: where the question alone is taken, it was the format that was refused.
            sent = await self._answer(ask, max_tokens)
            engine.takes_formats = False
            return sent
        seconds, latency = time.perf_counter() - start, raw.elapsed.total_seconds()
        return Sent(without_known(raw.text), raw.retries_taken + 1, latency, seconds)  # it may send the key back

    async def _ask(self, messages: Any, max_tokens: int, wish: Format, sample: int) -> Any:
        engine, omit = self.engine, openai.omit
        return await self.client.chat.completions.with_raw_response.create(
            model=engine.model,
            messages=messages,
            max_tokens=max_tokens,  # not max_completion_tokens, which fewer servers know
            temperature=engine.temperature,
            top_p=omit if engine.top_p is None else engine.top_p,
            seed=omit if engine.seed is None else engine.seed + sample,
            frequency_penalty=0.0,  # `transformers serve` derives its repetition penalty, here 1, from it
            logprobs=True if engine.takes_logprobs else omit,
            response_format=omit if wish is None else cast(Any, wish),
        )

    async def _paced(self, request: Any) -> None:
        """Called before every try, those after 429 included."""
        if self.requests is not None and request.method == "POST":
            await self.requests.acquire()

    async def _rest(self, tokens: int) -> None:
        """Wait until `tokens` more may be used: what a reply took is known when it has come."""
        while self.tokens is not None and tokens > 0:
            part = min(tokens, self.tokens.max_rate)
            await self.tokens.acquire(part)
            tokens -= int(part)


def _pace(per_minute: float | None, burst: float | None = None) -> AsyncLimiter | None:
    """So many a minute, evenly: `burst` at once, else what a second has room for. # ours

    A bucket of a whole minute would let twice as much through in the first one, and again in each call.
    """
    if per_minute is None:
        return None
    size = burst or max(1.0, per_minute // 60)
    return AsyncLimiter(size, size * 60 / per_minute)
