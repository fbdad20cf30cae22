"""Questions and reasoning traces of the phantoms. # ours

Every trace goes by what its perspective knows, and by nothing else: where that does not decide the question, it says so
and answers by its own lights.
"""

from __future__ import annotations

import numpy as np

from mmedexpert.data.record import Trace
from mmedexpert.guidelines import Guideline
from mmedexpert.sources.phantom.cases import Case
from mmedexpert.sources.phantom.families import Family

LETTERS = "ABCD"
UNDECIDED = ", undecided"
WORDINGS = (
    "{modality} of {population}. What follows?",
    "{population}, {modality}. Which one fits?",
    "Choose the option that fits this {modality} of {population}.",
)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def upper(text: str) -> str:
    """With a capital."""
    return text[0].upper() + text[1:]


def question(case: Case, rng: np.random.Generator) -> str:
    """A question that names modality, population and what is special; no measurement, sign, look or threshold."""
    wording = WORDINGS[rng.integers(len(WORDINGS))]
    asked = upper(wording.format(modality=case.family.modality, population=_article(case.rule.population)))
    if case.needs == "bayesian":
        return f"{asked} Prevalence of {case.labels[1]} {case.prevalence}%."
    if case.needs == "differential":
        one, other = (str(label) for label in rng.permutation(np.array(case.labels, dtype=object)))
        return f"{asked} {upper(one)} or {other}?"
    if case.needs == "intuitive":
        return f"{asked} {upper(case.family.unmeasurable)}."
    return asked


def options(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """Four lettered options: the two labels in question and two of the family that no picture shows."""
    others = [*case.family.distractors, case.family.rival]
    extra = rng.permutation(np.array([text for text in others if text not in case.labels], dtype=object))[:2]
    texts = rng.permutation(np.array([*case.labels, *extra], dtype=object))
    return {letter: str(text) for letter, text in zip(LETTERS, texts, strict=True)}


def letter_of(choices: dict[str, str], label: str) -> str:
    """The letter that a label stands under."""
    return next(letter for letter, text in choices.items() if text == label)


def listed(choices: dict[str, str]) -> str:
    """Options as they stand in a prompt, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in choices.items())


def measured(family: Family, guideline: Guideline, value: float) -> str:
    """The finding and its value, without a full stop."""
    unit = guideline.unit
    blank = "" if not unit or unit.startswith("/") else " "
    return f"{upper(guideline.finding)} {family.text(value)}{blank}{unit}"


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


def trace(case: Case, choices: dict[str, str], perspective: str) -> Trace:
    """The reasoning of one perspective about a case, ending in the label it comes to and its option letter.

    Label and letter stand side by side: a tiny model learns to look a letter up in 150 steps so, and hardly ever with a
    bracket between them. Raises ValueError for an unknown perspective.
    """
    undecided = "" if case.needs == perspective else UNDECIDED
    steps, label = _STEPS[perspective](case, choices, undecided) if perspective in _STEPS else ((), "")
    if not label:
        raise ValueError(f"unknown perspective {perspective!r}")
    letter = letter_of(choices, label)
    return Trace(perspective, (*steps, f"So {label} {letter}."), None if label == case.gold else letter)


def _analytical(case: Case, choices: dict[str, str], undecided: str) -> tuple[tuple[str, ...], str]:
    family, rule = case.family, case.rule
    level = rule.level(case.value)
    cuts = " to ".join(family.text(cut) for cut in rule.cuts)
    criterion = f"Criterion for {_article(rule.population)}: {cuts}."
    compared = f"{comparison(family, rule.cuts, case.value, level)}, {grade(level, rule.cuts)}{undecided}."
    return (f"{measured(family, rule, case.value)}.", criterion, compared), case.measured


def _intuitive(case: Case, choices: dict[str, str], undecided: str) -> tuple[tuple[str, ...], str]:
    look = case.family.looks[bool(case.look) == case.brighter_below]
    return (f"Pattern at a glance: {look}, typical {case.looks_like}{undecided}.",), case.looks_like


def _differential(case: Case, choices: dict[str, str], undecided: str) -> tuple[tuple[str, ...], str]:
    first, second = (text for text in choices.values() if text in case.labels)
    kept = case.gold if not undecided else first
    other = second if kept == first else first
    seen = upper(f"{'' if case.sign else 'no '}{case.family.sign}")  # first, so that what it is against follows from it
    return (f"Candidates: {first}, {second}.", f"{seen} against {other}{undecided}."), kept


def _bayesian(case: Case, choices: dict[str, str], undecided: str) -> tuple[tuple[str, ...], str]:
    label, prior = case.prior
    ratio = f"{case.ratio:.2f}".rstrip("0").rstrip(".")
    cut, moved = case.rule.cuts[case.pair], "raises" if case.ratio > 1 else "lowers"
    beside = f"{measured(case.family, case.rule, case.value)} beside {case.family.text(cut)}"
    found = f"{beside} {moved} it, likelihood ratio {ratio}."
    return (f"Prior of {label} {prior}%.", found, f"Posterior {case.posterior}%{undecided}."), case.likely


_STEPS = {
    "differential": _differential, "intuitive": _intuitive, "analytical": _analytical, "bayesian": _bayesian,
}  # fmt: skip
