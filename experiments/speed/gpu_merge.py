"""A CACI merge of one decoder layer of Qwen2.5-VL-7B, on the GPU and on the CPU: seconds, GB/s and what differs.

Bytes are those that have to move: every delta read once, the merged one written, in fp32. Thresholds are given, as the
merge over files gives them; here they are the quantiles of the normal distribution that the deltas are drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from gpu_clock import timed
from tiny_vl import SIZES, Size
from torch import Tensor

from mmedexpert.merging.methods import caci

EXPERTS = 5  # conf/specialty/all.yaml
DENSITY = 0.8  # conf/merge/caci_vote.yaml, both roles
EXPERT_STD, REASONER_STD = 1e-3, 5e-5  # ours: an RL update is 20 times smaller, as in caci_cases.py
TOLERANCE = 1e-5  # ours: the share of entries that rounding may give another sign
CLOSE = 1e-5  # ours: entries that differ by more than this share of the largest differ


def shapes(size: Size) -> list[tuple[int, int]]:
    """[out, in] of the seven linear layers of a decoder layer."""
    key = size.hidden // size.heads * size.kv_heads
    attention = [(size.hidden, size.hidden), (key, size.hidden), (key, size.hidden), (size.hidden, size.hidden)]
    return [*attention, (size.inner, size.hidden), (size.inner, size.hidden), (size.hidden, size.inner)]


def merged(deltas: list[Tensor]) -> Tensor:
    """The merge with the settings of conf/merge/caci_vote.yaml."""
    bound = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - DENSITY, dtype=torch.float64)))
    stds = [*[EXPERT_STD] * EXPERTS, REASONER_STD]
    return caci(
        deltas[:EXPERTS], deltas[EXPERTS:], expert_weights=None, reasoner_weights=None, expert_density=DENSITY,
        reasoner_density=DENSITY, expert_scaling=1.0, reasoner_scaling=1.0, thresholds=[bound * std for std in stds],
    )  # fmt: skip


def rows(device: str, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """The layer on the device, then on the CPU, which is compared (without a GPU: in fp64)."""
    runs = [(device, torch.float32), ("cpu", torch.float64 if device == "cpu" else torch.float32)]
    size = SIZES["s" if tiny else "7b"]
    kept: list[Tensor] = []
    for number, (where, dtype) in enumerate(runs):
        seconds, moved, differing, entries = 0.0, 0, 0, 0
        for place, shape in enumerate(shapes(size)):
            generator = torch.Generator().manual_seed(place)  # the same numbers on both
            deltas = [
                (torch.randn(shape, generator=generator) * std).to(where, dtype)
                for std in (*[EXPERT_STD] * EXPERTS, REASONER_STD)
            ]
            if number == 0 and place == 0:
                merged(deltas)  # warm-up
            out, spent = timed(where, merged, deltas)
            seconds += spent
            moved += (len(deltas) + 1) * out.nbytes
            entries += out.numel()
            if number == 0:
                kept.append(out.cpu())
            else:
                differing += int(((out - kept[place]).abs() > CLOSE * out.abs().max()).sum())
        row = {"case": f"a layer, {where}, {str(dtype).removeprefix('torch.')}", "parameters": entries}
        row |= {"seconds": seconds, "gb_per_s": moved / seconds / 1e9}
        if number:
            share = differing / entries
            row |= {"differing_share": share, "tolerance": TOLERANCE, "within": share <= TOLERANCE}
        yield row
