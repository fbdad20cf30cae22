"""Judging by an unambiguous parser: harmless formatting changes nothing, and what commits to no answer is unparsed.

Here: yes or no, closed and open answers; the letter of a choice is read in `clauses`.

Ours; shares its reading of thoughts and answer tags, and of options, with the outcome reward (`clauses`). # ours
"""

from __future__ import annotations

import re
import unicodedata

from mmedexpert.data.record import Record
from mmedexpert.scoring import score_choice
from mmedexpert.scoring.clauses import BOX, answer_spans
from mmedexpert.scoring.judged import Judged
from mmedexpert.scoring.medevalkit import choice_texts
from mmedexpert.scoring.text import open_scores, tokens

_YES_NO = {
    "yes": "yes", "\u662f": "yes", "\u662f\u7684": "yes",
    "no": "no", "\u5426": "no", "\u4e0d\u662f": "no", "\u4e0d\u662f\u7684": "no",
}  # fmt: skip


def judge(record: Record, response: str) -> Judged:
    """The robust verdict of one response; unparsed counts as wrong.

    choice: `scoring.score_choice`. yes_no, and closed with such a gold answer: `read_yes_no`. Other closed and open
    questions: `read_text` must equal the gold answer after normalisation (`text.tokens`), with `text.open_scores`
    as scores. Raises ValueError for a yes/no question whose gold answer is neither.
    """
    if record.asked_as == "choice":
        texts = choice_texts(record, own_letters(record.options or {}))
        verdict = score_choice(response, texts, record.answer, "robust")
        return Judged(verdict.correct, verdict.picked, verdict.parsed)

    gold = _YES_NO.get(record.answer.strip().casefold())
    if gold is None and record.asked_as == "yes_no":
        raise ValueError(f"the gold answer of yes/no question {record.id} must be yes or no, got {record.answer!r}")
    if gold is not None and record.asked_as != "open":
        picked = read_yes_no(response, record.language)
        return Judged(picked == gold, picked, picked is not None)

    picked = read_text(response, record.language)
    scores = open_scores(picked or "", record.answer, record.language)
    return Judged(scores["exact_match"] == 1, picked, picked is not None, scores)


_LATEX = re.compile(r"\\[a-z]+")

# --- yes or no --------------------------------------------------------------------------------------------------------

# "No. 5" is a number; "yes it is" and "no there is none" hold two clauses.
_NUMBER_SIGN = re.compile(r"\bno\.(?=\s{0,2}\d)")
_CLAUSE = re.compile(
    r"[.,;:!?\n(){}\[\]|/\u2013\u2014\u3001\u3002]| -+ "
    r"|(?:(?<=\byes)|(?<=\bno)) (?=(?:it|there|this|that|these|the|they|he|she|i)\b)"
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# A clause is an answer only if it is yes or no after nothing but these words; so negations and reasons never are.
_BEFORE = "|".join(
    """a the final correct right best most likely answer response is it it's so therefore thus hence i my think believe
    would say be should must to this question clearly definitely certainly""".split()
)
_CLAIM = re.compile(rf"(?:(?:{_BEFORE}) )*(yes|no)(?: is (?:correct|right|(?:the|my) (?:(?:final|correct) )?answer))?")
# "no" before a noun belongs to that noun; "yes" never does.
_NAMED = re.compile(rf"\byes\b|\bno(?=$| (?:{_BEFORE}|or|and|but|then|vs|versus|yes)\b)")
_OR_ZH = re.compile("\u6216\u8005?|\u548c|\u4e0e|\u8fd8\u662f|\u4ee5\u53ca")
_CLAIM_ZH = re.compile(
    "(?:(?:\u6700\u7ec8)?(?:\u7b54\u6848|\u56de\u7b54)(?:\u5e94\u8be5)?[\u662f\u4e3a])?"
    "(\u662f\u7684?|\u5426|\u4e0d\u662f\u7684?)"
)


def own_letters(options: dict[str, str]) -> bool:
    """Whether an option carries its own `A:`, whatever the data set."""
    return any(text.lstrip().startswith(f"{letter}:") for letter, text in options.items())


def read_yes_no(response: str, language: str) -> str | None:
    """The answer "yes" or "no" that a response commits to, or None.

    It must stand in a clause of its own (`Yes, there is`; `the answer is: no`; not `no fracture`), and the other must
    stand nowhere but as part of a phrase (`Yes, no fracture is seen`). Chinese too where `language` is "zh". # ours
    """
    return _agreed([_yes_no(span, language) for span in _spans(response)])


def _yes_no(span: str, language: str) -> str | None:
    stated, named = set(), set()
    for clause in _CLAUSE.split(_LATEX.sub(" ", _NUMBER_SIGN.sub("number ", span))):
        words = _WORD.findall(clause)
        if claim := _CLAIM.fullmatch(" ".join(words)):
            stated.add(claim[1])
        named.update(_NAMED.findall(" ".join(words)))
        if language == "zh":
            pieces = _OR_ZH.split("".join(words))
            stated |= {_YES_NO[claim[1]] for piece in pieces if (claim := _CLAIM_ZH.fullmatch(piece))}
    return stated.pop() if stated and len(stated | named) == 1 else None


# --- closed and open --------------------------------------------------------------------------------------------------

_CUE = re.compile(r"\banswer[\s*_\"]*(?:is\b|:)|\u7b54\u6848[\s*]*[\u662f\u4e3a:]")


def read_text(response: str, language: str) -> str | None:
    """The normalised text that a response gives as its answer, or None where it gives none, or several that differ.

    What stands in a box; else the rest of the line after `answer is`, `answer:`; else all of it. # ours
    """
    return _agreed([_text(span, language) for span in _spans(response)])


def _text(span: str, language: str) -> str | None:
    candidates = BOX.findall(span) or [rest.lstrip(" :*_\n").partition("\n")[0] for rest in _CUE.split(span)[1:]]
    read = {" ".join(tokens(_LATEX.sub(" ", text), language)) for text in candidates or [span]}
    return read.pop() or None if len(read) == 1 else None


def _spans(response: str) -> list[str]:
    return answer_spans(unicodedata.normalize("NFKC", response).casefold())


def _agreed(read: list[str | None]) -> str | None:
    """What every answer tag says; those that disagree say nothing."""
    return read[0] if len(set(read)) == 1 else None
