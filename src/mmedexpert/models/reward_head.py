"""A backbone that says how good an answer is: a number for each dimension from the last hidden state of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmedexpert.errors import UserError
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import pack

FILE = "reward_head.safetensors"
DIMENSIONS = "dimensions"  # the key of their names in the file


class RewardHead(nn.Module):
    """Scores [N, D] of hidden states [N, H]: one direction shared by all D dimensions, and one of each.  # ours

    A dimension without any label in training keeps the shared direction alone. All start at zero.
    """

    def __init__(self, hidden_size: int, dimensions: Sequence[str]) -> None:
        super().__init__()
        self.dimensions = tuple(dimensions)
        self.shared = nn.Parameter(torch.zeros(hidden_size))
        self.own = nn.Parameter(torch.zeros(len(self.dimensions), hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # close scores are subtracted: bf16 would lose them
            return hidden.float() @ (self.shared + self.own).T

    def save(self, folder: Path) -> None:
        """`<folder>/reward_head.safetensors`."""
        told = {DIMENSIONS: " ".join(self.dimensions)}
        save_file({name: p.detach().contiguous().cpu() for name, p in self.named_parameters()}, folder / FILE, told)

    @classmethod
    def load(cls, folder: Path, dimensions: Sequence[str]) -> RewardHead:
        """A saved head; UserError for a missing or damaged one, and for one of other dimensions."""
        try:
            weights = load_file(folder / FILE)
            with safe_open(folder / FILE, "pt") as file:
                told = (file.metadata() or {}).get(DIMENSIONS, "").split()
            if tuple(told) != tuple(dimensions):
                raise KeyError(f"it is of the dimensions {', '.join(told)}")
            head = cls(len(weights["shared"]), dimensions)
            head.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder / FILE} is no usable reward head: {str(error).splitlines()[0]}") from error
        return head


def scores(
    model: Any, encoder: Encoder, head: RewardHead, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Scores [N, D] of N answers (token ids, the end of turn last) to their prompts, read before the end of turn.

    Prompts that answers share are read once (models/packing.py).
    """
    packed = pack(model, encoder, prompts, answers)
    last = torch.tensor([len(words) for words in answers], device=packed.at.device).cumsum(0) - 1
    hidden = core_of(model).model(**packed.inputs, scored=packed.at[last], use_cache=False).last_hidden_state[0]
    return head(hidden)
