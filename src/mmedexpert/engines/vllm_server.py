"""One vLLM server: what is asked of it, and what its answers mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx

from mmedexpert.engines.completions import Failed, Messages, Refused
from mmedexpert.engines.replies import reason_of, short
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password

CONNECT_SECONDS = 10.0  # ours
PASSING = (408, 429, 502, 503, 504)  # HTTP: later it may go
PROBE: Messages = [{"role": "user", "content": "1 + 1 ="}]
LIKELIEST = 5  # first tokens that are compared


@dataclass(eq=False)
class VllmServer:
    """A server at `url`, without /v1, and what is known of it; `client` is that of the call under way."""

    url: str
    key_setting: str  # which option names the variable of its key
    alive: bool = True
    checked: bool = False  # since it came up
    failures: int = 0  # one after the other to check it or to load the adapter, though it is healthy
    reason: str = ""
    client: httpx.AsyncClient = field(init=False)

    @property
    def shown(self) -> str:
        """Its address, for messages."""
        return without_password(self.url)

    async def healthy(self) -> bool:
        """Whether /health answers; else `reason` says why not."""
        try:
            told = await self.client.get(f"{self.url}/health", timeout=CONNECT_SECONDS)
        except httpx.TransportError as error:
            self.reason = reason_of(error)
            return False
        self.reason = "" if told.is_success else f"/health says {told.status_code}"
        return told.is_success

    async def check(self, model: str, longest: int) -> None:
        """UserError unless it serves `model` with room for `longest` tokens and tells processed log-probabilities."""
        rows = await self.rows()
        if model not in rows:
            raise UserError(
                f"{self.shown} serves {', '.join(rows) or 'nothing'} and not {model}: start it with the command "
                "that stage=serve prints for this configuration"
            )
        room = rows[model].get("max_model_len") or longest
        if room < longest:
            raise UserError(
                f"{self.shown} has room for {room} tokens, and a prompt with its completion may take {longest}: "
                f"start it with --max-model-len {longest}"
            )
        one, two = [await self.first(PROBE, temperature, model) for temperature in (1.0, 2.0)]
        if all(abs(one[token] - two[token]) < 1e-6 for token in one.keys() & two.keys()):
            raise UserError(
                f"{self.shown} tells log-probabilities before temperature and banned tokens, and the update needs "
                "those of what was sampled from: start it with --logprobs-mode processed_logprobs"
            )
        self.checked = True

    async def rows(self) -> dict[str, dict[str, Any]]:
        """What /v1/models lists, by name."""
        told = await self.json("/v1/models")
        try:
            return {str(row["id"]): row for row in told["data"]}
        except (KeyError, TypeError) as error:
            raise Failed(f"/v1/models gave no list ({error!r})") from error

    async def first(self, messages: Messages, temperature: float, model: str) -> dict[str, float]:
        """The likeliest first tokens of a reply, with their log-probabilities."""
        body = {
            "model": model, "messages": messages, "temperature": temperature, "seed": 0, "max_tokens": 1,
            "logprobs": True, "top_logprobs": LIKELIEST,
        }  # fmt: skip
        reply = await self.json("/v1/chat/completions", body)
        try:
            tokens = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return {str(token["token"]): float(token["logprob"]) for token in tokens[:LIKELIEST]}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failed(f"no log-probabilities in its reply ({error!r})") from error

    async def load(self, name: str, folder: Path) -> None:
        """Have an adapter; UserError where it is refused."""
        told = await self.send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if told.is_success or "already been loaded" in told.text:
            return
        if told.status_code in PASSING:
            raise Failed(f"{told.status_code}: {short(told.text)}")
        self._refuse_key(told)
        if told.status_code == 404 and "adapter" not in told.text:
            raise UserError(
                f"{self.shown} takes no adapters at run time: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        raise UserError(
            f"{self.shown} refuses the adapter in {folder} ({told.status_code}: {short(told.text, 300)}): it must "
            "see that folder (on a shared disk: sampler.adapters, paths.outputs) and have room for its rank "
            "(--max-lora-rank)"
        )

    async def unload(self, name: str) -> None:
        """Let an adapter go, or leave it where the server does not answer soon."""
        with anyio.move_on_after(CONNECT_SECONDS):
            await self.send("/v1/unload_lora_adapter", {"lora_name": name})

    async def send(self, path: str, body: Any = None) -> httpx.Response:
        """What it answers, whatever it is; `Failed` for a lost connection."""
        try:
            if body is None:
                return await self.client.get(self.url + path)
            return await self.client.post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise Failed(reason_of(error)) from error

    def _refuse_key(self, reply: httpx.Response) -> None:
        if reply.status_code in (401, 403):
            raise UserError(
                f"{self.shown} refuses the key: give the name of the variable that holds it as {self.key_setting}"
            )

    async def json(self, path: str, body: Any = None) -> dict[str, Any]:
        """The object that it answers; `Refused` for a request that is wrong, `Failed` for all that may pass."""
        reply = await self.send(path, body)
        text = short(reply.text, 300)
        self._refuse_key(reply)
        if reply.is_client_error and reply.status_code not in (404, *PASSING):
            raise Refused(f"{self.shown} refuses {path} ({reply.status_code}: {text})")
        if not reply.is_success:
            raise Failed(f"{reply.status_code}: {text}")
        try:
            told = reply.json()
        except ValueError as error:
            raise Failed(f"no JSON: {text}") from error
        if not isinstance(told, dict):
            raise Failed(f"no JSON object: {text}")
        return told
