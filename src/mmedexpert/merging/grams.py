"""What a layer's inputs are like: Gram matrices of each expert's own training records, and what a merge does to them.

An update t [out, in] changes a layer's outputs on inputs X [in, tokens] by t X, and ||t X||_F^2 = tr(t G t^T) with the
Gram matrix G = X X^T: the inputs themselves need not be kept. `full` Grams are [in, in]; `span` ones are A G A^T of all
updates' stacked LoRA factors A [k, in], k the sum of ranks, which is all that a merge inside their span can see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.models.checkpoint import StoredTensor, stored_tensors

SMALLEST = 1e-12  # ours: eigenvalues of A A^T below so much of the largest are rounding, a direction of A at 1e-6 of it


@dataclass(frozen=True)
class Span:
    """Orthonormal directions V [in, d] of the row space of factors A [k, in], and the T [k, d] with V = A^T T."""

    directions: Tensor
    mixing: Tensor

    @classmethod
    def of(cls, stack: Tensor) -> Span:
        """The span of stacked factors A [k, in], in fp64."""
        stack = stack.double()
        values, vectors = torch.linalg.eigh(stack @ stack.T)
        kept = values > SMALLEST * values.amax() if len(values) else values > 0
        mixing = vectors[:, kept] / values[kept].sqrt()
        return cls(stack.T @ mixing, mixing)

    def gram(self, spanned: Tensor) -> Tensor:
        """V^T G V [d, d] from A G A^T [K, K], whose first k rows and columns are those of this span's factors."""
        known = len(self.mixing)
        return self.mixing.T @ spanned[:known, :known].double() @ self.mixing


def energy(a: Tensor, b: Tensor, gram: Tensor) -> float:
    """||B A X||_F^2 = tr(B A G A^T B^T) from A [r, in], B [out, r] and G [in, in], in fp64 and r x r products."""
    b = b.double()
    return float(((b.T @ b) * (a @ gram @ a.T)).sum())


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of the experts, in their order, read from disk one tensor at a time."""

    stored: Sequence[Mapping[str, StoredTensor]]
    spanned: bool

    @classmethod
    def load(cls, folders: Sequence[Path], *, spanned: bool) -> Grams:
        """Open what `collect.collect` wrote, one folder per expert; UserError for damaged files."""
        files = [sorted(folder.glob("*.safetensors")) for folder in folders]
        return cls([{t.key: t for file in some for t in stored_tensors(file)} for some in files], spanned)

    def of(self, name: str) -> Iterator[Tensor]:
        """Each expert's Gram of the layer whose weight is `name`; UserError where one has none."""
        for tensors in self.stored:
            if name not in tensors:
                raise UserError(f"no Gram matrix of {name} was collected: delete the folders in outputs/grams")
            yield tensors[name].rows()


def interference(pairs: Iterable[tuple[Tensor, Tensor]], gram: Tensor, space: Span | None) -> float | None:
    """||(M - t) X||_F^2 / ||t X||_F^2 of an expert's update t and a merge M; None where t does nothing to its inputs.

    0: the merge answers as the expert; 1: as if the expert's update were not there. `pairs` are blocks of the rows of
    M and t [rows, in], or all of them after one rotation of their columns. Of a span's Gram `space` is the `Span`, and
    inputs count as far as they lie in it.
    """
    gram = gram.double() if space is None else space.gram(gram)
    off = own = 0.0
    for merged, task in pairs:
        apart, alone = (merged.double() - task.double()), task.double()
        if space is not None:
            apart, alone = apart @ space.directions, alone @ space.directions
        off += float((apart @ gram * apart).sum())
        own += float((alone @ gram * alone).sum())
    return off / own if own > 0 else None
