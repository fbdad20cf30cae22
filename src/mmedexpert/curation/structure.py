"""Step 4: what cannot be asked, or answers itself. Records whose texts, options, answer or images are no question.

Complaints about published sets (duplicate options in 713 questions of MedMCQA, answers under one letter) are its list.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

from mmedexpert.curation.near import INLINE, pictures_of, plain, stem
from mmedexpert.curation.steps import Records, Verdict, checked
from mmedexpert.data.record import Record
from mmedexpert.data.table import alike

EMPTY, FEW, NO_GOLD = "empty text", "fewer than two options", "answer is none of the options"
TWINS, NAMED = "two options say the same", "question names its answer"
UNREADABLE, BLANK = "unreadable image", "blank image"
BLANK_STD = 2.0  # ours, of 0..255: the flattest of 2,378 real images has 8.4; the noise of a flat JPEG is below 1
WHOLE = 32  # ours: words of a question that is read whole for its answer; a longer case may tell of it before it asks
LETTERS = 3  # ours: an option of fewer letters ("B", "T2") stands in many a question by chance
YES_NO = frozenset("yes no true false present absent normal abnormal".split())
HYPHEN = re.compile(r"(?<=[^\W\d_])[-\u2010-\u2015](?=[^\W\d_])")
# options that speak of the others keep their place; where letters are named, all do (a question names figures so)
REFERS = re.compile(
    r"(?:all|none|neither|both|any|either|no|two|more than one)\b.*\b(?:above|below|these|those|following|options"
    r"|choices|answers|correct|mentioned|listed)\b.*|all|none|neither|both",
    re.IGNORECASE | re.DOTALL,
)
NAMED_LETTER = re.compile(r"\b(?:[Oo]ptions?|[Cc]hoices?|[Aa]nswers?)\s+\(?[A-J]\b")
NAMED_LETTERS = re.compile(r"\b[A-J]\s*(?:and|or|&|,|/|\+)\s*[A-J]\b")
NUMBER = re.compile(r"[-\u2212]?\d+(?:\.\d+)?")
HOW_FREQUENT = re.compile(r"\b(?:prevalence|probability|incidence|frequency|likelihood|risk) of .*?(?=\d)")  # ours


def structure(records: Records, *, blank: float = BLANK_STD, shuffle_options: bool = False) -> Iterator[Verdict]:
    """Drop records that are no question; with `shuffle_options` the others' options are put in an order of their own.

    `blank`: standard deviation of an image's grey values (of 255) below which it shows nothing.
    """
    for record in records:
        reason, detail = _fault(record, blank)
        yield Verdict(shuffled(record) if shuffle_options and not reason else record, reason, detail)


def shuffled(record: Record) -> Record:
    """The record with its options ordered by a hash of its id and their texts, so that no letter is right more often.

    Labels that options carry themselves ("A: ...") go, as they would stay with their texts and name another letter.
    Options that speak of the others ("none of the above") keep their place, and so do all where they are numbers in
    order, where letters are named, or where there is a trace, which may name them. Done twice, it changes nothing.
    """
    options = unlabelled(record.options or {})
    if not options or record.trace or not _free(record.question, list(options.values())):
        return record
    places = [letter for letter, text in options.items() if not REFERS.fullmatch(text.strip(" .;:"))]
    digest = {x: hashlib.sha256(f"{record.id}\n{options[x]}".encode(errors="replace")).digest() for x in places}
    came_from = dict(zip(places, sorted(places, key=lambda letter: (digest[letter], letter)), strict=True))
    texts = {letter: options[came_from.get(letter, letter)] for letter in options}
    answer = next(letter for letter in options if came_from.get(letter, letter) == record.answer)
    order = "".join(came_from.get(letter, letter) for letter in options)
    return checked(replace(record, options=texts, answer=answer), "structure", order=order)


def unlabelled(options: dict[str, str]) -> dict[str, str]:
    """The options without labels of their own ("A: ..."), where all carry one."""
    found = {letter: re.match(rf"\s*\(?{re.escape(letter)}[.):]\s*", text) for letter, text in options.items()}
    labels = {letter: match.end() for letter, match in found.items() if match}
    return {letter: options[letter][end:] for letter, end in labels.items()} if len(labels) == len(options) else options


def report(before: Iterable[Record], after: Iterable[Record], *, blank: float = BLANK_STD) -> list[dict[str, Any]]:
    """Rows for the data set's card: the threshold, and how often each letter is right, by number of options."""
    rows: list[dict[str, Any]] = [{"what": "blank image: standard deviation of grey below, of 255", "value": blank}]
    for when, records in (("before", before), ("after", after)):
        right: dict[int, Counter[str]] = defaultdict(Counter)
        for record in records:
            if record.options and record.answer in record.options:
                right[len(record.options)][record.answer] += 1
        for options, counts in sorted(right.items()):
            shares = {letter: round(counts[letter] / counts.total(), 3) for letter in sorted(counts)}
            rows.append({"letters": when, "options": options, "records": counts.total(), "right": shares})
    return rows


def _fault(record: Record, blank: float) -> tuple[str, str]:
    """Reason and detail of what is wrong with a record, both "" where nothing is."""
    options = record.options
    texts = {"question": record.question, "answer": record.answer, **(options or {})}
    if empty := [name for name, text in texts.items() if not text.strip()]:
        return EMPTY, ", ".join(empty)
    if options is not None:
        if len(options) < 2:
            return FEW, ""
        if record.answer not in options:
            return NO_GOLD, record.answer[:80]
        folded = {letter: _folded(text) for letter, text in options.items()}
        if twins := [f"{a} and {b}" for a, b in combinations(options, 2) if alike(folded[a], folded[b])]:
            return TWINS, ", ".join(twins)
        if names_answer(record):
            return NAMED, options[record.answer][:80]
    elif re.fullmatch(r"\s*[A-Z]\s*", record.answer):
        return NO_GOLD, f"{record.answer.strip()}, and there are no options"
    for name, picture in zip(record.images, pictures_of(record), strict=True):
        if picture is None:
            return UNREADABLE, name
        if picture.grey_std < blank:
            return BLANK, f"{name}: standard deviation {picture.grey_std:g}"
    return "", ""


def names_answer(record: Record) -> bool:
    """Whether the gold option stands in the question and no other does; of a long one its last sentence is read. # ours

    In a case history the cause is a clue among others; "a pneumonia is seen; what is it?" is none. How frequent
    something is ("prevalence of glaucoma 10%") does not say that it is there.
    """
    options = {letter: plain(text) for letter, text in (record.options or {}).items()}
    gold = options[record.answer]
    if sum(char.isalpha() for char in gold) < LETTERS or set(options.values()) <= YES_NO:
        return False
    asked = stem(record)
    if asked.count(" ") + 1 > WHOLE:
        before = INLINE.split(record.question, maxsplit=1)[0].strip()
        asked = plain(re.split(r"(?<=[.!?])\s+|\n", before)[-1])
    asked = HOW_FREQUENT.sub(" ", f" {asked} ")
    return [letter for letter, text in options.items() if text and f" {text} " in asked] == [record.answer]


def _folded(text: str) -> str:
    """An option without what tells no two apart: outer punctuation and hyphens; a sign or a decimal point does."""
    return HYPHEN.sub(" ", " ".join(text.split()).strip(" .,;:!?\"'\u2018\u2019\u201c\u201d`*_")) or text


def _free(question: str, options: list[str]) -> bool:
    """Whether the order of options is of no meaning."""
    if INLINE.search(question) or any(map(NAMED_LETTER.search, (question, *options))):
        return False
    if any(map(NAMED_LETTERS.search, options)):
        return False
    found = [NUMBER.search(re.sub(r"(?<=\d),(?=\d{3})", "", text)) for text in options]
    values = [float(number[0].replace("\u2212", "-")) for number in found if number]
    in_order = {True} in ({a < b for a, b in pairwise(values)}, {a > b for a, b in pairwise(values)})
    return len(values) < len(options) or not in_order
