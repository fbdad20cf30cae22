"""What two outputs folders of one command differ in, but for times and process numbers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

# fields that tell how long something took, when, on how much memory or in how many tries; all else has to be equal
OF_TIME = re.compile(
    r"timing_s/|perf/|step_time|_seconds$|^seconds|^tries$|^finished$|^peak_memory_bytes$|^latency$|^made_at$"
)
# no results: locks, W&B's own logs, and memories whose rows tell when they were made
LEFT_OUT = re.compile(r"(^|/)(\.[^/]*\.lock|wandb|wandb\.json|image_fingerprints\.jsonl|ledger\.sqlite[^/]*)(/|$)")


def differences(one: Path, other: Path) -> list[str]:
    """Files, by their path, that only one of two outputs folders has or that differ; none where both are the same."""
    files, others = contents(one), contents(other)
    return sorted(name for name in {*files, *others} if files.get(name) != others.get(name))


def contents(outputs: Path) -> dict[str, Any]:
    """Path to what a file holds without the fields of time; of a link where it leads."""
    found: dict[str, Any] = {}
    for path in sorted(outputs.rglob("*")):
        name = str(path.relative_to(outputs))
        if LEFT_OUT.search(name) or (path.is_dir() and not path.is_symlink()):
            continue
        found[name] = str(path.readlink()) if path.is_symlink() else _content(path)
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [_timeless(row) for row in csv.DictReader(file)]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):  # in its order
        return [(key, _timeless(inner)) for key, inner in value.items() if not OF_TIME.search(key)]
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value
