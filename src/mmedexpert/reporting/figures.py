"""Line and interval figures as SVG within a page: text stays text, colours are the page's own, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS = 7  # --c1 to --c7 of pages.css
# what matplotlib draws with, and what of the page takes its place
INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(COLOURS))
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (1.5, 1.5), (6, 2, 1.5, 2))  # a line is told by more than colour
WIDTH = 4.6  # inches: what fits a small screen at a readable size
FONT = 9.0
WRAP = 30  # letters in a line of a label


@dataclass(frozen=True)
class Line:
    """A series of a figure; `place` is its colour and dash, the same in all figures of a group."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    place: int


def line_figure(lines: Sequence[Line], title: str, across: str, described: str) -> str:
    """Lines over steps, as a figure whose caption is the title; one point is a dot."""
    with _settings():
        return _figure(_lines(lines, across), title, described)


def _lines(lines: Sequence[Line], across: str) -> Any:
    figure, axes = _empty(WIDTH, 2.3)
    for line in lines:
        dash = DASHES[line.place % len(DASHES)]
        style: Any = (0, dash) if dash else "-"
        mark = "o" if len(line.x) == 1 else ""
        axes.plot(line.x, line.y, color=SERIES[line.place % COLOURS], linestyle=style, marker=mark, linewidth=1.6)
    axes.set_xlabel(across, fontsize=FONT)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True, nbins=6)
    return figure


def interval_figure(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], kinds: Sequence[str], title: str, described: str
) -> str:
    """A row per model with a mean and its interval for each of `kinds`, told apart by colour, place and shape."""
    with _settings():
        return _figure(_intervals(rows, kinds), title, described)


def _intervals(rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], kinds: Sequence[str]) -> Any:
    names = ["\n".join(textwrap.wrap(name, WRAP)) for name, _ in rows]
    height = sum(0.2 + 0.17 * (1 + name.count("\n")) for name in names) + 0.7
    figure, axes = _empty(WIDTH, height)
    for k, kind in enumerate(kinds):
        means, lows, highs = zip(*(values[k] for _, values in rows), strict=True)
        y = [place + 0.22 * (k - (len(kinds) - 1) / 2) for place in range(len(rows))]
        spans = [
            [m - low for m, low in zip(means, lows, strict=True)],
            [h - m for m, h in zip(means, highs, strict=True)],
        ]
        axes.errorbar(
            means,
            y,
            xerr=spans,
            color=SERIES[k],
            fmt="os"[k % 2],
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=kind,
        )
    axes.set_yticks(range(len(rows)), names, fontsize=FONT)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("accuracy in percent", fontsize=FONT)
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=len(kinds), fontsize=FONT, frameon=False, labelcolor=INK)
    return figure


def legend(names: Sequence[str]) -> str:
    """Names beside a sample of their line, as text that wraps."""
    items = []
    for place, name in enumerate(names):
        dash = " ".join(f"{part:g}" for part in DASHES[place % len(DASHES)])
        sample = (
            f'<svg width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" stroke-width="2.5" '
            f'stroke-dasharray="{dash}" style="stroke: var(--c{place % COLOURS + 1})"/></svg>'
        )
        items.append(f"<li>{sample}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _settings() -> AbstractContextManager[None]:
    """Text stays text, a dollar in a name is no formula, and the same drawing is the same file."""
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False})


def _empty(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # lazily: half a second, and only a page draws
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=INK, labelsize=FONT, length=2.5)
    axes.xaxis.label.set_color(INK)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(INK)
    return figure, axes


def _figure(figure: Any, title: str, described: str) -> str:
    """The drawing within the page: named, described, without ids that another drawing has."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    own = f"f{hashlib.sha256((title + svg).encode()).hexdigest()[:10]}"
    svg = re.sub(r'id="', f'id="{own}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{own}-", svg)
    for colour, name in ((INK, "ink"), (GRID, "line"), *((c, f"c{k}") for k, c in enumerate(SERIES, start=1))):
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^\";]*", r"font: \1px sans-serif", svg)
    names = f'role="img" aria-labelledby="{own}-title {own}-desc"'
    told = f'<title id="{own}-title">{escape(title)}</title><desc id="{own}-desc">{escape(described)}</desc>'
    svg = re.sub(r"<svg ([^>]*)>", lambda found: f"<svg {names} {_sized(found[1])}>{told}", svg, count=1, flags=re.S)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg.strip()}</figure>"


def _sized(attributes: str) -> str:
    """Without a size in points: the page gives it."""
    return re.sub(r'\b(width|height)="[^"]*pt"\s*', "", attributes).strip()
