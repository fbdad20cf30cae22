"""Asking any OpenAI-compatible server (vLLM, SGLang, `transformers serve`): several questions at once, greedy.

Start vLLM with `--generation-config vllm`: it otherwise applies the model's own sampling defaults (a repetition penalty
of 1.05 for Qwen2.5-VL), which MedEvalKit does not.
"""

from __future__ import annotations

import atexit
import base64
import io
import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

import anyio
import openai
from anyio.from_thread import start_blocking_portal
from anyio.streams.memory import MemoryObjectSendStream
from PIL import ExifTags, Image

from mmedexpert.data.images import open_image
from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password
from mmedexpert.schema import EndpointConfig

GONE = 20  # ours: this many questions in a row that the server could not take (and `concurrency` more): it is gone
CONNECT_SECONDS = 5.0  # ours: the openai client's own default; a dead host is told apart from a slow answer
CHECK_RETRIES = 2  # ours: few, so that a server that is not there is told at once
Format = Mapping[str, Any] | None  # a `response_format`
Formats = Sequence[Format] | None
ABORTED = ("abort", "error")  # how vLLM and SGLang end an answer that they gave up, for instance on shutdown


class OpenAIEngine:
    """Greedy answers of `model` at `base_url` (with its `/v1`) to questions about images, `concurrency` at a time.

    An Engine of `engines.asking`. 429, 5xx, lost connections and time-outs are tried again `retries` times by the
    openai client, with exponential back-off and jitter, or when the server says. `timeout_s` is the longest silence of
    the server per try. `api_key` None sends no key that the environment may hold: the server may be anyone's. `address`
    is base_url without its password, for messages and caches.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 8192,  # peers: MedEvalKit
        concurrency: int = 16,
        timeout_s: float = 600.0,
        retries: int = 5,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout_s <= 0 or max_new_tokens < 1:
            raise ValueError("concurrency and max_new_tokens start at 1, retries at 0, timeout_s above 0")
        if not base_url.startswith(("http://", "https://")):
            shown = base_url.rpartition("@")[2]  # before it stands a user and password
            raise UserError(f"base_url {shown!r} is no web address: write it as http://localhost:8000/v1")
        self.base_url = base_url
        self.address = without_password(base_url)
        self.model = model
        self.api_key = api_key
        self.system_prompt = system_prompt
        self.max_new_tokens = max_new_tokens
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retries = retries
        self._logprobs = True  # until the server refuses
        self._formats = True  # so, too

    def __call__(self, asks: Sequence[Ask], formats: Formats = None) -> Iterator[tuple[int, Reply]]:
        """(place in `asks`, reply), each as soon as it is there; images are read when their question's turn comes.

        `formats` holds OpenAI's `response_format` (a JSON schema) of each question. It is a wish: a server that refuses
        it is asked without, and a reply may be of another form.

        A question that the server refuses for good (HTTP 400, 413, 415, 422: too long, an image it does not take), or
        whose image cannot be opened, gets a `refusal`.

        Raises UserError before the first question where the server is not there, refuses the key, is no such server or
        does not serve the model; and after the last reply where questions stayed without one.
        """
        replies = self._replies(asks, formats or [None] * len(asks))
        alive = weakref.ref(replies)
        # One left half-read would, when the interpreter ends, wait for the event loop's thread, which no longer runs.
        atexit.register(_close, alive)
        return replies

    def _replies(self, asks: Sequence[Ask], formats: Sequence[Format]) -> Generator[tuple[int, Reply], None, None]:
        if not asks:
            return
        failed: list[str] = []
        send, receive = anyio.create_memory_object_stream[tuple[int, Reply]](self.concurrency)
        # The event loop has its own thread: requests go on while the caller writes a reply to disk. Leaving the block
        # by an exception (Ctrl-C, the caller's own) cancels them.
        with receive, start_blocking_portal() as portal:
            work = portal.start_task_soon(self._answer_all, asks, formats, send, failed)
            while True:
                try:
                    reply = portal.call(receive.receive)
                except anyio.EndOfStream:
                    break
                yield reply
            answered = work.result()
        if missing := len(asks) - answered:
            stopped = f", then {missing - len(failed)} were not sent" if missing > len(failed) else ""
            raise UserError(
                f"{missing} of {len(asks)} questions got no answer from {self.address}: {len(failed)} failed{stopped} "
                f"(first: {failed[0]}); the other answers are kept, the same command asks only these again"
            )

    async def _answer_all(
        self, asks: Sequence[Ask], formats: Sequence[Format], send: MemoryObjectSendStream[tuple[int, Reply]],
        failed: list[str],
    ) -> int:  # fmt: skip
        """Send every answer and refusal down the stream, append reasons to `failed`; the number of replies sent."""
        turn = iter(enumerate(asks))  # shared by the workers: each question is taken once
        workers = min(self.concurrency, len(asks))
        answered = in_a_row = 0

        async def work() -> None:
            nonlocal answered, in_a_row
            for place, ask in turn:
                try:
                    reply = await self._answer(client, ask, self.max_new_tokens, workers, formats[place])
                except Exception as error:  # a hostile body can raise almost anything
                    if _own_fault(error):
                        answered += 1
                        await send.send((place, refusal(_reason(error))))
                        continue
                    failed.append(f"{ask.id}: {_reason(error)}")
                    in_a_row += 1
                    if in_a_row >= GONE + workers:
                        return
                else:
                    in_a_row = 0
                    answered += 1
                    await send.send((place, reply))

        async with (
            send,
            openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self.api_key or "none",
                max_retries=self.retries,
                timeout=openai.Timeout(self.timeout_s, connect=CONNECT_SECONDS),
            ) as client,
        ):
            await self._check(client)
            async with anyio.create_task_group() as group:
                for _ in range(workers):
                    group.start_soon(work)
        return answered

    async def _check(self, client: openai.AsyncOpenAI) -> None:
        """Raise UserError unless the server is there and serves the model."""
        try:
            listed = await client.with_options(max_retries=CHECK_RETRIES).models.list()
            served = [str(model.id) for model in listed.data]
        except openai.APIConnectionError as error:
            fix = "start the server, or correct base_url"
            raise UserError(f"no server answers at {self.address} ({_reason(error)}): {fix}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.address} refuses the api_key ({_reason(error)}): give its key") from error
        except openai.APIStatusError as error:
            fix = "correct base_url (it often ends in /v1), or look at the server's log"
            raise UserError(f"{self.address} does not list its models ({_reason(error)}): {fix}") from error
        except Exception as error:  # HTML, a list, half a JSON object: anything may come back
            told = f"/models gave no list ({_reason(error)})"
            raise UserError(f"{self.address} is no OpenAI-compatible server, {told}: correct base_url") from error
        if self.model in served:
            return
        reason = ""
        # `transformers serve` lists its hub cache only, never the local folder it was started with: try such a name.
        if not served or Path(self.model).is_dir() or PurePath(self.model).is_absolute():
            try:
                await self._answer(client, Ask("probe", "Hello", ()), 1)
                return
            except Exception as error:
                reason = f" ({_reason(error)})"
        names = ", ".join(served[:20]) or "nothing"
        raise UserError(f"{self.address} does not serve {self.model!r}{reason} but {names}: name one of these")

    async def _answer(
        self, client: openai.AsyncOpenAI, ask: Ask, max_tokens: int, workers: int = 1, wish: Format = None
    ) -> Reply:
        messages = await anyio.to_thread.run_sync(_messages, ask, self.system_prompt)
        start = time.perf_counter()
        wanted, wish = self._logprobs, wish if self._formats else None
        try:
            done = await self._ask(client, messages, max_tokens, wish)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if wanted and "logprob" in _reason(error):
                self._logprobs = False  # some servers refuse to tell; the others in flight come here, too
                return await self._answer(client, ask, max_tokens, workers, wish)
            if wish is None:
                raise
            # Servers word it in many ways: where the question alone is taken, it was the format that was refused.
            reply = await self._answer(client, ask, max_tokens, workers)
            self._formats = False
            return reply
        return _reply(done, (time.perf_counter() - start) / workers)

    async def _ask(self, client: openai.AsyncOpenAI, messages: Any, max_tokens: int, wish: Format) -> Any:
        return await client.chat.completions.create(
            model=self.model,
            messages=messages,
            max_tokens=max_tokens,  # not max_completion_tokens, which fewer servers know
            temperature=0.0,
            frequency_penalty=0.0,  # `transformers serve` derives its repetition penalty, here 1, from it
            logprobs=True if self._logprobs else openai.omit,
            response_format=openai.omit if wish is None else cast(Any, wish),
        )


def engine_of(endpoint: EndpointConfig, where: str, *, max_new_tokens: int, system_prompt: str = "") -> OpenAIEngine:
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
    return OpenAIEngine(
        endpoint.base_url, endpoint.model, api_key=os.environ[variable] if variable else None,
        system_prompt=system_prompt, max_new_tokens=max_new_tokens, concurrency=endpoint.concurrency,
        timeout_s=endpoint.timeout_s, retries=endpoint.retries,
    )  # fmt: skip


def _close(alive: weakref.ref[Generator[tuple[int, Reply], None, None]]) -> None:
    if replies := alive():
        replies.close()


def _messages(ask: Ask, system_prompt: str) -> list[dict[str, Any]]:
    """The chat of one question: one image then the text; several are announced as `<image_1>: ` # peers: MedEvalKit"""
    content: list[dict[str, Any]] = []
    for number, path in enumerate(ask.images, start=1):
        if len(ask.images) > 1:
            content.append({"type": "text", "text": f"<image_{number}>: "})
        content.append({"type": "image_url", "image_url": {"url": _data_url(path)}})
    content.append({"type": "text", "text": ask.text})
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": content}]


def _data_url(path: Path) -> str:
    """The file's own bytes where every reader sees in them what `open_image` gives, else that image as PNG."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            as_it_is = upright and image.mode in ("L", "RGB") and "transparency" not in image.info
            kind = "png" if image.format == "PNG" else "jpeg"
    except Exception:  # another format, or damaged: open_image reads it, or says what is wrong
        as_it_is = False
    if as_it_is:
        data = path.read_bytes()
    else:
        buffer, kind = io.BytesIO(), "png"
        open_image(path).save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _reply(done: Any, seconds: float) -> Reply:
    """The reply in a chat completion, `seconds` being its share of the wall time; ValueError for a malformed one.

    A thought that the server has parted from the answer is put before it again: the answer is what the model wrote.
    """
    if isinstance(done, str):
        raise ValueError(f"not JSON but {_short(done, 60)!r}")
    try:
        choice = done.choices[0]
        finish, text = choice.finish_reason, choice.message.content or ""
        thought = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
        logps = [float(token.logprob) for token in choice.logprobs.content or ()] if choice.logprobs else []
        tokens = int(done.usage.completion_tokens) if done.usage else len(logps)
        read = int(getattr(done.usage, "prompt_tokens", None) or 0)
    except (AttributeError, IndexError, TypeError, KeyError) as error:
        told = getattr(done, "error", None)  # some gateways send an error as 200
        raise ValueError(f"not a chat completion ({_short(told or error)})") from error
    if not isinstance(text, str) or not isinstance(finish, str) or finish in ABORTED:
        raise ValueError(f"the answer is no text or was broken off (finish_reason {finish!r})")
    if isinstance(thought, str):
        text = f"<think>{thought}</think>{text}" if text else f"<think>{thought}"
    text = text.encode(errors="replace").decode()  # half a surrogate pair could not be written as UTF-8
    mean_logp = sum(logps) / len(logps) if logps else None
    return Reply(text, tokens, "length" if finish == "length" else "stop", seconds, mean_logp, prompt_tokens=read)


def _own_fault(error: Exception) -> bool:
    """Whether the failure lies in the question (a damaged image, a text over the context length), not in the server."""
    return isinstance(error, UserError) or getattr(error, "status_code", None) in (400, 413, 415, 422)


def _reason(error: Exception) -> str:
    """The failure in one short line, without passwords."""
    if isinstance(error, openai.APIConnectionError) and error.__cause__:  # the outer one only says "Connection error."
        return _short(f"{error} {error.__cause__}")
    if isinstance(error, openai.APIStatusError):  # its text holds only OpenAI's own kind of message
        return _short(f"{error.status_code} {error.response.text}")
    return _short(error if isinstance(error, UserError | openai.OpenAIError | ValueError) else repr(error))


def _short(text: object, length: int = 200) -> str:
    return without_password(" ".join(str(text)[: 10 * length].split()))[:length]
