"""A table of questions, on images or of text alone: json, jsonl, csv, tsv or Parquet, its columns named in a config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmedexpert.data.record import SPLITS, TEXT, Record
from mmedexpert.data.table import is_unknown
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.dicom import numbered, patient_of
from mmedexpert.sources.medr1 import parse_problem
from mmedexpert.sources.parquet import store_image, text_of, yes_no_or_open
from mmedexpert.sources.rows import Choices, choices_of, gold_of, rows_of
from mmedexpert.sources.unpack import leaves_root, place_images

# what a column may be named for; one of these may be several columns: image, options (one for each letter, from A)
COLUMNS = ("image", "question", "options", "answer", "id", "modality", "body_system", "license", "rationale", "patient",
           "language")  # fmt: skip
INLINE = "inline"  # columns.options: the options stand in the question, as "A) ..., B) ..."
CELLS = "cells"  # folder of images that came as bytes in the rows
PATIENT = "patient"
Parse = Callable[[Mapping[str, Any], str], Record]  # a row and its id; ValueError says what is wrong


def load(
    root: Path,
    out_dir: Path,
    *,
    files: str | Sequence[str],
    columns: Mapping[str, Any],
    name: str = "",
    split: str = "train",
    license: str = "not stated",
    modality: str = "",
    body_system: str = "",
    language: str = "en",
    image_folders: Sequence[str] = (".", "images"),
    archives: Sequence[str] = (),
) -> tuple[list[Record], Path, Bad]:
    """Records, image root, bad (id, reason) of the rows of `files` (globs in `root`); no single row is fatal.

    `columns` maps what is asked for (`COLUMNS`) to the table's own names. Options are read as `rows.choices_of` says,
    or from one column a letter, or "inline"; an answer is a letter or a text. Images are paths in `image_folders` or
    in zips, DICOM among them (`curation.ingest` opens it), or the bytes of a Parquet cell. Without columns.image the
    questions are of text alone. Raises UserError for files and columns that are not there.
    """
    named = _columns(columns)
    if split not in SPLITS:
        raise UserError(f"vqa_table has no split {split!r}: choose one of {', '.join(SPLITS)}")
    defaults = {"license": license, "modality": modality, "body_system": body_system, "language": language}

    def parse(row: Mapping[str, Any], record_id: str) -> Record:
        return _parse(row, record_id, named, defaults, split, out_dir)

    paths = find_files(root, files)
    records, image_root, bad = load_rows(
        root, out_dir, paths, parse, name=name or root.name, id_column=_one(named, "id"),
        needed=[column for value in named.values() if value != INLINE
                for column in ([value] if isinstance(value, str) else value)], image_folders=image_folders,
        archives=[root / archive for archive in archives],
    )  # fmt: skip
    return _by_patient(records, image_root, name or root.name), image_root, bad


def find_files(root: Path, files: str | Sequence[str]) -> list[Path]:
    """The files of `root` that the globs name, in order of the globs, then of names; UserError where one finds none."""
    globs = [files] if isinstance(files, str) else list(files)
    found: dict[Path, None] = {}
    for glob in globs:
        paths = sorted(path for path in root.glob(glob) if path.is_file())
        if not paths:
            raise UserError(f"{root} holds no file {glob!r}: check the root and load.files")
        found.update(dict.fromkeys(paths))
    return list(found)


def load_rows(
    root: Path,
    out_dir: Path,
    paths: Sequence[Path],
    parse: Parse,
    *,
    name: str,
    id_column: str = "",
    needed: Sequence[str] = (),
    image_folders: Sequence[str] = (".",),
    archives: Sequence[Path] = (),
) -> tuple[list[Record], Path, Bad]:
    """What readers of unchecked tables share: each row parsed or bad, then images found. A record's id is that of its
    row, else the file's name and the row's number. Raises UserError where no row of any file has the columns needed.
    """
    drafts: list[Record] = []
    bad: Bad = []
    seen: dict[str, None] = {}  # the columns of all rows: a JSON object may leave out what it has nothing for
    for path in paths:
        prefix = f"{name}-{path.relative_to(root).with_suffix('').as_posix().replace('/', '-')}"
        for number, (where, row) in enumerate(rows_of(path, bad)):
            seen.update(dict.fromkeys(row))
            try:
                draft = parse(row, text_of(row.get(id_column)).strip() or f"{prefix}-{number:05d}")
                drafts.append(replace(draft, source=f"{name} {path.name}"))
            except ValueError as error:
                bad.append((where, str(error)))
    if seen and (absent := [column for column in needed if column not in seen]):
        lacking = f"no row has the columns {', '.join(absent)} (there are {', '.join(seen)[:300]})"
        raise UserError(f"{paths[0]}: {lacking}: name them in load.columns")
    cells = out_dir / CELLS
    if any(is_there(cells, draft.images[0]) for draft in drafts if draft.images):  # they came with the rows
        root, image_folders, archives = cells, (".",), ()
    records, image_root, lost = place_images(drafts, root, out_dir, folders=image_folders, archives=archives)
    return records, image_root, bad + lost


def images_of(cell: Any, out_dir: Path) -> tuple[str, ...]:
    """Names of the images in a cell: a path, bytes (written to `out_dir`), or a list of these, also as text.

    ValueError for an image without a name.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise ValueError(f"images {cell[:80]!r} are no list in JSON") from error
    if cell is None or cell == "" or cell == []:
        return ()
    names = []
    for one in cell if isinstance(cell, list) else [cell]:
        data = one.get("bytes") if isinstance(one, dict) else one
        if isinstance(data, bytes) and data:
            names.append(store_image(data, out_dir / CELLS))
        else:
            path = text_of(one.get("path") if isinstance(one, dict) else one).strip().replace("\\", "/")
            names.append(path.removeprefix("./"))
    if not all(names):
        raise ValueError("an image of it has no name")
    return tuple(names)


def is_there(folder: Path, name: str) -> bool:
    """Whether a name that nobody checked is that of a file in the folder."""
    return not leaves_root(name) and (folder / name).is_file()


def text_group(question: str) -> str:
    """The group of a question without an image: the question, so that no split tells another its answer."""
    return f"text:{hashlib.sha256(question.encode(errors='replace')).hexdigest()[:16]}"


def make_record(
    record_id: str, images: tuple[str, ...], question: str, choices: Choices, answer: str, *, split: str, source: str,
    license: str, reasoning: str = "", **more: Any,
) -> Record:  # fmt: skip
    """A record of an unchecked row: its gold option found, the set's own reasoning kept beside it, not as a trace.

    ValueError for an empty question or answer, and for an answer that is no option, or several.
    """
    for name, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise ValueError(f"the {name} is empty")
    options, gold = gold_of(choices, answer) if choices else (None, answer.strip())
    if not images:
        more["modality"] = TEXT
    return Record(
        id=record_id,
        images=images,
        question=question.strip(),
        options=options,
        answer=gold,
        specialties=("all",),
        source=source,
        license=license or "not stated",
        split=split,
        image_group="+".join(images) or text_group(question),
        kind="choice" if options else yes_no_or_open(gold),
        provenance={"source_reasoning": reasoning.strip()} if reasoning.strip() else {},
        **more,
    )


def _columns(columns: Mapping[str, Any]) -> dict[str, str | list[str]]:
    named = {"question": "question", "answer": "answer", **columns}
    if unknown := sorted(set(named) - set(COLUMNS)):
        raise UserError(f"load.columns names {', '.join(unknown)}: choose among {', '.join(COLUMNS)}")
    for key, value in named.items():
        several = key in ("image", "options") and isinstance(value, Sequence)
        if not isinstance(value, str) and not (several and all(isinstance(one, str) for one in value)):
            raise UserError(f"load.columns.{key} is {value!r}: give the name of a column")
    return {key: value if isinstance(value, str) else list(value) for key, value in named.items()}


def _parse(
    row: Mapping[str, Any], record_id: str, named: Mapping[str, str | list[str]], defaults: Mapping[str, str],
    split: str, out_dir: Path,
) -> Record:  # fmt: skip
    def cell(key: str) -> str:
        value = row.get(_one(named, key))
        return text_of(value[0] if isinstance(value, list) and len(value) == 1 else value).strip()

    question, options = cell("question"), named.get("options", [])
    if options == INLINE:
        question, inline = parse_problem(question)
        choices = list(inline.items())
    elif isinstance(options, list):
        choices = choices_of(dict(zip(ascii_uppercase, (row.get(column) for column in options), strict=False)))
    else:
        choices = choices_of(row.get(options))
    columns = named.get("image", [])
    images = tuple(
        name for column in ([columns] if isinstance(columns, str) else columns)
        for name in images_of(row.get(column), out_dir)
    )  # fmt: skip
    if columns and not images:
        raise ValueError("it names no image")
    about = {key: cell(key) or default for key, default in defaults.items()}
    license = about.pop("license")
    record = make_record(
        record_id, images, question, choices, cell("answer"), split=split, source="", license=license,
        reasoning=cell("rationale"), **about,
    )  # fmt: skip
    patient = cell("patient")
    return record if is_unknown(patient) else replace(record, groups={PATIENT: patient})


def _by_patient(records: Sequence[Record], image_root: Path, name: str) -> list[Record]:
    """Records grouped by their patient, told by the table or by a DICOM file: by a number, as an id is nobody's."""
    told = [record.groups.get(PATIENT) or patient_of([image_root / image for image in record.images])
            for record in records]  # fmt: skip
    return [
        replace(record, groups={}, image_group=f"{name}:{patient}" if patient else record.image_group)
        for record, patient in zip(records, numbered(told), strict=True)
    ]


def _one(named: Mapping[str, str | list[str]], key: str) -> str:
    value = named.get(key, "")
    return value if isinstance(value, str) else ""
