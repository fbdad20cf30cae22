"""An update of a base that no adapter can hold, such as TIES makes: its rows, in a file of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.models.adapters import CONFIG, LoraAdapter, record_base, recorded_base
from mmedexpert.models.checkpoint import StoredTensor, new_folder, stored_tensors
from mmedexpert.runtime.fingerprints import file_digest

FILE = "update.safetensors"

Blocks = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class DenseUpdate:
    """The changes of some matrices of a base, each [rows, columns] in bf16; read by rows when asked for."""

    folder: Path
    shapes: dict[str, tuple[int, int]]
    base_fingerprint: str | None
    stored: Mapping[str, StoredTensor]

    @classmethod
    def load(cls, folder: str | Path) -> DenseUpdate:
        """Open what `save_dense` wrote; UserError for a missing or truncated file."""
        folder = Path(folder)
        stored = {tensor.key: tensor for tensor in stored_tensors(folder / FILE)}
        return cls(folder, {name: t.matrix for name, t in stored.items()}, recorded_base(folder), stored)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of its file."""
        return file_digest(self.folder / FILE)

    def touches(self, name: str) -> bool:
        """Whether it holds a change of a tensor."""
        return name in self.shapes

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """A function (i, j) -> rows i:j of the change, fp32; UserError where it is not finite."""
        stored = self.stored[name]

        def rows(i: int, j: int) -> Tensor:
            delta = stored.rows(i, j).float()
            if not torch.isfinite(delta).all():
                raise UserError(f"{name} in {self.folder} has NaN or Inf: merge again")
            return delta

        return rows

    def delta(self, name: str) -> Tensor:
        """The change of one tensor, fp32."""
        return self.reader(name)(0, self.shapes[name][0])


def update_in(folder: str | Path) -> LoraAdapter | DenseUpdate:
    """What a folder holds of a base's update: an adapter, or rows; UserError for neither."""
    return LoraAdapter.load(folder) if (Path(folder) / CONFIG).exists() else DenseUpdate.load(folder)


def save_dense(
    out_folder: str | Path, shapes: Mapping[str, tuple[int, int]], blocks: Callable[[str], Blocks], base: str
) -> None:
    """Write an update as `DenseUpdate` reads it, a block of rows at a time: safetensors' own writer wants it whole.

    `blocks(name)` yields (first row, rows) from the first row to the last; `base`: the fingerprint of its base. In
    bf16, whose error is a 512th of each entry, whatever its size. UserError for an existing folder or a full disk.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with new_folder(out_folder, 8 + len(told) + end) as folder:
        with (folder / FILE).open("wb") as out:
            out.write(len(told).to_bytes(8, "little") + told)
            for name in shapes:
                for _, block in blocks(name):
                    out.write(block.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8).numpy().data)
                if out.tell() != 8 + len(told) + int(header[name]["data_offsets"][1]):  # type: ignore[index]
                    raise ValueError(f"the blocks of {name} do not cover it")
        record_base(folder, base)
