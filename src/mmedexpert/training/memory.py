"""How an optimiser step is cut into passes, and what is done when one of them does not fit on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import CACHE_BYTES, Encoder, Prompt
from mmedexpert.models.packing import micro_batches
from mmedexpert.models.plan import SPARE, Setup
from mmedexpert.models.shapes import shape_of

AUTO = "auto"


class NoRoom(Exception):
    """A pass of this step ran out of memory, `here` or on another device: nothing of the step was done."""

    def __init__(self, here: bool) -> None:
        super().__init__()
        self.here = here


class MicroBatches:
    """Cuts steps into passes of at most `tokens` tokens (None: one pass).

    Given AUTO, `tokens` are as many as the device has room for when training begins (`fitting`), on a CPU None; a step
    that runs out of memory all the same is done again in passes of `smaller()`.
    """

    def __init__(self, given: int | str | None) -> None:
        self.auto = given == AUTO
        self.tokens = None if self.auto else int(given) if given is not None else None
        self.found, self.halved = False, 0  # was it looked what fits, and how often was that too much
        self.step: list[tuple[Encoder, Sequence[Prompt], Sequence[Sequence[int]]]] = []  # what the step was cut out of

    def cut(self, encoder: Encoder, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[int]]:
        """The rows of each pass (`packing.micro_batches`)."""
        self.step.append((encoder, prompts, completions))
        return micro_batches(encoder, prompts, completions, self.tokens)

    def take(self, tokens: int | None, *, halved: bool = False) -> None:
        """Passes of at most so many tokens from now on."""
        self.tokens, self.found, self.halved = tokens, True, self.halved + halved

    def smaller(self) -> int:
        """The first halving of `tokens` that cuts the last step into more passes; 0 where each is one row already."""
        before, tokens = self._passes(self.tokens), sum(map(_length, self._rows()))
        tokens = tokens if self.tokens is None else min(self.tokens, tokens)
        while (tokens := tokens // 2) and self._passes(tokens) == before:
            pass
        return tokens

    def longest(self) -> int:
        """Tokens of the longest row of the last step."""
        return max(map(_length, self._rows()))

    def _rows(self) -> Iterator[tuple[Prompt, Sequence[int]]]:
        for _, prompts, completions in self.step:
            yield from zip(prompts, completions, strict=True)

    def _passes(self, tokens: int | None) -> int:
        return sum(len(micro_batches(*one, tokens)) for one in self.step)


def _length(row: tuple[Prompt, Sequence[int]]) -> int:
    prompt, words = row
    return len(prompt.input_ids) + len(words)


def fitting(model: Any, device: torch.device, *, computed: int | None, begun: bool, devices: int) -> int | None:
    """The most tokens of a training pass for which this device has room now, by `models/plan.py`; None on a CPU.

    `computed`: bytes of an activation; None for those of the weights. Still to come are gradients, images' features
    and, unless training has `begun`, AdamW's moments.
    """
    if device.type != "cuda":
        return None
    setup = setup_of(model, computed, devices)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    coming = setup.gradient_bytes + CACHE_BYTES + (0 if begun else setup.state_bytes)
    return max(1, setup.fitting_tokens((1 - SPARE) * (free - coming)))


def setup_of(model: Any, computed: int | None, devices: int) -> Setup:
    """How a model with a LoRA is held and trained, as it is."""
    core, lora = core_of(model), next(iter(model.peft_config.values()))
    shape, weights = shape_of(core.config.to_dict()), core.dtype.itemsize
    trained = next(p.element_size() for p in model.parameters() if p.requires_grad)
    return Setup(
        shape, lora.r, shape.lora(lora.r, lora.target_modules), weights, trained, computed or weights,
        lora.lora_dropout > 0, core.model.language_model.is_gradient_checkpointing, devices,
    )  # fmt: skip
