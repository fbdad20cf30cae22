"""What a teacher replies: a line of reasoning in steps and an answer, read strictly, and freed of what is only form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.engines.objects import MAX_REPLY, json_objects, visible
from mmedexpert.scoring import score_choice
from mmedexpert.scoring.robust import judge, read_text, read_yes_no

MAX_STEPS = 40  # ours: a longer list is a loop
_TAGGED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[\"'(\[]?[^\W_])|\n+")
_ABBREVIATED = re.compile(r"(?:\b(?:vs|e\.g|i\.e|approx|Dr|Fig|No|cf|ca)|\b[A-Z])\.$")

# What only numbers or marks a step, and is taken off it.
_LABEL = re.compile(
    r"^\s*(?:[-*\u2022\u2013#>]+\s+|(?:\*\*|__)?(?:step\s*)?\(?\d{1,2}(?:[.):](?!\d)|\s+[-\u2013])\s*"
    r"|(?:\*\*)?step\s+\d{1,2}(?:\*\*)?\s+)+",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"\*\*|__|`+|^#+\s*")
_HEADER_WORDS = 6  # ours: "Differential diagnosis:" is a header, a sentence is none
# What shows that the teacher spoke to itself or about its task; such a candidate is refused.
RESIDUE = {
    "tags inside its steps": re.compile(r"</?[a-z][a-z_]*\s*/?>|```|<\|\w+\|>|\[/?INST\]", re.IGNORECASE),
    "it corrects itself": re.compile(
        r"(?:^|(?<=[.!?;:\n\u2014] ))(?:oh[, ]+|but |and |hmm[,.] )?(?:wait\b(?![- ]and)"
        r"|hmm+\b|hold on\b|oops\b|scratch that|on second thoughts?|hang on\b"
        r"|no, that(?:'s| is) (?:not|wrong)|let me (?:re-?\w+|double|check|correct|start"
        r" over|look (?:at (?:it|this|that|the \w+) )?again)|actually, (?:let|no\b|wait|I\b)"
        r"|I (?:made a mistake|was wrong|misread|need to re-?\w+))",
        re.IGNORECASE,
    ),
    "it speaks of its task": re.compile(
        r"\bthe (?:prompt(?=[.,;:]| (?:says|asks|states|mentions|gives|wants)\b)|given answer"
        r"|provided answer|reference answer|gold answer|correct option given|answer key"
        r"|JSON|(?:given|provided|retrieved) (?:guideline )?statements?|instructions? (?:say|ask|require))\b"
        r"|\bas an AI\b|\b(?:user|system) (?:asks|wants|prompt)\b|\bI (?:am|was) (?:asked|told|instructed)\b",
        re.IGNORECASE,
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A teacher's reasoning and its answer: the letter of an option, or text as it stands in the reply."""

    steps: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        """The steps as one text."""
        return " ".join(self.steps)


def candidate_of(reply: str, record: Record) -> Candidate | None:
    """The candidate in a reply: one JSON object {"steps": [...], "answer": ...} after any thought, bare, in a code
    fence or between words; or `<think>...</think><answer>...</answer>`. None where there is none, or two that differ.

    An answer that names no option, or says neither yes nor no where that is asked, is none.
    """
    text = reply[-MAX_REPLY:]
    found = [one for value in json_objects(visible(text)) if (one := _of_json(value, record))]
    if not found and (tagged := _TAGGED.fullmatch(text)):
        lines = [line.strip() for line in tagged[1].split("\n") if line.strip()]
        steps = lines if len(lines) > 1 else sentences_of(tagged[1])
        answer = answer_of(tagged[2], record)
        found = [Candidate(tuple(map(sendable, steps)), answer)] if steps and answer else []
    return found[0] if found and all(one == found[0] for one in found) else None


def _of_json(value: Any, record: Record) -> Candidate | None:
    steps, answer = value.get("steps"), value.get("answer")
    if not (isinstance(steps, list) and steps and all(isinstance(step, str) for step in steps)):
        return None
    read = answer_of(answer, record) if isinstance(answer, str) else None
    return Candidate(tuple(map(sendable, steps)), read) if read else None


def sendable(text: str) -> str:
    """A text that can be written and sent: half a surrogate pair, which JSON may hold, becomes a question mark."""
    return text.encode(errors="replace").decode()


def answer_of(text: str, record: Record) -> str | None:
    """The answer that a text gives to the record's question: a letter, yes or no, or text; None for none.

    "C", "(c)", "C. Tuberculosis" and "tuberculosis" all name option C (`scoring.score_choice`, robust).
    """
    text = sendable(text.strip())
    if record.options is None:
        if record.asked_as == "yes_no":
            return read_yes_no(text, record.language)
        return text if text and read_text(text, record.language) else None
    if text in record.options:
        return text
    if list(record.options) != list(ascii_uppercase[: len(record.options)]):
        return None
    return picked(text, record)


def picked(text: str, record: Record) -> str | None:
    """The letter of the option that a text commits to; None for none, and for letters that are not A, B, C in order."""
    options = record.options or {}
    if not options or list(options) != list(ascii_uppercase[: len(options)]):
        return None
    return score_choice(text, [f"{letter}. {option}" for letter, option in options.items()], "A", "robust").picked


def is_right(answer: str, record: Record) -> bool:
    """Whether an answer that `answer_of` read is the gold answer; open ones after normalisation (`scoring.robust`)."""
    if record.options is not None:
        return answer == record.answer
    try:
        return judge(record, answer).correct
    except ValueError:  # a yes/no question whose gold answer is neither
        return False


def tidied(candidate: Candidate) -> tuple[Candidate, str]:
    """The candidate without numbers, bullets, emphasis and headers of its steps, and what is wrong with it still.

    Form that drifts between samples is what users of such sets complain of (R1-Onevision, issue 5): what is only form
    is taken off; a candidate that corrects itself, speaks of its task or holds tags is refused. # ours
    """
    steps = []
    for step in candidate.steps:
        bare = " ".join(_EMPHASIS.sub("", _LABEL.sub("", step.strip())).split())
        header = step.lstrip().startswith("#") or (
            len(bare.split()) <= _HEADER_WORDS and bare.endswith(":") and not bare.endswith(".:")
        )
        if bare and not header:
            steps.append(bare)
    tidy = Candidate(tuple(steps), candidate.answer)
    if not steps:
        return tidy, "its steps are headers alone"
    if len(steps) > MAX_STEPS:
        return tidy, "too many steps"
    return tidy, next((name for name, mark in RESIDUE.items() if any(map(mark.search, candidate.steps))), "")


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, whole; abbreviations and numbers end none."""
    found: list[str] = []
    for part in _SENTENCE.split(text):
        if found and _ABBREVIATED.search(found[-1]):
            found[-1] = f"{found[-1]} {part}"
        elif part.strip():
            found.append(part.strip())
    return found
