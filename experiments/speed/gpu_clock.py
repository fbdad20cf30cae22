"""The wall clock of the parts of gpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def timed(device: str, function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """What the function returns, and its wall seconds; on CUDA until the device has done all of it."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    result = function(*arguments)
    return result, now() - began
