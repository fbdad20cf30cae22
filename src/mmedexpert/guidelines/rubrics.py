"""How far a completion follows each clinical reasoning perspective: rules read its text, a linear model weighs them.

The paper names the perspectives and publishes no rubric. Criteria (`perspectives.yaml`) and signs of substance are
measured by rules (`measures.py`); their weights (`weights.yaml`) are fitted to labelled texts of our own
(`experiments/perspectives/fit.py`).  # ours
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mmedexpert.guidelines.measures import criteria_of, signs_of
from mmedexpert.guidelines.perspectives import PERSPECTIVES, perspectives
from mmedexpert.guidelines.reading import Thought, read
from mmedexpert.guidelines.soundness import faults
from mmedexpert.guidelines.truth import Truth, truths_of

DATA = ("guidelines.yaml", "perspectives.yaml", "cues.yaml", "weights.yaml")  # what a score depends on beside code
# Where a weighed sum becomes 1/2, and how far from there it becomes 0 and 1.
STYLE_SHIFT, STYLE_BELOW, STYLE_ABOVE = 0.25, 1.0, 2.0
SOUND_SHIFT, SOUND_WIDTH = -0.75, 0.6
# How strong a text's third style may be before it costs, and where it costs everything.
THIRD_FREE, THIRD_NONE = 0.5, 0.8
FOUR_WORDS = 60
FALSE = 0.25  # what a false measurement, threshold, direction or conclusion leaves of a score
UNSUPPORTED = 0.25  # what a style is worth at most without one criterion of its own that counts alone


@dataclass(frozen=True)
class Grades:
    """A completion's `scores` in [0, 1] by perspective, its `criteria` in [0, 1] by perspective and name, its `faults`.

    A criterion is None where there is nothing to check it by; a text with a fault scores 0 throughout.
    """

    scores: Mapping[str, float]
    criteria: Mapping[str, Mapping[str, float | None]]
    faults: tuple[str, ...]


def adherence(
    completion: str, options: Mapping[str, str] | None, perspective: str, truth: Truth | None = None
) -> float:
    """How far a completion reasons in the manner of a perspective, in [0, 1].  # ours

    Raises ValueError for an unknown perspective. See `grades`.
    """
    return grades(completion, options, truth).scores[_known(perspective)]


def criteria(
    completion: str, options: Mapping[str, str] | None, perspective: str, truth: Truth | None = None
) -> dict[str, float | None]:
    """The criteria of one perspective, each in [0, 1]; None for one that needs ground truth where there is none."""
    return dict(grades(completion, options, truth).criteria[_known(perspective)])


def _known(perspective: str) -> str:
    if perspective not in PERSPECTIVES:
        raise ValueError(f"perspective must be one of {', '.join(PERSPECTIVES)}, got {perspective!r}")
    return perspective


def grades(completion: str, options: Mapping[str, str] | None, truth: Truth | None = None) -> Grades:
    """All four scores of a completion with what they come from.  # ours

    `completion` is `<think>...</think><answer>C</answer>` (without think tags what precedes the answer is the thought),
    `options` maps letters to texts; None for an open question. score = style * soundness * truth: style and soundness
    are squashed linear models, truth is the product of what a record's ground truth can check (1 without any). A style
    without one criterion of its own is worth a quarter. A text strong in three styles at once follows none: what the
    third strongest has above `THIRD_FREE` is taken from all.
    """
    thought = read(completion, options)
    found = criteria_of(thought)
    known = truths_of(thought, truth)
    checked = {name: _checked(known[name]) for name in PERSPECTIVES}
    by_perspective: dict[str, Mapping[str, float | None]] = {
        name: {key: found[key] for key in one.criteria} | dict(known[name])
        for name, one in perspectives().items()
    }  # fmt: skip
    wrong = faults(thought) + (("four templates",) if _four_templates(thought, found) else ())
    if wrong:
        return Grades(dict.fromkeys(PERSPECTIVES, 0.0), by_perspective, wrong)
    styles, sound = weighed({**found, **signs_of(thought)})
    return Grades({name: styles[name] * sound * checked[name] for name in PERSPECTIVES}, by_perspective, ())


def _four_templates(thought: Thought, found: Mapping[str, float]) -> bool:
    """The marks of all four perspectives in no more words than one takes: templates, one after the other."""
    chancy = bool(found["chances"] and thought.cue("prior") and thought.cue("posterior"))
    recognised = bool(found["typical"] or found["recognised"])
    deduced = bool(found["holds"] or found["compared"] or found["mechanism"])
    several = bool(found["listed"] and found["excluded"])
    return chancy and recognised and deduced and several and len(thought.words) < FOUR_WORDS


def _checked(known: Mapping[str, float | None]) -> float:
    """What is left of a score when its claims are held against the truth: of each false one a quarter.

    Not nothing: where all that a model says is false at first, zeros throughout would teach it nothing.
    """
    return math.prod(FALSE + (1 - FALSE) * value for value in known.values() if value is not None)


@cache
def weights() -> dict[str, dict[str, float]]:
    """The fitted weights by perspective and `sound`, each with its `bias`, read from `weights.yaml`."""
    return yaml.safe_load(files(__package__).joinpath("weights.yaml").read_text(encoding="utf-8"))


def weighed(
    features: Mapping[str, float], model: Mapping[str, Mapping[str, float]] | None = None
) -> tuple[dict[str, float], float]:
    """Each perspective's style in [0, 1] and the soundness in [0, 1] of measured `features`, by `model` (`weights`)."""
    model = model or weights()
    sums = {name: _sum(row, features) for name, row in model.items()}
    styles = {
        name: _squash(sums[name] + STYLE_SHIFT, STYLE_BELOW, STYLE_ABOVE)
        * (1.0 if any(features[key] for key, one in spec.criteria.items() if one.alone) else UNSUPPORTED)
        for name, spec in perspectives().items()
    }
    third = sorted(styles.values(), reverse=True)[2]
    damped = min(1.0, max(0.0, (THIRD_NONE - third) / (THIRD_NONE - THIRD_FREE)))
    sound = _squash(sums["sound"] + SOUND_SHIFT, SOUND_WIDTH, SOUND_WIDTH)
    return {name: style * damped for name, style in styles.items()}, sound


def _sum(row: Mapping[str, Any], features: Mapping[str, float]) -> float:
    return row["bias"] + sum(weight * features[name] for name, weight in row.items() if name != "bias")


def _squash(value: float, below: float, above: float) -> float:
    return min(1.0, max(0.0, 0.5 + 0.5 * value / (below if value < 0 else above)))


def measured(completion: str, options: Mapping[str, str] | None) -> tuple[Thought, dict[str, float]]:
    """What a completion is weighed by, for fitting: its thought, and its criteria and signs by name."""
    thought = read(completion, options)
    return thought, {**criteria_of(thought), **signs_of(thought)}
