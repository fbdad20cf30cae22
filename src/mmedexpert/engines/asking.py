"""What an engine is asked and what it replies: the seam between evaluation and whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedexpert.errors import UserError


@dataclass(frozen=True)
class Ask:
    """One question: a user turn of images (several are announced as `<image_1>: ` and so on) and then text.

    `sample` tells apart several answers to one question, where the engine samples. `format` is OpenAI's
    `response_format` (a JSON schema), a wish.
    """

    id: str
    text: str
    images: tuple[Path, ...]
    sample: int = 0
    format: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Reply:
    """An answer. `finish_reason` stop or length; `seconds` of its batch, divided among the batch's questions.

    `mean_logp` is the mean log-probability of its tokens, None where the engine does not tell; `prompt_tokens` are
    those of the question, 0 likewise, and `image_tokens` the places of its images among them, None likewise. A
    question that cannot be answered for good (`refusal`) has no text, the finish_reason refused, and the reason in
    `refused`. `kept`: it came out of a ledger (`engines.ledger`), and cost nothing.
    """

    text: str
    tokens: int
    finish_reason: str
    seconds: float
    mean_logp: float | None
    refused: str = ""
    prompt_tokens: int = 0
    kept: bool = False
    image_tokens: int | None = None


def refusal(reason: str) -> Reply:
    """The reply to a question that the engine will never answer: an image it cannot open, a text that is too long."""
    return Reply("", 0, "refused", 0.0, None, reason)


class BudgetReached(UserError):
    """An engine has asked or spent as much as it may: what came is kept, the same command goes on with the rest."""


# (place in the asked list, reply), in any order, each as soon as it is there
Engine = Callable[[Sequence[Ask]], Iterator[tuple[int, Reply]]]


def while_there(engine: Engine, asks: Sequence[Ask], reasons: list[str]) -> Iterator[tuple[int, Reply]]:
    """What an engine gives; what it raises for a lost server is a reason, after the replies that came."""
    try:
        yield from engine(asks)
    except BudgetReached:
        raise
    except UserError as error:
        reasons.append(str(error))
