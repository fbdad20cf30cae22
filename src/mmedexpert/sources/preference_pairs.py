"""Preference pairs of one's own: a line of JSON each, with several images, ties and missing dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import folded, record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import text_of
from mmedexpert.sources.unpack import leaves_root, read_objects

SPLITS = ("train", "val", "test")
NEEDED = ("id", "question", "answer_a", "answer_b", "labels")


def load(root: Path, out_dir: Path, *, file: str = "pairs.jsonl", split: str = "all") -> tuple[list[Record], Path, Bad]:
    """Records (`judging.pairs`), image root (`root`) and what was left out, of `<root>/<file>`.

    Each line: `id`, `question`, `answer_a`, `answer_b`, `labels` (dimension to A, B or tie; a missing one was not
    judged); optional `images` (paths below `root`, or one text), `organ`, `specialty`, `group` (what is drawn together
    in the bootstrap: a patient; else the first image), `source`, `license`, `reason` (why the better one is it, with
    `{better}` and `{worse}` in place of letters). # ours
    `split`: all, or train, val, test: eight, one and one tenth of the groups, by a hash of their names. # ours

    Raises UserError where the file is missing or damaged, ValueError for another split.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f"split must be one of all, {', '.join(SPLITS)}, got {split!r}")
    path = root / file
    if not path.is_file():
        raise UserError(f"{path} is not there: give the folder that holds it, or its name in load.file")
    records: list[Record] = []
    bad: Bad = []
    ids: set[str] = set()
    for where, row in read_objects(path, NEEDED):
        try:
            record = _parse(row)
            if record.id in ids:
                raise ValueError("its id stands twice")
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        ids.add(record.id)
        records.append(record)
    kept, copies = folded(records)
    chosen = [record for record in kept if split in ("all", _split_of(record))]
    if kept and not chosen:
        raise UserError(f"{path}: none of its {len(kept)} pairs is in the part {split}: more groups are needed")
    return chosen, root, bad + copies


def _split_of(record: Record) -> str:
    tenth = int(hashlib.sha256(record.image_group.encode()).hexdigest(), 16) % 10
    return SPLITS[max(0, tenth - 7)]


def _parse(row: Any) -> Record:
    if not isinstance(row, dict) or not isinstance(row.get("labels"), dict):
        raise ValueError("the row is no object with labels")
    identity = text_of(row.get("id")).strip()
    if not identity:
        raise ValueError("it has no id")
    images = row.get("images") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, Sequence) or not all(isinstance(one, str) for one in images):
        raise ValueError("images is neither a path nor a list of paths")
    if outside := next((one for one in images if leaves_root(one)), None):
        raise ValueError(f"the image {outside!r} does not lie below the folder")
    keys = ("organ", "specialty", "group", "source", "license", "reason")
    told = {key: text_of(row.get(key)).strip() for key in keys}
    return record_of(
        identity=identity, images=images, question=row.get("question"),
        answers={"A": row.get("answer_a"), "B": row.get("answer_b")}, labels=row["labels"],
        source=told["source"] or "preference pairs", license=told["license"] or "not stated", group=told["group"],
        organ=told["organ"], specialty=told["specialty"], reason=told["reason"],
    )  # fmt: skip
