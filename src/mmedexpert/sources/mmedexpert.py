"""A released MMedExpert: Parquet files with the images inside, as `curation/release.py` writes them, and as records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedexpert.data.record import SPLITS, Record, Trace
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import find_parquet, read_parquet
from mmedexpert.sources.unpack import write_image

# columns that are a record's fields as they are; `options` is [{letter, text}], `trace` its steps, JSON what is open
FIELDS = (
    "id", "question", "answer", "specialties", "license", "split", "image_group", "modality", "body_system", "kind",
    "language",
)  # fmt: skip
JSON_FIELDS = ("groups", "latent")
PROVENANCE = ("source", "revision", "redistribute")  # parts of it with a column each
JSON_PROVENANCE = ("labels", "checks")
COLUMNS = (
    *FIELDS, *JSON_FIELDS, *PROVENANCE, *JSON_PROVENANCE, "images", "options", "perspective", "trace", "trace_answer",
    "source_text", "provenance",
)  # fmt: skip
SUFFIXES = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp",
    b"RIFF": ".webp", b"\0\0\0\x0cjP": ".jp2",
}  # fmt: skip


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir/images`) and bad rows of a released folder, of all its splits.

    Raises UserError where it holds no `data/<split>-*.parquet`, and for files that are damaged or of another kind.
    """
    images = out_dir / "images"
    records: list[Record] = []
    bad: Bad = []
    paths = [path for split in SPLITS for path in find_parquet(root, split)]
    if not paths:
        raise UserError(f"{root} holds no data/<split>-*.parquet: give the folder of a released MMedExpert")
    for path in paths:
        for number, row in enumerate(read_parquet(path, COLUMNS)):
            try:
                records.append(_record(row, images))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                bad.append((str(row["id"]), f"{path.name} row {number}: {error}"))
    return records, images, bad


def image_name(data: bytes) -> str:
    """What an image file is called in a release: by its content, so that no name tells a label or a patient."""
    suffix = next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), ".img")
    return hashlib.sha256(data).hexdigest()[:24] + suffix


def _record(row: Mapping[str, Any], folder: Path) -> Record:
    names = []
    for cell in row["images"]:
        if not cell["bytes"]:
            raise ValueError("an image has no bytes")
        names.append(image_name(cell["bytes"]))
        write_image(folder / names[-1], cell["bytes"])
    options, perspective = row["options"], row["perspective"]
    provenance = {
        **json.loads(row["provenance"]),
        **{name: row[name] for name in PROVENANCE if row[name] is not None},
        **{name: json.loads(row[name]) for name in JSON_PROVENANCE if row[name] is not None},
    }
    return Record(
        **{name: row[name] for name in FIELDS} | {"specialties": tuple(row["specialties"])},
        **{name: json.loads(row[name]) for name in JSON_FIELDS},
        images=tuple(names),
        options=None if options is None else {option["letter"]: option["text"] for option in options},
        source=row["source_text"],
        trace=None if perspective is None else Trace(perspective, tuple(row["trace"]), row["trace_answer"]),
        provenance=provenance,
    )
