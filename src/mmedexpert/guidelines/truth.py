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
    """The guideline that applies to a record's finding and population, and the finding's true value.

    `decisive`: the guideline's label of that value is the answer; where other things decide, no conclusion is checked.
    """

    guideline: Guideline
    value: float
    decisive: bool = True


def truth_of(record: Record) -> Truth | None:
    """The truth that a record's `latent` holds; None where it names no known guideline or no value."""
    rule, value = guidelines().get(str(record.latent.get("guideline", ""))), record.latent.get("value")
    if rule is None or not isinstance(value, int | float):
        return None
    return Truth(rule, float(value), bool(record.latent.get("decisive", True)))


def truths_of(thought: Thought, truth: Truth | None) -> dict[str, Mapping[str, float | None]]:
    """By perspective: `measurement`, `conclusion`, and `threshold` (analytical) or `direction` (Bayesian), in [0, 1].

    None where there is no truth, or nothing is stated that could be held against it; but where there is, a deduction
    that states no measurement or no threshold has 0 for it: saying nothing must not be worth more than saying it wrong.
    """
    stated = _stated(thought, truth) if truth else None
    near = _nearness(stated, truth) if truth and stated is not None else None
    decided = truth is not None and truth.decisive
    follows = _conclusion(thought, truth.value if stated is None else stated, truth) if truth and decided else None
    found: dict[str, dict[str, float | None]] = {
        name: {"measurement": near, "conclusion": follows} for name in PERSPECTIVES
    }
    if truth:
        found["analytical"] = {"measurement": near or 0.0, "conclusion": (follows or 0.0) if decided else None}
        found["analytical"]["threshold"] = _threshold(thought, truth, stated)
    else:
        found["analytical"]["threshold"] = None
    found["bayesian"]["direction"] = _direction(thought, truth) if truth else None
    return dict(found)


def _stated(thought: Thought, truth: Truth) -> float | None:
    """The measurement that a thought states, in the guideline's unit.

    Of the numbers in sentences that name its finding, else of all, the first that is no chance, no age or time, and no
    threshold; a threshold where there is no other.
    """
    words, cuts = normal(truth.guideline.finding).split(), truth.guideline.cuts
    named: list[float] = []
    others: list[float] = []
    for sentence in thought.sentences:
        about = all(any(token.startswith(word) for token in sentence.tokens) for word in words)
        for number in sentence.numbers:
            scale = _scale(number.unit, truth.guideline.unit)
            if scale is not None and not (number.chance or number.strength):
                (named if about else others).append(round(number.value * scale, 6))
    numbers = named or others
    measured = [value for value in numbers if value not in cuts]
    return next(iter(measured or numbers), None)


def _scale(unit: str, wanted: str) -> float | None:
    """What turns a number of a unit into one of the guideline's; None where it measures something else."""
    if not unit or unit == wanted or (unit == "/" and wanted.startswith("/")) or unit in ("bpm", "beats"):
        return 1.0
    return {("mm", "cm"): 0.1, ("cm", "mm"): 10.0}.get((unit, wanted))


def _nearness(stated: float, truth: Truth) -> float:
    scale = max(truth.guideline.cuts)
    return min(1.0, max(0.0, (FAR - abs(stated - truth.value) / scale) / (FAR - CLOSE)))


def _conclusion(thought: Thought, stated: float, truth: Truth) -> float:
    """Whether the answer is what the guideline says of the measurement stated, of the true one where none is."""
    label = normal(truth.guideline.labels[truth.guideline.level(stated)])
    return float(thought.answered is not None and thought.naming.names[thought.answered] == label)


def _thresholds(thought: Thought, truth: Truth, stated: float | None) -> set[float]:
    """The numbers that a measurement is held against, in the guideline's unit: those beside a word of limits."""
    found: set[float] = set()
    for sentence in thought.sentences:
        for number in sentence.numbers if "limit" in sentence.marks else ():
            scale = _scale(number.unit, truth.guideline.unit)
            if scale is not None and not (number.chance or number.strength):
                found.add(round(number.value * scale, 6))
    return found - ({stated} - set(truth.guideline.cuts))  # a measurement may lie on the threshold


def _threshold(thought: Thought, truth: Truth, stated: float | None) -> float:
    """The share of the stated thresholds that the guideline has; 0 where none is stated."""
    named = _thresholds(thought, truth, stated)
    return len(named & set(truth.guideline.cuts)) / len(named) if named else 0.0


def _direction(thought: Thought, truth: Truth) -> float | None:
    """Whether the chance of the option that is followed rises where it is the true label, and falls where it is not."""
    held = [sentence for sentence in thought.sentences if sentence.chances]
    option = next(iter(held[0].options), thought.answered) if held else None
    own = [one.chances for one in held if set(one.options) <= {option}]
    if option is None or len(own) < 2 or own[0][0] == own[-1][-1]:
        return None
    label = normal(truth.guideline.labels[truth.guideline.level(truth.value)])
    return float((own[-1][-1] > own[0][0]) == (thought.naming.names[option] == label))
