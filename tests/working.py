"""What workers do in tests/test_workers.py: in a file of its own, as each of them imports it when it starts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mmedexpert.errors import UserError
from mmedexpert.runtime import progress, runs


def nothing() -> None:
    """What a worker of these tests does first."""


def told(path: Path, line: str, seconds: float = 0.0) -> None:
    """Work that says so, shows how far it is, and notes when it was done and by whom."""
    runs.console.print(f"[bold]{line}[/bold]")
    with progress.Bar(line, 2) as bar:
        time.sleep(seconds)
        bar.show(2, {"loss": 0.25})
    path.write_text(f"{time.time()} {os.getpid()}")


def fails() -> None:
    """A user's mistake."""
    raise UserError("data.root=x is no folder")
