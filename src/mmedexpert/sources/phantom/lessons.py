"""What the tiny base is taught before it meets medicine: to read options, copy, look, follow what is stated. # ours

A real base brings these from pretraining. The base learns the terms (a wide heart is called cardiomegaly) and how each
perspective goes about it, but nothing that a specialist knows: criterion, what a look or a sign stands for, and which
label is common are drawn anew for each lesson and stated in it; where they are not, the lesson says that they are
unknown and answers A. What applies to whom is what DSA adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mmedexpert.guidelines import PERSPECTIVES, Guideline, guidelines, instructions
from mmedexpert.sources.phantom.cases import Case, completed
from mmedexpert.sources.phantom.families import FAMILIES, PRACTICES, Family, family_of
from mmedexpert.sources.phantom.text import (
    LETTERS,
    comparison,
    grade,
    listed,
    measured,
    options,
    question,
    trace,
    upper,
)

NAMES = sorted(
    {label for rule in guidelines().values() for label in rule.labels}
    | {label for family in FAMILIES.values() for label in (family.rival, *family.distractors)}
)
UNKNOWN = 0.15  # share of the lessons that do not state what they need
OWN = 0.4  # share of the lessons that ask for what their perspective decides


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


def copying(rng: np.random.Generator) -> Lesson:
    """A measurement and a criterion, which are then compared: one's own numbers, copied digit by digit."""
    rule = _random_rule(rng)
    family = family_of(rule.id)
    value = round(float(rng.uniform(*family.span)), family.decimals)
    stated = _restated(rule, family, int(rng.integers(len(rule.cuts))), rng)
    level = stated.level(value)
    cuts = " to ".join(family.text(cut) for cut in stated.cuts)
    completion = f" {comparison(family, stated.cuts, value, level)}, {grade(level, stated.cuts)}."
    return Lesson(f"{measured(family, rule, value)}. Criterion: {cuts}.", completion)


def looking(rng: np.random.Generator) -> Lesson:
    """An image and what a specialist would know, stated: reason from one perspective, answer in the final format."""
    perspective = PERSPECTIVES[rng.integers(len(PERSPECTIVES))]
    needs = perspective if rng.random() < OWN else PERSPECTIVES[rng.integers(len(PERSPECTIVES))]
    return lesson(lesson_case(_random_rule(rng), needs, rng), perspective, rng, stated=bool(rng.random() >= UNKNOWN))


def lesson(case: Case, perspective: str, rng: np.random.Generator, *, stated: bool = True) -> Lesson:
    """A case under one perspective; not `stated`: without what a specialist knows, where the case needs it."""
    choices = options(case, rng)
    missing = "" if stated else _unknown(case, perspective)
    if missing:
        knowledge, completion = "", f"<think>{missing} unknown.</think><answer>{LETTERS[0]}</answer>"
    else:
        steps = trace(case, choices, perspective).steps
        knowledge = _stated(case, perspective)
        completion = f"<think>{' '.join(steps)}</think><answer>{steps[-1][-2]}</answer>"
    prompt = f"{question(case, rng)}{knowledge}\n{listed(choices)}\n{instructions()[perspective]}"
    return Lesson(prompt, completion, image=case.paint(rng))


def lesson_case(rule: Guideline, needs: str, rng: np.random.Generator) -> Case:
    """A case in which all that a specialist knows is drawn at random."""
    family, pair = family_of(rule.id), int(rng.integers(len(rule.cuts)))
    rivals = [family.rival, *family.distractors]
    return completed(
        _restated(rule, family, pair, rng), family, needs, pair, rng, brighter_below=bool(rng.integers(2)),
        rival=rivals[rng.integers(3)], common=pair + int(rng.integers(2)),
    )  # fmt: skip


def _random_rule(rng: np.random.Generator) -> Guideline:
    return guidelines()[list(PRACTICES)[rng.integers(len(PRACTICES))]]


def _restated(rule: Guideline, family: Family, pair: int, rng: np.random.Generator) -> Guideline:
    """The rule with other cuts: that of the pair so that strong findings lie in the span, others beyond those."""
    low, high = family.span
    step = 10**-family.decimals
    cut = rng.uniform(low + family.far[1], high - family.far[1])
    room = family.far[1] + 2 * step
    cuts = [cut + (place - pair) * (room + rng.uniform(0, 0.3) * (high - low)) for place in range(len(rule.cuts))]
    rounded = tuple(max(step, round(float(one), family.decimals)) for one in cuts)
    return replace(rule, cuts=rounded, upper="exclusive")


def _stated(case: Case, perspective: str) -> str:
    """What a specialist who reasons so would know of the case."""
    family, rule = case.family, case.rule
    criterion = f" Criterion {' to '.join(family.text(cut) for cut in rule.cuts)}."
    if perspective == "analytical":
        return criterion
    if perspective == "intuitive":
        one, other = family.looks[case.brighter_below], family.looks[not case.brighter_below]
        return f" Typical: {one} {rule.labels[case.pair + 1]}, {other} {rule.labels[case.pair]}."
    if perspective == "bayesian":
        usual = "" if case.prevalence is not None else f" Usual {case.prior[0]}."
        return criterion + usual
    return f" {upper(family.sign)} {case.rival}." if case.needs == "differential" else ""


def _unknown(case: Case, perspective: str) -> str:
    """What is missing where nothing is stated; empty where nothing needs to be."""
    if perspective == "differential":
        return "Sign" if case.needs == "differential" else ""
    return {"analytical": "Criterion", "intuitive": "Pattern", "bayesian": "Criterion"}[perspective]
