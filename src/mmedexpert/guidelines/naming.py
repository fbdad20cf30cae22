"""How a text names the options of its question: in full, by a word of their own, by initials, by letter.  # ours"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmedexpert.guidelines.cues import beginning, look_up, normal

MARKS = "abcdefghijklmnopqrstuvwxyz"  # an option named in full becomes one word: qoptionaq, qoptionbq, ...
MOST = len(MARKS)
LONGEST = 300  # characters of an option that are looked at
_WORD = re.compile(r"[^\W\d_][\w'-]*")
_LETTERS = re.compile(r"[^\W\d_]+")
_PART = re.compile(r"[^\W_]+")
_INITIALS = re.compile(r"\b[A-Z][a-z]?[A-Z]+s?\b")
_SMALL = frozenset("of the with and from in due to".split())
# A word that turns its option into the opposite: "normal heart" is not named by "heart".
_QUALIFIER = frozenset(
    "normal abnormal no not high low negative positive without increased decreased".split()
)  # fmt: skip
# Initials of examinations, places and doses, which no option is meant by.
_PLAIN = frozenset(
    "ct mri mr ecg ekg us xr cxr pet iv im po wbc rbc hb na k ph bp hr rr icu er ed ok or the and ap pa lr rll rul lll "
    "lul rml lv rv la ra".split()
)


class Naming:
    """Finds options in words. `names` are the options' texts as `normal` writes them, `raw` is the text as written.

    An option is named by its text, by the beginning of a word that no other option has, or by capitals that abbreviate
    it and no other ("GPA"). `shared` are beginnings that several options have: neither a name nor a finding.
    """

    def __init__(self, names: Sequence[str], raw: str) -> None:
        self.names = list(names[:MOST])
        self.words = [_own_words(name) for name in self.names]
        self.owner, self.shared = self._owners()
        self._starts = tuple(self.owner)
        self._initials = _initials(raw, self.names)
        self._seen: dict[int, set[str]] = {}
        self._beginnings = ("qoption", *self.owner, *self.shared)

    def concerns(self, word: str) -> bool:
        """Whether a word may name an option, or is shared: what this denies needs no closer look."""
        return word.startswith(self._beginnings) or word in self._initials

    def mark(self, text: str) -> str:
        """The text with every option that stands in it in full as one word of `MARKS`."""
        phrases: dict[str, int] = {}
        for place, name in enumerate(self.names):
            parts = _PART.findall(name)
            if len(parts) > 1 and len(name) <= 80:
                phrases.setdefault(r"[\W_]{1,3}".join(map(re.escape, parts)), place)
        if not phrases:
            return text
        order = sorted(phrases, key=len, reverse=True)
        pattern = re.compile(r"(?<![^\W_])(?:" + "|".join(f"({phrase})" for phrase in order) + r")s?(?![^\W_])")
        return pattern.sub(lambda match: f"qoption{MARKS[phrases[order[(match.lastindex or 1) - 1]]]}q", text)

    def option(self, word: str) -> int | None:
        """The option that a word names."""
        if word.startswith("qoption") and len(word) == 9 and word[7] in MARKS:
            place = MARKS.index(word[7])
            if place >= len(self.names):
                return None
            self._seen.setdefault(place, set()).update(self.words[place])
            return place
        if word.startswith(self._starts):
            hits = [
                (len(start), self.owner[start][0])
                for start in self._starts
                if word.startswith(start)
                and len(word) <= self.owner[start][1]
                and (len(start) >= 5 or word in (start, f"{start}s"))
            ]
            if hits:
                place = max(hits)[1]
                self._seen.setdefault(place, set()).add(word[:5])
                return place
        return self._initials.get(word)

    def share(self, place: int) -> float:
        """How much of an option's words the text has used so far; 1 for one named by initials alone."""
        return len(self._seen[place]) / max(1, len(self.words[place])) if place in self._seen else 1.0

    def _owners(self) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
        """Beginning of a word to the option it names and the longest word it may begin; beginnings of several."""
        every = [
            (word, place)
            for place, words in enumerate(self.words)
            for word in words
            if not (len(self.names[place].split()) > 1 and _QUALIFIER & set(self.names[place].split()))
        ]
        owner: dict[str, tuple[int, int]] = {}
        shared: set[str] = set()
        for word, place in every:
            start = beginning(word)
            others = [other for other, whose in every if whose != place]
            if not any(other.startswith(start) and len(other) <= len(word) + 3 for other in others):
                owner[start] = (place, len(word) + 3)
                continue
            shared.add(start)
            if not any(other.startswith(word) or word.startswith(other) for other in others):
                owner[word] = (place, len(word) + 1)  # what tells it from the others is the whole word
        return owner, tuple(shared)


def _own_words(name: str) -> list[str]:
    found = dict.fromkeys(_WORD.findall(name[:LONGEST]))
    words = [word for word in found if len(word) > 2 or (word.isalpha() and len(name) <= 4)]
    return [word for word in words if not look_up(word).generic] or words


def _initials(raw: str, names: Sequence[str]) -> Mapping[str, int]:
    """Capitals in a text that abbreviate one option: its letters in order, the first at the beginning of a word."""
    found: dict[str, int] = {}
    for capitals in set(_INITIALS.findall(raw)):
        letters = normal(capitals[:-1] if capitals[-1] == "s" else capitals)
        if not 2 <= len(letters) <= 6 or letters in _PLAIN:
            continue
        pattern = re.compile(r"(?<![^\W_])" + ".*?".join(map(re.escape, letters)))
        inside = [place for place, name in enumerate(names) if pattern.search(name)]
        full = [place for place in inside if _first_letters(names[place]).startswith(letters)]
        chosen = full if len(full) == 1 else inside
        if len(chosen) == 1:
            found[letters] = chosen[0]
    return found


def _first_letters(name: str) -> str:
    return "".join(word[0] for word in _LETTERS.findall(name) if word not in _SMALL)
