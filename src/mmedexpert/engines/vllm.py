"""Completions with their token ids and log-probabilities from vLLM servers, whose LoRA adapters come and go by name.

Tried with vLLM's OpenAI-compatible server (V1 engine). What is asked has a seed: a request can be sent again, to the
same server or to another, for the same completions.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio
import httpx

from mmedexpert.engines.completions import Asking, Drawn, Failed, Messages, Refused, Wanted, completions_of, request_of
from mmedexpert.engines.replies import reason_of, short
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.ranks import rank

TRIES = 3  # ours: of one request that a healthy server does not answer, ever longer after each other
DEATHS = 10  # ours: of servers that one request was sent to
POLL_SECONDS = 1.0  # ours: between two looks at servers that are down
CONNECT_SECONDS = 10.0  # ours
KEYS = {"sampler": "sampler.api_key_env", "engine": "engine.endpoint.api_key_env"}
PASSING = (408, 429, 502, 503, 504)  # HTTP: later it may go
LIKELIEST = 5  # first tokens that are compared


@dataclass(eq=False)
class _Server:
    url: str
    alive: bool = True
    checked: bool = False  # since it came up
    failures: int = 0  # one after the other to check it or to load the adapter, though it is healthy
    reason: str = ""

    @property
    def shown(self) -> str:
        return without_password(self.url)


class Servers:
    """vLLM servers at `urls` (with or without /v1) of one model, which they serve as `model`.

    A server that dies, hangs, refuses or answers by halves is waited for: once its /health answers, the adapter is
    loaded again and what was not answered is sent again, meanwhile to the others. UserError when none has been well for
    `patience_s`, and for a request that a healthy server does not answer `TRIES` times. The base never answers in place
    of an adapter.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        patience_s: float = 600.0,
        setting: str = "sampler",
    ) -> None:
        self.servers = [_Server(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self.model, self.concurrency, self.patience_s = model, concurrency, patience_s
        self.setting = setting  # whose keys messages name
        self.adapter: tuple[str, Path] | None = None  # the one that answers: its name and folder
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = httpx.Timeout(timeout_s, connect=CONNECT_SECONDS)
        self.longest: int | None = None  # a prompt with its completion, once servers are to be checked

    def check(self, longest: int) -> None:
        """UserError unless the servers serve `model` with room for `longest` tokens, and tell processed
        log-probabilities: those of the distribution sampled from, after temperature and banned tokens. One that comes
        up later is checked then."""
        self.longest = longest
        self._run(self._everywhere, self._check)

    def choose(self, models: Sequence[str], longest: int) -> None:
        """Ask from now on for the first of these models that all servers have, which are then checked."""
        listed: list[set[str]] = []

        async def look(server: _Server) -> None:
            listed.append(set(await self._rows(server)))

        self._run(self._everywhere, look)
        common = set.intersection(*listed)
        self.model = next((model for model in models if model in common), models[0])
        self.check(longest)

    def publish(self, name: str, folder: Path) -> None:
        """Let the adapter in `folder` answer from now on, under a name of its own, and unload the one before.

        A name is used once: an adapter loaded in place of another answers from that one's prefix cache.
        UserError where a healthy server refuses it.
        """
        before, self.adapter = self.adapter, (name, folder)
        self._run(self._everywhere, lambda server: self._replace(server, before))

    def withdraw(self) -> None:
        """Unload the adapter that answers, where a server is still there."""
        (name, _), self.adapter = cast(tuple[str, Path], self.adapter), None

        async def unload() -> None:
            for server in self.servers:
                with suppress(Failed):
                    await self._send(server, "/v1/unload_lora_adapter", {"lora_name": name})

        self._run(unload)

    def complete(
        self, wanted: Sequence[Wanted], asking: Asking, refused: dict[int, str] | None = None
    ) -> list[list[Drawn]]:
        """The n completions of each, in order; prompts with the same `name` share a server.

        A prompt that a server refuses or reads otherwise than we do is a UserError; with `refused` it has no
        completions, and the reason there by its place.
        """
        found: list[list[Drawn]] = [[] for _ in wanted]
        self._run(self._complete, wanted, asking, found, refused)
        return found

    def first_tokens(self, messages: Messages, *, of_base: bool = False) -> dict[str, dict[str, float]]:
        """Of each server that is there the likeliest first tokens of a reply, with their log-probabilities."""
        found: dict[str, dict[str, float]] = {}

        async def look(server: _Server) -> None:
            model = self.model if of_base else self._answering
            found[server.shown] = await self._first(server, messages, 1.0, model)

        self._run(self._everywhere, look)
        return found

    @property
    def _answering(self) -> str:
        return self.adapter[0] if self.adapter else self.model

    def _run(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        async def with_client() -> None:
            self.reviving = anyio.Lock()
            limits = httpx.Limits(max_connections=None)  # a look at /health must not wait behind requests
            client = httpx.AsyncClient(headers=self.headers, timeout=self.timeout, limits=limits)
            async with client as self.client:
                await work(*arguments)

        try:
            anyio.run(with_client)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _everywhere(self, work: Callable[[_Server], Awaitable[None]]) -> None:
        """Do it on every server that is well, at least on one."""
        done = False
        while not done:
            for server in self.servers:
                try:
                    if server.alive or await self._revived(server):
                        await work(server)
                        done = True
                except Failed as error:
                    server.alive, server.reason = False, str(error)
            if not done:
                await self._some_alive()

    async def _complete(
        self, wanted: Sequence[Wanted], asking: Asking, found: list[list[Drawn]], refused: dict[int, str] | None
    ) -> None:
        limit = anyio.CapacityLimiter(self.concurrency * len(self.servers))
        # each rank begins at another server
        homes = {name: place for place, name in enumerate(dict.fromkeys(one.name for one in wanted), rank())}
        for server in self.servers:
            if not server.alive:
                await self._revived(server)

        async def ask(place: int) -> None:
            async with limit:
                try:
                    found[place] = await self._ask(wanted[place], asking, homes[wanted[place].name])
                except Refused as error:
                    if refused is None:
                        raise
                    refused[place] = str(error)

        async with anyio.create_task_group() as group:
            for place in range(len(wanted)):
                group.start_soon(ask, place)

    async def _ask(self, one: Wanted, asking: Asking, home: int) -> list[Drawn]:
        body = request_of(one, await anyio.to_thread.run_sync(one.messages), asking)
        failures = deaths = 0
        while True:
            at_home = self.servers[home % len(self.servers)]
            server = at_home if at_home.alive else await self._some_alive(home)
            try:
                reply = await self._json(server, "/v1/chat/completions", body | {"model": self._answering})
                return completions_of(reply, one, asking)
            except Failed as error:
                if await self._well(server, error):
                    failures += 1
                    await anyio.sleep(POLL_SECONDS * 2**failures)
                else:
                    deaths += 1
                if failures == TRIES or deaths == DEATHS:
                    told = f"is well and failed {TRIES} times" if failures == TRIES else f"was lost {DEATHS} times"
                    raise UserError(
                        f"{server.shown} {told} to answer {one.name} ({error}): look at its log, mend it, and run the "
                        "same command: it goes on where it stopped"
                    ) from error

    async def _some_alive(self, home: int = 0) -> _Server:
        """The server of this number, or one that is well; UserError after the time that is waited for one."""
        async with self.reviving:
            deadline = time.monotonic() + self.patience_s
            while True:
                turn = [self.servers[(home + n) % len(self.servers)] for n in range(len(self.servers))]
                for server in turn:
                    if server.alive:
                        return server
                for server in turn:
                    if await self._revived(server):
                        return server
                if time.monotonic() > deadline:
                    told = "; ".join(f"{server.shown} ({server.reason})" for server in self.servers)
                    raise UserError(
                        f"no server has answered for {self.patience_s:.0f} s: {told}: start it again and run the same "
                        "command: it goes on where it stopped"
                    )
                await anyio.sleep(min(POLL_SECONDS, self.patience_s))

    async def _well(self, server: _Server, error: Failed) -> bool:
        """Whether a server that failed is there, with its adapter; it is down for all where it is not."""
        async with self.reviving:
            if server.alive and not await self._revived(server):
                server.reason = f"{error}; {server.reason}" if server.reason else str(error)
            return server.alive

    async def _revived(self, server: _Server) -> bool:
        """Whether it is healthy, the right one, and has the adapter that answers."""
        if not server.alive:
            server.checked = False  # another may have come up in its place
        server.alive = healthy = await self._healthy(server)
        try:
            if healthy and self.longest is not None and not server.checked:
                await self._check(server)
            if healthy and self.adapter:
                await self._load(server, *self.adapter)
            server.failures = 0
        except Failed as error:
            server.alive, server.reason = False, str(error)
            server.failures += 1
            if server.failures == TRIES:
                raise UserError(f"{server.shown} is well and fails ({error}): is it vLLM? look at its log") from error
            await anyio.sleep(POLL_SECONDS * 2**server.failures)
        return server.alive

    async def _healthy(self, server: _Server) -> bool:
        try:
            told = await self.client.get(f"{server.url}/health", timeout=CONNECT_SECONDS)
        except httpx.TransportError as error:
            server.reason = reason_of(error)
            return False
        server.reason = "" if told.is_success else f"/health says {told.status_code}"
        return told.is_success

    async def _check(self, server: _Server) -> None:
        longest = cast(int, self.longest)
        rows = await self._rows(server)
        if self.model not in rows:
            raise UserError(
                f"{server.shown} serves {', '.join(rows) or 'nothing'} and not {self.model}: start it with the command "
                "that stage=serve prints for this configuration"
            )
        room = rows[self.model].get("max_model_len") or longest
        if room < longest:
            raise UserError(
                f"{server.shown} has room for {room} tokens, and a prompt with its completion may take {longest}: "
                f"start it with --max-model-len {longest}"
            )
        question: Messages = [{"role": "user", "content": "1 + 1 ="}]
        one, two = [await self._first(server, question, temperature, self.model) for temperature in (1.0, 2.0)]
        if all(abs(one[token] - two[token]) < 1e-6 for token in one.keys() & two.keys()):
            raise UserError(
                f"{server.shown} tells log-probabilities before temperature and banned tokens, and the update needs "
                "those of what was sampled from: start it with --logprobs-mode processed_logprobs"
            )
        server.checked = True

    async def _rows(self, server: _Server) -> dict[str, dict[str, Any]]:
        told = await self._json(server, "/v1/models")
        try:
            return {str(row["id"]): row for row in told["data"]}
        except (KeyError, TypeError) as error:
            raise Failed(f"/v1/models gave no list ({error!r})") from error

    async def _first(self, server: _Server, messages: Messages, temperature: float, model: str) -> dict[str, float]:
        body = {
            "model": model, "messages": messages, "temperature": temperature, "seed": 0, "max_tokens": 1,
            "logprobs": True, "top_logprobs": LIKELIEST,
        }  # fmt: skip
        reply = await self._json(server, "/v1/chat/completions", body)
        try:
            tokens = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return {str(token["token"]): float(token["logprob"]) for token in tokens[:LIKELIEST]}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failed(f"no log-probabilities in its reply ({error!r})") from error

    async def _replace(self, server: _Server, before: tuple[str, Path] | None) -> None:
        await self._load(server, *cast(tuple[str, Path], self.adapter))
        if before:
            await self._send(server, "/v1/unload_lora_adapter", {"lora_name": before[0]})

    async def _load(self, server: _Server, name: str, folder: Path) -> None:
        told = await self._send(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if told.is_success or "already been loaded" in told.text:
            return
        if told.status_code in PASSING:
            raise Failed(f"{told.status_code}: {short(told.text)}")
        self._refuse_key(server, told)
        if told.status_code == 404 and "adapter" not in told.text:
            raise UserError(
                f"{server.shown} takes no adapters at run time: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        raise UserError(
            f"{server.shown} refuses the adapter in {folder} ({told.status_code}: {short(told.text, 300)}): it must "
            "see that folder (on a shared disk: sampler.adapters, paths.outputs) and have room for its rank "
            "(--max-lora-rank)"
        )

    async def _send(self, server: _Server, path: str, body: Any = None) -> httpx.Response:
        try:
            if body is None:
                return await self.client.get(server.url + path)
            return await self.client.post(server.url + path, json=body)
        except httpx.TransportError as error:
            raise Failed(reason_of(error)) from error

    def _refuse_key(self, server: _Server, reply: httpx.Response) -> None:
        if reply.status_code in (401, 403):
            name = KEYS[self.setting]
            raise UserError(f"{server.shown} refuses the key: give the name of the variable that holds it as {name}")

    async def _json(self, server: _Server, path: str, body: Any = None) -> dict[str, Any]:
        """What the server says; UserError where it takes the request for a wrong one."""
        reply = await self._send(server, path, body)
        text = short(reply.text, 300)
        self._refuse_key(server, reply)
        if reply.is_client_error and reply.status_code not in (404, *PASSING):
            raise Refused(f"{server.shown} refuses {path} ({reply.status_code}: {text})")
        if not reply.is_success:
            raise Failed(f"{reply.status_code}: {text}")
        try:
            told = reply.json()
        except ValueError as error:
            raise Failed(f"no JSON: {text}") from error
        if not isinstance(told, dict):
            raise Failed(f"no JSON object: {text}")
        return told
