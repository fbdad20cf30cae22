"""A command as it is, which notes each step that it begins, and each reply and run that it finishes.

A line of a file each, appended by one system call before anything else goes on: a kill takes back none of them.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def main(counts: str, script: str, words: list[str]) -> None:
    """Run `script` with `words`, and note in the file `counts`."""
    from mmedexpert.evaluation import asked
    from mmedexpert.runtime import runs
    from mmedexpert.training.fit import TrainingModule

    file = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str) -> None:
        os.write(file, f"{what}\n".encode())

    step, write, line = TrainingModule.on_train_batch_start, runs.write_atomic, asked.lines

    def stepped(self: TrainingModule, batch: Any, batch_idx: int) -> None:
        note(f"step {type(self).__name__} {self.global_step}")
        step(self, batch, batch_idx)

    def written(path: Any, data: bytes) -> None:
        write(path, data)
        if path.name == "DONE":
            note(f"run {path.parent.parent.name}/{path.parent.name}")

    def replied(rows: Any) -> bytes:
        if isinstance(rows, list):  # one that came in; those that were kept are written as a view of a dictionary
            note(f"reply {rows[0]['id']}")
        return line(rows)

    TrainingModule.on_train_batch_start = stepped  # type: ignore[method-assign]
    runs.write_atomic, asked.lines = written, replied
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
