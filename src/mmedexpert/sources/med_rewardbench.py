"""Med-RewardBench: pairs of answers about medical images, preferred in six dimensions by physicians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import DIMENSIONS, folded, record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import read_parquet, store_image, text_of
from mmedexpert.sources.unpack import read_objects

FOLDER = "pair_gt_all"
NEEDED = ("question_id", "question", "image", "answer1_text", "answer2_text")
SOURCE, LICENSE = "Med-RewardBench", "not stated"
TWICE = object()  # the labels of an id that has two rows of them
ANSWERS = {"A": "answer1_text", "B": "answer2_text"}  # answer 1 is shown as A


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records (`judging.pairs`), image root `out_dir/images`, and what was left out.

    Source: arXiv 2508.21430 and meidandz/Med-RewardBench@9b9d806: `data/pair_gt_all/<organ>.jsonl` holds the labels,
    `parquet/<organ>.parquet` beside it questions, images and both answers, joined by `question_id` within an organ.
    There, an id that stands twice hides the first in silence; here both are left out and told.

    Raises UserError for a folder of another layout, labels without their Parquet file, and a damaged file.
    """
    folder = next((path for path in (root / "data" / FOLDER, root / FOLDER, root) if any(path.glob("*.jsonl"))), None)
    if folder is None:
        raise UserError(f"{root} holds no data/{FOLDER}/<organ>.jsonl: give the folder as it was published")
    images = out_dir / "images"
    records: list[Record] = []
    bad: Bad = []
    for path in sorted(folder.glob("*.jsonl")):
        answers = folder / "parquet" / f"{path.stem}.parquet"
        if not answers.is_file():
            raise UserError(f"{path} has no {answers} beside it, which holds its questions: download that, too")
        labels = _labels(path, bad)
        records += _pairs(answers, path.stem, labels, images, bad)
    for path in sorted((folder / "parquet").glob("*.parquet")):
        if not (folder / f"{path.stem}.jsonl").is_file():
            bad.append((path.stem, f"{path.name} has no {path.stem}.jsonl with its labels"))
    kept, copies = folded(records)
    return kept, images, bad + copies


def _labels(path: Path, bad: Bad) -> dict[str, Any]:
    """Id to the labels as they stand there."""
    found: dict[str, Any] = {}
    twice: set[str] = set()
    for where, row in read_objects(path, ("question_id", "human_answer")):
        identity = _id(row.get("question_id")) if isinstance(row, dict) else ""
        if not identity:
            bad.append((where, f"{path.name}: the row has no question_id"))
        elif identity in found:
            twice.add(identity)
        else:
            found[identity] = row.get("human_answer")
    for identity in sorted(twice):
        bad.append((f"{path.stem}-{identity}", f"{path.name}: question_id {identity} stands twice: both are left out"))
        found[identity] = TWICE
    return found


def _pairs(path: Path, organ: str, labels: dict[str, Any], images: Path, bad: Bad) -> list[Record]:
    found: dict[str, Record] = {}
    seen: set[str] = set()
    for number, row in enumerate(read_parquet(path, NEEDED, ("image_id",))):
        question_id = _id(row["question_id"])
        identity = f"{organ}-{question_id}" if question_id else f"{organ} row {number}"
        if not question_id:
            bad.append((identity, f"{path.name}: the row has no question_id"))
            continue
        if question_id in seen:
            if found.pop(question_id, None):
                bad.append((identity, f"{path.name}: question_id {question_id} stands twice: both are left out"))
            continue
        seen.add(question_id)
        if question_id not in labels:
            bad.append((identity, f"{path.name}: {organ}.jsonl has no label for it"))
            continue
        try:
            told = labels[question_id]
            if told is TWICE:
                continue
            if not isinstance(told, dict) or not set(DIMENSIONS) <= set(told):
                raise ValueError(f"its labels are {str(told)[:80]!r}: all of {', '.join(DIMENSIONS)} are needed")
            image = store_image(row["image"], images)
            found[question_id] = record_of(
                identity=identity, images=[image], question=row["question"],
                answers={letter: row[column] for letter, column in ANSWERS.items()},
                labels={name: _letter(name, told[name]) for name in DIMENSIONS}, source=f"{SOURCE} {organ}",
                license=LICENSE, organ=organ,
            )  # fmt: skip
        except ValueError as error:
            bad.append((identity, f"{path.name}: {error}"))
    for question_id in labels:
        if question_id not in seen and labels[question_id] is not TWICE:
            bad.append((f"{organ}-{question_id}", f"{path.name} has no such question_id"))
    return list(found.values())


def _id(value: Any) -> str:
    """An id as text; a number that a table keeps with a fraction of 0 is the whole number."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else text_of(value).strip()


def _letter(dimension: str, value: Any) -> str:
    letter = text_of(value).strip().upper()
    if letter not in ANSWERS:
        raise ValueError(f"the label of {dimension} is {value!r}: A or B is needed")
    return letter
