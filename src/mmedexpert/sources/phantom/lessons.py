"""What the tiny base is taught before it meets medicine: to read options, measure, follow a stated criterion. # ours

A real base brings these from pretraining. The base learns the terms (a wide heart is called cardiomegaly) and no
threshold: the criterion of each lesson is drawn anew, and where none is stated the lesson says that it is not known and
answers A. Which criterion applies to whom is what DSA adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mmedexpert.guidelines import PERSPECTIVES, guidelines, instructions
from mmedexpert.sources.phantom.families import FAMILIES, SPECIALTIES_OF, Family, family_of
from mmedexpert.sources.phantom.text import LETTERS, listed, measured, options, question, trace

NAMES = sorted(
    {label for rule in guidelines().values() for label in rule.labels}
    | {label for family in FAMILIES.values() for label in family.distractors}
)
UNKNOWN = 0.2  # share of the lessons that state no criterion


@dataclass(frozen=True)
class Lesson:
    """One training text. `prompt` is raw text when `image` is None, else the user's turn; `scored` limits the loss to
    the tokens of these words (None: all of the completion)."""

    prompt: str
    completion: str
    image: Image.Image | None = None
    scored: frozenset[str] | None = None


def reading(rng: np.random.Generator) -> Lesson:
    """Options, then their letters in another order: under which letter does a name stand?

    Without this lesson the lookup is still at chance after 1,000 image steps; with it, it takes 200 short ones.
    """
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:4]]
    answers = "".join(f" {names[i]} {LETTERS[i]}" for i in rng.permutation(4))
    return Lesson(listed(dict(zip(LETTERS, names, strict=True))) + "\n", answers, scored=frozenset(LETTERS))


def looking(rng: np.random.Generator) -> Lesson:
    """An image and an arbitrary criterion: measure, reason from one perspective, answer in the final format."""
    rule = guidelines()[list(SPECIALTIES_OF)[rng.integers(len(SPECIALTIES_OF))]]
    family, level = family_of(rule.id), int(rng.integers(len(rule.labels)))
    value, cuts = _value_and_cuts(family, len(rule.labels), level, rng)
    choices, letter = options(family, rule.labels, rule.labels[level], rng)
    perspective = PERSPECTIVES[rng.integers(len(PERSPECTIVES))]
    stated = replace(rule, cuts=cuts, upper="exclusive")
    if rng.random() < UNKNOWN:
        criterion, letter = "", LETTERS[0]
        steps: tuple[str, ...] = (measured(family, rule, value), "Criterion unknown.")
    else:
        criterion = f" Criterion {' to '.join(family.text(cut) for cut in cuts)}."
        steps = trace(family, stated, value, letter, perspective, rng).steps
    prompt = f"{question(family, rule, rng)}{criterion}\n{listed(choices)}\n{instructions()[perspective]}"
    completion = f"<think>{' '.join(steps)}</think><answer>{letter}</answer>"
    return Lesson(prompt, completion, image=family.paint(value, rng))


def _value_and_cuts(
    family: Family, count: int, level: int, rng: np.random.Generator
) -> tuple[float, tuple[float, ...]]:
    """A value and `count - 1` cuts, at least 6 % of the family's span apart, with the value on `level`."""
    low, high = family.span
    while True:
        points = np.sort(rng.uniform(low, high, count))
        rounded = [round(float(point), family.decimals) for point in points]
        if np.all(np.diff(points) > 0.06 * (high - low)) and len(set(rounded)) == count:
            return rounded[level], tuple(rounded[:level] + rounded[level + 1 :])
