"""GMAI-MMBench VAL (arXiv 2408.03361): about 4,549 questions of 2 to 5 options, asked and judged as by VLMEvalKit."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import replace
from pathlib import Path

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.scoring.choice import answer_tags
from mmedexpert.scoring.judged import Judged
from mmedexpert.sources.unpack import lettered, read_rows, write_image

FILE = "GMAI-MMBench_VAL.tsv"
COLUMNS = ("index", "image", "question", "a", "b", "answer")
GROUPS = ("clinical vqa task", "department", "perceptual granularity", "modality")
REFERENCE = 64  # peers: VLMEvalKit takes an image cell up to this length for the index of the row that holds the image
SUFFIXES = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"))

# peers: VLMEvalKit `can_infer`: what it takes for a refusal, its separators, and a letter told in a sentence
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
TOLD = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir`), bad (id, reason); images are written as they are, each distinct one once.

    Source: `GMAI-MMBench_VAL.tsv` of hub data set VLMEval/GMAI-MMBench (9.3 GB, read row by row). TEST has no answers.
    Raises UserError for a missing or damaged file and for other columns.
    """
    path = root / FILE
    drafts: list[Record] = []
    bad: Bad = []
    image_of: dict[str, str] = {}
    for line, row in read_rows(path, COLUMNS, delimiter="\t"):
        index = row["index"].strip()
        cell = row["image"].strip()
        try:
            image = cell
            if len(cell) > REFERENCE:
                image = image_of[index] = _write(cell, out_dir)
            drafts.append(_parse(row, index or f"line {line}", image))
        except ValueError as error:
            bad.append((index or f"line {line}", f"{FILE} line {line}: {error}"))
    if not drafts and not bad:
        raise UserError(f"{path} holds no question: download it again")
    records: dict[str, Record] = {}
    for draft in drafts:
        image = image_of.get(draft.images[0], draft.images[0])
        if not image.startswith("images/"):
            bad.append((draft.id, f"its image is in row {image[:REFERENCE]!r}, which is not there"))
        elif draft.id in records:
            bad.append((draft.id, "the index occurs twice"))
        else:
            records[draft.id] = replace(draft, images=(image,), image_group=image)
    return list(records.values()), out_dir, bad


def ask(record: Record) -> str:
    """The prompt of VLMEvalKit (e8e78f0, `ImageMCQDataset.build_prompt`), with its blank before the last line break."""
    options = "".join(f"{letter}. {text}\n" for letter, text in (record.options or {}).items())
    return (
        f"Question: {record.question}\nOptions:\n{options}Please select the correct answer from the options above. \n"
    )


def judge(record: Record, response: str) -> Judged:
    """The verdict of VLMEvalKit (e8e78f0, `can_infer`, exact matching); a response with no match is unparsed, wrong.

    Of a response with an answer tag what stands in it is read, as MedEvalKit's and MMMU's readers do: to VLMEvalKit's
    the tag and its letter are one word, and a model trained to answer so would be wrong everywhere.  # ours

    Raises ValueError for a record without options.
    """
    if not record.options:
        raise ValueError(f"record {record.id!r} has no options")
    picked = _pick(answer_tags(response) or response, record.options)
    return Judged(correct=picked == record.answer, picked=picked, parsed=picked is not None)


def _pick(response: str, options: dict[str, str]) -> str | None:
    if any(refusal in response for refusal in REFUSALS):
        return None
    if "Failed to obtain answer via API" not in response:
        words = response.translate(SEPARATORS).split()
        letters = [letter for letter in options if letter in words]
        # the first place of the letter has to be among the last four words
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return None
        told = TOLD.search(response)
        if told and told[1].upper() in options:
            return told[1].upper()
    text = response.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else None


def _write(cell: str, out_dir: Path) -> str:
    """Write a base64 image under its content's hash; its path relative to `out_dir`."""
    try:
        data = base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its image is not base64 ({error})") from error
    suffix = next((suffix for magic, suffix in SUFFIXES if data.startswith(magic)), "")
    name = f"images/{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
    write_image(out_dir / name, data)
    return name


def _parse(row: dict[str, str], record_id: str, image: str) -> Record:
    if not row["question"].strip():
        raise ValueError("the question is empty")
    if not image:
        raise ValueError("it has no image")
    options, positions = lettered([row.get(letter) for letter in "abcde"])
    if len(options) < 2:
        raise ValueError(f"it has {len(options)} option(s), a choice needs two or more")
    gold = row["answer"].strip()
    native = ["ABCDE"[position] for position in positions]
    if gold not in native:
        raise ValueError(f"answer {gold[:80]!r} is none of the options {', '.join(native)}")
    return Record(
        id=record_id,
        images=(image,),
        question=row["question"],
        options=options,
        answer=list(options)[native.index(gold)],
        specialties=("all",),
        source=f"GMAI-MMBench {FILE}",
        license="not stated",
        split="test",
        image_group=image,
        modality=row.get("modality", ""),
        kind="choice",
        groups={name.replace(" ", "_"): row[name] for name in GROUPS if row.get(name)},
    )
