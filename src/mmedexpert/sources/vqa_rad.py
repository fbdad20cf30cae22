"""VQA-RAD: yes/no and open questions on radiology images, from the hub's Parquet files or the authors' JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import (
    find_parquet,
    groups_of,
    load_vqa,
    question_and_answer,
    text_of,
    yes_no_or_open,
)
from mmedexpert.sources.unpack import place_images, read_objects

SPLITS = ("train", "test")
NATIVE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")  # of the authors, of the copies that hold split files
SOURCE, LICENSE = "VQA-RAD", "CC0 1.0"
NEEDED = ("question", "answer", "image_name", "phrase_type")


def load(root: Path, out_dir: Path, *, split: str = "test") -> tuple[list[Record], Path, Bad]:
    """Records, image root and bad rows: from Parquet files, else `split_<split>set.json`, else the authors' one file.

    Source: Lau et al. 2018 (doi 10.1038/sdata.2018.251), as published in flaviagiammarino/vqa-rad (test: 451) or on
    OSF, where `phrase_type` names the test questions; the copies with split files divide them alike. The image root is
    `out_dir/images` for Parquet files, else `root`.
    Raises UserError for another split than train, test, and for missing, truncated or unknown files.
    """
    if split not in SPLITS:
        raise UserError(f"vqa_rad has no split {split!r}: choose one of {', '.join(SPLITS)}")
    if paths := find_parquet(root, split):
        return load_vqa(paths, out_dir, name="vqa_rad", source=SOURCE, license=LICENSE, split=split)
    names = (f"split_{split}set.json", f"{split}set.json", NATIVE)
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise UserError(f"{root} holds neither {split}-*.parquet nor {NATIVE!r}: give the folder as it was published")
    if not any((root / name).is_dir() for name in IMAGE_FOLDERS):
        raise UserError(f"{root} has no folder {' or '.join(map(repr, IMAGE_FOLDERS))}: put the images there")
    drafts: list[Record] = []
    bad: Bad = []
    for where, row in read_objects(path, NEEDED):
        if path.name == NATIVE and _is_test(row) != (split == "test"):
            continue
        try:
            drafts.append(_parse(row, split, path.name))
        except ValueError as error:
            bad.append((where, str(error)))
    records, image_root, missing = place_images(drafts, root, out_dir, folders=IMAGE_FOLDERS, archives=())
    return records, image_root, bad + missing


def _is_test(row: Any) -> bool:
    return isinstance(row, dict) and text_of(row.get("phrase_type")).strip().startswith("test")


def _parse(row: Any, split: str, file: str) -> Record:
    question, answer = question_and_answer(row)
    image, qid = text_of(row.get("image_name")).strip(), text_of(row.get("qid")).strip()
    if not qid:
        raise ValueError("it has no qid")
    return Record(
        id=f"vqa_rad-{split}-{qid}",
        images=(image,),
        question=question,
        options=None,
        answer=answer,
        specialties=("all",),
        source=f"{SOURCE} {file}",
        license=LICENSE,
        split=split,
        image_group=image,
        kind=yes_no_or_open(answer),
        groups=groups_of(row, ("question_type", "answer_type", "image_organ")),
    )
