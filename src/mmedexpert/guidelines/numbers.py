"""The numbers of a sentence: which of them are chances, and whether what is compared compares so.  # ours"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmedexpert.guidelines.cues import look_up

UNITS = frozenset(
    "hg cm2 cm3 mm2 mm3 pg pmol nmol sd mm cm m ml l bpm hu mmhg ms s mv kg g mg µg ng mmol µmol iu u years year yr "
    "yrs y months month weeks week days day d hours hour h min minutes hz db beats kpa °c c f mosm".split()
)
_FEW = "one|two|three|four|five|six|seven|eight|nine"
_MANY = rf"{_FEW}|ten|twenty|fifty|hundred|thousand"
_TOLD = re.compile(
    rf"\b(?:{_FEW}|\d+) (?:in|of|out of|times in) (?:every )?(?:a |about )?(?:{_MANY}|\d+)\b"
    r"|\b(?:one|two|three)[- ](?:quarter|third|fifth|tenth|half)s?\b|\b(?:half|a quarter|a third|quarter)\b"
    r"|\b\d+(?:\.\d+)? ?(?:to|:) ?1\b|\b1 ?: ?\d+|\bx ?\d|\d ?x\b"
)
_TELLING, _PARTS = frozenset(_FEW.split("|")), frozenset("half quarter third x".split())
_OUT_OF = frozenset("in of out times quarter quarters third thirds fifth fifths tenth tenths half".split())
_STRENGTH = frozenset("lr lr+ lr- sensitivity specificity likelihood".split())  # of a finding: no chance of a disease
_ARROWS = ("→", "->")
_ABOUT = frozenset("about roughly maybe around to ~ perhaps near ≈ at now from".split())
_AFTER = frozenset(["", ",", ";", ")", "now", "→", "->", "vs", "for", "to", "and"])

_ABOVE = "> above over surpasses surpassing exceeds exceeding exceed exceeded beyond"
_BELOW = "< below under"
_MORE = "higher greater more larger faster longer wider"
_LESS = "lower less smaller fewer slower shorter"
_SIGNS = {"≤": operator.le, "≥": operator.ge}
_SIGNS |= dict.fromkeys(f"{_ABOVE} {_MORE}".split(), operator.gt)
_SIGNS |= dict.fromkeys(f"{_BELOW} {_LESS}".split(), operator.lt)
# What may stand between the first number and the comparison, and between the comparison and the second number.
_BEFORE = UNITS | frozenset(
    "is are was were , of which that well far clearly already still being % / ( at and so therefore it this lies stays "
    "sits measures patient value result measurement ratio the likewise also here with he she not no slightly just "
    "much".split()
)
_BETWEEN = frozenset(
    "the a an its normal limit upper lower cut-off cutoff threshold ceiling criterion criteria of than reference range "
    "value for adult adults accepted about roughly usual our mature maximum minimum ( diagnostic guideline floor line "
    "mark bar permitted allowed permissible recommended lower-limit".split()
)
_REACH = 7  # words to either side


@dataclass(slots=True)
class Number:
    """A number at a place of its sentence; `chance`: it is how probable something is, in per cent or not."""

    value: float
    place: int
    percent: bool = False
    unit: str = ""
    chance: bool = False
    strength: bool = False  # of a finding: a likelihood ratio, a sensitivity


def chances(
    tokens: Sequence[str], numbers: Sequence[Number], options: Mapping[int, int], chancy: bool
) -> tuple[list[float], int]:
    """Probabilities in [0, 1] that a sentence states in figures, and how many it tells in words ("one in ten").

    A per cent is one; a bare number up to 100 only where the text speaks of chances (`chancy`) and it follows a word of
    chance, an arrow, an option or "about". Strengths of a finding (likelihood ratios, sensitivities) are none.
    """
    found: list[float] = []
    for number in numbers:
        before = tokens[max(0, number.place - 4) : number.place]
        last = before[-1] if before else ""
        if _is_strength(before) and last != "now":
            number.strength = True
            continue
        if number.percent:
            number.chance = number.value <= 100
        elif chancy and not number.unit and number.value <= 100:
            after = tokens[number.place + 1] if number.place + 1 < len(tokens) else ""
            number.chance = (
                any("chance" in look_up(word).cues for word in before[-2:])
                or last in _ARROWS
                or any(0 < number.place - place <= 2 for place in options.values())
                or (last in _ABOUT and after in _AFTER)
            )
        if number.chance:
            found.append(number.value / 100 if number.percent or number.value > 1 else number.value)
    tells = numbers or not _PARTS.isdisjoint(tokens)
    tells = tells or not (_TELLING.isdisjoint(tokens) or _OUT_OF.isdisjoint(tokens))
    told = len(_TOLD.findall(" ".join(tokens))) if tells else 0
    return found, told


def _is_strength(before: Sequence[str]) -> bool:
    """Whether a number after these words says how strong a finding is ("a likelihood ratio of about 8")."""
    if "likelihood" in before:
        return "ratio" in before or "ratios" in before
    return not _STRENGTH.isdisjoint(before[-3:])


def comparisons(tokens: Sequence[str], numbers: Sequence[Number]) -> list[tuple[float, float, bool]]:
    """Each "a is above the limit of b" of a sentence: a, b, and whether it is true."""
    if len(numbers) < 2:
        return []
    at = {number.place: number for number in numbers}
    found: list[tuple[float, float, bool]] = []
    for place, token in enumerate(tokens):
        if token not in _SIGNS:
            continue
        left, right = place - 1, place + 1
        while left >= 0 and place - left <= _REACH and left not in at and tokens[left] in _BEFORE:
            left -= 1
        while right < len(tokens) and right - place <= _REACH and right not in at and tokens[right] in _BETWEEN:
            right += 1
        if left not in at or right not in at:
            continue
        one, other, between = at[left], at[right], tokens[left + 1 : place]
        if one.percent != other.percent or (one.unit and other.unit and one.unit != other.unit):
            continue
        if {"and", "so"} & set(between) and not {"is", "it", "this", "lies"} & set(between):
            continue  # another thing is compared
        denied = bool({"not", "no"} & set(between))
        found.append((one.value, other.value, _SIGNS[token](one.value, other.value) != denied))
    return found
