"""The wall clock of the parts of gpu.py, and what they leave behind on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def timed(device: str, function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """What the function returns, and its wall seconds; on CUDA until all is done, and peak memory counts from here."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    began = now()
    result = function(*arguments)
    return result, now() - began


def release() -> None:
    """Give the device back what nobody holds."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
