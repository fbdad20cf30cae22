"""Completions with their token ids and log-probabilities from vLLM servers, whose LoRA adapters come and go by name.

Tried with vLLM's OpenAI-compatible server (V1 engine). What is asked has a seed: a request can be sent again, to the
same server or to another, for the same completions.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import anyio
import httpx

from mmedexpert.engines.completions import Asking, Drawn, Failed, Messages, Refused, Wanted, completions_of, request_of
from mmedexpert.engines.vllm_server import CONNECT_SECONDS, VllmServer
from mmedexpert.errors import UserError
from mmedexpert.runtime.ranks import rank

TRIES = 3  # ours: of one request that a healthy server does not answer, ever longer after each other
DEATHS = 10  # ours: of servers that one request was sent to
POLL_SECONDS = 1.0  # ours: between two looks at servers that are down
KEYS = {"sampler": "sampler.api_key_env", "engine": "engine.endpoint.api_key_env"}


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
        self.servers = [VllmServer(url.rstrip("/").removesuffix("/v1"), KEYS[setting]) for url in urls]
        self.model, self.concurrency, self.patience_s = model, concurrency, patience_s
        self.adapter: tuple[str, Path] | None = None  # the one that answers: its name and folder
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = httpx.Timeout(timeout_s, connect=CONNECT_SECONDS)
        self.longest: int | None = None  # a prompt with its completion, once servers are to be checked

    def check(self, longest: int) -> None:
        """UserError unless the servers serve `model` with room for `longest` tokens, and tell processed
        log-probabilities: those of the distribution sampled from, after temperature and banned tokens. One that comes
        up later is checked then."""
        self.longest = longest
        self._run(self._everywhere, lambda server: server.check(self.model, longest))

    def choose(self, models: Sequence[str], longest: int) -> None:
        """Ask from now on for the first of these models that all servers have, which are then checked."""
        listed: list[set[str]] = []

        async def look(server: VllmServer) -> None:
            listed.append(set(await server.rows()))

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
                    await server.unload(name)

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

        async def look(server: VllmServer) -> None:
            model = self.model if of_base else self._answering
            found[server.shown] = await server.first(messages, 1.0, model)

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
            async with client:
                for server in self.servers:
                    server.client = client
                await work(*arguments)

        try:
            anyio.run(with_client)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _everywhere(self, work: Callable[[VllmServer], Awaitable[None]]) -> None:
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
                reply = await server.json("/v1/chat/completions", body | {"model": self._answering})
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

    async def _some_alive(self, home: int = 0) -> VllmServer:
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

    async def _well(self, server: VllmServer, error: Failed) -> bool:
        """Whether a server that failed is there, with its adapter; it is down for all where it is not."""
        async with self.reviving:
            if server.alive and not await self._revived(server):
                server.reason = f"{error}; {server.reason}" if server.reason else str(error)
            return server.alive

    async def _revived(self, server: VllmServer) -> bool:
        """Whether it is healthy, the right one, and has the adapter that answers."""
        if not server.alive:
            server.checked = False  # another may have come up in its place
        server.alive = healthy = await server.healthy()
        try:
            if healthy and self.longest is not None and not server.checked:
                await server.check(self.model, self.longest)
            if healthy and self.adapter:
                await server.load(*self.adapter)
            server.failures = 0
        except Failed as error:
            server.alive, server.reason = False, str(error)
            server.failures += 1
            if server.failures == TRIES:
                raise UserError(f"{server.shown} is well and fails ({error}): is it vLLM? look at its log") from error
            await anyio.sleep(POLL_SECONDS * 2**server.failures)
        return server.alive

    async def _replace(self, server: VllmServer, before: tuple[str, Path] | None) -> None:
        await server.load(*cast(tuple[str, Path], self.adapter))
        if before:
            await server.unload(before[0])
