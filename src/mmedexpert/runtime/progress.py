"""The one progress bar of all long work: what, how far, how long still, and the numbers that matter; on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SHORT = 500  # ours: items below which a loop needs no bar
LINE_SECONDS = 30.0  # ours: between two lines in a log file
RELAY_SECONDS = 0.3  # ours: between two words of a worker about one bar
Item = TypeVar("Item")
# of a worker (runtime/workers.py): its bars stand in the first process
relay: Callable[[tuple[str, int, int, str]], None] | None = None


class Bars(Progress):
    """Bars of several titles, those that are not full yet; where stderr is no terminal a plain line now and then."""

    def __init__(self) -> None:
        terminal = Console(stderr=True)
        super().__init__(*_columns(), console=terminal, transient=True, disable=not terminal.is_terminal)
        self.known: dict[str, TaskID] = {}
        self.told: dict[str, float] = {}

    def line(self, text: str) -> None:
        """A line above the bars, with the colours it came with."""
        self.console.print(Text.from_ansi(text), highlight=False, soft_wrap=True)

    def show(self, title: str, done: int, total: int, numbers: str) -> None:
        """How far the work of that title is; it goes when it is done."""
        if title not in self.known:
            self.known[title], self.told[title] = self.add_task(title, total=total, numbers=""), time.monotonic()
        self.update(self.known[title], completed=done, numbers=numbers, visible=done < total)
        if not self.console.is_terminal and time.monotonic() - self.told[title] > LINE_SECONDS:
            self.told[title] = time.monotonic()
            self.line(f"{title}  {done}/{total}  {numbers}")


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("[dim]{task.fields[numbers]}"),
    )  # fmt: skip


class Bar(Progress):
    """A rich bar for one task: `with Bar(title, total) as bar: bar.show(done, {"loss": 0.3})`; gone when it ends.

    Where stderr is no terminal (a log file) it writes a plain line now and then instead.
    """

    def __init__(self, title: str, total: int, *, hidden: bool = False) -> None:
        terminal = Console(stderr=True)
        self.relay, hidden = None if hidden else relay, hidden or relay is not None
        super().__init__(*_columns(), console=terminal, transient=True, disable=hidden or not terminal.is_terminal)
        self.title, self.total, self.silent = title, total, hidden or terminal.is_terminal
        self.told = time.monotonic()
        self.only = self.add_task(title, total=total, numbers="")

    def show(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """Set how much is done, and the numbers beside the bar."""
        text = "  ".join(f"{name} {float(value):.3g}" for name, value in (numbers or {}).items())
        self.update(self.only, completed=done, numbers=text)
        if self.relay and (done == self.total or time.monotonic() - self.told > RELAY_SECONDS):
            self.told = time.monotonic()
            self.relay((self.title, done, self.total, text))
        if not self.silent and time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            self.console.print(f"{self.title}  {done}/{self.total}  {text}", highlight=False)


def track(items: Sequence[Item], title: str, *, size: int | None = None) -> Iterator[Item]:
    """Iterate, with a bar where the work (`size`, else the number of items) is long."""
    with Bar(title, len(items), hidden=(len(items) if size is None else size) <= SHORT) as bar:
        for done, item in enumerate(items):
            bar.show(done)
            yield item
