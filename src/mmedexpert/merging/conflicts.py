"""How much the merged updates conflict: sign conflict against chance, cosines, norms, what each one keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Conflicts:
    """Running conflict statistics over the tensors of N named updates; entries that are zero take no part."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        n = len(self.names)
        self.gram = torch.zeros(n, n, dtype=torch.float64)
        self.entries, self.kept = [0] * n, [0] * n
        self.overlapping, self.conflicting, self.expected = 0, 0, 0.0
        self.merged_square = 0.0

    def add(self, deltas: Sequence[Tensor], merged: Tensor) -> None:
        """Count one tensor: the N deltas to it (zeros where an update does not touch it) and what became of them."""
        positive, negative = torch.zeros_like(merged, dtype=torch.int16), torch.zeros_like(merged, dtype=torch.int16)
        for i, delta in enumerate(deltas):
            up, down = delta > 0, delta < 0
            positive += up
            negative += down
            self.entries[i] += int(up.sum() + down.sum())
            self.kept[i] += int((up & (merged > 0)).sum() + (down & (merged < 0)).sum())
            for j, other in enumerate(deltas[: i + 1]):
                self.gram[i, j] += float(delta.flatten() @ other.flatten())
        voters = positive + negative
        for m in range(2, len(deltas) + 1):
            count = int((voters == m).sum())
            self.overlapping += count
            self.expected += count * (1 - 2.0 ** (1 - m))  # m independent signs, each + or - with probability 1/2
        self.conflicting += int(((positive > 0) & (negative > 0)).sum())
        self.merged_square += float(merged.flatten() @ merged.flatten())

    def report(self) -> dict[str, float]:
        """Flat metrics; 0 where there is nothing to compare.

        sign_conflict_rate: share of the entries with at least two nonzero updates whose signs are not all equal;
        sign_conflict_chance: what independent symmetric updates would give there; mean_cosine: mean over the pairs of
        whole updates; <name>/norm: L2 norm; <name>/kept_share: share of its nonzero entries whose sign the merged
        update has.
        """
        norms = self.gram.diagonal().sqrt()
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i)]
        cosines = [float(self.gram[i, j] / (norms[i] * norms[j])) for i, j in pairs if norms[i] > 0 and norms[j] > 0]
        metrics = {
            "sign_conflict_rate": self.conflicting / max(1, self.overlapping),
            "sign_conflict_chance": self.expected / max(1, self.overlapping),
            "mean_cosine": sum(cosines) / max(1, len(cosines)),
            "merged_norm": self.merged_square**0.5,
        }
        for i, name in enumerate(self.names):
            metrics[f"{name}/norm"] = float(norms[i])
            metrics[f"{name}/kept_share"] = self.kept[i] / max(1, self.entries[i])
        return metrics
