"""Which records need their image: a model that is not shown it is asked all the same.

As MMMU-Pro (arXiv 2409.02813) and MMStar (arXiv 2403.20330) leave out what text-only models solve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmedexpert.curation.replies import BATCH, UNJUDGED, Question, asked, passed, refusals, rows_of, unjudged
from mmedexpert.curation.steps import Verdict, checked
from mmedexpert.curation.structure import unlabelled
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Engine
from mmedexpert.models.encode import prompt_text

NAME = "needs_image"
WITHOUT_IMAGE = "solved without its image"
FROM_OPTIONS = "solved from its options alone"
QUESTION_ONLY, OPTIONS_ONLY = "question_only", "options_only"
# A model that says it sees no image has not shown that it needs one.  # peers: MMMU-Pro, in words of our own
GUESS = "No image is shown. Answer all the same, with what is most likely."
WHICH = "Which of these options is the right answer?"  # ours: stands for the question where options are shown alone

# Options that name others by their letters ("A and C") are right in one order only.
_LETTERS = re.compile(r"\b[A-J]\b\W{0,3}(?:and|or|,|&)\W{0,3}\b[A-J]\b")


def needs_image(
    records: Iterable[Record],
    engine: Engine,
    kept: Path,
    *,
    tries: int = 4,  # ours
    mode: str = "drop",
    instruction: str = GUESS,
    batch: int = BATCH,
) -> Iterator[Verdict]:
    """Drop (mode flag: only mark) what a model solves in all tries without its image, or from its options alone.

    Each try is another sample, with options in another order (`reordered`), so that a habit of one letter is not taken
    for knowledge. Luck: among n options a model that guesses anew at each try solves k of k with probability n^-k, 0.4%
    for four options and four tries, and is asked both ways (`chance`). Open questions are right by an exact match after
    normalisation, and have no options to show alone. Records without an image, or of modality text, are only marked.
    What is refused is not solved; the mark then has `refused`. Replies are kept in the file `kept` (`replies.asked`).
    """
    if mode not in ("drop", "flag"):
        raise ValueError(f"mode is 'drop' or 'flag', not {mode!r}")
    drop = mode == "drop"
    ask = partial(_questions, tries=tries, instruction=instruction)
    for record, row in asked(records, ask, engine, kept, batch=batch):
        if _is_text(record):
            yield Verdict(checked(record, NAME, text_only=True))
            continue
        if fault := unjudged(record):
            yield Verdict(record, UNJUDGED, fault) if drop else Verdict(checked(record, NAME, unjudged=fault))
            continue
        found: dict[str, Any] = {QUESTION_ONLY: passed(row, QUESTION_ONLY)}
        if record.options:
            found[OPTIONS_ONLY] = passed(row, OPTIONS_ONLY)
        reason = _solved(found, tries)
        detail = f"{', '.join(f'{kind} {right}' for kind, right in found.items())} of {tries}" if reason else ""
        if refused := len(refusals(row)):
            found["refused"] = refused
        marked = checked(record, NAME, **found, of=tries, **({"solved": reason} if reason else {}))
        yield Verdict(marked, reason, detail) if drop else Verdict(marked)


def reordered(record: Record, number: int) -> Record:
    """The record with its options in order `number`: 0 as it is, then turned by one place at a time, then backwards.

    So the right one stands under another letter in each of the first n tries. Options that name others by their letters
    stay in place.  # ours
    """
    options = unlabelled(record.options or {})
    if not options or any(_LETTERS.search(text) for text in options.values()):
        return record
    letters, size = list(options), len(options)
    order = letters[::-1] if number // size % 2 else letters
    order = order[number % size :] + order[: number % size]
    texts = {letter: options[was] for letter, was in zip(letters, order, strict=True)}
    return replace(record, options=texts, answer=letters[order.index(record.answer)])


def chance(record: Record, tries: int) -> float:
    """The probability that a model which only guesses solves the record in all tries of either way of asking."""
    if _is_text(record) or unjudged(record):
        return 0.0
    if record.options:
        return 1 - (1 - len(record.options) ** -tries) ** 2
    yes_no = record.asked_as != "open" and record.answer.strip().casefold() in ("yes", "no")
    return 2.0**-tries if yes_no else 0.0


def report(records: Iterable[Record], kept: Path, tries: int) -> dict[str, float]:
    """The step's row for the funnel, of the records it was given: how many were asked about, were solved, were refused.

    `lost_by_luck` is how many a model that only guesses would be expected to solve: the most that luck explains.
    """
    counts: dict[str, float] = dict.fromkeys(
        ("asked", "text_only", QUESTION_ONLY, OPTIONS_ONLY, "both", "refused", "lost_by_luck"), 0
    )
    for record, row in zip(records, rows_of(kept), strict=True):
        question, options = (passed(row, kind) == tries for kind in (QUESTION_ONLY, OPTIONS_ONLY))
        counts["asked"] += bool(row["replies"])
        counts["text_only"] += _is_text(record)
        counts[QUESTION_ONLY] += question
        counts[OPTIONS_ONLY] += options
        counts["both"] += question and options
        counts["refused"] += bool(refusals(row))
        counts["lost_by_luck"] += chance(record, tries)
    return counts


def _questions(record: Record, tries: int, instruction: str) -> list[Question]:
    if _is_text(record) or unjudged(record):
        return []
    found = []
    for sample in range(tries):
        shown = reordered(record, sample)
        found.append(Question(QUESTION_ONLY, shown, Ask(record.id, prompt_text(shown, instruction), (), sample)))
        if record.options:
            alone = prompt_text(replace(shown, question=WHICH), instruction)
            found.append(Question(OPTIONS_ONLY, shown, Ask(record.id, alone, (), sample)))
    return found


def _solved(found: dict[str, Any], tries: int) -> str:
    if found[QUESTION_ONLY] == tries:
        return WITHOUT_IMAGE
    return FROM_OPTIONS if found.get(OPTIONS_ONLY) == tries else ""


def _is_text(record: Record) -> bool:
    return record.modality == "text" or not record.images
