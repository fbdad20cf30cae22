"""What the tiny base is taught before it meets medicine: to read, to see, to follow a stated criterion. # ours

A real base brings these from pretraining. Class names are drawn anew in every lesson, so that the base learns no
threshold and no diagnosis: those are what DSA adds. Three lessons, easiest first; without the first two the option
lookup is still at chance after 1,000 image steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mmedexpert.data.phantom.families import FAMILIES, Family
from mmedexpert.data.phantom.text import LETTERS, grade, question, trace
from mmedexpert.guidelines import PERSPECTIVES, guidelines, instructions

NAMES = sorted(
    {label for rule in guidelines().values() for label in rule.labels}
    | {label for family in FAMILIES.values() for label in family.distractors}
)


@dataclass(frozen=True)
class Lesson:
    """One training text. `prompt` is raw text when `image` is None, else the user's turn; `scored` limits the loss to
    the tokens of these words (None: all of the completion)."""

    prompt: str
    completion: str
    image: Image.Image | None = None
    scored: frozenset[str] | None = None


def _draw_names(rng: np.random.Generator) -> list[str]:
    return [NAMES[i] for i in rng.permutation(len(NAMES))[:4]]


def _listed(names: list[str]) -> str:
    return "\n".join(f"{letter}. {name}" for letter, name in zip(LETTERS, names, strict=True))


def reading(rng: np.random.Generator) -> Lesson:
    """Options, then their letters in another order: where is a name written, and under which letter?"""
    names = _draw_names(rng)
    answers = "".join(f" {names[i]} {LETTERS[i]}" for i in rng.permutation(4))
    return Lesson(_listed(names) + "\n", answers, scored=frozenset(LETTERS))


def ruling(rng: np.random.Generator) -> Lesson:
    """A rule in words, then its cases: which name does `low`, `within` or `high` mean, and which letter has it?"""
    names, count = _draw_names(rng), int(rng.integers(2, 4))
    labels = rng.permutation(4)[:count]
    grades = ["low", "within", "high"] if count == 3 else ["low", "high"]
    rule = ", ".join(f"{word} {names[i]}" for word, i in zip(grades, labels, strict=True))
    cases = " ".join(f"{grades[i]} {names[labels[i]]} {LETTERS[labels[i]]}." for i in rng.permutation(count))
    first_words = frozenset(name.split()[0] for name in names)
    return Lesson(f"criterion: {rule}.\n{_listed(names)}\n", f"<think>{cases}", scored=frozenset(LETTERS) | first_words)


def looking(rng: np.random.Generator) -> Lesson:
    """An image and an arbitrary criterion with arbitrary class names: reason from one perspective, answer in the format."""
    key = list(FAMILIES)[rng.integers(len(FAMILIES))]
    family = FAMILIES[key]
    model = guidelines()[list(family.ranges)[rng.integers(len(family.ranges))]]
    level = int(rng.integers(len(model.labels)))
    value, cuts = _value_and_cuts(family, len(model.labels), level, rng)
    names = _draw_names(rng)
    rule = replace(model, cuts=cuts, labels=tuple(names[: len(model.labels)]))
    perspective = PERSPECTIVES[rng.integers(len(PERSPECTIVES))]
    listed = [names[i] for i in rng.permutation(4)]
    letter = LETTERS[listed.index(names[level])]
    meaning = ", ".join(f"{grade(i, cuts)} {name}" for i, name in enumerate(rule.labels))
    criterion = f"Criterion {' to '.join(family.text(cut) for cut in cuts)}: {meaning}."
    prompt = f"{question(family, rule, rng)} {criterion}\n{_listed(listed)}\n{instructions()[perspective]}"
    steps = " ".join(trace(family, rule, value, letter, perspective, rng).steps)
    return Lesson(prompt, f"<think>{steps}</think><answer>{letter}</answer>", image=family.paint(value, rng))


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
