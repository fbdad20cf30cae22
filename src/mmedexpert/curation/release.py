"""The released set: Parquet files with the images inside, which `datasets.load_dataset(<folder>)` loads as they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmedexpert.curation.balance import make_up, primary, source_of
from mmedexpert.curation.steps import Records
from mmedexpert.data.record import SPLITS, Record
from mmedexpert.data.records import RECORDS, record_of
from mmedexpert.errors import UserError
from mmedexpert.models.encode import target_text
from mmedexpert.runtime.files import sync
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.progress import SHORT, Bar
from mmedexpert.runtime.runs import write_json
from mmedexpert.sources.mmedexpert import FIELDS, JSON_FIELDS, JSON_PROVENANCE, PROVENANCE, image_name

SUMMARY = "release.json"
SHARD_BYTES = 400 * 2**20  # ours: of images; the hub advises files below 500 MB
GROUP_ROWS, GROUP_BYTES = 100, 32 * 2**20  # ours: of a row group, whichever is reached first: what is in memory at once
TEXTS = (
    "id", "question", "answer", "answer_text", "primary", "evidence", "perspective", "trace_answer", "completion",
    "modality", "body_system", "kind", "language", "source", "source_text", "source_id", "revision", "license",
    "image_group", "split", *JSON_FIELDS, *JSON_PROVENANCE, "provenance",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a record stands in its file, and where it goes."""

    split: str
    order: bytes  # a hash of its id: neighbours in a source are none in the release
    offset: int
    size: int  # bytes of its images


def release(
    records: Records, folder: Path, *, name: str = "mmedexpert", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write `data/<split>-00000-of-0000N.parquet` and `release.json` to `folder`, and return what the latter says.

    Only records whose `provenance["redistribute"]` is true; the others are counted by source and licence under `local`.
    Equal records give equal bytes, in whatever order they come (with one version of pyarrow and datasets). Raises
    UserError for an image that is missing, or is not the one whose hash was taken.
    """
    places, local, licences = _places(records)
    shards = list(_shards(places, shard_bytes))
    data, part = folder / "data", folder / "data.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {}
    with Bar(f"release {name}", len(places), hidden=len(places) <= SHORT) as bar:
        done = 0
        for file, shard in shards:
            _write(part / file, _rows(records, shard))
            done += len(shard)
            bar.show(done)
            facts = {"records": len(shard), "bytes": (part / file).stat().st_size, "sha256": file_digest(part / file)}
            files[f"data/{file}"] = facts
    sync(part)
    shutil.rmtree(data, ignore_errors=True)
    part.replace(data)
    summary = {
        "name": name,
        "records": len(places),
        "splits": {split: count for split in SPLITS if (count := sum(place.split == split for place in places))},
        "files": files,
        "licences": _table(("source", "revision", "licence"), licences),
        "local": _table(("source", "licence"), local),
        "make_up": make_up(_in(records, places)),
    }
    write_json(folder / SUMMARY, summary)
    return summary


def row_of(record: Record, image_root: Path) -> dict[str, Any]:
    """A record as a row of the release, images embedded and named by their content."""
    cells, digests = [], []
    for name in record.images:
        try:
            content = (image_root / name).read_bytes()
        except OSError as error:
            raise UserError(f"image {image_root / name} cannot be read ({error.strerror}): restore it") from error
        cells.append({"bytes": content, "path": image_name(content)})
        digests.append(hashlib.sha256(content).hexdigest())
    known = [image["sha256"] for image in record.provenance.get("images", []) if "sha256" in image]
    if known and known != digests:
        raise UserError(f"record {record.id!r}: its images have changed since they were read; run the data stage anew")
    provenance = record.provenance
    shown = {*PROVENANCE, *JSON_PROVENANCE}
    labels = provenance.get("labels") or []
    evidence = next((label.get("evidence") for label in labels if label.get("label") == primary(record)), None)
    options = record.options
    return {
        **{field: getattr(record, field) for field in FIELDS},
        "kind": record.asked_as,
        **{field: _json(getattr(record, field)) for field in JSON_FIELDS},
        **{field: provenance.get(field) for field in PROVENANCE},
        **{field: _json(provenance[field]) if field in provenance else None for field in JSON_PROVENANCE},
        "provenance": _json({key: value for key, value in provenance.items() if key not in shown}),
        "specialties": list(record.specialties),
        "images": cells,
        "image_sha256": digests,
        "options": None if options is None else [{"letter": key, "text": text} for key, text in options.items()],
        "answer_text": options.get(record.answer) if options else record.answer,
        "primary": primary(record),
        "evidence": evidence if isinstance(evidence, str | None) else _json(evidence),
        "perspective": record.trace and record.trace.perspective,
        "trace": list(record.trace.steps) if record.trace else None,
        "trace_answer": record.trace and record.trace.answer,
        "completion": target_text(record) if record.trace else None,
        "source_text": record.source,
        "source_id": str(provenance.get("source_id", record.id)),
    }


def features() -> Any:
    """The columns, in the words of `datasets`."""
    from datasets import Features, Image, List, Value  # lazily: it takes a second

    kinds = dict.fromkeys(TEXTS, Value("string")) | {
        "images": List(Image()), "image_sha256": List(Value("string")), "specialties": List(Value("string")),
        "trace": List(Value("string")), "redistribute": Value("bool"),
        "options": List({"letter": Value("string"), "text": Value("string")}),
    }  # fmt: skip
    first = ("id", "images", "question", "options", "answer", "answer_text", "completion", "trace", "perspective")
    return Features({name: kinds[name] for name in (*first, *(name for name in kinds if name not in first))})


def _places(records: Records) -> tuple[list[Place], Counter[tuple[str, ...]], Counter[tuple[str, ...]]]:
    """The records that may be released, in the order of the release; how many others there are by source and licence,
    and how many of these by source, revision and licence."""
    places: list[Place] = []
    local: Counter[tuple[str, ...]] = Counter()
    licences: Counter[tuple[str, ...]] = Counter()
    sizes: dict[str, int] = {}
    for record, offset in zip(records, _offsets(records.folder / RECORDS), strict=True):
        if record.provenance.get("redistribute") is not True:
            local[source_of(record), record.license] += 1
            continue
        licences[source_of(record), str(record.provenance.get("revision") or ""), record.license] += 1
        for name in record.images:
            if name not in sizes:
                path = records.image_root / name
                sizes[name] = path.stat().st_size if path.is_file() else 0  # `row_of` says what is wrong
        order = hashlib.sha256(record.id.encode()).digest()
        places.append(Place(record.split, order, offset, sum(sizes[name] for name in record.images)))
    return sorted(places, key=lambda place: (SPLITS.index(place.split), place.order)), local, licences


def _offsets(path: Path) -> Iterator[int]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield offset
            offset += len(line)


def _in(records: Records, places: Iterable[Place]) -> Iterator[Record]:
    with (records.folder / RECORDS).open("rb") as file:
        for place in places:
            file.seek(place.offset)
            yield record_of(file.readline())


def _shards(places: Sequence[Place], shard_bytes: int) -> Iterator[tuple[str, list[Place]]]:
    for split in SPLITS:
        shards: list[list[Place]] = []
        size = 0
        for place in places:
            if place.split != split:
                continue
            if not shards or size + place.size > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(place)
            size += place.size
        for number, shard in enumerate(shards):
            yield f"{split}-{number:05d}-of-{len(shards):05d}.parquet", shard


def _rows(records: Records, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    return (row_of(record, records.image_root) for record in _in(records, places))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    schema = features().arrow_schema
    with pq.ParquetWriter(path, schema, version="2.6", compression="zstd", compression_level=3) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            group.append(row)
            size += sum(len(cell["bytes"]) for cell in row["images"])
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))
    sync(path)


def _table(names: Sequence[str], counts: Counter[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [{**dict(zip(names, key, strict=True)), "records": count} for key, count in sorted(counts.items())]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
