"""Experts saved as whole models: their update is the difference to the base, read by blocks of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.models.adapters import recorded_base
from mmedexpert.models.checkpoint import StoredTensor, read_checkpoint
from mmedexpert.runtime.fingerprints import file_digest

COMPARED = 2**20  # entries compared at a time


@dataclass(frozen=True)
class FullWeights:
    """One fine-tuned model of the base's architecture; `shapes` holds every tensor of it as a matrix [rows, columns].

    A vector is one row; the weights of a convolution are [out, all the rest].
    """

    folder: Path
    shapes: dict[str, tuple[int, int]]
    base_fingerprint: str | None
    own: Mapping[str, StoredTensor]
    base: Mapping[str, StoredTensor]

    @classmethod
    def load(cls, folder: str | Path, base_folder: str | Path) -> FullWeights:
        """Open a saved model beside its base; UserError for other keys or shapes, or a truncated file."""
        folder, base_folder = Path(folder), Path(base_folder)
        own, base = read_checkpoint(folder), read_checkpoint(base_folder)
        for kind, names in (("lacks", base.keys() - own.keys()), ("has beyond it", own.keys() - base.keys())):
            if names:
                raise UserError(
                    f"{folder} is no fine-tuned {base_folder}: it {kind} {len(names)} tensors, such as {min(names)}; "
                    "use models of one base"
                )
        for name, tensor in own.items():
            if tensor.shape != base[name].shape:
                raise UserError(
                    f"{folder} is no fine-tuned {base_folder}: {name} is {list(tensor.shape)} and in the base "
                    f"{list(base[name].shape)}; use models of one base"
                )
        shapes = {name: tensor.matrix for name, tensor in own.items()}
        return cls(folder, shapes, recorded_base(folder), own, base)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of its safetensors files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted({tensor.file for tensor in self.own.values()}):
            digest.update(file_digest(path).encode())
        return digest.hexdigest()

    def touches(self, name: str) -> bool:
        """Whether any entry of a tensor differs from the base's; reads no further than the first difference."""
        own, base = self.own[name], self.base[name]
        rows, columns = own.matrix
        step = max(1, COMPARED // max(1, columns))
        return any(
            not torch.equal(own.rows(i, min(rows, i + step)).float(), base.rows(i, min(rows, i + step)).float())
            for i in range(0, rows, step)
        )

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """A function (i, j) -> rows i:j of the difference to the base, fp32; UserError where it is not finite."""
        own, base = self.own[name], self.base[name]

        def rows(i: int, j: int) -> Tensor:
            delta = own.rows(i, j).float() - base.rows(i, j).float()
            if not torch.isfinite(delta).all():
                raise UserError(f"{name} in {self.folder} or in its base has NaN or Inf: save the model again")
            return delta

        return rows
