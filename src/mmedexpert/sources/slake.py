"""SLAKE: open and closed questions on radiology images in English and Chinese."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import groups_of, question_and_answer, text_of
from mmedexpert.sources.unpack import place_images, read_objects

FILES = {"train": ("train.json",), "val": ("validation.json", "validate.json"), "test": ("test.json",)}
LANGUAGES = ("en", "zh")
NEEDED = ("img_name", "question", "answer", "q_lang", "answer_type")
GROUPS = ("answer_type", "content_type", "modality", "location")


def load(
    root: Path, out_dir: Path, *, languages: Sequence[str] = LANGUAGES, split: str = "test"
) -> tuple[list[Record], Path, Bad]:
    """Records, image root and bad rows of `<split>.json` with `imgs/` (used in place) or `imgs.zip` (unpacked).

    Source: Liu et al. 2021 (arXiv 2102.09542), as published in BoKelvin/SLAKE (test: 2,094 in both languages).
    Raises UserError for unknown languages or splits, and for missing, truncated or unknown files.
    """
    if not languages or not set(languages) <= set(LANGUAGES):
        raise UserError(f"slake: load.languages is {list(languages)}: give one or both of {', '.join(LANGUAGES)}")
    if split not in FILES:
        raise UserError(f"slake has no split {split!r}: choose one of {', '.join(FILES)}")
    path = next((root / name for name in FILES[split] if (root / name).is_file()), None)
    if path is None:
        raise UserError(f"{root} holds no {' or '.join(FILES[split])}: give the folder of BoKelvin/SLAKE")
    archives = [root / "imgs.zip"] if (root / "imgs.zip").is_file() else []
    if not archives and not (root / "imgs").is_dir():
        raise UserError(f"{root} has neither imgs.zip nor a folder imgs: give the folder of BoKelvin/SLAKE")
    drafts: list[Record] = []
    bad: Bad = []
    for where, row in read_objects(path, NEEDED):
        try:
            record = _parse(row, split, path.name)
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        if record.language in languages:
            drafts.append(record)
    records, image_root, missing = place_images(drafts, root, out_dir, folders=("imgs",), archives=archives)
    return records, image_root, bad + missing


def _parse(row: Any, split: str, file: str) -> Record:
    question, answer = question_and_answer(row)
    image, qid = text_of(row.get("img_name")).strip(), text_of(row.get("qid")).strip()
    groups = groups_of(row, GROUPS)
    language, answer_type = text_of(row.get("q_lang")).strip(), groups.get("answer_type", "")
    if not qid:
        raise ValueError("it has no qid")
    if language not in LANGUAGES:
        raise ValueError(f"q_lang {language!r} is none of {', '.join(LANGUAGES)}")
    if answer_type == "OPEN":
        kind = "open"
    elif answer_type == "CLOSED":  # MedEvalKit minds the case: a gold "Yes" is compared as any other text
        kind = "yes_no" if answer in ("yes", "no") else "closed"
    else:
        raise ValueError(f"answer_type {answer_type!r} is neither OPEN nor CLOSED")
    return Record(
        id=f"slake-{split}-{language}-{qid}",
        images=(image,),
        question=question,
        options=None,
        answer=answer,
        specialties=("all",),
        source=f"SLAKE {file}",
        license="not stated",
        split=split,
        image_group=image,
        modality=groups.get("modality", ""),
        kind=kind,
        language=language,
        groups={**groups, "language": language},
    )
