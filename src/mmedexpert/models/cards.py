"""How long a device takes for what `models/plan.py` counts: datasheets, and the rates of one card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmedexpert.errors import UserError, suggestion
from mmedexpert.models.plan import GIB, Pass, Setup

CARDS = Path(__file__).with_name("cards.yaml")
CPU = "cpu"


@dataclass(frozen=True)
class Card:
    """A device: bytes of memory, FLOP/s and bytes/s; share of the FLOP/s that products reach, and seconds of a decoder
    layer beside them: in a training pass, in a token step."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    matmul: float
    layer_pass: float
    layer_token: float
    own: float = 0.0  # bytes taken by the driver and the allocator

    def computing(self, flops: float) -> float:
        """Seconds of matrix products."""
        return flops / (self.flops * self.matmul)

    def training(self, setup: Setup, parts: Sequence[Pass], again: int = 0) -> float:
        """Seconds of an optimiser step."""
        flops = sum(setup.step_flops(one.tokens, one.scored, one.pairs, again) for one in parts)
        started = len(parts) * setup.shape.layers * self.layer_pass
        return started + self.computing(flops)

    def sampling(self, setup: Setup, prompts: int, prompt: int, rows: int, width: int, packed: int) -> float:
        """Seconds of reading prompts and of all token steps."""
        reading = setup.forward_flops(packed, prompts, packed * (packed // prompts + 1) // 2)
        moved = setup.decoding_bytes(prompts, prompt, rows, width) / self.bandwidth
        steps = (width - 1) * setup.shape.layers * self.layer_token
        computed = self.computing(setup.decoding_flops(prompt, rows, width))
        return self.computing(reading) + steps + max(moved, computed)

    def seeing(self, setup: Setup, patches: int) -> float:
        """Seconds of the vision tower on an image, whose layers are started one by one, too."""
        return setup.shape.v_layers * self.layer_token + self.computing(setup.vision_flops(patches))


@cache
def told() -> dict[str, Any]:
    """What cards.yaml says."""
    return dict(yaml.safe_load(CARDS.read_text(encoding="utf-8")))


def named(device: str) -> str | None:
    """The name here of what torch.cuda.get_device_name() tells; None for a card that is not known."""
    return next((name for name, one in told()["cards"].items() if one["device"] == device), None)


def card(name: str, memory: float | None = None) -> Card:
    """A card of cards.yaml, or CPU: this machine's memory; UserError for any other. `memory`: other bytes than its."""
    cards = told()["cards"]
    if name not in (known := [*cards, CPU]):
        raise UserError(f"plan.card={name} is not known{suggestion(name, known)}: one of {', '.join(known)}")
    one, rates = (told()[CPU], told()[CPU]) if name == CPU else (cards[name], told()["measured"])
    if memory is None:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = float(pages) if name == CPU else one["memory_gb"] * 1e9
    return Card(
        name, memory, one["flops"], one["bandwidth"], rates["matmul"], rates["pass_ms"] / 1e3, rates["token_ms"] / 1e3,
        rates.get("cuda_gib", 0.0) * GIB,
    )  # fmt: skip
