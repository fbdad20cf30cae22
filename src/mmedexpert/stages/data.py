"""`stage=data`: build, validate and fingerprint the data set (records.jsonl and images)."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

from mmedexpert.build import build
from mmedexpert.data.record import Record
from mmedexpert.data.records_io import fingerprint, save_records, validate
from mmedexpert.errors import UserError
from mmedexpert.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages.common import stage_run

TEXT_FILES = (".csv", ".json", ".jsonl", ".yaml")


def run(config: Config) -> dict[str, Run]:
    """The data set, as the only run."""
    return {"data": dataset(config)}


def dataset(config: Config) -> Run:
    """The data set of the config; a changed source folder gives another run."""
    settings = config.data
    source = {key: value for key, value in settings.source.items() if not key.startswith("_") or key == "_target_"}
    if settings.source.get("_needs_root_") and settings.root is None:
        raise UserError(f"data={settings.name} reads a folder: give data.root=<folder>")
    root = Path(settings.root) if settings.root else None
    key = {
        "source": source,
        "on_bad_record": settings.on_bad_record,
        "limit": settings.limit,
        "root": root_fingerprint(root),
    }

    def work(run: Run) -> dict[str, float]:
        with run.phase("build"):
            records, image_root, bad = build(source, "data.source", root=root, out_dir=run.folder, seed=settings.seed)
        with run.phase("validate"):
            records, bad = validate(records, image_root, bad=bad, on_bad_record=settings.on_bad_record)
        if settings.limit is not None:
            records = first_of_each(records, settings.limit)
        if not records:
            raise UserError(f"data={settings.name} has no usable record in {root or run.folder}")
        save_records(records, run.folder, image_root, skipped=bad)
        run.notes["data_fingerprint"] = fingerprint(records, image_root)
        run.notes["skipped_records"] = [{"id": identity, "reason": reason} for identity, reason in bad]
        counts: Counter[str] = Counter()
        for record in records:
            counts[f"records/{record.split}"] += 1
            for name in record.specialties:
                counts[f"records/{record.split}/{name}"] += 1
        return {**{k: float(v) for k, v in sorted(counts.items())}, "records/skipped": float(len(bad))}

    # its own seed: under every seed of training the same questions are asked
    return stage_run(config, "data", settings.name, key, work, seed=settings.seed)


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
def root_fingerprint(root: Path | None) -> str | None:
    """Names and sizes of all files and the content of the text files: cheap, and blind to where the folder lies."""
    if root is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        if path.suffix in TEXT_FILES:
            digest.update(path.read_bytes())
    return digest.hexdigest()
