"""What a merge rule declares: what it is given, what is measured for it first, what its result is linear in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mmedexpert.errors import UserError

Takes = Literal["deltas", "roles", "factors", "factor_roles"]
Measure = Literal["thresholds", "norms", "counts", "place", "grams"]
Method = Callable[..., Any]


@dataclass(frozen=True)
class MergeRule:
    """What `Stream` gives a merge rule beside its settings.

    takes: `deltas`, one list, experts first, then reasoners; `roles`, the two lists apart; `factors` and
    `factor_roles`, the LoRA pairs in the same two ways. measures: what is known of the whole tensor before its blocks
    are merged, each a keyword of the rule: `thresholds`, `norms`, `counts`, with `place` the tensor's `name` and the
    block's `first_row`, with `grams` those of each expert's inputs and whether they are `spanned` (`grams.Grams`).
    bands: a threshold is a pair (low, high). scalings: the keywords in which the result is linear, so that a search
    merges once for all of them. sums: whether it is a weighted sum, whose rank is at most that of the updates together.
    """

    takes: Takes
    measures: tuple[Measure, ...] = ()
    bands: bool = False
    scalings: tuple[str, ...] = ()
    sums: bool = False

    @property
    def low_rank(self) -> bool:
        """Whether it merges LoRA factors to factors."""
        return self.takes in ("factors", "factor_roles")

    @property
    def keeps_adapters(self) -> bool:
        """Whether what it makes of adapters is an adapter, exactly."""
        return self.low_rank or self.sums

    @property
    def apart(self) -> bool:
        """Whether experts and reasoners are two lists."""
        return self.takes in ("roles", "factor_roles")


def declare(
    function: Method,
    takes: Takes,
    *measures: Measure,
    bands: bool = False,
    scalings: tuple[str, ...] = (),
    sums: bool = False,
) -> None:
    """Make a function a merge rule; see `MergeRule`. (Decorated functions would be skipped by mutation tools.)"""
    vars(function)["rule"] = MergeRule(takes, measures, bands, scalings, sums)


def declared(method: Method) -> MergeRule:
    """The declaration of a rule, also with settings bound; UserError for a function that has none."""
    inner: Any = method
    while not hasattr(inner, "rule"):
        wrapped = getattr(inner, "func", None) or getattr(inner, "__wrapped__", None)
        if wrapped is None:
            name = getattr(inner, "__name__", inner)
            raise UserError(f"merge.method: {name} is no merge rule: declare what it takes with merging.rule.declare")
        inner = wrapped
    found: MergeRule = inner.rule
    return found
