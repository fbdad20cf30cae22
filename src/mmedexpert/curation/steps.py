"""What the steps of the funnel share: records streamed from file to file, and what each step drops and why.

`Record.provenance` of a curated record:

    source       id of the source in the config, such as `vqa_rad`
    revision     of the source: a commit of the hub, or a digest of the folder it was read from
    redistribute whether its licence lets the record be released
    images       of each image {"sha256": of its bytes, "pixels": of its RGB pixels, "phash": 64 hex digits, "grey_std"}
                 and where opening it changed or noticed something, "changes": what (data/images.py)
    source_reasoning  the source's own, where it has one: no trace of ours
    labels       specialties found, [{"label", "score", "method", "evidence", "version"}] (data/specialties.py)
    checks       what steps found out, by the step's name, such as {"difficulty": {"passed": 5, "of": 16}}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.records import RECORDS, line_of, stream_records
from mmedexpert.runtime.files import sync
from mmedexpert.runtime.progress import SHORT, Bar
from mmedexpert.runtime.runs import write_json

DROPPED, COUNTS = "dropped.jsonl", "counts.json"


@dataclass(frozen=True)
class Records:
    """The records of a step's folder, read anew at each pass, so that they are never all in memory."""

    folder: Path
    image_root: Path

    def __iter__(self) -> Iterator[Record]:
        return stream_records(self.folder / RECORDS)

    def __len__(self) -> int:
        return int(self.counts["out"])

    @property
    def counts(self) -> dict[str, Any]:
        """`in`, `out`, and `reasons`: reason to how many were dropped for it."""
        return json.loads((self.folder / COUNTS).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Verdict:
    """What a step says of a record: kept (as it is here) or, with a reason, dropped.

    `reason` is one of few phrases, which are counted ("question asked before"); `detail` is of this record ("as x-12").
    """

    record: Record
    reason: str = ""
    detail: str = ""


Step = Callable[[Records], Iterator[Verdict]]  # each record once, in order; steps that make records out of one: several


def run_step(name: str, step: Step, records: Records, folder: Path) -> Records:
    """Stream records through a step into `folder`: those kept, those dropped with their reasons, and the counts."""
    given = len(records)

    def shown(bar: Bar) -> Iterator[Verdict]:
        dropped = 0
        for done, verdict in enumerate(step(records)):
            dropped += bool(verdict.reason)
            bar.show(min(done, given), {"dropped": dropped})
            yield verdict

    with Bar(name, given, hidden=given <= SHORT) as bar:
        return write_step(name, shown(bar), folder, records.image_root, given=given)


def write_step(name: str, verdicts: Iterator[Verdict], folder: Path, image_root: Path, *, given: int | None) -> Records:
    """What a step said, as files of `folder`; each is written whole or not at all. `given`: records it was asked about,
    None where it made them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, dropped = folder / f"{RECORDS}.part", folder / f"{DROPPED}.part"
    reasons: Counter[str] = Counter()
    out = 0
    with kept.open("wb") as good, dropped.open("wb") as bad:
        for verdict in verdicts:
            if verdict.reason:
                reasons[verdict.reason] += 1
                bad.write(_dropped(name, verdict))
            else:
                out += 1
                good.write(line_of(verdict.record))
    for part in (kept, dropped):
        sync(part)
        part.replace(part.with_suffix(""))
    total = out + sum(reasons.values()) if given is None else given
    counts = {"step": name, "in": total, "out": out, "reasons": dict(sorted(reasons.items()))}
    write_json(folder / COUNTS, counts)
    return Records(folder, image_root)


def checked(record: Record, step: str, **found: Any) -> Record:
    """The record with what a step found out about it in `provenance["checks"]`."""
    before = record.provenance.get("checks", {})
    checks = {**before, step: {**before.get(step, {}), **found}}
    return replace(record, provenance={**record.provenance, "checks": checks})


def _dropped(step: str, verdict: Verdict) -> bytes:
    record = verdict.record
    row = {
        "id": record.id, "source": record.provenance.get("source", record.source), "step": step,
        "reason": verdict.reason, "detail": verdict.detail,
    }  # fmt: skip
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
