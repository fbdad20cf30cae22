"""What a server sends back: a reply, a refusal for good, or a failure with its reason in one line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import openai

from mmedexpert.engines.asking import Reply
from mmedexpert.engines.ledger import FAILED, REFUSED, REPLIED, Row, key_of, now
from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_known, without_password

MAX_TOKENS = 2**31  # ours: a server that tells of more is broken
RUNS = 3  # ours: a question that failed in so many, each time by the server's reply to it, is refused from then on
_IN_RUNS = re.compile(r"in (\d+) runs: ")
_PASSES = re.compile(r"\b(?:429|50[234])\b|rate.?limit|overload", re.IGNORECASE)  # ours: what gateways send as 200
BROKEN_OFF = "the server broke the answer off"
ABORTED = ("abort", "error")  # how vLLM and SGLang end an answer that they gave up, for instance on shutdown


@dataclass(frozen=True)
class Prices:
    """A price list: USD per million tokens read (`input`) and written (`output`), and its name."""

    input: float
    output: float
    version: str

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD; a thought's tokens are among those written."""
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


@dataclass(frozen=True)
class Sent:
    """A server's text after `attempts` tries, the last of `latency` seconds, all of `seconds`."""

    text: str
    attempts: int
    latency: float
    seconds: float


def body_of(text: str) -> Any:
    """The JSON of a server's text; ValueError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON but {short(text, 60)!r}") from error


def reply_of(body: Any, seconds: float) -> Reply:
    """The reply in a chat completion, `seconds` being its share of the wall time; ValueError for a malformed one.

    A thought that the server has parted from the answer is put before it again: the answer is what the model wrote.
    """
    try:
        choice = body["choices"][0]
        message, logprobs = choice["message"], choice.get("logprobs")
        finish, text = choice["finish_reason"], message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning")
        logps = [float(token["logprob"]) for token in logprobs.get("content") or ()] if logprobs else []
        usage = body.get("usage")
        tokens = int(usage["completion_tokens"]) if usage else len(logps)
        read = int(usage.get("prompt_tokens") or 0) if usage else 0
    except (AttributeError, IndexError, TypeError, KeyError, ValueError, OverflowError) as error:  # 1e999 tokens
        told = body.get("error") if isinstance(body, dict) else None  # some gateways send an error as 200
        raise ValueError(f"not a chat completion ({short(told or repr(error))})") from error
    if not (0 <= tokens < MAX_TOKENS and 0 <= read < MAX_TOKENS):
        raise ValueError(f"not a chat completion (usage {short(usage)})")
    if finish in ABORTED:
        raise ValueError(f"{BROKEN_OFF} (finish_reason {short(finish)})")
    if not isinstance(text, str) or not isinstance(finish, str):
        raise ValueError(f"the answer is no text (finish_reason {short(finish)})")
    if isinstance(thought, str):
        text = f"<think>{thought}</think>{text}" if text else f"<think>{thought}"
    text = text.encode(errors="replace").decode()  # half a surrogate pair could not be written as UTF-8
    mean_logp = sum(logps) / len(logps) if logps else None
    return Reply(text, tokens, "length" if finish == "length" else "stop", seconds, mean_logp, prompt_tokens=read)


def own_fault(error: Exception) -> bool:
    """Whether the failure lies in the question (a damaged image, a text over the context length), not in the server."""
    return isinstance(error, UserError) or getattr(error, "status_code", None) in (400, 413, 415, 422)


def reason_of(error: Exception) -> str:
    """The failure in one short line, without passwords."""
    if isinstance(error, openai.APIConnectionError) and error.__cause__:  # the outer one only says "Connection error."
        return short(f"{error} {error.__cause__}")
    if isinstance(error, openai.APIStatusError):  # its text holds only OpenAI's own kind of message
        return short(f"{error.status_code} {error.response.text}")
    return short(error if isinstance(error, UserError | openai.OpenAIError | ValueError) else repr(error))


def short(text: object, length: int = 200) -> str:
    """A text of a stranger in one line, without passwords."""
    plain = without_known(str(text))[: 10 * length].encode(errors="replace").decode()
    return without_password(" ".join(plain.split()))[:length]


def replied_row(request: str, model: str, sent: Sent, reply: Reply, prices: Prices | None) -> Row:
    """The ledger's row of a reply."""
    body = body_of(sent.text)
    choice = body["choices"][0]
    choice.pop("logprobs", None)  # many times as long as the reply; their mean is kept
    details = (body.get("usage") or {}).get("completion_tokens_details")
    thought = details.get("reasoning_tokens") if isinstance(details, dict) else None
    cost = prices.cost(reply.prompt_tokens, reply.tokens) if prices else None
    return Row(
        key_of(request), REPLIED, model, request, json.dumps(body), short(choice["finish_reason"]),
        reply.prompt_tokens, reply.tokens, thought if isinstance(thought, int) and 0 <= thought < MAX_TOKENS else 0,
        reply.mean_logp, cost, prices.version if prices else None, sent.attempts, sent.latency, created=now(),
    )  # fmt: skip


def failed_row(request: str, model: str, sent: Sent | None, error: Exception) -> Row:
    """The ledger's row of a refusal or failure."""
    tried = getattr(getattr(error, "request", None), "headers", {}).get("x-stainless-retry-count", 0)  # openai's own
    return Row(
        key_of(request), REFUSED if own_fault(error) else FAILED, model, request,
        attempts=sent.attempts if sent else int(tried) + 1, latency=sent.latency if sent else None,
        error=type(error).__name__, error_text=reason_of(error), created=now(),
    )  # fmt: skip


def counted(before: Row | None, row: Row) -> tuple[Row, int]:
    """A failure with the number of runs in a row, this one included, in which the server was there and replied to this
    question with HTTP 500 or what is no chat completion. 0 after what may pass: 429, 502, 503, time-outs, a gateway's
    page, a lost connection."""
    if not _by_question(row):
        return row, 0
    known = before is not None and before.outcome == FAILED and _by_question(before)
    runs = 1 + (_runs_of(before) if before is not None and known else 0)
    return (replace(row, error_text=f"in {runs} runs: {row.error_text}") if runs > 1 else row), runs


def _runs_of(row: Row) -> int:
    found = _IN_RUNS.match(row.error_text or "")
    return int(found[1]) if found else 1


def _by_question(row: Row) -> bool:
    told = _IN_RUNS.sub("", row.error_text or "")
    if row.error != ValueError.__name__:
        return told.startswith("500 ")
    return not (told.startswith((BROKEN_OFF, "not JSON but '<")) or _PASSES.search(told))


def kept_reply(row: Row | None, *, retry_refused: bool) -> Reply | None:
    """The reply or refusal that a row holds; None where its request is to be asked (again)."""
    if row is None or row.outcome not in (REPLIED, REFUSED) or (row.outcome == REFUSED and retry_refused):
        return None
    if row.response is None:
        return Reply("", 0, "refused", 0.0, None, row.error_text or "refused", kept=True)
    reply = reply_of(json.loads(row.response), 0.0)
    return replace(
        reply, tokens=row.completion_tokens, prompt_tokens=row.prompt_tokens, mean_logp=row.mean_logp, kept=True
    )
