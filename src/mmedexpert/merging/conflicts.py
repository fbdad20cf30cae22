"""How much merged updates conflict: signs against chance, cosines, shared subspaces, norms, what each one keeps."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**17  # ours: entries counted together; they stay in the cache, and fp32 sums of signs are exact
Factors = tuple[Tensor, Tensor]

COLUMNS = {
    "layer": "number of the layer, empty outside the layers",
    "module": "kind of the linear layer",
    "tensor": "name of the weight in the model",
    "entries": "number of its entries",
    "sign_conflict_rate": "of the entries that two or more updates change (after trimming): share whose signs differ",
    "sign_conflict_chance": "what independent updates with random signs would give on the same entries",
    "mean_cosine": "cosine of two whole updates, mean over the pairs; 0 for unrelated ones",
    "row_overlap": "share of the smaller row space (inputs read) that lies in the other's, mean over the pairs",
    "row_overlap_chance": "the same for random subspaces of these ranks",
    "column_overlap": "as row_overlap, of the column spaces (outputs written)",
    "column_overlap_chance": "the same for random subspaces of these ranks",
    "interference": "mean over the experts of <update>/interference",
    "merged_norm": "L2 norm of the merged update",
    "<update>/norm": "L2 norm of the update before trimming",
    "<update>/trim_share": "share of its nonzero entries that are still there after trimming",
    "<update>/kept_share": "share of its nonzero entries that are there after trimming and whose sign the merge has",
    "<update>/interference": "||(M - t) X||^2 / ||t X||^2 of the merge M and an expert's update t on the inputs X that "
    "the layer has in the expert's own training records: 0 answers as the expert, 1 as without it; mean over tensors; "
    "empty without merge.grams, and with merge.grams=span of inputs as far as they lie in the updates' span",
}
OF_A_TENSOR = (
    "sign_conflict_rate", "sign_conflict_chance", "mean_cosine", "row_overlap", "row_overlap_chance", "column_overlap",
    "column_overlap_chance", "interference",
)  # fmt: skip
OVERLAPS = OF_A_TENSOR[3:7]


@dataclass
class _Counts:
    """Sums over the entries of one tensor or of many; `pairs` [N, N] are inner products of the updates."""

    pairs: Tensor
    entries: list[float]
    trimmed: list[float]
    kept: list[float]
    size: int = 0
    overlapping: float = 0.0
    conflicting: float = 0.0
    expected: float = 0.0
    merged_square: float = 0.0
    means: dict[str, list[float]] = field(default_factory=dict)  # what is a mean over tensors, or pairs of updates
    from_factors: bool = False

    @classmethod
    def of(cls, n: int) -> _Counts:
        return cls(torch.zeros(n, n, dtype=torch.float64), [0.0] * n, [0.0] * n, [0.0] * n)

    def __iadd__(self, other: _Counts) -> _Counts:
        self.pairs = self.pairs + other.pairs
        for mine, its in ((self.entries, other.entries), (self.trimmed, other.trimmed), (self.kept, other.kept)):
            mine[:] = [a + b for a, b in zip(mine, its, strict=True)]
        for name in ("size", "overlapping", "conflicting", "expected", "merged_square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, values in other.means.items():
            self.means.setdefault(name, []).extend(values)
        return self


class Conflicts:
    """Conflict statistics of N named updates, collected tensor by tensor; entries that are zero take no part."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._tensors: dict[str, _Counts] = {}
        self._lock = threading.Lock()

    def _of(self, tensor_name: str) -> _Counts:
        return self._tensors.setdefault(tensor_name, _Counts.of(len(self.names)))

    @torch.no_grad()
    def add(self, tensor_name: str, deltas: Sequence[Tensor], trimmed: Sequence[Tensor] | None, merged: Tensor) -> None:
        """Count one block of rows of a tensor.

        `deltas` are the N updates to it (fp32, one shape; zeros where an update does not touch it), `trimmed` what the
        rule's trim left of them (None: it does not trim), `merged` what became of them. Sums of signs in fp32 are
        twice as fast as int8 masks here: torch vectorises sign and dot, and not the comparisons. ValueError for another
        number of updates. Threads may add blocks at the same time.
        """
        if len(deltas) != len(self.names) or (trimmed is not None and len(trimmed) != len(deltas)):
            raise ValueError(f"{len(deltas)} deltas and {len(trimmed or deltas)} trimmed of {len(self.names)} updates")
        counts = self._of(tensor_name)
        whole = [t.reshape(-1) for t in (merged, *deltas, *(trimmed or ()))]
        for start in range(0, merged.numel(), CHUNK):
            out, *parts = (t[start : start + CHUNK] for t in whole)
            self._count(counts, out, parts[: len(deltas)], parts[len(deltas) :])

    def _count(self, counts: _Counts, merged: Tensor, deltas: list[Tensor], trimmed: list[Tensor]) -> None:
        elected = merged.sign()
        nonzero = elected.square()
        net, voters = torch.zeros_like(merged), torch.zeros_like(merged)
        entries, present, agreeing = [], [], []  # of each update
        for delta, kept in zip(deltas, trimmed or deltas, strict=True):
            sign = kept.sign()
            there = sign.square()
            net += sign
            voters += there
            present.append(there.sum())
            entries.append(delta.sign().square().sum() if trimmed else present[-1])
            agreeing.append((there @ nonzero + sign @ elected) / 2)  # both nonzero, and of one sign
        sums = {
            "entries": torch.stack(entries),
            "trimmed": torch.stack(present),
            "kept": torch.stack(agreeing),
            "changed": voters.clamp(max=1).sum(),
            "overlapping": (voters - 1).clamp_(0, 1).sum(),
            "conflicting": (voters - net.abs()).clamp_(max=1).sum(),
            "chances": torch.exp2(-voters).sum(),
            "merged_square": merged @ merged,
        }
        if not counts.from_factors:
            sums["pairs"] = torch.stack([deltas[i] @ deltas[j] for i, j in self._triangle()])
        numbers = torch.cat([part.reshape(-1) for part in sums.values()]).tolist()  # one wait for the device
        ends = list(itertools.accumulate(part.numel() for part in sums.values()))
        named = {name: numbers[end - sums[name].numel() : end] for name, end in zip(sums, ends, strict=True)}
        with self._lock:
            self._sum_up(counts, named, merged.numel())

    def _sum_up(self, counts: _Counts, sums: dict[str, list[float]], size: int) -> None:
        counts.size += size
        for mine, name in ((counts.entries, "entries"), (counts.trimmed, "trimmed"), (counts.kept, "kept")):
            mine[:] = [before + more for before, more in zip(mine, sums[name], strict=True)]
        counts.overlapping += sums["overlapping"][0]
        counts.conflicting += sums["conflicting"][0]
        # v independent signs, each + or - with probability 1/2, differ with probability 1 - 2 * 2^-v (0 for v = 1)
        unchanged = size - sums["changed"][0]
        counts.expected += sums["changed"][0] - 2 * (sums["chances"][0] - unchanged)
        counts.merged_square += sums["merged_square"][0]
        if "pairs" in sums:
            for (i, j), product in zip(self._triangle(), sums["pairs"], strict=True):
                counts.pairs[i, j] += product

    def _triangle(self) -> Iterator[tuple[int, int]]:
        return ((i, j) for i in range(len(self.names)) for j in range(i + 1))

    @torch.no_grad()
    def overlap(self, tensor_name: str, factors: Sequence[Factors | None]) -> None:
        """Norms, cosines and subspace overlaps of one tensor's LoRA updates B A, from r x r products.

        `factors` are the N pairs A [r, in], B [out, r], scaling folded into B; None where an update does not touch the
        tensor. Overlap of two subspaces with orthonormal bases Q, P: ||Q^T P||_F^2 / min(rank) in [0, 1], as in LoRA
        (arXiv 2106.09685, section 7.2); max(rank) / width for random ones. Called before `add`, it spares the inner
        products of the whole updates there. ValueError for another number of updates.
        """
        if len(factors) != len(self.names):
            raise ValueError(f"{len(factors)} factors of {len(self.names)} updates")
        counts = self._of(tensor_name)
        counts.from_factors, counts.means = True, {}
        counts.pairs = torch.zeros_like(counts.pairs)
        thin = {i: _thin_svd(*pair) for i, pair in enumerate(factors) if pair is not None}
        for i, j in self._triangle():
            if i not in thin or j not in thin:
                continue
            (u, s, v), (u_, s_, v_) = thin[i], thin[j]
            columns, rows = u.T @ u_, v.T @ v_
            counts.pairs[i, j] = float(s @ (columns * rows) @ s_)
            if i == j or not len(s) or not len(s_):
                continue
            low, high = sorted((len(s), len(s_)))
            for name, product, width in (("row", rows, len(v)), ("column", columns, len(u))):
                counts.means.setdefault(f"{name}_overlap", []).append(float(product.square().sum()) / low)
                counts.means.setdefault(f"{name}_overlap_chance", []).append(high / width)

    def interfere(self, tensor_name: str, values: Sequence[float | None]) -> None:
        """The relative interference of a tensor with the first updates, the experts; None where one does not act."""
        means = self._of(tensor_name).means
        for name, value in zip(self.names, values, strict=False):
            means[f"{name}/interference"] = [] if value is None else [value]

    def report(self) -> dict[str, float]:
        """Flat metrics over all tensors, and under `layers/<layer>/<module>/` those of each layer and module kind.

        What the names mean: `COLUMNS`. Overlaps and interference are means over tensors, and left out without LoRA
        factors and Gram matrices; 0 where there is nothing to compare.
        """
        total = self._total()
        metrics = {
            name: 0.0 if value is None else value
            for name, value in self._figures(total).items()
            if value is not None or not name.endswith(("overlap", "overlap_chance", "interference"))
        }
        places: dict[str, _Counts] = {}
        for name, counts in self._tensors.items():
            layer, module = place(name)
            key = f"layers/{'none' if layer is None else layer}/{module}"
            places.setdefault(key, _Counts.of(len(self.names)))
            places[key] += counts
        for key, counts in places.items():
            figures = self._figures(counts)
            metrics |= {f"{key}/{name}": value for name in OF_A_TENSOR if (value := figures[name]) is not None}
        return metrics

    def table(self) -> list[dict[str, Any]]:
        """One row per tensor, by layer: `COLUMNS`, and `cosine <a>, <b>` of each pair; None where there is none."""
        rows = []
        for name, counts in self._tensors.items():
            layer, module = place(name)
            cosines = self._cosines(counts)
            row = {"layer": layer, "module": module, "tensor": name, "entries": counts.size, **self._figures(counts)}
            for i, j in combinations(range(len(self.names)), 2):
                value = float(cosines[i, j])
                row[f"cosine {self.names[i]}, {self.names[j]}"] = None if value != value else value
            rows.append(row)
        return sorted(rows, key=lambda row: (row["layer"] is None, row["layer"] or 0))

    def cosines(self) -> list[list[float]]:
        """Cosines of the whole updates over all tensors, [N, N]; nan where one of them is zero."""
        return self._cosines(self._total()).tolist()

    def _total(self) -> _Counts:
        total = _Counts.of(len(self.names))
        for counts in self._tensors.values():
            total += counts
        return total

    def _cosines(self, counts: _Counts) -> Tensor:
        lower = counts.pairs.tril()
        full = lower + lower.T - lower.diag().diag()
        norms = full.diag().clamp(min=0).sqrt()
        return full / (norms[:, None] * norms)  # 0 / 0: nan

    def _figures(self, counts: _Counts) -> dict[str, float | None]:
        cosines = self._cosines(counts)
        pairs = [float(cosines[i, j]) for i, j in combinations(range(len(self.names)), 2) if cosines[i, j].isfinite()]
        figures: dict[str, float | None] = {
            "sign_conflict_rate": _share(counts.conflicting, counts.overlapping),
            "sign_conflict_chance": _share(counts.expected, counts.overlapping),
            "mean_cosine": _share(sum(pairs), len(pairs)),
            "merged_norm": counts.merged_square**0.5,
        }
        for name in (*OVERLAPS, *(f"{one}/interference" for one in self.names)):
            values = counts.means.get(name, [])
            figures[name] = _share(sum(values), len(values))
        told = [value for name, values in counts.means.items() if "interf" in name for value in values]
        figures["interference"] = _share(sum(told), len(told))
        for i, name in enumerate(self.names):
            figures[f"{name}/norm"] = max(0.0, float(counts.pairs[i, i])) ** 0.5
            figures[f"{name}/trim_share"] = _share(counts.trimmed[i], counts.entries[i])
            figures[f"{name}/kept_share"] = _share(counts.kept[i], counts.entries[i])
        return figures


def place(tensor_name: str) -> tuple[int | None, str]:
    """Layer number and module kind of a weight: (3, "q_proj") of `language_model.layers.3.self_attn.q_proj.weight`.

    Outside the language model the stack's name stays before the kind, because its layers are counted anew:
    (3, "visual.blocks.qkv"); None as layer where the name has no number.
    """
    name = tensor_name.removesuffix(".weight")
    found = re.fullmatch(r"(.+?)\.(\d+)\.(?:.+\.)?([^.]+)", name)
    if found is None:
        return None, name.rpartition(".")[2]
    stack, number, kind = found.groups()
    stack = re.sub(r"^(model\.)?(language_model\.)?(layers$)?", "", stack)
    return int(number), f"{stack}.{kind}" if stack else kind


def _thin_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], s [k], V [in, k] with B A = U diag(s) V^T and k its numerical rank (numpy's rule, on the core)."""
    q_a, r_a = torch.linalg.qr(a.float().T)
    q_b, r_b = torch.linalg.qr(b.float())
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = s > s.max() * len(s) * torch.finfo(s.dtype).eps if len(s) else s > 0
    return q_b @ u[:, kept], s[kept], q_a @ vh[kept].T


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
