"""Judges of pairs of answers as people read them: one row a judge, the parts by dimensions, and a picture of that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.judging.numbers import MEAN, RATES
from mmedexpert.reporting.tables import Row
from mmedexpert.runtime.drawing import save_drawing

HEADS = {
    "acc_strict": "right in both orders", "acc_avg": "right on average", "acc_single": "right in the first order",
    "consistency": "consistent", "position_bias": "position bias", "first_minus_second": "first - second",
    "length_bias": "length bias", "decisiveness": "decided", "invalid_rate": "invalid",
}  # fmt: skip


def judge_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a judge, percent; a dash where one order says nothing of it."""
    rows = []
    for name, one in summaries.items():
        row, lead = {"model": name}, lead_of(one)
        for score in ("acc_strict", "acc_avg", "acc_single"):
            found = one["micro"].get(score)
            row[HEADS[score]] = _percent(found[MEAN]) if found else "-"
        for over, head in (("over_parts", "mean of parts"), ("over_specialties", "mean of specialties")):
            row[head] = _percent(one[over][lead][MEAN]) if over in one else "-"
        row |= {
            f"{name} (theirs)": f"{100 * value:.1f}" for name, value in one.get("theirs", {}).items() if "/" not in name
        }
        rows.append(row)
    return rows


def dimension_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a judge: each dimension, percent right on average over the orders asked."""
    rows = []
    for name, one in summaries.items():
        found = one["micro"][lead_of(one)]
        rows.append({"model": name} | {d: _percent(found[d]) if d in found else "-" for d in DIMENSIONS})
    return rows


def rate_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a judge: what place and length do to it, how often it decides; percent, biases in points."""
    rows = []
    for name, one in summaries.items():
        row = {"model": name}
        for rate in RATES:
            found, sign = one.get(rate), "+" if "bias" in rate or "minus" in rate else ""
            row[HEADS[rate]] = f"{100 * found['value']:{sign}.1f}" if found and found["n"] else "-"
        rows.append(row)
    return rows


def lead_of(summary: Mapping[str, Any]) -> str:
    """The score that leads: of both orders, where both were asked."""
    return "acc_avg" if "acc_avg" in summary["micro"] else "acc_single"


def part_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Organ or category by dimension: percent right on average over the orders asked, with its interval and n."""
    rows, lead = [], lead_of(summary)
    for part, scores in summary.get("table", {}).items():
        found = scores[lead]
        row = {"part": part, "n": str(found[MEAN]["n"])}
        rows.append(row | {name: _percent(found[name]) if name in found else "-" for name in (*DIMENSIONS, MEAN)})
    return rows


def paired_rows(found: Mapping[str, tuple[float, float, float, float]], first: str, score: str) -> list[Row]:
    """Each judge minus the first, in points, with its adjusted p."""
    head = f"{HEADS[score]}, against {first}"
    return [
        {
            "model": n,
            head: f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            "p (Holm)": "-" if p != p else f"{p:.3g}",
        }
        for n, (value, low, high, p) in found.items()
    ]


def heat_map(summary: Mapping[str, Any], title: str, path: Path) -> None:
    """The parts by dimensions, from 0 to 100 percent around chance, with each number written in its cell."""
    from matplotlib.figure import Figure  # lazily: half a second

    parts = list(summary["table"])
    columns = [*DIMENSIONS, MEAN]
    scores = [summary["table"][part][lead_of(summary)] for part in parts]
    values = [[100 * one[name]["value"] if name in one else float("nan") for name in columns] for one in scores]
    drawn = Figure(figsize=(9, 1.4 + 0.36 * len(parts)), layout="constrained")
    axes = drawn.subplots()
    image = axes.imshow(values, cmap="PuOr", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            told, colour = ("-", "0.2") if value != value else (f"{value:.0f}", "w" if abs(value - 50) > 35 else "0.1")
            axes.text(j, i, told, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    named = [f"{name} ({one[MEAN]['n']})".replace("$", r"\$") for name, one in zip(parts, scores, strict=True)]
    axes.set_yticks(range(len(parts)), named)
    drawn.colorbar(image, label="percent right (50: chance)")
    drawn.suptitle(title.replace("$", r"\$"))
    save_drawing(drawn, path)


def _percent(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:.1f} [{100 * one['ci_low']:.1f}, {100 * one['ci_high']:.1f}]"
