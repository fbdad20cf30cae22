"""What conf/ may compute: `${home:path}`, `${all:${arms}}`, `${times:${dsa.steps},4}`, `${gpus:gpu,2}`."""

from __future__ import annotations

import os

from omegaconf import OmegaConf


def _times(value: float, factor: float) -> float:
    """Of a whole number (steps, a rank) a whole one, at least 1; of any other (a rate) the product."""
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def _gpus(accelerator: str, devices: int | None) -> int | None:
    """What a job asks a scheduler for: a GPU for each device, nothing for the CPU."""
    return None if accelerator == "cpu" else devices


# a sweep's folder is made by Hydra itself, before any key is checked
OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)
OmegaConf.register_new_resolver("all", ",".join, replace=True)  # every arm of an experiment, as values of a sweep
OmegaConf.register_new_resolver("times", _times, replace=True)
OmegaConf.register_new_resolver("gpus", _gpus, replace=True)
