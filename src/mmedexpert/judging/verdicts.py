"""What a judge's reply says of each dimension, by a named rule: A, B, tie, or invalid; never a verdict by accident."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmedexpert.data.pairs import DIMENSIONS, INVALID, OTHER, TIE, Order
from mmedexpert.engines.objects import MAX_REPLY, unique_keys, visible

_LETTERS = {"a": "A", "b": "B", "tie": TIE}
# of one line; no class takes a line break, and none follows another that takes the same
_NAMED = re.compile(
    r"^[ \t]*(?:[*#\-][ \t]*|\d+[.)][ \t]*)*[*_\"']*(" + "|".join(DIMENSIONS) + r")[*_\"']*[ \t]*[:=]"
    r"[ \t*_\"'\[(]*(tie|[ab])[ \t\])*_\"'.,;]*$",
    re.IGNORECASE,
)
_TAG = re.compile(r"<answer>([^<>\n]{1,100})</answer>\s*\Z")
_BEFORE, _AFTER = re.compile(r"(?:^|\n|:|```|json|\})[ \t]*$", re.IGNORECASE), re.compile(r"^[ \t.!]*(?:\n|```|\{|$)")


@dataclass(frozen=True)
class Verdicts:
    """`said`: dimension to A, B, tie (of the reply's own slots) or invalid; `rule` names what decided it."""

    said: dict[str, str]
    rule: str


def pairwise(reply: str, names: Sequence[str], *, cut: bool = False) -> Verdicts:
    """The verdicts of a reply to the `pairwise` prompt; `cut`: it ran into its limit.  # ours

    `json`: one object with a verdict for every dimension, after any thought, bare, in a fence, or between words on
    lines of its own; a value is A, B or tie alone, in either case, or an object whose `verdict` is. `json, partly`:
    some lack, and are invalid. `lines`: without any brace, a line of its own `dimension: letter` for each, once.
    `answer tag`: without any brace, as the last of the reply and once, `<answer>A, B</answer>` with a letter for each
    dimension, in the order asked (what `judging/lessons.py` teaches small models).
    Else all are invalid: `empty`, `no verdict`, `several verdicts` (that contradict each other), `in a sentence` (an
    object among words, which may be a quotation), `broken object` (what is inside of it is none of its own), `cut off`
    (no brace closes it, or a reply ran on after its object until its limit).
    """
    text = visible(reply)[-MAX_REPLY:]
    if not text.strip():
        return _none(names, "empty")
    if "{" not in text:
        return _lines(text, names, cut)
    said: dict[str, str] = {}
    decoder, end, quoted = json.JSONDecoder(object_pairs_hook=unique_keys, strict=False), 0, False
    while (start := text.find("{", end)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return _none(names, "broken object" if "}" in text[start:] else "cut off")
        found = _verdicts(value, names)
        if found is None or any(said.get(name, letter) != letter for name, letter in found.items()):
            return _none(names, "several verdicts")
        quoted = quoted or bool(found and not (_BEFORE.search(text[:start]) and _AFTER.search(text[end:])))
        said |= found
    if cut and text[end:].strip(" \t\n`."):
        return _none(names, "cut off")
    if quoted or not said:
        return _none(names, "in a sentence" if quoted else "no verdict")
    whole = len(said) == len(names)
    return Verdicts({name: said.get(name, INVALID) for name in names}, "json" if whole else "json, partly")


def _lines(text: str, names: Sequence[str], cut: bool) -> Verdicts:
    named = [(m[1].lower(), _LETTERS[m[2].lower()]) for line in text.splitlines() if (m := _NAMED.match(line[:200]))]
    if len({name for name, _ in named}) < len(named):
        return _none(names, "several verdicts")
    if sorted(name for name, _ in named) == sorted(names):
        return Verdicts(dict(named), "lines")
    if not named and text.count("<answer>") == 1 and (match := _TAG.search(text)):
        letters = [_LETTERS.get(part.strip().lower()) for part in match[1].split(",")]
        if len(letters) == len(names) and all(letters):
            return Verdicts({name: str(letter) for name, letter in zip(names, letters, strict=True)}, "answer tag")
    return _none(names, "cut off" if cut else "no verdict")


def _verdicts(value: dict[str, Any], names: Sequence[str]) -> dict[str, str] | None:
    """The verdicts in a JSON object, by dimension; None where two of its keys are one dimension."""
    lowered = {key.strip().lower(): one for key, one in value.items()}
    if len(lowered) < len(value):
        return None
    found = {}
    for name in names:
        one = lowered.get(name)
        one = one.get("verdict") if isinstance(one, dict) else one
        if isinstance(one, str) and (letter := _LETTERS.get(one.strip().lower())):
            found[name] = letter
    return found


def _none(names: Sequence[str], rule: str) -> Verdicts:
    return Verdicts(dict.fromkeys(names, INVALID), rule)


_PAIRS = {name: re.compile(rf"\b{name}[\"']?\s*:\s*[\"']?([AB])\b", re.IGNORECASE) for name in DIMENSIONS}
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


def read(reply: str, names: Sequence[str], protocol: str, *, finish_reason: str = "stop") -> Verdicts:
    """The verdicts by the rules of a protocol; a refused question has none."""
    if finish_reason == "refused":
        return _none(names, "refused")
    if protocol == "med_rewardbench":
        return med_rewardbench(reply)
    return pairwise(reply, names, cut=finish_reason == "length")


def canonical(said: str, order: Order) -> str:
    """A verdict of the slots A and B as one of the pair's own answers."""
    return OTHER.get(said, said) if order == "ba" else said
