"""How long a run took over all its tries, on disk while it works: a kill loses seconds of it, not hours."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmedexpert.runtime.files import write_atomic

EVERY_SECONDS = 10.0  # ours: between two notes; the most that a killed try loses


class Clock:
    """Wall seconds of a run and of its named phases, summed over the tries that `path` knows of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tries, self.before, self.start = 0, 0.0, time.perf_counter()
        self.phases: dict[str, float] = {}
        self.begun: dict[str, float] = {}  # phases that have not ended

    @contextmanager
    def running(self) -> Iterator[None]:
        """One try, added to the earlier ones; noted on disk every ten seconds and however it ends, but by a kill."""
        if self.path.exists():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            self.tries, self.before, self.phases = known["tries"], known["wall_seconds"], known["phase_seconds"]
        self.tries, self.start, over = self.tries + 1, time.perf_counter(), threading.Event()

        def keep() -> None:
            self._note()
            while not over.wait(EVERY_SECONDS):
                self._note()

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            self._note()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall seconds of a block to those of its name, also where it fails."""
        self.begun[name] = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.numbers()["phase_seconds"][name]
            del self.begun[name]

    def numbers(self) -> dict[str, Any]:
        """`tries`, `wall_seconds` and `phase_seconds` until now, seconds to the millisecond."""
        now, phases = time.perf_counter(), dict(self.phases)
        for name, begun in dict(self.begun).items():
            phases[name] = phases.get(name, 0.0) + now - begun
        return {
            "tries": self.tries,
            "wall_seconds": round(self.before + now - self.start, 3),
            "phase_seconds": {name: round(seconds, 3) for name, seconds in phases.items()},
        }

    def _note(self) -> None:
        with suppress(OSError):  # a full disk is told by the work, not by its clock
            write_atomic(self.path, json.dumps(self.numbers()).encode())
