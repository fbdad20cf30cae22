"""The one progress bar of all long work: what, how far, how long still, and the numbers that matter; on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHORT = 500  # ours: items below which a loop needs no bar
LINE_SECONDS = 30.0  # ours: between two lines in a log file
Item = TypeVar("Item")


class Bar(Progress):
    """A rich bar for one task: `with Bar(title, total) as bar: bar.show(done, {"loss": 0.3})`; gone when it ends.

    Where stderr is no terminal (a log file) it writes a plain line now and then instead.
    """

    def __init__(self, title: str, total: int, *, hidden: bool = False) -> None:
        terminal = Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("[dim]{task.fields[numbers]}"),
            console=terminal, transient=True, disable=hidden or not terminal.is_terminal,
        )  # fmt: skip
        self.title, self.total, self.silent = title, total, hidden or terminal.is_terminal
        self.told = time.monotonic()
        self.only = self.add_task(title, total=total, numbers="")

    def show(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """Set how much is done, and the numbers beside the bar."""
        text = "  ".join(f"{name} {float(value):.3g}" for name, value in (numbers or {}).items())
        self.update(self.only, completed=done, numbers=text)
        if not self.silent and time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            self.console.print(f"{self.title}  {done}/{self.total}  {text}", highlight=False)


def track(items: Sequence[Item], title: str, *, size: int | None = None) -> Iterator[Item]:
    """Iterate, with a bar where the work (`size`, else the number of items) is long."""
    with Bar(title, len(items), hidden=(len(items) if size is None else size) <= SHORT) as bar:
        for done, item in enumerate(items):
            bar.show(done)
            yield item
