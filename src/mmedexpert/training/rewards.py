"""Outcome rewards, in the signature of TRL's reward functions; adherence to the perspectives: `training/grading.py`.

docs/usage.md has the formulas; the paper does not state its rewards. # ours
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmedexpert.errors import UserError, suggestion
from mmedexpert.scoring import Protocol, score_choice
from mmedexpert.scoring.choice import has_format
from mmedexpert.scoring.robust import read_text
from mmedexpert.scoring.text import tokens

Options = Mapping[str, str] | None


def accuracy(
    completions: Sequence[str],
    *,
    options: Sequence[Options],
    answer: Sequence[str],
    protocol: Protocol = "robust",
    **_: Any,
) -> list[float | None]:
    """1.0 where the completion picks the gold answer, else 0.0; the columns are aligned with `completions`.

    With options, `answer` is a letter and `protocol` reads the pick (`scoring.score_choice`). For an open question
    (None) the text read as in evaluation must equal the answer after normalisation (`scoring.robust`). # ours
    Raises ValueError where columns differ in length or an answer is not the letter of an option.
    """
    return [
        float(_right(text, choices, gold, protocol))
        for text, choices, gold in zip(completions, options, answer, strict=True)
    ]


def _right(completion: str, options: Options, gold: str, protocol: Protocol) -> bool:
    if options:
        choices = [f"{letter}. {text}" for letter, text in options.items()]
        return score_choice(completion, choices, gold, protocol).correct
    return read_text(completion, "en") == " ".join(tokens(gold, "en"))


def answer_format(completions: Sequence[str], **_: Any) -> list[float | None]:
    """1.0 where the completion is `<think>...</think><answer>...</answer>` and nothing else, else 0.0."""
    return [float(has_format(text)) for text in completions]


# the parts of the outcome reward, by the names of `reward.weights`; each is logged as rewards/<name>/mean
REWARDS: dict[str, Callable[..., list[float | None]]] = {"accuracy": accuracy, "format": answer_format}


def outcome(
    completions: Sequence[str],
    *,
    options: Sequence[Options],
    answer: Sequence[str],
    weights: Mapping[str, float],
    protocol: Protocol = "robust",
) -> tuple[list[float], dict[str, list[float]]]:
    """The outcome reward r_i = sum of weight * part over `REWARDS`, `[N]`, and its unweighted parts by name.

    Every part is returned, also one without weight. Raises UserError for a weight of no part.
    """
    if unknown := sorted(set(weights) - set(REWARDS)):
        fix = suggestion(unknown[0], list(REWARDS)) or f": give weights to {', '.join(REWARDS)}"
        raise UserError(f"reward.weights: no reward is called {unknown[0]!r}{fix}")
    columns: dict[str, Any] = {"options": options, "answer": answer, "protocol": protocol}
    rewards = {name: reward(completions, **columns) for name, reward in REWARDS.items()}
    parts = {name: [float(value or 0.0) for value in values] for name, values in rewards.items()}
    total = [sum(weights[name] * parts[name][i] for name in weights) for i in range(len(completions))]
    return total, parts
