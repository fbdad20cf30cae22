"""`stage=data`: build, validate and fingerprint the data set (records.jsonl and images)."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

from rich.console import Console

from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint, move_root, save_records
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.runtime.build import build, values_of
from mmedexpert.runtime.fingerprints import folder_digest
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import rule_of, text_of, versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import stage_run

FUNNEL = "funnel.json"  # of a set that was curated


def run(config: Config) -> dict[str, Run]:
    """The data set, as the only run; of one that was curated the funnel is shown."""
    made = dataset(config)
    if (made.folder / FUNNEL).is_file() and rank() == 0:
        from mmedexpert.curation.funnel import funnel_table

        Console().print(funnel_table(json.loads((made.folder / FUNNEL).read_text(encoding="utf-8"))))
    return {"data": made}


def dataset(config: Config) -> Run:
    """The data set of the config; a changed source folder gives another run."""
    settings = config.data
    if settings.sources:
        from mmedexpert.stages.release import curated  # a second of libraries that no other data set needs

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
