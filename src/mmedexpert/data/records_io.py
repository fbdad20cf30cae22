"""Reading, writing, checking and fingerprinting a folder of records (`records.jsonl`, `dataset.json`)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mmedexpert.data.images import check_image
from mmedexpert.data.record import KINDS, SPLITS, Record, Trace
from mmedexpert.data.table import alike
from mmedexpert.errors import UserError
from mmedexpert.fingerprints import file_digest
from mmedexpert.progress import track

RECORDS, DATASET = "records.jsonl", "dataset.json"
GROUP_KEEPS = ("test", "val", "train")  # ours: a group found in several splits stays where it is scarcest
REQUIRED = frozenset(f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING)
KNOWN = frozenset(f.name for f in fields(Record))
LISTS = ("images", "specialties")
TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
TEXTS = tuple(f.name for f in fields(Record) if f.type == "str")

Bad = list[tuple[str, str]]  # (record id, reason)


class LeftOut(list[tuple[str, str]]):
    """(record id, reason) of what is left out; `changed` counts by kind what is used, but not as it stands there: a
    picture scaled, a label folded."""

    def __init__(self, found: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(found)
        self.changed: Counter[str] = Counter()


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
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    write_atomic(folder / RECORDS, lines.encode())
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
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a text
        if not line.strip():
            continue
        try:
            records.append(_from_json(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{folder / RECORDS} line {number}: {error}; mend or delete the line") from error
    return records, image_root.resolve()


def validate(
    records: Sequence[Record],
    image_root: Path,
    *,
    bad: Iterable[tuple[str, str]] = (),
    on_bad_record: str = "error",
    check_images: bool = True,
) -> tuple[list[Record], LeftOut]:
    """The records that can be used, and (record id, reason) for the others; `bad` are those a source already found.

    Each distinct image is opened once, as it will be for the model; what that changes is counted (`LeftOut`). With
    "error" the first problem raises UserError. A group that occurs in several splits keeps its test records, else its
    val records: evaluation never meets an image seen in training.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record is 'error' or 'skip', not {on_bad_record!r}")
    found = LeftOut()
    found.changed.update(getattr(bad, "changed", {}))

    def refuse(record_id: str, reason: str) -> None:
        if on_bad_record == "error":
            advice = "mend or remove it, or leave such records out with data.on_bad_record=skip"
            raise UserError(f"record {record_id!r}: {reason}; {advice}")
        found.append((record_id, reason))

    for record_id, reason in bad:
        refuse(record_id, reason)
    good = list(records)
    checks: list[Callable[[list[Record]], Iterator[str | None]]] = [_field_faults]  # cheap ones before decoding images
    if check_images:
        checks.append(partial(image_faults, image_root=image_root, changed=found.changed))
    for faults in (*checks, _group_faults):
        kept: list[Record] = []
        for record, fault in zip(good, faults(good), strict=True):
            if fault is None:
                kept.append(record)
            else:
                refuse(record.id, fault)
        good = kept
    return good, found


def fingerprint(records: Sequence[Record], image_root: Path) -> str:
    """sha256 of the records (in order, canonical JSON) and of their images' bytes; the place of the root is no part.

    Raises UserError for an image that is missing or unreadable.
    """
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(asdict(record), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    for name in track(sorted({name for record in records for name in record.images}), "fingerprint of images"):
        try:
            content = file_digest(image_root / name)
        except OSError as error:
            raise UserError(f"image {image_root / name} cannot be read ({error.strerror}): restore it") from error
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: else a loss of power may undo a renaming."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows, which has no such call
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _field_faults(records: list[Record]) -> Iterator[str | None]:
    seen: set[str] = set()
    for record in records:
        yield f"the id occurs twice (here with image {_names(record)})" if record.id in seen else _wrong(record)
        seen.add(record.id)


def image_faults(
    records: list[Record], *, image_root: Path, changed: Counter[str] | None = None
) -> Iterator[str | None]:
    """For each record what is wrong with one of its images, or None; each distinct image is opened once.

    `changed` counts the images of which `images.changes` has something to tell.
    """
    counts = Counter[str]() if changed is None else changed
    fault_of: dict[str, str | None] = {}
    distinct = len({name for record in records for name in record.images})
    for record in track(records, "checking images", size=distinct):
        for name in record.images:
            if name not in fault_of:
                try:
                    counts.update(f"images: {one}" for one in check_image(image_root / name) or ())
                    fault_of[name] = None
                except UserError as error:
                    fault_of[name] = str(error)
        yield next((fault for name in record.images if (fault := fault_of[name])), None)


def _group_faults(records: list[Record]) -> Iterator[str | None]:
    splits_of: dict[str, set[str]] = {}
    for record in records:
        splits_of.setdefault(record.image_group, set()).add(record.split)
    for record in records:
        splits = [split for split in GROUP_KEEPS if split in splits_of[record.image_group]]
        if record.split == splits[0]:
            yield None
        else:
            yield f"image group {record.image_group!r} ({_names(record)}) is in both {' and '.join(splits)}"


def _wrong(record: Record) -> str | None:
    """What is wrong with the record's own fields, or None."""
    if fault := not_text(record):
        return fault
    if not record.images:
        return "it names no image"
    if escaping := [name for name in record.images if _escapes(name)]:
        return f"image path {escaping[0]!r} is absolute or leaves the image root"
    where = f"(image {_names(record)})"
    if not record.question.strip():
        return f"the question is empty {where}"
    if not record.specialties:
        return f"it has no specialty {where}"
    if record.split not in SPLITS:
        return f"split {record.split!r} is none of {', '.join(SPLITS)} {where}"
    if not record.image_group:
        return f"image_group is empty {where}"
    if not record.answer.strip():
        return f"the answer is empty {where}"
    steps = record.trace.steps if record.trace else ()
    if tag := TAG.search("\n".join([*steps, *(record.options or {}).values(), record.answer])):
        return f"trace, option or answer holds the tag {tag[0]}, by which answers are read: take it out {where}"
    if record.asked_as not in KINDS or (record.asked_as == "choice") != (record.options is not None):
        return f"kind {record.kind!r} does not fit (choice has options; yes_no, closed and open have none) {where}"
    if record.options is None:
        if re.fullmatch(r"\s*[A-Z]\s*", record.answer):
            return f"the answer is the letter {record.answer.strip()} but there are no options {where}"
        return None
    if len(record.options) < 2:
        return f"it has {len(record.options)} option(s), a choice needs two or more {where}"
    if record.answer not in record.options:
        return f"answer {record.answer!r} is none of the options {', '.join(record.options)} {where}"
    if found := twins(record):
        return f"the text of answer {record.answer} stands under another letter, too ({', '.join(found)}) {where}"
    return None


def twins(record: Record) -> list[str]:
    """The letters under which the right answer's text stands a second time."""
    options = record.options or {}
    return [x for x, text in options.items() if x != record.answer and alike(text, options[record.answer])]


def not_text(record: Record) -> str | None:
    """What keeps a record's texts from being written and tokenised (half of a surrogate pair out of JSON), or None."""
    try:
        json.dumps(asdict(record), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"a text of it is no Unicode ({error.reason}): mend or remove it"
    return None


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
    mistyped += [name for name in ("latent", "groups") if not isinstance(data.get(name, {}), dict)]
    if mistyped:
        raise ValueError(f"wrong type of value in {', '.join(mistyped)}")
    kept: dict[str, Any] = {**data, "images": tuple(data["images"]), "specialties": tuple(data["specialties"])}
    kept["trace"] = Trace(trace["perspective"], tuple(trace["steps"])) if trace else None
    return Record(**kept)


def _is_trace(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"perspective", "steps"}:
        return False
    return isinstance(value["perspective"], str) and _texts(value["steps"])


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _escapes(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _names(record: Record) -> str:
    return ", ".join(record.images)
