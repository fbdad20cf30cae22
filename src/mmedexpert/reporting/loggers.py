"""Lightning's loggers as runs use them: W&B, and `metrics.csv`, a row a step, which a kill does not lose."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from mmedexpert.reporting.tracking import no_stop
from mmedexpert.runtime.files import write_atomic

Row = dict[str, Any]


class CsvLogger(Logger):
    """A Lightning logger whose rows are in the file as soon as they are logged (Lightning's own deletes older ones).

    Rows that an earlier try left stay, but those from the first step on that this one logs: it does them again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.rows = path, read_rows(path)
        self.columns: list[str] = list(self.rows[0]) if self.rows else ["step"]
        self.begun, self.whole = False, True  # by this try; whether the file has to be written anew

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: they are in `hparams.yaml` from the start."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers of a step; without one, of the step after the last that this try logged. OSError for a full disk."""
        if step is None:
            step = int(self.rows[-1]["step"]) + 1 if self.begun else 0
        if not self.begun:
            self.rows, self.begun = [row for row in self.rows if int(row["step"]) < step], True
        row = {"step": step, **{name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()}}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.whole or new:
            self.whole = True
            write_atomic(self.path, self._text(self.rows, head=True).encode())
            self.whole = False
            return
        self.whole = True  # until the line is there
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._text([row], head=False))
        self.whole = False

    def _text(self, rows: list[Row], *, head: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`, as text; none without the file, and not the line that a kill cut off."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if None not in row and None not in row.values() and row["step"].isdigit()]


class Wandb(WandbLogger):
    """Lightning's W&B logger, whose errors stop no run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As the parent."""
        with no_stop("W&B"):
            super().log_metrics(metrics, step)


class Csv(CsvLogger):
    """`metrics.csv`, whose errors stop no run."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As the parent."""
        with no_stop(str(self.path)):
            super().log_metrics(metrics, step)
