"""A completion read for the rubrics: sentences of words with their cues, options, findings and numbers.  # ours

One pass over the words, each looked up once: time is linear in the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from mmedexpert.guidelines.cues import Phrases, look_up, matches, normal
from mmedexpert.guidelines.naming import Naming
from mmedexpert.guidelines.numbers import UNITS, Number, chances, comparisons
from mmedexpert.scoring import score_choice

_TOKEN = re.compile(
    r"[^\W\d_][^\W_]*(?:['-][^\W_]+)*\+?|(?<![^\W_])\d{1,6}(?:,\d{3})*(?:\.\d+)?|->|=>|[→⇒↑↓<>≤≥=%/~≈,:(\[)\]-]"
)
_END = re.compile(r"[!?;\n]+|\.(?!\d)")
_HEADING = re.compile(r"(?m)^[^\w\n]*(?:\d{1,2}[^\w\n]+)?([^\W\d_][\w' -]{2,40}?)[^\S\n]*(?::| - | → )")
_LISTED = re.compile(
    r"\b(?:candidates?|differential(?: diagnos[ei]s)?)\b[^.;:\n]{0,40}?(?:\b(?:is|are|includes?)\b|:)+ ?"
    r"([^.;\n]{1,300})"
)
_SEPARATOR = re.compile(r", (?:and |or |a |an )?| and | or | versus | vs ")
_OPEN_NAMES = 12  # ours: so many candidates of an open question are followed through its text


@dataclass(slots=True)
class Sentence:
    """A sentence: `cues` how often, `marks` what it holds, `options` to their first place, `findings` and `clinical`
    beginnings of words, `chances` in [0, 1],
    `compared` pairs of numbers and whether what is said of them is true."""

    tokens: list[str]
    words: int = 0
    cues: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)  # a cue's first place
    options: dict[int, int] = field(default_factory=dict)
    findings: set[str] = field(default_factory=set)
    clinical: set[str] = field(default_factory=set)
    numbers: list[Number] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    told: int = 0  # chances in words: one in ten, half
    compared: list[tuple[float, float, bool]] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)
    masked: str = ""  # its words with options and numbers alike: what repetition is counted in
    build: str = ""  # and with findings alike, too

    def measured(self) -> int:
        """Measurements: numbers that are neither a chance nor a finding's strength, beside the name of something."""
        if not self.numbers or not (
            self.findings or self.clinical or self.options or any(number.unit for number in self.numbers)
        ):
            return 0
        return sum(not (number.chance or number.strength) for number in self.numbers)

    def count(self, cue: str, place: int) -> None:
        """A cue at a place."""
        if cue in self.cues:
            self.cues[cue] += 1
            self.first[cue] = min(place, self.first[cue])
        else:
            self.cues[cue], self.first[cue] = 1, place


@dataclass(slots=True)
class Thought:
    """A thought, read. `answered` is the option of its answer (0 for an open question's), `text` as `normal` has it."""

    raw: str
    text: str
    sentences: list[Sentence]
    words: list[str]
    generic: int  # words that fit any case
    answered: int | None
    naming: Naming
    open: bool
    findings: frozenset[str] = field(init=False)  # of all sentences
    clinical: frozenset[str] = field(init=False)
    measured: int = field(init=False)
    cues: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.cues = Counter()
        for sentence in self.sentences:
            for name, count in sentence.cues.items():
                self.cues[name] += count
        self.findings = frozenset().union(*(sentence.findings for sentence in self.sentences))
        self.clinical = frozenset().union(*(sentence.clinical for sentence in self.sentences))
        self.measured = sum(sentence.measured() for sentence in self.sentences)

    def cue(self, *names: str) -> int:
        """How often these cues occur."""
        return sum(self.cues[name] for name in names)


def thought_of(completion: str) -> str:
    """What stands in the think tags; without them, what stands before the answer."""
    return completion.partition("</think>")[0].rpartition("<think>")[2].partition("<answer>")[0]


def read(completion: str, options: Mapping[str, str] | None) -> Thought:
    """Normalise, find the options, cut into sentences, look every word up."""
    raw = thought_of(completion)
    text = normal(raw)
    letters: list[str] = []
    if options:
        letters = [normal(letter) for letter in options]
        names = [normal(option) for option in options.values()]
        answered = _answered(completion, options)
    else:
        names, answered = _candidates(completion, text)
    naming = Naming(names, raw)
    sentences, words, generic = _sentences(naming.mark(text), naming, letters, closed=bool(options))
    chancy = any("chance" in sentence.cues or "prior" in sentence.cues for sentence in sentences)
    for sentence in sentences:
        sentence.chances, sentence.told = chances(sentence.tokens, sentence.numbers, sentence.options, chancy)
        sentence.compared = comparisons(sentence.tokens, sentence.numbers)
        _mark(sentence, answered)
    return Thought(raw, text, sentences, words, generic, answered, naming, not options)


def _answered(completion: str, options: Mapping[str, str]) -> int | None:
    """The place of the option that is picked; None for none, and for letters that are not A, B, C ... in order."""
    if list(options) != [chr(ord("A") + place) for place in range(len(options))]:
        return None
    choices = [f"{letter}. {option}" for letter, option in options.items()]
    picked = score_choice(completion, choices, "A", "robust").picked
    return ord(picked) - ord("A") if picked is not None else None


def _candidates(completion: str, text: str) -> tuple[list[str], int | None]:
    """Of an open question: its answer, and the candidates that the thought lists or has as headings."""
    chosen = normal(completion.partition("<answer>")[2].partition("</answer>")[0][:200]).strip()
    match = _LISTED.search(text)
    listed = [name.strip() for name in _SEPARATOR.split(match[1])] if match else []
    headings = [name.strip() for name in _HEADING.findall(text)]
    own = [name for name in headings if any(not look_up(word).generic for word in re.findall(r"[^\W\d_]+", name))]
    names = [chosen, *(name for name in listed if 0 < len(name.split()) <= 6), *own]
    return list(dict.fromkeys(names))[:_OPEN_NAMES], 0 if chosen else None


class _Entry(NamedTuple):
    """All that a token means in a text; `told`: there is more to it than a finding, or a word."""

    word: bool
    number: bool
    told: bool
    generic: bool
    masked: str = ""
    build: str = ""
    finding: str = ""  # its beginning where it may be a finding
    clinical: str = ""
    option: int | None = None
    cues: tuple[str, ...] = ()
    phrases: Phrases | None = None


@lru_cache(maxsize=50_000)
def _entry(token: str) -> _Entry:
    """A token in a text whose options it does not name."""
    found = look_up(token)
    number, word = token[0].isdecimal(), token[0].isalpha()
    told = number or bool(found.cues or found.phrases)
    if not word:
        masked = "0" if number else ""
        return _Entry(word, number, told, False, masked, masked, cues=found.cues, phrases=found.phrases)
    finding = found.start if found.finding else ""
    clinical = found.start if found.clinical else ""
    build = "#" if finding else token
    return _Entry(word, number, told, found.generic, token, build, finding, clinical, None, found.cues, found.phrases)


def _sentences(text: str, naming: Naming, letters: list[str], *, closed: bool) -> tuple[list[Sentence], list[str], int]:
    """The sentences of a marked text, all its words, and how many of them fit any case."""
    shared = naming.shared or ("\0",)
    known: dict[str, _Entry] = {}

    def learn(token: str) -> _Entry:
        entry = _entry(token)
        close = entry.word and naming.concerns(token)
        option = naming.option(token) if close else None
        if option is not None or (close and token.startswith(shared)):
            named = option is not None if closed else option == 0  # an open question's candidates are its own words
            stands_for = token if option is None else "@"
            if named or token.startswith(shared):
                entry = entry._replace(finding="", clinical="")
            entry = entry._replace(
                told=entry.told or option is not None, option=option, masked=stands_for,
                build="#" if entry.finding else stands_for,
            )  # fmt: skip
        known[token] = entry
        return entry

    sentences: list[Sentence] = []
    words: list[str] = []
    generic = 0
    for part in _END.split(text):
        tokens: list[str] = _TOKEN.findall(part)
        if not tokens:
            continue
        entries = [known.get(token) or learn(token) for token in tokens]
        spoken = [token for token, entry in zip(tokens, entries, strict=True) if entry.word]
        sentence = Sentence(tokens, len(spoken))
        begun: list[tuple[int, Phrases]] = []  # places of words that phrases begin with
        for place, entry in enumerate(entries):
            if not entry.told:
                continue
            if entry.option is not None:
                sentence.options.setdefault(entry.option, place)
            if entry.number:
                sentence.numbers.append(Number(float(tokens[place].replace(",", "")), place))
            for cue in entry.cues:
                sentence.count(cue, place)
            if entry.phrases:
                begun.append((place, entry.phrases))
        if sentence.words or sentence.numbers:
            words += spoken
            generic += sum([entry.generic for entry in entries])
            sentence.findings = {entry.finding for entry in entries if entry.finding}
            sentence.clinical = {entry.clinical for entry in entries if entry.clinical}
            sentence.masked = " ".join([entry.masked for entry in entries if entry.masked])
            sentence.build = " ".join([entry.build for entry in entries if entry.build])
            _phrases(sentence, begun, letters)
            _units(sentence)
            sentences.append(sentence)
    return sentences, words, generic


def _phrases(sentence: Sentence, begun: list[tuple[int, Phrases]], letters: list[str]) -> None:
    """Cues of several words, and options by their letter ("option B")."""
    tokens, size = sentence.tokens, len(sentence.tokens)
    for place, phrases in begun:
        if place + 1 == size:
            continue
        for cue, rest in phrases.that_go_on(tokens[place + 1]):
            end = place + 2 + len(rest)
            if end <= size and all(map(matches, tokens[place + 2 : end], rest)):
                sentence.count(cue, place)
    for place, token in enumerate(tokens) if letters and ("option" in tokens or "choice" in tokens) else ():
        if token in ("option", "choice"):
            following = [word for word in tokens[place + 1 : place + 3] if word != "("][:1]
            if following and following[0] in letters:
                sentence.options.setdefault(letters.index(following[0]), place)


def _units(sentence: Sentence) -> None:
    for number in sentence.numbers:
        following = sentence.tokens[number.place + 1 : number.place + 2] or [""]
        number.percent = following[0] == "%"
        number.unit = following[0] if following[0] in UNITS or following[0] == "/" else ""


def _mark(sentence: Sentence, answered: int | None) -> None:
    """What a sentence holds, as the measures of `perspectives.yaml` ask for it."""
    marks = set(sentence.cues)
    if sentence.findings:
        marks.add("finding")
        if len(sentence.findings) >= 2:
            marks.add("findings")
    if sentence.options:
        marks.add("option")
        if answered in sentence.options:
            marks.add("answer")
    if "up" in marks or "down" in marks:
        marks.add("update")
    if sentence.chances or sentence.told:
        marks.add("p")
    if any(not number.chance for number in sentence.numbers):
        marks.add("measured")
    sentence.marks = marks
