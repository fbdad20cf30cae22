"""Reading what a kill or a full disk may have cut: JSON lines that were appended one by one, and single objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedexpert.errors import UserError


def read_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file (none where it is not there), each with the keys `needed`.

    A last line without its line end is dropped unless it is whole: it was cut off, perhaps inside a character.
    Raises UserError naming the file and line for any other line that is no such object: nothing goes unnoticed.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _object(line, needed)
        if row is None:
            fix = "delete this line (what it held is done again)"
            raise UserError(f"{path} line {number} is damaged, it is no object with {', '.join(needed)}: {fix}")
        rows.append(row)
    cut = _object(last, needed)
    return rows if cut is None else [*rows, cut]


def _object(line: bytes, needed: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) and all(key in value for key in needed) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
