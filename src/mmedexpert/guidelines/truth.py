"""Ground truth where a record has one: is the stated measurement, threshold and direction that of the record?  # ours

A record that names a guideline and the exact value (`latent`: drawn images, or data that was measured) can be checked;
any other cannot, and then these criteria are None: they neither pay nor cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmedexpert.data.record import Record
from mmedexpert.guidelines.cues import normal
from mmedexpert.guidelines.perspectives import PERSPECTIVES
from mmedexpert.guidelines.reading import Thought
from mmedexpert.guidelines.rules import Guideline, guidelines

CLOSE, FAR = 0.1, 0.3  # of the guideline's largest cut: a measurement this near counts whole, this far not at all


@dataclass(frozen=True)
class Truth:
    """The guideline that applies to a record's finding and population, and the finding's true value."""

    guideline: Guideline
    value: float


def truth_of(record: Record) -> Truth | None:
    """The truth that a record's `latent` holds; None where it names no known guideline or no value."""
    rule, value = guidelines().get(str(record.latent.get("guideline", ""))), record.latent.get("value")
    return Truth(rule, float(value)) if rule is not None and isinstance(value, int | float) else None


def truths_of(thought: Thought, truth: Truth | None) -> dict[str, Mapping[str, float | None]]:
    """By perspective: `measurement`, `conclusion`, and `threshold` (analytical) or `direction` (Bayesian), in [0, 1].

    None where there is no truth, or nothing is stated that could be held against it; but where there is, a deduction
    that states no measurement or no threshold has 0 for it: saying nothing must not be worth more than saying it wrong.
    """
    stated = _stated(thought, truth) if truth else None
    near = _nearness(stated, truth) if truth and stated is not None else None
    follows = _conclusion(thought, stated, truth) if truth and stated is not None else None
    found: dict[str, dict[str, float | None]] = {
        name: {"measurement": near, "conclusion": follows} for name in PERSPECTIVES
    }
    if truth:
        found["analytical"] = {"measurement": near or 0.0, "conclusion": follows or 0.0}
        found["analytical"]["threshold"] = _threshold(thought, truth, stated)
    else:
        found["analytical"]["threshold"] = None
    found["bayesian"]["direction"] = _direction(thought, truth) if truth else None
    return dict(found)


def _stated(thought: Thought, truth: Truth) -> float | None:
    """The first number that is stated of the guideline's finding, else the first that is no chance and no limit."""
    words = normal(truth.guideline.finding).split()
    plain: list[float] = []
    for sentence in thought.sentences:
        numbers = [one.value for one in sentence.numbers if not (one.chance or one.strength)]
        if numbers and all(any(token.startswith(word) for token in sentence.tokens) for word in words):
            return numbers[0]
        if "limit" not in sentence.marks:
            plain += numbers
    return plain[0] if plain else None


def _nearness(stated: float, truth: Truth) -> float:
    scale = max(truth.guideline.cuts)
    return min(1.0, max(0.0, (FAR - abs(stated - truth.value) / scale) / (FAR - CLOSE)))


def _conclusion(thought: Thought, stated: float, truth: Truth) -> float:
    """Whether the answer is what the guideline says of the measurement that is stated."""
    label = normal(truth.guideline.labels[truth.guideline.level(stated)])
    return float(thought.answered is not None and thought.naming.names[thought.answered] == label)


def thresholds(thought: Thought, stated: float | None) -> set[float]:
    """The numbers that a thought holds a measurement against: those beside a word of limits but the measurement."""
    return {
        number.value
        for sentence in thought.sentences
        if "limit" in sentence.marks
        for number in sentence.numbers
        if not (number.chance or number.strength) and number.value != stated
    }


def _threshold(thought: Thought, truth: Truth, stated: float | None) -> float:
    """The share of the stated thresholds that the guideline has; 0 where none is stated."""
    named = thresholds(thought, stated)
    return len(named & set(truth.guideline.cuts)) / len(named) if named else 0.0


def _direction(thought: Thought, truth: Truth) -> float | None:
    """Whether the chance rises where it is that of the true label, and falls where it is another's."""
    held = [sentence for sentence in thought.sentences if sentence.chances]
    if not held:
        return None
    first, last = held[0].chances[0], held[-1].chances[-1]
    option = next(iter(held[0].options), thought.answered)
    if option is None or first == last or len(held) + len(held[0].chances) < 3:
        return None
    label = normal(truth.guideline.labels[truth.guideline.level(truth.value)])
    return float((last > first) == (thought.naming.names[option] == label))
