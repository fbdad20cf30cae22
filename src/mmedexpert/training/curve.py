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

    A line that cannot be written is missing, and training goes on: as with any logger.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STEPS

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            kept = [row for row in read_curve(self.path) if row["step"] <= trainer.global_step]
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step, **numbers}) + "\n")
