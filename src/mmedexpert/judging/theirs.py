"""How published benchmarks of judges add up their own numbers, of the first order alone: to stand beside ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmedexpert.data.pairs import DIMENSIONS, INVALID, Pair
from mmedexpert.judging.ask import Judgement
from mmedexpert.judging.numbers import Cell, cells_of


def med_rewardbench(pairs: Sequence[Pair], rows: Sequence[Judgement]) -> dict[str, float]:
    """Right of each organ's pairs in each dimension, to four places; an invalid reply is wrong.

    Source: meidandz/Med-RewardBench@9b9d806, vlm/00_benchmark_full_pipeline.py. It has no mean over organs.
    """
    cells = cells_of(pairs, rows)
    found = {}
    for part in sorted({pair.part for pair in pairs}):
        for name in DIMENSIONS:
            right = [cell.score("acc_single") for cell in cells if (cell.pair.part, cell.dimension) == (part, name)]
            if right:
                found[f"{part}/{name}"] = round(float(np.mean(right)), 4)
    return found


def vl_rewardbench(pairs: Sequence[Pair], rows: Sequence[Judgement]) -> dict[str, float]:
    """`overall`: over all pairs; `macro`: the mean of general, hallucination and reasoning; without invalid replies.

    Source: VL-RewardBench@9b10abd, which takes the majority of up to ten samples; ours is one greedy reply.
    """
    valid = [cell for cell in cells_of(pairs, rows) if cell.said[0] != INVALID]
    if not valid:
        return {}
    parts = {f"part/{part}": _right(valid, part) for part in sorted({cell.pair.part for cell in valid})}
    overall = float(np.mean([cell.score("acc_single") for cell in valid]))
    return {"overall": overall, "macro": float(np.mean([*parts.values()])), **parts}


def multimodal_rewardbench(pairs: Sequence[Pair], rows: Sequence[Judgement]) -> dict[str, float]:
    """`overall`: over all pairs, and each category; an invalid reply is half right.

    Source: facebookresearch/multimodal_rewardbench@b4b92cd, scripts/2_get_accuracy.py, which draws A or B for it.
    """
    cells = cells_of(pairs, rows)
    values = {id(cell): 0.5 if cell.said[0] == INVALID else cell.score("acc_single") for cell in cells}
    parts = {
        f"part/{part}": float(np.mean([values[id(cell)] for cell in cells if cell.pair.part == part]))
        for part in sorted({cell.pair.part for cell in cells})
    }
    return {"overall": float(np.mean([*values.values()])), **parts}


def _right(cells: Sequence[Cell], part: str) -> float:
    return float(np.mean([cell.score("acc_single") for cell in cells if cell.pair.part == part]))
