"""`steps.jsonl` of a run: the numbers of every optimiser step, whatever logger is on; `stage=report` draws them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mmedexpert.runtime.curve import STEPS, read_curve
from mmedexpert.runtime.files import write_atomic


class Curve(Callback):
    """Adds a line a step; a resumed run goes on behind the step it resumes from, and does the later ones again.

    A line that cannot be written waits for the next one, and training goes on: as with any logger.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STEPS
        self.lines: list[str] = []
        self.whole = False  # whether the file holds all of them

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            kept = [row for row in read_curve(self.path) if row["step"] <= trainer.global_step]
            self.lines = [json.dumps(row) + "\n" for row in kept]
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write_all()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.lines.append(json.dumps({"step": trainer.global_step, **numbers}) + "\n")
            with suppress(OSError):
                if self.whole:
                    self.whole = False  # until the line is there
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(self.lines[-1])
                    self.whole = True
                else:
                    self._write_all()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not self.whole:
            with suppress(OSError):
                self._write_all()

    def _write_all(self) -> None:
        write_atomic(self.path, "".join(self.lines).encode())
        self.whole = True
