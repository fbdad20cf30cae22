"""What is counted of a judge: right in one order, in both, on average; consistency; what place and length do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedexpert.data.pairs import DIMENSIONS, INVALID, OTHER, TIE, A, B, Pair
from mmedexpert.evaluation.stats import cluster_bootstrap_ci, macro_bootstrap_ci
from mmedexpert.judging.ask import Judgement

SCORES = ("acc_single", "acc_strict", "acc_avg")
RATES = ("consistency", "position_bias", "first_minus_second", "length_bias", "decisiveness", "invalid_rate")
MEAN = "mean"  # of the dimensions that a pair has


@dataclass(frozen=True)
class Cell:
    """One pair in one dimension: its label, and the verdicts (of the pair's own answers) by order."""

    pair: Pair
    dimension: str
    label: str
    said: tuple[str, ...]

    def score(self, name: str) -> float:
        """In [0, 1]; an invalid verdict is wrong."""
        right = [verdict == self.label for verdict in self.said]
        if name == "acc_single":
            return float(right[0])
        return float(all(right)) if name == "acc_strict" else float(np.mean(right))


def cells_of(pairs: Sequence[Pair], rows: Sequence[Judgement]) -> list[Cell]:
    """Every labelled dimension of every pair, with the verdicts of all orders; a dimension not asked is invalid."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row["verdicts"])
    return [
        Cell(pair, name, label, tuple(verdicts.get(name, INVALID) for verdicts in found[pair.id]))
        for pair in pairs
        for name, label in pair.labels.items()
    ]


def numbers_of(pairs: Sequence[Pair], rows: Sequence[Judgement], *, num_resamples: int, seed: int) -> dict[str, Any]:
    """All numbers of a judge, each a value with n and a 95% interval by bootstrap over images.

    acc_single: right in the published order; acc_strict: right in both orders; acc_avg: the mean over both. Each by
    dimension and as `mean`, over pairs (`micro`), over parts (organs, categories) and over specialties;
    `table`: part to dimension.
    consistency: the same answer in both orders, where both are valid; position_bias: the share of decided verdicts for
    the answer that stands first, minus 0.5; first_minus_second: the share of valid verdicts for the answer that stands
    first minus that for the second; length_bias: the share of decided verdicts for the longer answer, minus
    that of their labels; decisiveness: valid verdicts that are no tie; invalid_rate.
    # ours: how other benchmarks of judges count, side by side

    A number of nothing is 0 with n = 0. Of one order alone, acc_strict, acc_avg and consistency are absent.
    """
    cells = cells_of(pairs, rows)
    both = all(len(cell.said) == 2 for cell in cells)
    scores = SCORES if both else SCORES[:1]

    def mean(values: Sequence[float], groups: Sequence[str], strata: Sequence[str] | None = None) -> dict[str, float]:
        if not values:
            return {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n": 0}
        options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
        if strata is None:
            value, low, high = cluster_bootstrap_ci(values, groups, **options)
        else:
            value, low, high = macro_bootstrap_ci(values, groups, strata, **options)
        return {"value": value, "ci_low": low, "ci_high": high, "n": len(values)}

    def of(chosen: Sequence[Cell], score: str, by: Callable[[Pair], str] | None = None) -> dict[str, dict[str, float]]:
        parts = {name: [cell for cell in chosen if cell.dimension == name] for name in DIMENSIONS}
        found = {
            name: mean([c.score(score) for c in part], [c.pair.group for c in part], _strata(part, by))
            for name, part in parts.items() if part
        }  # fmt: skip
        of_pair: dict[str, list[Cell]] = {}
        for cell in chosen:
            of_pair.setdefault(cell.pair.id, []).append(cell)
        whole = [part[0] for part in of_pair.values()]
        means = [float(np.mean([cell.score(score) for cell in part])) for part in of_pair.values()]
        return {**found, MEAN: mean(means, [cell.pair.group for cell in whole], _strata(whole, by))}

    parts = sorted({pair.part for pair in pairs if pair.part})
    found: dict[str, Any] = {"n": len(pairs), "orders": 2 if both else 1, "micro": {s: of(cells, s) for s in scores}}
    if parts:
        inside = [cell for cell in cells if cell.pair.part]
        found["over_parts"] = {s: of(inside, s, lambda pair: pair.part) for s in scores}
        found["table"] = {o: {s: of([c for c in cells if c.pair.part == o], s) for s in scores} for o in parts}
    found["over_specialties"] = {s: of(cells, s, lambda pair: pair.specialty) for s in scores}
    for name in RATES if both else RATES[1:]:
        values = _RATES[name](cells)
        found[name] = mean([value for value, _ in values], [group for _, group in values])
    return found


def _strata(cells: Sequence[Cell], by: Callable[[Pair], str] | None) -> list[str] | None:
    return None if by is None else [by(cell.pair) for cell in cells]


Values = list[tuple[float, str]]  # a value and its image


def _consistency(cells: Sequence[Cell]) -> Values:
    return [(float(c.said[0] == c.said[1]), c.pair.group) for c in cells if INVALID not in c.said]


def _slots(cell: Cell) -> list[tuple[str, str]]:
    """Of each order that is decided, the verdict and the answer that stood first."""
    return [(said, first) for said, first in zip(cell.said, (A, B), strict=False) if said in OTHER]


def _position_bias(cells: Sequence[Cell]) -> Values:
    return [(float(said == first) - 0.5, c.pair.group) for c in cells for said, first in _slots(c)]


def _first_minus_second(cells: Sequence[Cell]) -> Values:
    """The share of valid verdicts for the answer that stands first minus that for the second; a tie is for neither."""
    valid = [(c, said, first) for c in cells for said, first in zip(c.said, (A, B), strict=False) if said != INVALID]
    return [(0.0 if said == TIE else 1.0 if said == first else -1.0, c.pair.group) for c, said, first in valid]


def _length_bias(cells: Sequence[Cell]) -> Values:
    """Of each decided verdict whose label is decided, too: is it for the longer answer, less, is the label? Answers of
    equal length are left out."""
    longer = {c.pair.id: _longer(c.pair) for c in cells}
    return [
        (float(said == longer[c.pair.id]) - float(c.label == longer[c.pair.id]), c.pair.group)
        for c in cells if longer[c.pair.id] and c.label in OTHER for said, _ in _slots(c)
    ]  # fmt: skip


def _longer(pair: Pair) -> str:
    a, b = (len(pair.answers[letter].strip()) for letter in (A, B))
    return "" if a == b else A if a > b else B


def _decisiveness(cells: Sequence[Cell]) -> Values:
    return [(float(said != TIE), c.pair.group) for c in cells for said in c.said if said != INVALID]


def _invalid(cells: Sequence[Cell]) -> Values:
    return [(float(said == INVALID), c.pair.group) for c in cells for said in c.said]


_RATES: dict[str, Callable[[Sequence[Cell]], Values]] = {
    "consistency": _consistency, "position_bias": _position_bias, "first_minus_second": _first_minus_second,
    "length_bias": _length_bias, "decisiveness": _decisiveness, "invalid_rate": _invalid,
}  # fmt: skip


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """A run's metrics: `acc_single/accuracy` and so on over pairs, `.../over_parts`, and the rates, with intervals."""
    found: dict[str, float] = {"pairs": float(numbers["n"])}
    for part in ("micro", "over_parts", "over_specialties"):
        for score, by in numbers.get(part, {}).items():
            for name, one in by.items():
                key = f"{score}/{name}" + ("" if part == "micro" else f"/{part}")
                found |= {key + ("" if k == "value" else f"/{k}"): float(v) for k, v in one.items()}
    found |= {f"theirs/{name}": float(value) for name, value in numbers.get("theirs", {}).items()}
    for name in RATES:
        for k, v in numbers.get(name, {}).items():
            found[name + ("" if k == "value" else f"/{k}")] = float(v)
    return found


def per_pair(pairs: Sequence[Pair], rows: Sequence[Judgement], score: str) -> list[float]:
    """Each pair's mean over its dimensions, in the order of `pairs`: what two judges are compared by."""
    of_pair: dict[str, list[float]] = {}
    for cell in cells_of(pairs, rows):
        of_pair.setdefault(cell.pair.id, []).append(cell.score(score))
    return [float(np.mean(of_pair[pair.id])) for pair in pairs]
