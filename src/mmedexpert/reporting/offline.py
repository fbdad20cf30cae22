"""What the file of an offline W&B run holds: LevelDB's log of protobuf records, which a kill may have cut anywhere."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedexpert.reporting.finals import STEP

BLOCK, HEADER, PREAMBLE = 32768, struct.Struct("<IHB"), 7  # checksum, length, kind of a piece; bytes of the file's own
FIRST, LAST = (1, 2), (1, 4)  # kinds that begin and that end a record


def last_step(folder: Path, identity: str) -> int:
    """The highest step of the trainer that the offline files of a run in its folder tell; -1 without any."""
    paths = folder.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    return max((step for path in paths for step in _steps(path)), default=-1)


def _steps(path: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2  # lazily: it takes a second

    for data in _records(path):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(data)
        except Exception:  # of protobuf's own kind: what a kill cut
            return
        for item in record.history.item:
            if STEP in (item.key, *item.nested_key):
                yield int(json.loads(item.value_json))


def _records(path: Path) -> Iterator[bytes]:
    data, place, whole = path.read_bytes(), PREAMBLE, b""
    while place + HEADER.size <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        if place + length > len(data) or not 1 <= kind <= 4:
            return
        whole = (b"" if kind in FIRST else whole) + data[place : place + length]
        place += length
        if kind in LAST:
            yield whole
