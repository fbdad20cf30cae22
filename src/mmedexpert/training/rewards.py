"""Outcome rewards, in the signature of TRL's reward functions; adherence to the perspectives: `training/grading.py`.

docs/usage.md has the formulas; the paper does not state its rewards. # ours
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError, suggestion
from mmedexpert.scoring import Protocol, medevalkit, robust
from mmedexpert.scoring.choice import has_format

JUDGES = {"robust": robust.judge, "medevalkit": medevalkit.judge}


def accuracy(
    completions: Sequence[str], *, record: Sequence[Record], protocol: Protocol = "robust", **_: Any
) -> list[float | None]:
    """1.0 where evaluation would call the completion right, else 0.0; `record` is aligned with `completions`.

    `protocol` says whose verdict counts: of letters, yes or no, closed and open answers in the record's language.
    Raises ValueError where columns differ in length, for a gold answer that is no option, or neither yes nor no where
    that is asked.
    """
    judge = JUDGES[protocol]
    return [float(judge(one, text).correct) for text, one in zip(completions, record, strict=True)]


def answer_format(completions: Sequence[str], **_: Any) -> list[float | None]:
    """1.0 where the completion is `<think>...</think><answer>...</answer>` and nothing else, else 0.0."""
    return [float(has_format(text)) for text in completions]


# the parts of the outcome reward, by the names of `reward.weights`; each is logged as rewards/<name>/mean
REWARDS: dict[str, Callable[..., list[float | None]]] = {"accuracy": accuracy, "format": answer_format}


def outcome(
    completions: Sequence[str],
    *,
    record: Sequence[Record],
    weights: Mapping[str, float],
    protocol: Protocol = "robust",
) -> tuple[list[float], dict[str, list[float]]]:
    """The outcome reward r_i = sum of weight * part over `REWARDS`, `[N]`, and its unweighted parts by name.

    Every part is returned, also one without weight. Raises UserError for a weight of no part.
    """
    if unknown := sorted(set(weights) - set(REWARDS)):
        fix = suggestion(unknown[0], list(REWARDS)) or f": give weights to {', '.join(REWARDS)}"
        raise UserError(f"reward.weights: no reward is called {unknown[0]!r}{fix}")
    columns: dict[str, Any] = {"record": record, "protocol": protocol}
    rewards = {name: reward(completions, **columns) for name, reward in REWARDS.items()}
    parts = {name: [float(value or 0.0) for value in values] for name, values in rewards.items()}
    total = [sum(weights[name] * parts[name][i] for name in weights) for i in range(len(completions))]
    return total, parts
