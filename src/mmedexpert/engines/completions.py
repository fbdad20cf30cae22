"""Completions as token ids: what a server is asked for them, and what it must reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmedexpert.errors import UserError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """n completions of one prompt: `messages` makes its chat when its turn comes, `prompt_ids` are what the server must
    make of it, `name` is for messages to the user; the i-th completion is drawn with seed + i."""

    name: str
    messages: Callable[[], Messages]
    prompt_ids: list[int]
    n: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One completion: its ids with the end token where it has one, their log-probabilities under the distribution that
    was sampled from, and whether it ended by itself."""

    ids: list[int]
    logps: list[float]
    finished: bool


@dataclass(frozen=True)
class Asking:
    """How all completions of a call are sampled: temperature 0 is greedy; `banned_ids` have no chance."""

    max_new_tokens: int
    temperature: float
    end_ids: Sequence[int]
    banned_ids: Sequence[int]
    top_p: float = 1.0


class Refused(UserError):
    """One prompt cannot be asked of a server; others can."""


class Failed(Exception):
    """What may be tried again: the server was lost, hung, has lost its adapter, or gave half an answer."""


def request_of(one: Wanted, messages: Messages, asking: Asking) -> dict[str, Any]:
    """The body of a chat completion by which vLLM gives n completions with ids and log-probabilities."""
    return {
        "messages": messages,
        "n": one.n,
        "seed": one.seed,
        "temperature": asking.temperature,
        "top_p": asking.top_p,
        "max_tokens": asking.max_new_tokens,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "logit_bias": {str(token): -100 for token in asking.banned_ids},
        "stop_token_ids": list(asking.end_ids),
        "ignore_eos": True,  # the model's own list may hold more ends than the trainer's
    }


def completions_of(reply: dict[str, Any], one: Wanted, asking: Asking) -> list[Drawn]:
    """The completions in a reply; `Failed` for half a one, `Refused` where the prompt is not ours."""
    try:
        prompt, choices = list(reply["prompt_token_ids"]), sorted(reply["choices"], key=lambda row: row["index"])
        found = [
            Drawn(
                [int(token) for token in row["token_ids"]],
                [float(token["logprob"]) for token in row["logprobs"]["content"]],
                row["finish_reason"] == "stop",
            )
            for row in choices
        ]
        reasons = [str(row["finish_reason"]) for row in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise Failed(f"a reply without ids or log-probabilities ({error!r})") from error
    if prompt != one.prompt_ids:
        at = next((n for n, pair in enumerate(zip(prompt, one.prompt_ids, strict=False)) if pair[0] != pair[1]), -1)
        raise Refused(
            f"{one.name}: the server reads another prompt than the trainer ({len(prompt)} tokens for "
            f"{len(one.prompt_ids)}, other from token {at}): it must serve the folder of stage=serve, tokenizer, chat "
            "template and preprocessor unchanged; a question that quotes special tokens cannot be asked of a server"
        )
    if len(found) != one.n or set(reasons) - {"stop", "length"}:
        raise Failed(f"{len(found)} of {one.n} completions, ended by {', '.join(sorted(set(reasons))) or 'nothing'}")
    for drawn in found:
        ended = bool(drawn.ids) and drawn.ids[-1] in asking.end_ids
        whole = ended if drawn.finished else len(drawn.ids) == asking.max_new_tokens
        if len(drawn.ids) != len(drawn.logps) or not whole or set(drawn.ids) & set(asking.banned_ids):
            raise Failed(f"a completion of {len(drawn.ids)} ids, {len(drawn.logps)} log-probabilities, not as asked")
    return found
