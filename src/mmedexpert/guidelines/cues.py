"""Cues as data (`cues.yaml`): what a word or phrase does in a line of reasoning, looked up word by word.  # ours

A word is looked up once and remembered, so that reading costs a dictionary access a word, however many cues there are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

import yaml

_SPELLINGS = (
    ("\u2019", "'"),
    ("\u2013", "-"),
    ("\u2212", "-"),
    ("\u2014", ";"),
    ("*", " "),
    ("#", " "),
    ("`", " "),
    ("_", " "),
    ("can't", "can not"),
    ("won't", "will not"),
    ("n't", " not"),
    ("cannot", "can not"),
    ("tumour", "tumor"),
    ("<=", "≤"),
    (">=", "≥"),
    ("per cent", "%"),
)
_PERCENT = re.compile(r"\bpercent\b")
_DIGRAPHS = {pair: re.compile(rf"{pair}(?=[dmstcglnpr])(?!s\b)") for pair in ("ae", "oe")}  # haematoma; not "does"
Phrase = tuple[str, tuple[str, ...]]  # the cue, and the words that must follow


class Phrases(NamedTuple):
    """The phrases that begin with one word: by their second word, and those whose second word is a beginning."""

    whole: Mapping[str, tuple[Phrase, ...]]
    starting: tuple[tuple[str, Phrase], ...]

    def that_go_on(self, word: str) -> tuple[Phrase, ...]:
        """The cues, each with the words still to follow, of the phrases that go on with `word`."""
        found = self.whole.get(word, ())
        if self.starting:
            found += tuple(phrase for start, phrase in self.starting if word.startswith(start))
        return found


class Word(NamedTuple):
    """What a word is by itself: its cues, and the phrases that begin with it."""

    cues: tuple[str, ...]
    phrases: Phrases | None
    start: str  # what its inflected forms have in common
    generic: bool  # talk that is never a finding
    finding: bool  # may be one
    clinical: bool  # a concrete word that findings are stated in


def normal(text: str) -> str:
    """Lower case, one kind of dash, apostrophe and negation, no markdown marks, American spelling where it differs."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    if "percent" in text:
        text = _PERCENT.sub("%", text)
    for pair, pattern in _DIGRAPHS.items():
        if pair in text:
            text = pattern.sub("e", text)
    return text


def beginning(word: str) -> str:
    """What inflected forms of a word have in common: all but its last four letters, five letters at least."""
    return word if len(word) <= 5 else word[: max(5, len(word) - 4)]


@cache
def cues() -> dict[str, list[str]]:
    """The phrases of each cue, read from `cues.yaml`."""
    rows = yaml.safe_load(files(__package__).joinpath("cues.yaml").read_text(encoding="utf-8"))
    return {name: [phrase.strip() for phrase in text.split(",") if phrase.strip()] for name, text in rows.items()}


@cache
def _index() -> tuple[Mapping[str, list[Phrase]], Mapping[str, list[Phrase]], Mapping[str, list[Phrase]]]:
    """Phrases by their first word: whole, by its beginning (`argu*`), by its ending (`*itis`)."""
    whole: dict[str, list[Phrase]] = {}
    starting: dict[str, list[Phrase]] = {}
    ending: dict[str, list[Phrase]] = {}
    for cue, phrases in cues().items():
        for phrase in phrases:
            words = [
                "*" * word.startswith("*") + normal(word.strip("*")) + "*" * word.endswith("*")
                for word in phrase.split()
            ]
            first, *rest = " ".join(words).split()
            if first.startswith("*"):
                ending.setdefault(first[1:], []).append((cue, tuple(rest)))
            elif first.endswith("*"):
                starting.setdefault(first[:-1], []).append((cue, tuple(rest)))
            else:
                whole.setdefault(first, []).append((cue, tuple(rest)))
    return whole, starting, ending


@lru_cache(maxsize=50_000)
def look_up(word: str) -> Word:
    """What `word`, as `normal` writes it, is by itself."""
    whole, starting, ending = _index()
    found = list(whole.get(word, ()))
    for size in range(1, min(len(word), 30) + 1):
        found += starting.get(word[:size], ())
        found += ending.get(word[-size:], ()) if size < len(word) else ()
    alone = {cue for cue, rest in found if not rest}
    kinds = tuple(sorted(alone - {"generic", "clinical"}))
    phrases = _by_second_word(sorted((cue, rest) for cue, rest in found if rest))
    generic = "generic" in alone
    finding = len(word) > 2 and not generic and not word.endswith("ly")
    return Word(kinds, phrases, beginning(word), generic, finding, "clinical" in alone)


def _by_second_word(phrases: Sequence[Phrase]) -> Phrases | None:
    whole: dict[str, tuple[Phrase, ...]] = {}
    starting: list[tuple[str, Phrase]] = []
    for cue, (second, *rest) in phrases:
        if second[-1] == "*":
            starting.append((second[:-1], (cue, tuple(rest))))
        else:
            whole[second] = (*whole.get(second, ()), (cue, tuple(rest)))
    return Phrases(whole, tuple(starting)) if phrases else None


def matches(word: str, pattern: str) -> bool:
    """Whether a word is what a later word of a phrase asks for."""
    return word.startswith(pattern[:-1]) if pattern[-1] == "*" else word == pattern
