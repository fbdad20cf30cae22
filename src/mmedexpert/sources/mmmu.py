"""MMMU, Health & Medicine: the validation questions of five subjects, with MedEvalKit's prompt and the MMMU parser."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.scoring.choice import answer_tags, boxed_content
from mmedexpert.scoring.judged import Judged
from mmedexpert.sources.parquet import (
    find_parquet,
    groups_of,
    question_and_answer,
    read_parquet,
    store_image,
    text_of,
)

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
COLUMNS = ("id", "question", "options", "answer", "image_1", "question_type")
LETTERS = "ABCDEFGHIJ"
SEED = 42  # MedEvalKit's
NONE = "None"  # what MedEvalKit's extractor returns where nothing is boxed


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir/images`) and bad rows of `<subject>/validation-*.parquet`, five subjects.

    Source: Yue et al. 2023 (arXiv 2311.16502), as published in MMMU/MMMU (validation: 30 questions per subject). As in
    MedEvalKit each question is shown with `image_1` only, and `<image 1>` stays in its text. The records' split is
    test: this is what is evaluated.
    Raises UserError for a subject without files, and for truncated or unknown ones.
    """
    paths = {subject: find_parquet(root / subject, "validation") for subject in SUBJECTS}
    if missing := [subject for subject, found in paths.items() if not found]:
        fix = "give the folder of MMMU/MMMU"
        raise UserError(f"{root} holds no validation-*.parquet in {', '.join(missing)}: {fix}")
    images = out_dir / "images"
    records: list[Record] = []
    bad: Bad = []
    for subject, found in paths.items():
        for path in found:
            for number, row in enumerate(read_parquet(path, COLUMNS, ("topic_difficulty", "subfield"))):
                try:
                    records.append(_record(row, subject, images, path.name))
                except ValueError as error:
                    name = text_of(row["id"]).strip() or f"{subject} row {number}"
                    bad.append((f"mmmu-{name}", f"{subject}/{path.name}: {error}"))
    return records, images, bad


def ask(record: Record) -> str:
    """MedEvalKit's prompt for MMMU (its own template, with the blanks of the source's indentation)."""
    if record.options is None:
        return f"\n{record.question}\n\n        Answer the question using a single word or phrase."
    options = "".join(f"({letter}) {text}\n" for letter, text in record.options.items())
    instruction = "Answer with the option's letter from the given choices directly."
    return f"\n{record.question}\n\n{options}\n\n        {instruction}"


def judge(record: Record, response: str) -> Judged:
    """MedEvalKit's verdict for MMMU: the answer tag, the box, then the parser of Yue et al. 2023.

    Where that finds no option it takes a random one. The original draws from one stream per data set (seed 42), so that
    a draw depends on all responses before it; ours is seeded by 42 and the record's id, so that a verdict depends on
    nothing but its question (killed runs, batches, re-scoring). Expected accuracy is the same, single draws differ;
    `parsed` is False for them. An open question is never right in the original: it compares with the single characters
    of the response.
    """
    if record.options is None:
        return Judged(correct=False, picked=response.strip() or None, parsed=bool(response.strip()))
    picked = _pick(response, record.options)
    drawn = picked or random.Random(f"{SEED}:{record.id}").choice(list(record.options))  # ours: seeded per question
    return Judged(correct=drawn == record.answer, picked=picked, parsed=picked is not None)


def _pick(response: str, options: Mapping[str, str]) -> str | None:
    """The option named last: as "(A)", else as " A ", else (more than five words) by its text."""
    text = answer_tags(response)
    if (boxed := boxed_content(text)) != NONE:
        text = boxed
    if "<answer>" in text:  # the parser looks for both again, now reading a box that is never closed as "None"
        text = answer_tags(text)
    elif "\\boxed" in text:
        text = boxed_content(text)
    text = text.strip()
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        found = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(found.values()) >= 0:
            return max(found, key=found.__getitem__)
    if len(text.split()) > 5:
        found = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if max(found.values()) >= 0:
            return max(found, key=found.__getitem__)
    return None


def _record(row: dict[str, Any], subject: str, images: Path, file: str) -> Record:
    question, answer = question_and_answer(row)
    name, question_type = text_of(row["id"]).strip(), text_of(row["question_type"]).strip()
    if not name:
        raise ValueError("it has no id")
    if question_type not in ("multiple-choice", "open"):
        raise ValueError(f"question_type {question_type!r} is neither multiple-choice nor open")
    options = None
    if question_type == "multiple-choice":
        options = _options(row["options"])
        answer = answer.strip()
        if answer not in options:
            raise ValueError(f"answer {answer!r} is none of the options {', '.join(options)}")
    image = store_image(row["image_1"], images)
    return Record(
        id=f"mmmu-{name}",
        images=(image,),
        question=question,
        options=options,
        answer=answer,
        specialties=("all",),
        source=f"MMMU {subject}/{file}",
        license="Apache-2.0",
        split="test",
        image_group=image,
        kind="choice" if options else "open",
        groups={"subject": subject, **groups_of(row, ("question_type", "topic_difficulty", "subfield"))},
    )


def _options(cell: Any) -> dict[str, str]:
    """Options by letter from the text of a Python list."""
    try:
        values = ast.literal_eval(text_of(cell))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"the options {text_of(cell)[:80]!r} are no list") from error
    if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
        raise ValueError(f"the options {text_of(cell)[:80]!r} are no list of 2 to {len(LETTERS)}")
    options = dict(zip(LETTERS, map(text_of, values), strict=False))
    if not all(text.strip() for text in options.values()):
        raise ValueError(f"an option is empty in {text_of(cell)[:80]!r}")
    return options
