"""What W&B was told, read back from the files of offline runs (`run-<id>.wandb`: LevelDB's log of its records)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from mmedexpert.reporting.sync import begun

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, whether the record ends here
LAST = (1, 4)


@dataclass
class Told:
    """One W&B run: of several files of one id what they hold together."""

    id: str
    name: str = ""
    group: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)  # define_metric, by name or glob
    made: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)  # files that artifacts would send
    files: int = 0

    @property
    def keys(self) -> set[str]:
        """Config keys, dotted."""
        return set(_flat(self.config))


def records(path: Path) -> Iterator[Record]:
    data, place, whole = path.read_bytes(), 7, b""  # seven bytes of the file's own
    while place + HEADER.size <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        if place + HEADER.size + length > len(data):  # a kill cut it
            return
        whole += data[place + HEADER.size : place + HEADER.size + length]
        place += HEADER.size + length
        if kind in LAST:
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def told(outputs: Path) -> list[Told]:
    """All W&B runs below an outputs folder, in the order in which they began."""
    found: dict[str, Told] = {}
    for path in sorted(outputs.glob("*/*/wandb/offline-run-*/run-*.wandb"), key=begun):
        run = found.setdefault(path.stem.removeprefix("run-"), Told(path.stem.removeprefix("run-")))
        run.files, run.summary = run.files + 1, {}  # `wandb sync` keeps the last file's summary alone
        for record in records(path):
            _note(run, record)
    return list(found.values())


def _note(run: Told, record: Record) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.name, run.group, run.project = record.run.display_name, record.run.run_group, record.run.project
        run.tags = list(record.run.tags)
        run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    elif kind == "summary":
        run.summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    elif kind == "history":
        items = record.history.item
        run.history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    elif kind == "metric":
        run.metrics[record.metric.name or record.metric.glob_name] = record.metric
    elif kind == "artifact" and record.artifact.type not in ("run_table", "job"):
        (run.used if record.artifact.use_after_commit else run.made).append(record.artifact.name)
        run.uploads += [entry.local_path for entry in record.artifact.manifest.contents if entry.local_path]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
