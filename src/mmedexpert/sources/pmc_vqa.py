"""PMC-VQA (arXiv 2305.10415): four-option questions about figures of articles, `test_2.csv`, `test_clean.csv`, or
`train_2.csv` and `train.csv`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.unpack import place_images, read_rows

FOLDERS = ("figures", "images")  # peers: MedEvalKit looks for a figure in this order
ARCHIVES = ("images_2.zip", "images.zip")
CHOICES = ("choice a", "choice b", "choice c", "choice d")


def load(root: Path, out_dir: Path, file: str = "test_2.csv") -> tuple[list[Record], Path, Bad]:
    """Records, image root, bad (id, reason); images from `root/figures` or `root/images`, else out of the zips.

    Source: hub data set RadGenome/PMC-VQA; version 2 (`test_2.csv`: the letter is in Answer) and version 1
    (`test_clean.csv`: in Answer_label). The two share hardly a question, so each record's source names the file and its
    number of rows. Option texts are the cells as they are, with their own "A:" and any blanks, as MedEvalKit has them.
    A file whose name starts with train is the training part. Raises UserError for a missing or damaged file and for
    other columns.
    """
    path = root / file
    rows = list(read_rows(path, ("figure_path", "question", *CHOICES, "answer")))
    if not rows:
        raise UserError(f"{path} holds no question: download it again")
    source = f"PMC-VQA {file} ({len(rows)} rows)"
    split = "train" if path.name.startswith("train") else "test"
    drafts: list[Record] = []
    bad: Bad = []
    for number, (line, row) in enumerate(rows):
        record_id = f"{path.stem}-{number}"
        try:
            drafts.append(replace(_parse(row, record_id), source=source, split=split))
        except ValueError as error:
            bad.append((record_id, f"{file} line {line}: {error}"))
    archives = [root / name for name in ARCHIVES if (root / name).is_file()]
    records, image_root, missing = place_images(drafts, root, out_dir, folders=FOLDERS, archives=archives)
    return records, image_root, bad + missing


def _parse(row: dict[str, str], record_id: str) -> Record:
    options = {letter: row[name] for letter, name in zip("ABCD", CHOICES, strict=True)}
    if empty := [letter for letter, text in options.items() if not text.strip()]:
        raise ValueError(f"choice {', '.join(empty)} is empty")
    answer = row.get("answer_label", row["answer"]).strip()
    if answer not in options:
        raise ValueError(f"answer {answer[:80]!r} is none of the options A, B, C, D")
    if not row["question"].strip():
        raise ValueError("the question is empty")
    image = row["figure_path"].strip()
    if not image:
        raise ValueError("it names no image")
    return Record(
        id=record_id,
        images=(image,),
        question=row["question"],
        options=options,
        answer=answer,
        specialties=("all",),
        source="",
        license="CC BY-SA",
        split="test",
        image_group=image,
        kind="choice",
    )
