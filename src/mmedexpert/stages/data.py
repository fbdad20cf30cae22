"""`stage=data`: build, validate and fingerprint the data set (records.jsonl and images)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mmedexpert.curation.card import write_card
from mmedexpert.curation.croissant import write_croissant
from mmedexpert.curation.funnel import funnel_figure, funnel_markdown, funnel_table, read_counts
from mmedexpert.curation.page import write_page
from mmedexpert.curation.release import release
from mmedexpert.curation.steps import COUNTS, DROPPED, Records, Verdict, run_step
from mmedexpert.data.record import Record
from mmedexpert.data.records import RECORDS, fingerprint, move_root, save_records
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.runtime.build import build, values_of
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.fingerprints import file_digest, folder_digest
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, clean, console, git_sha, write_json
from mmedexpert.runtime.versions import rule_of, text_of, versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.curate import Step, funnel, settings_of, teacher_of
from mmedexpert.stages.sources import REPORT

FUNNEL = "funnel.json"


def run(config: Config) -> dict[str, Run]:
    """The data set, as the only run; of one that was curated the funnel is shown."""
    made = dataset(config)
    if (made.folder / FUNNEL).is_file() and rank() == 0:
        Console().print(funnel_table(json.loads((made.folder / FUNNEL).read_text(encoding="utf-8"))))
    return {"data": made}


def dataset(config: Config) -> Run:
    """The data set of the config; a changed source folder gives another run."""
    settings = config.data
    if settings.sources:
        return curated(config)
    source = {"_target_": settings.source.get("_target_"), **values_of(settings.source)}
    if settings.source.get("_needs_root_") and settings.root is None:
        raise UserError(f"data={settings.name} reads a folder: give data.root=<folder>")
    root = Path(settings.root) if settings.root else None
    key = {
        "source": values_of(source),
        "on_bad_record": settings.on_bad_record,
        "limit": settings.limit,
        "root": root_fingerprint(root, Path(config.paths.outputs)),
        "rules": {**versions("splits", "images"), **rule_of(source["_target_"])},
    }
    if root is None:  # drawn by the guidelines
        key["guidelines"] = text_of("guidelines.yaml")

    def work(run: Run) -> dict[str, float]:
        with run.phase("build"):
            records, image_root, bad = build(source, "data.source", root=root, out_dir=run.folder, seed=settings.seed)
        with run.phase("validate"):
            records, bad = validate(records, image_root, bad=bad, on_bad_record=settings.on_bad_record)
        for what, count in sorted(bad.changed.items()):
            console.print(f"{settings.name}: {count} {what}", highlight=False)
        if settings.limit is not None:
            records = first_of_each(records, settings.limit)
        if not records:
            raise UserError(f"data={settings.name} has no usable record in {root or run.folder}")
        save_records(records, run.folder, image_root, skipped=bad, source_root=root)
        run.notes["data_fingerprint"] = fingerprint(records, image_root)
        run.notes["changed"] = dict(sorted(bad.changed.items()))
        run.notes["skipped_records"] = [{"id": identity, "reason": reason} for identity, reason in bad]
        counts: Counter[str] = Counter()
        for record in records:
            counts[f"records/{record.split}"] += 1
            for name in record.specialties:
                counts[f"records/{record.split}/{name}"] += 1
        counts.update({f"changed/{what}": count for what, count in bad.changed.items()})
        return {**{k: float(v) for k, v in sorted(counts.items())}, "records/skipped": float(len(bad))}

    # its own seed: under every seed of training the same questions are asked
    run = stage_run(config, "data", settings.name, key, work, seed=settings.seed)
    move_root(run.folder, root)
    return run


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
        kept = run_step("fields", partial(_usable, limit=settings.limit), last.records, run.folder)
        kept = Records(run.folder, run.folder / "images")
        records = list(kept)
        if not records:
            raise UserError(_nothing_left(settings.name, [step.run for step in steps]))
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


def _nothing_left(name: str, runs: Sequence[Run]) -> str:
    """Where the last record went, and why."""
    for run in runs:
        counts = json.loads((run.folder / COUNTS).read_text(encoding="utf-8"))
        if not counts["out"]:
            most = max(counts["reasons"], key=counts["reasons"].get, default="nothing came in")
            return (
                f"data={name}: step {counts['step']} left none of {counts['in']} records (most: {most}); each with its "
                f"reason is in {run.folder / DROPPED}"
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
        name = json.loads((step.run.folder / COUNTS).read_text(encoding="utf-8"))["step"]
        told[name] = {str(row["what"]): row["value"] for row in rows if "what" in row and "value" in row}
    return told


def first_of_each(records: list[Record], limit: int) -> list[Record]:
    """At most `limit` records per split and specialty, in order: for trying things out."""
    kept: Counter[tuple[str, str]] = Counter()
    chosen = []
    for record in records:
        kept[record.split, record.specialties[0]] += 1
        if kept[record.split, record.specialties[0]] <= limit:
            chosen.append(record)
    return chosen


@cache  # a command asks for its data set many times
def root_fingerprint(root: Path | None, outputs: Path) -> str | None:
    """What a source folder holds, without results that lie in it. UserError where they are one folder."""
    if root is None:
        return None
    if root.resolve() == outputs.resolve():
        raise UserError(f"paths.outputs={outputs} is the folder of the data: choose another, such as {outputs}/results")
    return folder_digest(root, leave_out=outputs)
