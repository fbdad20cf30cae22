"""What a judge's reply says of each dimension, by a named rule: A, B, tie, or invalid; never a verdict by accident."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmedexpert.data.pairs import DIMENSIONS, INVALID, OTHER, TIE, Order
from mmedexpert.engines.objects import MAX_REPLY, json_objects

_LETTERS = {"a": "A", "b": "B", "tie": TIE}
_NAMED = re.compile(
    r"^[\s>*#_\-\d.)\"']*(" + "|".join(DIMENSIONS) + r")[\s*_\"']*[:=][\s*_\"'\[(]*(tie|[ABab])[\])\s*_\"'.,;]*$",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdicts:
    """`said`: dimension to A, B, tie (of the reply's own slots) or invalid; `rule` names what decided it."""

    said: dict[str, str]
    rule: str


def pairwise(reply: str, names: Sequence[str]) -> Verdicts:
    """The verdicts of a reply to the `pairwise` prompt.  # ours

    `json`: one object with a verdict for every dimension, after any thought, bare, in a fence or between words; a value
    is A, B or tie alone, in either case, or an object whose `verdict` is. `json, partly`: one that lacks some, which
    are invalid. `lines`: without an object, a line of its own `dimension: letter` for each, once. Else all are invalid,
    as `empty`, `no verdict`, `several verdicts` (two that differ) or `cut off` (an object that never ends).
    """
    text = reply.rpartition("</think>")[2].partition("<think>")[0][-MAX_REPLY:]
    if not text.strip():
        return _none(names, "empty")
    objects = [found for value in json_objects(text) if (found := _verdicts(value, names))]
    distinct = [one for place, one in enumerate(objects) if one not in objects[:place]]
    if len(distinct) > 1:
        return _none(names, "several verdicts")
    if distinct:
        whole = len(distinct[0]) == len(names)
        said = {name: distinct[0].get(name, INVALID) for name in names}
        return Verdicts(said, "json" if whole else "json, partly")
    named = [(name.lower(), _LETTERS[letter.lower()]) for name, letter in _NAMED.findall(text)]
    if sorted(name for name, _ in named) == sorted(names):
        return Verdicts(dict(named), "lines")
    if named and len({name for name, _ in named}) < len(named):
        return _none(names, "several verdicts")
    return _none(names, "cut off" if "{" in text and "}" not in text.rpartition("{")[2] else "no verdict")


def _verdicts(value: Any, names: Sequence[str]) -> dict[str, str]:
    """The verdicts in a JSON object, by dimension; what is none is left out."""
    lowered = {key.strip().lower(): one for key, one in value.items()} if isinstance(value, dict) else {}
    found = {}
    for name in names:
        one = lowered.get(name)
        one = one.get("verdict") if isinstance(one, dict) else one
        if isinstance(one, str) and (letter := _LETTERS.get(one.strip().lower())):
            found[name] = letter
    return found


def _none(names: Sequence[str], rule: str) -> Verdicts:
    return Verdicts(dict.fromkeys(names, INVALID), rule)


_PAIRS = {name: re.compile(rf"{name}[\"']?\s*[:=]\s*[\"']?([AB])\b", re.IGNORECASE) for name in DIMENSIONS}
_BRACKETS = re.compile(r"\[\[([AB])\]\]")
_ALONE = re.compile(r"\b([ab])\b", re.IGNORECASE)


def med_rewardbench(reply: str) -> Verdicts:
    """As Med-RewardBench reads a reply (9b9d806), in its order, with its quirks: numbers can stand beside its own.

    `json`: what stands between the first { and the last } is an object with A or B, in either case, for all six;
    `pairs`: a key, a colon and a letter for all six; `brackets`: [[A]] or [[B]], for all six alike; `letter`: exactly
    one a or b that stands alone anywhere, in either case, for all six alike, so that the article "a" is a verdict;
    else `invalid`, which counts as wrong.
    """
    start, end = reply.find("{"), reply.rfind("}")
    if 0 <= start < end:
        try:
            value = json.loads(reply[start : end + 1])
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            letters = {name: str(value.get(name, "")).strip().upper() for name in DIMENSIONS}
            if set(letters.values()) <= set(OTHER):
                return Verdicts(letters, "json")
    found = {name: match[1].upper() for name, pattern in _PAIRS.items() if (match := pattern.search(reply))}
    if len(found) == len(DIMENSIONS):
        return Verdicts(found, "pairs")
    if match := _BRACKETS.search(reply):
        return Verdicts(dict.fromkeys(DIMENSIONS, match[1]), "brackets")
    alone = _ALONE.findall(reply)
    if len(alone) == 1:
        return Verdicts(dict.fromkeys(DIMENSIONS, alone[0].upper()), "letter")
    return _none(DIMENSIONS, "invalid")


def read(reply: str, names: Sequence[str], protocol: str, *, refused: bool = False) -> Verdicts:
    """The verdicts by the rules of a protocol; a refused question has none."""
    if refused:
        return _none(names, "refused")
    return med_rewardbench(reply) if protocol == "med_rewardbench" else pairwise(reply, names)


def canonical(said: str, order: Order) -> str:
    """A verdict of the slots A and B as one of the pair's own answers."""
    return OTHER.get(said, said) if order == "ba" else said
