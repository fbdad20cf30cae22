"""Lightning's loggers as runs use them: W&B, and `metrics.csv`, a row a step, which a kill does not lose."""

from __future__ import annotations

import csv
import io
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from mmedexpert.reporting.finals import CURVES, NOISY, STEP, ends
from mmedexpert.reporting.tracking import no_stop
from mmedexpert.runtime.curve import STEPS, read_curve
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

    def finalize(self, status: str) -> None:
        """A last row that a full disk refused."""
        if self.begun and self.whole:
            with suppress(OSError):
                write_atomic(self.path, self._text(self.rows, head=True).encode())
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
    """Lightning's W&B logger, whose errors stop no run and whose x axis is the trainer's step: W&B's own `_step` counts
    tables, too.

    Of a noisy curve the summary gets start, end, gain and best, of a resumed one no start: it has seen the rest alone.
    Each step is told once: `told` is the last one that an earlier try told, and those behind it that the curve in
    `folder` has, and W&B lost with that try, are told before this one's first.
    """

    def __init__(self, experiment: Any, folder: Path, told: int = -1) -> None:
        super().__init__(experiment=experiment)
        self.folder, self.told = folder, told
        self.curves: dict[str, list[float]] = {}
        self.first: int | None = None
        self.live = True  # not where a curve is told from a file: memory is the process's that trains
        with no_stop("W&B"):
            experiment.define_metric(STEP)
            experiment.define_metric("*", step_metric=STEP, step_sync=True)
            for name in NOISY:
                experiment.define_metric(name, step_metric=STEP, step_sync=True, summary="none")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As the parent."""
        with no_stop("W&B"):
            if self.first is None and step is not None:
                self.first = step
                self._tell_lost(step)
            for name in metrics.keys() & set(CURVES):
                self.curves.setdefault(name, []).append(float(metrics[name]))
            if step is None or step > self.told:
                super().log_metrics({**metrics, **(memory() if self.live else {})}, step)

    def _tell_lost(self, first: int) -> None:
        for row in read_curve(self.folder / STEPS):  # its steps count from 1, those of loggers from 0
            step = row.pop("step") - 1
            if self.told < step < first:
                super().log_metrics(row, step)

    def finish(self, numbers: Mapping[str, float]) -> None:
        """The summary at a run's end: `numbers` but a noisy curve's last step, and what the curves came to."""
        with no_stop("W&B"):
            came_to = {k: v for name, values in self.curves.items() for k, v in ends(name, values).items()}
            if self.first:
                came_to = {k: v for k, v in came_to.items() if not k.endswith(("/start", "/gain"))}
            told = {name: value for name, value in numbers.items() if name not in NOISY}
            self.experiment.summary.update({**came_to, **told})

    def summary(self) -> dict[str, Any]:
        """What W&B's summary holds by now, with the places of tables."""
        told = self.experiment.summary
        return {name: told.get(name) for name in told.keys() if not name.startswith("_")}  # noqa: SIM118  no dict


def memory() -> dict[str, float]:
    """The most memory that was used so far, in GB: of the GPU (verl's name), without one this process's."""
    if torch.cuda.is_available():
        return {"perf/max_memory_allocated_gb": torch.cuda.max_memory_allocated() / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"perf/cpu_memory_used_gb": peak / 1e9}


class Csv(CsvLogger):
    """`metrics.csv`, whose errors stop no run."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As the parent."""
        with no_stop(str(self.path)):
            super().log_metrics(metrics, step)

    def finish(self, numbers: Mapping[str, float]) -> None:
        """The numbers of a stage without a curve are its only row; a try that trained no step more adds none."""
        if not self.rows:
            self.log_metrics(numbers)
