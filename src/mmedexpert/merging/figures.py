"""Figures of a merge: where its updates conflict more than chance, and how alike they are."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.runtime.drawing import save_drawing

NUMBERS_IN_CELLS = 40  # ours: rows or columns up to which the numbers are written into the cells
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as data pass through a layer


def conflict_figures(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    cosines: Sequence[Sequence[float]],
    title: str,
) -> dict[str, Path]:
    """Draw what `Conflicts` found, each as PNG and SVG; returns the PNGs by name.

    `conflict_heatmap`: layer by module kind, sign-conflict rate minus its chance level in percentage points, from
    `Conflicts.table`. `update_cosines`: update by update, from `Conflicts.cosines`. A grey cell has no number.
    """
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: (layer is None, layer or 0))
    modules = sorted({row["module"] for row in rows}, key=lambda kind: (_order(kind), kind))
    excess = {place: [math.nan] * len(modules) for place in layers}
    for row in rows:
        if row["sign_conflict_rate"] is not None:
            above = 100 * (row["sign_conflict_rate"] - row["sign_conflict_chance"])
            excess[row["layer"]][modules.index(row["module"])] = above
    largest = max([abs(v) for values in excess.values() for v in values if not math.isnan(v)], default=0.0)
    short = [name.rpartition("/")[2] for name in names]  # "expert/pediatrics": the role is no news here
    short = short if len(set(short)) == len(short) else list(names)
    drawn = {
        "conflict_heatmap": _grid(
            list(excess.values()), ["other" if layer is None else str(layer) for layer in layers], modules,
            "Sign conflict above (red) or below (blue) chance", title, "percentage points", "layer",
            "{:+.1f}", max(largest, 1.0),
        ),
        "update_cosines": _grid(
            cosines, short, short, "Cosine of the updates", title, "cosine", "", "{:.2f}", 1.0
        ),
    }  # fmt: skip
    paths = {}
    for name, figure in drawn.items():
        for kind in ("svg", "png"):
            paths[name] = folder / f"{name}.{kind}"
            save_drawing(figure, paths[name], bbox_inches="tight")
    return paths


def _grid(
    values: Sequence[Sequence[float]], down: Sequence[str], across: Sequence[str], title: str, note: str, unit: str,
    ylabel: str, cell: str, limit: float,
) -> Any:  # fmt: skip
    """A heat map with its numbers in the cells, colours from -limit (blue) to limit (red)."""
    from matplotlib import colormaps  # lazily: half a second, and only a merge draws
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 3.0 + 0.85 * len(across)
    text = "\n".join([title, *textwrap.wrap(note, int(12 * width))])  # 12 letters an inch: none is cut off
    figure = Figure(figsize=(width, 1.8 + 0.42 * len(down) + 0.17 * text.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no state that other figures share
    axes = figure.add_subplot()
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    image = axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=40, ha="right", rotation_mode="anchor", fontsize=10)
    axes.set_yticks(range(len(down)), down, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=11)
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if max(len(down), len(across)) <= NUMBERS_IN_CELLS:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    colour = "white" if abs(value) > 0.6 * limit else "black"
                    text = cell.format(0.0 if float(cell.format(value)) == 0 else value)  # no -0.0
                    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=15 + len(down))
    bar.set_label(unit, fontsize=10)
    bar.outline.set_visible(False)
    return figure


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)
