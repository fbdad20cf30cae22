"""The k-th largest magnitude of a tensor that is never held whole: an exact radix select on the bits of fp32."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

# The bits of a positive float order as the float does, and so do their upper 16 (sign, exponent, 7 of the mantissa).
UPPER, LOWER = 2**15, 2**16


class RadixSelect:
    """Finds the `ranks`-th largest magnitudes (1: the largest) of values shown twice, block by block, in fixed memory.

    Radix select (MSD, two digits): `first` counts the upper 16 bits of every magnitude, `second` the lower 16 bits of
    those that share the upper half of a searched one. Values are contiguous fp32 without NaN, of any shape; entries
    that are zero need not be shown: a rank beyond the number of values finds 0. ValueError for a rank below 1.
    Threads may show blocks at the same time, but none of the second pass before the first has ended.
    """

    def __init__(self, ranks: list[int]) -> None:
        if any(rank < 1 for rank in ranks):
            raise ValueError(f"ranks count from 1, got {ranks}")
        self.ranks = ranks
        self.lock = Lock()
        self.upper = torch.zeros(UPPER, dtype=torch.int64)
        self.lower: dict[int, Tensor] = {}
        self.above: dict[int, int] = {}

    def first(self, values: Tensor) -> None:
        """Count a block in the first pass."""
        counts = torch.bincount(_upper(values), minlength=UPPER)
        with self.lock:
            self.upper += counts

    def second(self, values: Tensor) -> None:
        """Count a block in the second pass, which shows the same values as the first."""
        with self.lock:
            if not self.lower:
                self._locate()
        upper, bits = _upper(values), values.flatten().view(torch.int32)
        for digit, total in self.lower.items():
            inside = (bits[(upper == digit).nonzero().flatten()] & (LOWER - 1)).long()  # few: quicker than a mask
            with self.lock:
                total.scatter_add_(0, inside, torch.ones_like(inside))

    def result(self) -> list[float]:
        """The magnitude at each of the ranks."""
        if not self.lower:
            self._locate()
        found = []
        for rank, digit in zip(self.ranks, self.digits, strict=True):
            low = _digit(self.lower[digit], rank - self.above[digit])
            found.append(torch.tensor(digit * LOWER + low, dtype=torch.int32).view(torch.float32).item())
        return found

    def _locate(self) -> None:
        self.upper[0] += max(0, max(self.ranks) - int(self.upper.sum()))  # the zeros not shown
        self.digits = [_digit(self.upper, rank) for rank in self.ranks]
        for digit in self.digits:
            self.above[digit] = int(self.upper[digit + 1 :].sum())
            self.lower[digit] = torch.zeros(LOWER, dtype=torch.int64)
        if 0 in self.lower:
            self.lower[0][0] = max(self.ranks)  # zeros: no other value lies below them


def _upper(values: Tensor) -> Tensor:
    """The upper 16 bits of each magnitude, [n] int32."""
    return values.flatten().view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(16)


def _digit(counts: Tensor, rank: int) -> int:
    """The largest digit with at least `rank` counted entries at or above it."""
    at_or_above = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int(torch.searchsorted(at_or_above, rank))
