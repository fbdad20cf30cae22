"""The four clinical reasoning perspectives (`perspectives.yaml`): definition, instructions, criteria and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Criterion:
    """One thing to look for: `meaning` for a judge, an `example` of our own writing, and the rules' `measure`.

    Where `alone` is false it counts only beside another criterion: a short text that names no pattern is a guess.
    """

    meaning: str
    example: str
    measure: Mapping[str, Any]
    alone: bool = True


@dataclass(frozen=True)
class Perspective:
    """A clinical reasoning perspective; `instructions` by style (small, full), `criteria` by name."""

    definition: str
    source: str
    instructions: Mapping[str, str]
    criteria: Mapping[str, Criterion]


@cache
def perspectives() -> dict[str, Perspective]:
    """The perspectives by name, in the order of `gba.weights`, read from `perspectives.yaml`."""
    rows = yaml.safe_load(files(__package__).joinpath("perspectives.yaml").read_text(encoding="utf-8"))
    return {
        name: Perspective(**{**row, "criteria": {key: Criterion(**value) for key, value in row["criteria"].items()}})
        for name, row in rows.items()
    }


@cache
def instructions(style: str = "small") -> dict[str, str]:
    """The instruction of each perspective; `style` is small (the embedded model) or full (real models)."""
    return {name: one.instructions[style] for name, one in perspectives().items()}


PERSPECTIVES: tuple[str, ...] = tuple(perspectives())  # their order is that of gba.weights
