"""Drawings as files: whole or not at all, and the same drawing is the same file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmedexpert.runtime.files import write_atomic


def save_drawing(figure: Any, path: Path, **how: Any) -> None:
    """A matplotlib figure as PNG or SVG, by the name's ending; `how` goes to its `savefig`.

    An SVG of matplotlib's own tells the day, and its ids are drawn at random.
    """
    from matplotlib import rc_context  # lazily: half a second

    kind, drawn = path.suffix.removeprefix("."), io.BytesIO()
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None, **how)
    write_atomic(path, drawn.getvalue())
