"""The four clinical reasoning perspectives and the instruction of each (`perspectives.yaml`)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml


@cache
def instructions() -> dict[str, str]:
    """The instruction of each perspective, read from `perspectives.yaml`."""
    return yaml.safe_load(files(__package__).joinpath("perspectives.yaml").read_text(encoding="utf-8"))


PERSPECTIVES: tuple[str, ...] = tuple(instructions())  # their order is that of gba.weights
