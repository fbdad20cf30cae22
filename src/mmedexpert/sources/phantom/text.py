"""Questions and reasoning traces of the phantoms. # ours

Every trace states only what the picture's exact measurement supports, in the manner of one perspective.
"""

from __future__ import annotations

import numpy as np

from mmedexpert.data.record import Trace
from mmedexpert.guidelines import Guideline
from mmedexpert.sources.phantom.families import Family

LETTERS = "ABCD"
WORDINGS = (
    "{modality} of {population}. What follows?",
    "{population}, {modality}. Which one fits?",
    "Choose the option that fits this {modality} of {population}.",
)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def question(family: Family, guideline: Guideline, rng: np.random.Generator) -> str:
    """A question that names modality and population, and neither the measurement nor the threshold."""
    wording = WORDINGS[rng.integers(len(WORDINGS))]
    return _upper(wording.format(modality=family.modality, population=_article(guideline.population)))


def options(family: Family, labels: tuple[str, ...], gold: str, rng: np.random.Generator) -> tuple[dict[str, str], str]:
    """Four lettered options, all labels of the guideline and distractors of the family, and the gold letter."""
    extra = rng.permutation(np.array(family.distractors, dtype=object))[: 4 - len(labels)]
    texts = [str(text) for text in rng.permutation(np.array([*labels, *extra], dtype=object))]
    return dict(zip(LETTERS, texts, strict=True)), LETTERS[texts.index(gold)]


def listed(choices: dict[str, str]) -> str:
    """Options as they stand in a prompt, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in choices.items())


def measured(family: Family, guideline: Guideline, value: float) -> str:
    """The sentence every trace begins with: the finding and its value."""
    unit = guideline.unit
    blank = "" if not unit or unit.startswith("/") else " "
    return f"{_upper(guideline.finding)} {family.text(value)}{blank}{unit}."


def comparison(family: Family, cuts: tuple[float, ...], value: float, level: int) -> str:
    """The inequality that puts `value` on `level`, such as `60 < 75 < 100`."""
    shown, at = family.text(value), [family.text(cut) for cut in cuts]
    if level == 0:
        return f"{shown} {'=' if shown == at[0] else '<'} {at[0]}"
    if level == len(cuts):
        return f"{shown} {'=' if shown == at[-1] else '>'} {at[-1]}"
    low, high = at[level - 1], at[level]
    return f"{low} {'=' if low == shown else '<'} {shown} {'=' if high == shown else '<'} {high}"


def grade(level: int, cuts: tuple[float, ...]) -> str:
    """`low`, `within` or `high`, as a laboratory report would say."""
    return "low" if level == 0 else "high" if level == len(cuts) else "within"


def trace(
    family: Family, guideline: Guideline, value: float, letter: str, perspective: str, rng: np.random.Generator
) -> Trace:
    """The reasoning of one perspective for a drawn value, ending in the gold label and its option letter.

    Every trace begins with the measurement, names the gold label right after its grade, and ends with label and letter.
    Label and letter stand side by side: a tiny model learns to look a letter up in 150 steps so, and hardly ever with a
    bracket between them. Raises ValueError for an unknown perspective.
    """
    level = guideline.level(value)
    gold, pattern = guideline.labels[level], family.patterns[level]
    steps: tuple[str, ...]
    graded = f"{grade(level, guideline.cuts)} {gold}"
    seen = measured(family, guideline, value)
    if perspective == "analytical":
        cuts = " to ".join(family.text(cut) for cut in guideline.cuts)
        criterion = f"Criterion for {_article(guideline.population)}: {cuts}."
        compared = f"{comparison(family, guideline.cuts, value, level)} so {graded} {letter}."
        return Trace(perspective, (seen, criterion, compared))
    if perspective == "differential":
        rivals = [i for i in range(len(guideline.labels)) if i != level]
        other = rivals[rng.integers(len(rivals))]
        rival = guideline.labels[other]
        steps = (f"Candidates: {graded}, {grade(other, guideline.cuts)} {rival}.", f"Against {rival}: {pattern}.")
    elif perspective == "intuitive":
        steps = (f"Pattern: {pattern}, {graded}.",)
    elif perspective == "bayesian":
        prior, ratio, posterior = _update(family, guideline, value)
        found = f"{_upper(pattern)}, likelihood ratio {ratio}."
        steps = (f"Prior of {graded} {prior}%.", found, f"Posterior {posterior}%.")
    else:
        raise ValueError(f"unknown perspective {perspective!r}")
    return Trace(perspective, (seen, *steps, f"So {gold} {letter}."))


def _update(family: Family, guideline: Guideline, value: float) -> tuple[int, int, int]:
    """Prior, likelihood ratio and posterior in percent: equal priors, stronger evidence away from the cut. # ours"""
    low, high = family.span
    near = min(abs(value - cut) for cut in guideline.cuts) < 0.15 * (high - low)
    if len(guideline.labels) == 2:
        return (50, 4, 80) if near else (50, 19, 95)
    return (33, 8, 80) if near else (33, 38, 95)
