"""Checks on a candidate trace that need no engine: does it agree with itself, does its perspective's rubric hold; and
what is left of it without its conclusion, for the verifier (`verifier.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from mmedexpert.curation.candidates import Candidate, is_right, picked, sentences_of, tidied
from mmedexpert.data.record import Record, Trace
from mmedexpert.guidelines.reading import read
from mmedexpert.guidelines.rubrics import grades
from mmedexpert.guidelines.truth import truth_of
from mmedexpert.models.encode import target_text

# ours, measured on 216 labelled rationales: 90% of those of one perspective pass their own rubric, 6% another one's,
# 2% of those without reasoning pass any; at 0.5 they are 93, 11 and 3%. What is lost costs a candidate, of several.
MIN_ADHERENCE = 0.7
BLANK = "[...]"  # stands for the answer in a conclusion that cannot be taken away whole
CONTRADICTIONS = ("answer excluded", "another option argued for", "answer grows unlikely")  # faults of the rubrics

DRIFTS = "its form drifts"
WRONG = "no candidate is right"
DISAGREES = "its steps contradict its answer"
MANNER = "its perspective's rubric does not hold"


@dataclass(frozen=True)
class Held:
    """What the rules say of a candidate: why it fails, or nothing; `candidate` tidied, `right` and its `adherence`."""

    candidate: Candidate
    reason: str = ""
    detail: str = ""
    right: bool = False
    adherence: float | None = None


def by_rules(
    record: Record, perspective: str, candidate: Candidate, *, min_adherence: float, manner: bool = True
) -> Held:
    """The candidate tidied and checked, in the order of the funnel; without `manner` for form and answer alone."""
    candidate, drifts = tidied(candidate)
    right = is_right(candidate.answer, record)
    if drifts:
        return Held(candidate, DRIFTS, drifts, right)
    if not right:
        return Held(candidate, WRONG, f"its answer is {candidate.answer}")
    if not manner:
        return Held(candidate, right=True)
    completion = target_text(told_as(record, perspective, candidate))  # as a model is trained to write it
    found = grades(completion, record.options, truth_of(record))
    if told := disagreement(record, candidate, found.faults):
        return Held(candidate, DISAGREES, told, True)
    score = found.scores[perspective]
    if score < min_adherence:
        return Held(candidate, MANNER, ", ".join(found.faults) or f"{perspective} {score:.2f}", True, score)
    return Held(candidate, right=True, adherence=score)


def told_as(record: Record, perspective: str, candidate: Candidate) -> Record:
    """The record with the candidate as its trace."""
    answer = None if candidate.answer == record.answer else candidate.answer
    return replace(record, trace=Trace(perspective, candidate.steps, answer if record.options else None))


def disagreement(record: Record, candidate: Candidate, faults: Sequence[str]) -> str:
    """What in the steps contradicts the answer, or nothing: another is concluded last, or argued for (`faults`)."""
    concluded = picked(candidate.steps[-1], record)
    if concluded not in (None, candidate.answer):
        return f"its last step concludes {concluded}, its answer is {candidate.answer}"
    return next((fault for fault in faults if fault in CONTRADICTIONS), "")


def without_conclusion(record: Record, steps: tuple[str, ...]) -> str:
    """The reasoning without what gives its answer away: sentences that claim an option ("So the answer is C") wherever
    they stand; then, if one of the last two steps names the gold answer, that step and what follows it.

    Where nothing would stay ("A flat face and a single palmar crease suggest Down syndrome"), the gold answer is
    blanked out instead.
    """
    told = [" ".join(part for part in sentences_of(step) if picked(part, record) is None) for step in steps]
    left = [step for step in told if step]
    naming = [place for place in range(len(left))[-2:] if _names_gold(record, left[place])]
    kept = left[: naming[-1]] if naming else left
    return " ".join(kept) or _blanked(record, " ".join(left or steps))


def _names_gold(record: Record, sentence: str) -> bool:
    """Whether a sentence names the gold answer: its text, a word of its own, or its letter (`guidelines.reading`)."""
    options = record.options or {"A": record.answer}
    gold = list(options).index(record.answer) if record.options else 0
    named = any(gold in part.options for part in read(sentence, options).sentences)
    return named or (record.options is not None and _letter(record.answer).search(sentence) is not None)


def _blanked(record: Record, sentence: str) -> str:
    gold = (record.options or {}).get(record.answer, record.answer)
    text = re.sub(rf"(?<!\w){re.escape(gold)}(?!\w)", BLANK, sentence, flags=re.IGNORECASE)
    return _letter(record.answer).sub(BLANK, text) if record.options else text


@cache
def _letter(letter: str) -> re.Pattern[str]:
    """A letter where it stands for an option: "option C", "(C)", "is C.", and not "vitamin C deficiency"."""
    name = re.escape(letter)
    return re.compile(
        rf"(?:\b(?:options?|answers?|choices?)\W{{1,3}}(?:is\W{{1,3}})?|\(){name}(?!\w)|(?<!\w){name}\W*$"
    )
