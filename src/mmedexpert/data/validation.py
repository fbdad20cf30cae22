"""Which records can be used: fields, images and groups are checked before anything is trained or asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from mmedexpert.data.images import check_image
from mmedexpert.data.record import KINDS, SPLITS, TEXT, Record
from mmedexpert.data.records import line_of
from mmedexpert.data.table import alike
from mmedexpert.errors import UserError
from mmedexpert.runtime.progress import track

GROUP_KEEPS = ("test", "val", "train")  # ours: a group found in several splits stays where it is scarcest


TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


Bad = list[tuple[str, str]]  # (record id, reason)


class LeftOut(list[tuple[str, str]]):
    """(record id, reason) of what is left out; `changed` counts by kind what is used, but not as it stands there: a
    picture scaled, a label folded."""

    def __init__(self, found: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(found)
        self.changed: Counter[str] = Counter()


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
    if not record.images and record.modality != TEXT:
        return f"it names no image, and its modality is not {TEXT!r}"
    if escaping := [name for name in record.images if _escapes(name)]:
        return f"image path {escaping[0]!r} is absolute or leaves the image root"
    where = f"(image {_names(record)})" if record.images else "(no image)"
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
    comes_to = (record.trace.answer if record.trace else None) or record.answer
    if tag := TAG.search("\n".join([*steps, *(record.options or {}).values(), record.answer, comes_to])):
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
    if comes_to not in record.options:
        return f"the trace's answer {comes_to!r} is none of the options {', '.join(record.options)} {where}"
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
        line_of(record)
    except UnicodeEncodeError as error:
        return f"a text of it is no Unicode ({error.reason}): mend or remove it"
    return None


def _escapes(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _names(record: Record) -> str:
    return ", ".join(record.images)
