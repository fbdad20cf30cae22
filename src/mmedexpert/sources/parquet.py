"""Rows of a benchmark's Parquet files, streamed, with the images they hold; and what its rows say, as text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.unpack import write_image

BATCH = 16  # rows  # ours: with their images, the most that is in memory at once beside a column's page
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def find_parquet(folder: Path, split: str) -> list[Path]:
    """The files `<split>-00000-of-00003*.parquet` anywhere under `folder`, in order; `split` is the hub's name.

    An empty list where there are none; UserError where some of the parts are missing.
    """
    paths = sorted(folder.rglob(f"{split}-*.parquet"))
    parts = {int(match[1]) for path in paths if (match := re.search(r"-of-(\d+)", path.name))}
    if parts - {len(paths)}:
        fix = "download the missing ones, and keep one version of each"
        raise UserError(f"{folder} holds {len(paths)} {split} Parquet files, their names say {max(parts)}: {fix}")
    return paths


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as {column: value}, a batch at a time; `optional` columns only where it has them.
    None: all columns.

    Raises UserError for a file that is truncated or no Parquet file, for one without the columns, and for one with a
    cell that cannot be read (text that is no UTF-8, a date out of range).
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(_unreadable(path, error)) from error
    with file:
        if missing := [name for name in columns or () if name not in names]:
            fix = "give the folder as it was published"
            raise UserError(f"{path} has no column {', '.join(missing)} (it has {', '.join(names)}): {fix}")
        wanted = names if columns is None else [*columns, *(name for name in optional if name in names)]
        try:
            for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(_unreadable(path, error)) from error
        except (ValueError, OverflowError) as error:
            fix = "download it again, or write it anew"
            raise UserError(
                f"{path} has a cell that cannot be read ({' '.join(str(error).split())[:120]}): {fix}"
            ) from error


def store_image(cell: Any, folder: Path) -> str:
    """Write the image of a Parquet cell (`{bytes, path}`, or bytes) to `folder`, and return its name there.

    The name is made of the content, so that questions on one image share a file. ValueError for a cell without bytes.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise ValueError("the row holds no image")
    suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
    name = hashlib.sha256(data).hexdigest()[:24] + suffix
    write_image(folder / name, data)
    return name


def text_of(value: Any) -> str:
    """A cell as text: texts as they are, numbers as written, everything else empty."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def groups_of(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """The values of `keys` without stray blanks, where the row has them."""
    return {key: text for key in keys if (text := text_of(row.get(key)).strip())}


def question_and_answer(row: Any) -> tuple[str, str]:
    """Both as in the source; ValueError where one is missing or empty."""
    if not isinstance(row, dict):
        raise ValueError("the row is no object")
    question, answer = text_of(row.get("question")), text_of(row.get("answer"))
    for name, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise ValueError(f"the {name} is empty")
    return question, answer


def yes_no_or_open(answer: str) -> str:
    """Kind of a VQA-RAD or PathVQA question (MedEvalKit): yes_no where the answer is yes or no, else open."""
    return "yes_no" if answer.strip().lower() in ("yes", "no") else "open"


def load_vqa(
    paths: Sequence[Path], out_dir: Path, *, name: str, source: str, license: str, split: str
) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir/images`) and bad rows of Parquet files with `image, question, answer`.

    This is the hub's layout of VQA-RAD and PathVQA; it has no ids, so a record's is its row number.
    """
    images = out_dir / "images"
    records: list[Record] = []
    bad: Bad = []
    number = 0
    for path in paths:
        for row in read_parquet(path, ("image", "question", "answer")):
            record_id = f"{name}-{split}-{number:05d}"
            number += 1
            try:
                question, answer = question_and_answer(row)
                image = store_image(row["image"], images)
            except ValueError as error:
                bad.append((record_id, f"{path.name}: {error}"))
                continue
            records.append(
                Record(
                    id=record_id,
                    images=(image,),
                    question=question,
                    options=None,
                    answer=answer,
                    specialties=("all",),
                    source=f"{source} {path.name}",
                    license=license,
                    split=split,
                    image_group=image,
                    kind=yes_no_or_open(answer),
                )
            )
    return records, images, bad


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} is truncated or no Parquet file ({' '.join(str(error).split())[:120]}): download it again"
