"""Phrases found in a text by its words, many at once: what rules that are kept as data are written in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

STOP = "."  # ends a sentence or clause; no phrase goes across it
WORD = re.compile(r"[a-z0-9]+|[.;:?!]")
PHRASE = re.compile(r"(?:\*[a-z0-9]+|[a-z0-9]+\*?)(?: (?:\*[a-z0-9]+|[a-z0-9]+\*?))*")  # how one is written
KNOWN_WORDS = 50_000  # ours: words whose phrases are remembered


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without accents and hyphens, and `.` where a sentence or clause ends."""
    text = text.lower()
    if not text.isascii():
        text = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return [STOP if word in ";:?!" else word for word in WORD.findall(text)]


class Phrases:
    """A set of phrases, `*` for any beginning or end of a word: `open reduction`, `biops*`, `*ectomy`.

    Raises ValueError for one that is written otherwise (capitals, hyphens, a blank too many): it would never be found.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._parts = {phrase: phrase.split() for phrase in dict.fromkeys(phrases)}
        if wrong := [phrase for phrase in self._parts if not PHRASE.fullmatch(phrase)]:
            raise ValueError(f"phrase {wrong[0]!r} is not made of lower-case words, each with one * at most")
        self._starting: dict[str, list[str]] = {}  # by the first word as written
        for phrase, parts in self._parts.items():
            self._starting.setdefault(parts[0], []).append(phrase)
        self._by_word: Callable[[str], tuple[str, ...]] = lru_cache(KNOWN_WORDS)(self._that_start_with)

    def find(self, words: Sequence[str]) -> dict[str, str]:
        """The phrases in these words, each with the words that first matched it."""
        return {phrase: " ".join(words[place:end]) for phrase, place, end in reversed(self.hits(words))}

    def hits(self, words: Sequence[str]) -> list[tuple[str, int, int]]:
        """(phrase, place of its first word, place behind its last), in order of places."""
        hits = []
        for place, phrases in enumerate(map(self._by_word, words)):
            for phrase in phrases:  # few words begin one
                parts = self._parts[phrase]
                end = place + len(parts)
                if end - place == 1 or (end <= len(words) and all(map(_matches, words[place + 1 : end], parts[1:]))):
                    hits.append((phrase, place, end))
        return hits

    def _that_start_with(self, word: str) -> tuple[str, ...]:
        beginnings = (word[:size] + "*" for size in range(1, len(word) + 1))
        ends = ("*" + word[-size:] for size in range(1, len(word) + 1))
        return tuple(phrase for key in (word, *beginnings, *ends) for phrase in self._starting.get(key, ()))


def _matches(word: str, part: str) -> bool:
    if part[-1] == "*":
        return word.startswith(part[:-1])
    return word.endswith(part[1:]) if part[0] == "*" else word == part
