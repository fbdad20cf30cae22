"""Whether the patient of a question is a minor, from the ages that its text states."""

from __future__ import annotations

import re
from typing import Any

MAJORITY = 18.0  # ours: years; below it a patient is a minor
MINOR, ADULT = "minor", "adult"
ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen " \
    "eighteen nineteen".split()  # fmt: skip
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
YEARS = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25, "h": 1 / 8766}  # of a unit, by its first letter
NUMBER = rf"(?:\d{{1,3}}|(?:(?:{'|'.join(TENS)})[\s-])?(?:{'|'.join(ONES)})|{'|'.join(TENS)})"
UNIT = r"(?:years?|yrs?|months?|mos?|weeks?|wks?|days?|hours?|hrs?)"
# what is old, but no patient
THING = r"(?!\s+(?:injur|fractur|wound|scar|lesion|infarct|graft|stroke|burn|implant|prosthe|ruptur|tear|bleed|hemorr))"
OLD = re.compile(
    rf"(?<![\w.])(?P<number>{NUMBER})"
    rf"(?:\s*½|\s+1/2|[\s-]+and[\s-]+a[\s-]+half)?[\s-]*"
    rf"(?:(?P<unit>{UNIT})[\s-]*(?:old\b|of\s+age\b)|y[/.\s]?o\b)(?P<thing>{THING})"
    r"(?P<relative>\s+(?:mother|father|parent|brother|sister|sibling|cousin|grand|husband|wife))?"
)
WHOSE = re.compile(r"\b(?:his|her|their)\s+$")
# "at age 7" is when something was, not how old the patient is
AGED = re.compile(
    rf"(?<!\bat )(?<!\bsince )(?<!\bby )(?<!\bof )(?<!\bthe )\bage(?:d\s*:?|\s*:|\s+is)?\s+(?P<number>{NUMBER})\b"
    rf"(?:\s+(?P<unit>{UNIT})\b)?(?!\s*(?:-|to|or)\s*\d)"
)
MONOGRAM = re.compile(r"(?<![\w.-])(\d{1,2})\s?(?:yo\s?)?[MF]\b(?![/.\d])")  # 45M, 7F
GROWN = re.compile(r"\b(?:elderly|middle[\s-]aged|in (?:his|her) (?:[2-9]0|twenties|thirties|forties|fifties)s?)\b")
BRINGS = re.compile(r"\b(?:brings?|brought|accompan\w+|carries)\s+(?:in\s+)?(?:her|his|their)\b")


def age_group(text: str) -> tuple[str, str]:
    """(minor or adult, the words that say so) of the patient; ("", "") where no age is told.  # ours

    An age in months, weeks, days or hours counts before one in years (the other is a parent's), a patient's own before
    that of "his" or "her" relative, and the first before later ones.
    """
    small = text.lower()
    own: list[tuple[float, str]] = []
    related: list[tuple[float, str]] = []
    for match in OLD.finditer(small):
        years, unit = _years(match["number"], match["unit"]), (match["unit"] or "y")[0]
        if unit != "y" and years < MAJORITY:
            return MINOR, match[0].strip()
        relative = match["relative"] or WHOSE.search(small, max(0, match.start() - 8), match.start())
        (related if relative else own).append((years, match[0].strip()))
    if related and related[0][0] < MAJORITY and (not own or BRINGS.search(small)):
        return MINOR, related[0][1]
    if not own and "age" in small and (aged := AGED.search(small)):
        own = [(_years(aged["number"], aged["unit"]), aged[0].strip())]
    if not own and (short := MONOGRAM.search(text)):
        own = [(float(short[1]), short[0])]
    if own:
        return (MINOR if own[0][0] < MAJORITY else ADULT), own[0][1]
    grown = GROWN.search(small)
    return (ADULT, grown[0]) if grown else ("", "")


def group_of(age: Any) -> tuple[str, str]:
    """As `age_group`, of an age as data sets state it: a number of years, `12`, `12 years`, DICOM's `006M`."""
    match = re.fullmatch(rf"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>{UNIT}|[ymwd])?(?:\s*old)?\s*", str(age).lower())
    if not match:
        return age_group(str(age))
    years = float(match["number"]) * YEARS[(match["unit"] or "y")[0]]
    return (MINOR if years < MAJORITY else ADULT), match[0].strip()


def _years(number: str, unit: str | None) -> float:
    if number.isdigit():
        count = int(number)
    else:
        words = re.split(r"[\s-]+", number)
        count = sum(ONES.index(w) + 1 if w in ONES else (TENS.index(w) + 2) * 10 for w in words)
    return count * YEARS[(unit or "y")[0]]
