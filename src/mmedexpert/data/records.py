"""Reading, writing and fingerprinting a folder of records (`records.jsonl`, `dataset.json`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record, Trace
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.progress import track

RECORDS, DATASET = "records.jsonl", "dataset.json"
REQUIRED = frozenset(f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING)
KNOWN = frozenset(f.name for f in fields(Record))
LISTS = ("images", "specialties")
TEXTS = tuple(f.name for f in fields(Record) if f.type == "str")


def save_records(
    records: Sequence[Record],
    folder: Path,
    image_root: Path,
    *,
    skipped: Sequence[tuple[str, str]] = (),
    source_root: Path | None = None,
) -> None:
    """Write `records.jsonl` (one JSON object per line, the keys of Record) and `dataset.json`, each atomically.

    `image_root` is stored relative when it is `folder` or lies in it (the folder can then be moved), else absolute;
    where it lies in `source_root`, what the records were read from, `move_root` can follow that one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root, home = image_root.resolve(), folder.resolve()
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        for specialty in record.specialties:
            row = counts.setdefault(record.split, {})
            row[specialty] = row.get(specialty, 0) + 1
    dataset = {
        "image_root": root.relative_to(home).as_posix() if root.is_relative_to(home) else root.as_posix(),
        "source_root": source_root and source_root.resolve().as_posix(),
        "counts": counts,
        "skipped": [{"id": record_id, "reason": reason} for record_id, reason in skipped],
    }
    write_atomic(folder / RECORDS, b"".join(map(line_of, records)))
    write_atomic(folder / DATASET, (json.dumps(dataset, ensure_ascii=False, indent=2) + "\n").encode())


def move_root(folder: Path, source_root: Path | None) -> None:
    """Let records whose images lie in their source find them where it lies now: its place is not its content."""
    try:
        dataset = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        before, images = dataset["source_root"], Path(dataset["image_root"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # `load_records` says what is wrong
    if source_root is None or before is None or not images.is_absolute() or not images.is_relative_to(before):
        return
    now = source_root.resolve()
    if now != Path(before):
        moved = {"image_root": (now / images.relative_to(before)).as_posix(), "source_root": now.as_posix()}
        write_atomic(folder / DATASET, (json.dumps({**dataset, **moved}, ensure_ascii=False, indent=2) + "\n").encode())


def load_records(folder: Path) -> tuple[list[Record], Path]:
    """The records of a folder written by `save_records` (or by hand) and their image root.

    Raises UserError naming file and line for missing files, broken JSON, and missing, unknown or mistyped keys.
    """
    try:
        dataset = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        image_root = folder / dataset["image_root"]
        text = (folder / RECORDS).read_text(encoding="utf-8")
    except OSError as error:
        fix = "run stage=data first, or check the data folder"
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): {fix}") from error
    except (ValueError, KeyError, TypeError) as error:
        fix = "write it anew with stage=data"
        raise UserError(f"{folder}: {DATASET} (needs image_root) or {RECORDS} is damaged ({error}): {fix}") from error
    return list(_parsed(text, folder / RECORDS)), image_root.resolve()


@lru_cache(maxsize=4)  # a command reads its data set many times; another text is another key
def _parsed(text: str, path: Path) -> tuple[Record, ...]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a text
        if not line.strip():
            continue
        try:
            records.append(_from_json(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}; mend or delete the line") from error
    return tuple(records)


def stream_records(path: Path) -> Iterator[Record]:
    """The records of a JSON lines file one after the other, in constant memory; UserError naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        yield record_of(line)
                except ValueError as error:
                    raise UserError(f"{path} line {number}: {error}; mend or delete the line") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run the step before it again") from error


def line_of(record: Record) -> bytes:
    """A record as its line of a JSON lines file."""
    return json.dumps(plain(record), ensure_ascii=False).encode() + b"\n"


def record_of(line: bytes) -> Record:
    """The record of such a line. Raises ValueError for what is none."""
    return _from_json(json.loads(line))


def plain(record: Record) -> dict[str, Any]:
    """A record as a dictionary, as `asdict`, which copies all; without provenance where it has none."""
    values = {**vars(record), "trace": record.trace and vars(record.trace)}
    return values if record.provenance else {key: value for key, value in values.items() if key != "provenance"}


def fingerprint(records: Sequence[Record], image_root: Path) -> str:
    """sha256 of the records (in order, canonical JSON) and of their images' bytes; the place of the root is no part.

    Raises UserError for an image that is missing or unreadable.
    """
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(plain(record), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    for name in track(sorted({name for record in records for name in record.images}), "fingerprint of images"):
        try:
            content = file_digest(image_root / name)
        except OSError as error:
            raise UserError(f"image {image_root / name} cannot be read ({error.strerror}): restore it") from error
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _from_json(data: Any) -> Record:
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    if missing := sorted(REQUIRED - set(data)):
        raise ValueError(f"missing {', '.join(missing)}")
    if unknown := sorted(set(data) - KNOWN):
        raise ValueError(f"unknown {', '.join(unknown)} (known: {', '.join(sorted(KNOWN))})")
    options, trace = data["options"], data.get("trace")
    mistyped = [name for name in TEXTS if not isinstance(data.get(name, ""), str)]
    mistyped += [name for name in LISTS if not _texts(data[name])]
    if options is not None and not (isinstance(options, dict) and _texts(list(options.values()))):
        mistyped.append("options")
    if trace is not None and not _is_trace(trace):
        mistyped.append("trace")
    mistyped += [name for name in ("latent", "groups", "provenance") if not isinstance(data.get(name, {}), dict)]
    if mistyped:
        raise ValueError(f"wrong type of value in {', '.join(mistyped)}")
    kept: dict[str, Any] = {**data, "images": tuple(data["images"]), "specialties": tuple(data["specialties"])}
    kept["trace"] = Trace(trace["perspective"], tuple(trace["steps"]), trace.get("answer")) if trace else None
    return Record(**kept)


def _is_trace(value: Any) -> bool:
    if not isinstance(value, dict) or {*value} - {"answer"} != {"perspective", "steps"}:
        return False
    answer = value.get("answer")
    return isinstance(value["perspective"], str) and _texts(value["steps"]) and isinstance(answer, str | None)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
