"""Clinical guidelines as data (`guidelines.yaml`): thresholds of findings, each with its published source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class Guideline:
    """One threshold rule: the label of a measurement in a population, with its published source.

    `labels` has one entry more than the rising `cuts`. Raises ValueError where it does not.
    """

    id: str
    finding: str
    population: str
    unit: str
    cuts: tuple[float, ...]
    labels: tuple[str, ...]
    upper: str
    recommendation: str
    source: str

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.cuts) + 1 or list(self.cuts) != sorted(self.cuts):
            raise ValueError(f"guideline {self.id}: needs rising cuts and one label more than cuts")

    def level(self, value: float) -> int:
        """Index of the label of `value`; one on a cut follows `upper` (mixed: first cut exclusive, last inclusive)."""
        inclusive = [self.upper == "inclusive" or (self.upper == "mixed" and i > 0) for i in range(len(self.cuts))]
        return sum(value > cut or (value == cut and not keep) for cut, keep in zip(self.cuts, inclusive, strict=True))


@cache
def guidelines() -> dict[str, Guideline]:
    """All guidelines by id, read from `guidelines.yaml`."""
    rows = yaml.safe_load(files(__package__).joinpath("guidelines.yaml").read_text(encoding="utf-8"))
    return {
        key: Guideline(key, **{**row, "cuts": tuple(row["cuts"]), "labels": tuple(row["labels"])})
        for key, row in rows.items()
    }
