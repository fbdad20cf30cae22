"""How many records each step of the funnel was given, kept and dropped, and why: a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from mmedexpert.curation.steps import COUNTS
from mmedexpert.errors import UserError
from mmedexpert.runtime.drawing import save_drawing

Counts = Mapping[str, Any]  # a step's `step`, `in`, `out` and `reasons` (counts.json)
REASONS_SHOWN = 5  # ours: in the figure, the most frequent of a step; the table has all
TITLE = "Records that each step of the funnel kept (blue) and dropped"
KEPT_COLOUR, SOFT = "#2a6f97", "#6b7280"
COLOURS = ("#9b2226", "#ca6702", "#e9a13b", "#b56576", "#8d7b68", "#adb5bd")  # of reasons, the last of all others
# of the figure, in inches: its width, where bars start and end, the two columns of numbers, a bar, a line of text
WIDTH, START, END, KEPT, WHY, BAR, LINE, GAP = 11.0, 1.9, 6.0, 6.75, 7.6, 0.34, 0.19, 0.2


def read_counts(folders: Sequence[Path]) -> list[Counts]:
    """What the steps of these folders counted, in order."""
    try:
        return [json.loads((folder / COUNTS).read_text(encoding="utf-8")) for folder in folders]
    except (OSError, ValueError) as error:
        raise UserError(f"the counts of a step cannot be read ({error}): run the data stage again") from error


def funnel_table(steps: Sequence[Counts], title: str = "The funnel") -> Table:
    """For the terminal: a line for each step, its reasons below it."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("step and reason")
    for name in ("in", "dropped", "out"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(escape(str(step["step"])), f"{step['in']:,}", f"{_dropped(step):,}", f"{step['out']:,}")
        for reason, count in _reasons(step):
            table.add_row(f"  [dim]{escape(reason)}[/dim]", "", f"[dim]{count:,}[/dim]", "")
    return table


def funnel_markdown(steps: Sequence[Counts]) -> str:
    """For a page: a row for each step, its reasons in the last cell."""
    lines = ["| Step | In | Dropped | Out | Why |", "| --- | ---: | ---: | ---: | --- |"]
    for step in steps:
        why = "; ".join(f"{reason.replace('|', '&#124;')} {count:,}" for reason, count in _reasons(step)) or "-"
        if (more := _more(step)) > 0:
            why = f"makes {more:,} more of those it keeps" + ("" if why == "-" else f"; {why}")
        lines.append(f"| {step['step']} | {step['in']:,} | {_dropped(step):,} | {step['out']:,} | {why} |")
    return "\n".join(lines) + "\n"


def funnel_figure(steps: Sequence[Counts], path: Path, title: str = TITLE) -> Path:
    """A bar for each step, what it kept and what it dropped by reason, as PNG; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazily: half a second
    from matplotlib.figure import Figure

    largest = max([step["out"] + _dropped(step) for step in steps], default=0) or 1
    heights = [max(BAR, LINE * len(_shown(step))) + GAP for step in steps]
    height = 0.75 + sum(heights)
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # in inches from the upper left
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(0.15, 0.27, title, fontsize=12, va="center", weight="bold")
    axes.text(KEPT, 0.58, "kept", fontsize=9, ha="right", va="center", color=SOFT)
    axes.text(WHY - 0.1, 0.58, "dropped", fontsize=9, ha="right", va="center", color=SOFT)
    top = 0.75
    for step, tall in zip(steps, heights, strict=True):
        middle = top + tall / 2
        name = shorten(str(step["step"]), 20, placeholder=" ...")
        axes.text(START - 0.1, middle, name, fontsize=11, ha="right", va="center", parse_math=False)
        axes.text(KEPT, middle, f"{step['out']:,}", fontsize=11, ha="right", va="center", weight="bold")
        parts = [(KEPT_COLOUR, step["out"]), *zip(COLOURS, (count for _, count in _shown(step)), strict=False)]
        left = START
        for colour, count in parts:
            wide = count / largest * (END - START)
            axes.barh(middle, wide, BAR, left=left, color=colour)
            left += wide
        line = middle - LINE * (len(_shown(step)) - 1) / 2
        for colour, (reason, count) in zip(COLOURS, _shown(step), strict=False):
            axes.text(WHY - 0.1, line, f"{count:,}", fontsize=9, ha="right", va="center")
            axes.barh(line, 0.11, 0.11, left=WHY, color=colour)
            said = shorten(reason, 48, placeholder=" ...")
            axes.text(WHY + 0.2, line, said, fontsize=9, va="center", parse_math=False)
            line += LINE
        if not step["reasons"]:
            said = "none" if step["in"] or step["out"] else "nothing was left"
            axes.text(WHY + 0.2, middle, said, fontsize=9, va="center", color=SOFT)
        top += tall
        axes.axhline(top, 0.15 / WIDTH, 1 - 0.15 / WIDTH, color="#e4e7ea", linewidth=0.6)
    save_drawing(figure, path)
    return path


def _dropped(step: Counts) -> int:
    return sum(step["reasons"].values())


def _more(step: Counts) -> int:
    """Records a step makes beyond those it was given: one question in several perspectives."""
    return int(step["out"] + _dropped(step) - step["in"])


def _reasons(step: Counts) -> list[tuple[str, int]]:
    return sorted(step["reasons"].items(), key=lambda item: (-item[1], item[0]))


def _shown(step: Counts) -> list[tuple[str, int]]:
    """The most frequent reasons, and the others as one."""
    found = _reasons(step)
    rest = found[REASONS_SHOWN:]
    if len(rest) < 2:
        return found
    return [*found[:REASONS_SHOWN], (f"{len(rest)} other reasons", sum(count for _, count in rest))]
