"""The curve of a training run as its folder keeps it: lines of JSON, one a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = "steps.jsonl"  # written by training/curve.py


def read_curve(path: Path, step: str = "step") -> list[dict[str, Any]]:
    """The lines of a curve that are whole, each with its number under `step`; none without the file.

    What a kill or a full disk cut off is left out: a curve shows, and decides nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = (_object(line) for line in lines)
    return [row for row in rows if isinstance(row.get(step), int)]


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
