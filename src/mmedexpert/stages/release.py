"""What the funnel of `data=mmedexpert` leaves: the data set's folder, a page of samples, and what may be given away."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmedexpert.curation.card import write_card
from mmedexpert.curation.croissant import write_croissant
from mmedexpert.curation.funnel import funnel_figure, funnel_markdown, read_counts
from mmedexpert.curation.page import write_page
from mmedexpert.curation.release import release
from mmedexpert.curation.steps import DROPPED, Records, Verdict, run_step
from mmedexpert.data.records import RECORDS, fingerprint, save_records
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.runs import Run, clean, git_sha, write_json
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.curate import Step, funnel, settings_of, teacher_of
from mmedexpert.stages.data import FUNNEL
from mmedexpert.stages.sources import REPORT


def curated(config: Config) -> Run:
    """The set that the funnel of `stages/curate.py` leaves: its records and images, what was rejected and why, a page
    of samples, and `release/`, what may be given away of it."""
    settings, curate = config.data, settings_of(config)
    steps = funnel(config)
    last = steps[-1]
    teacher = teacher_of(config)

    def work(run: Run) -> dict[str, float]:
        with run.phase("images"):
            for record in last.records:
                for name in record.images:
                    _link(last.images / name, run.folder / "images" / name)
        run_step("fields", partial(_usable, limit=settings.limit), last.records, run.folder)
        kept = Records(run.folder, run.folder / "images")
        records = list(kept)
        if not records:
            raise UserError(_nothing_left(settings.name, steps))
        save_records(records, run.folder, kept.image_root)
        counts = read_counts([*(step.run.folder for step in steps), run.folder])
        rejected = b"".join((step.run.folder / DROPPED).read_bytes() for step in steps)
        write_atomic(run.folder / "rejected.jsonl", rejected + (run.folder / DROPPED).read_bytes())
        write_json(run.folder / FUNNEL, counts)
        write_atomic(run.folder / "funnel.md", funnel_markdown(counts).encode())
        figure = funnel_figure(counts, run.folder / "funnel.png")
        write_page(kept, run.folder / "page.html", title=settings.name, samples=curate.samples, seed=settings.seed)
        with run.phase("release"):
            folder = run.folder / "release"
            clean(run.folder, ("release",))  # of a try that was killed
            summary = release(kept, folder, name=settings.name)
            shutil.copyfile(figure, folder / figure.name)
            write_card(
                folder, summary=summary, steps=counts, settings=_reports(steps), teacher=teacher, command=sys.argv,
                commit=git_sha(), figure=figure.name,
            )  # fmt: skip
            write_croissant(folder, summary=summary, steps=counts, teacher=teacher)
        run.notes["data_fingerprint"] = fingerprint(records, kept.image_root)
        numbers: Counter[str] = Counter()
        for record in records:
            numbers[f"records/{record.split}"] += 1
            numbers[f"traced/{record.split}"] += record.trace is not None
            for name in record.specialties:
                numbers[f"records/{record.split}/{name}"] += 1
        numbers["released"] = summary["records"]
        return {**{k: float(v) for k, v in sorted(numbers.items())}, "read": float(counts[0]["in"])}

    key = {
        "name": settings.name, "samples": curate.samples, "limit": settings.limit, "rules": versions("release"),
    }  # fmt: skip
    inputs = {"funnel": last.run.run_id, "records": file_digest(last.run.folder / RECORDS)}
    return stage_run(config, "data", settings.name, key, work, inputs, seed=settings.seed)


def _usable(records: Records, *, limit: int | None) -> Iterator[Verdict]:
    """What can be trained on and asked: the last guard, which the steps before should leave nothing to do."""
    kept: Counter[tuple[str, str]] = Counter()
    found = list(records)
    good, bad = validate(found, records.image_root, on_bad_record="skip", check_images=False)
    usable, why = {record.id for record in good}, dict(bad)
    for record in found:
        kept[record.split, record.specialties[0]] += record.id in usable
        if record.id not in usable:
            yield Verdict(record, "cannot be used", why.get(record.id, ""))
        elif limit is not None and kept[record.split, record.specialties[0]] > limit:
            yield Verdict(record, "above data.limit")
        else:
            yield Verdict(record)


def _link(source: Path, target: Path) -> None:
    """One file under two names where the file system can, else a copy: the data set's folder stands on its own."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def _nothing_left(name: str, steps: Sequence[Step]) -> str:
    """Where the last record went, and why."""
    for step in steps:
        counts = step.records.counts
        if not counts["out"]:
            most = max(counts["reasons"], key=counts["reasons"].get, default="nothing came in")
            return (
                f"data={name}: step {counts['step']} left none of {counts['in']} records (most: {most}); each with its "
                f"reason is in {step.run.folder / DROPPED}"
            )
    return f"data={name}: no record can be used"


def _reports(steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """What the steps' counts do not tell, a row a setting."""
    told: dict[str, dict[str, Any]] = {}
    for step in steps:
        path = step.run.folder / REPORT
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found if isinstance(found, list) else [{"what": key, "value": value} for key, value in found.items()]
        told[step.records.counts["step"]] = {
            str(row["what"]): row["value"] for row in rows if "what" in row and "value" in row
        }
    return told
