"""The four clinical reasoning perspectives and the instruction of each (`perspectives.yaml`)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml

PERSPECTIVES = ("differential", "intuitive", "analytical", "bayesian")  # the order of gba.weights


@cache
def instructions() -> dict[str, str]:
    """The instruction of each perspective, in the order of `PERSPECTIVES`, read from `perspectives.yaml`."""
    rows = yaml.safe_load(files(__package__).joinpath("perspectives.yaml").read_text(encoding="utf-8"))
    return {name: rows[name] for name in PERSPECTIVES}
