"""Pieces of HTML: sections, tables, heat maps. Whatever is put in is text, and escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from mmedexpert.reporting.tables import LEFT, Row

LEVELS = 256  # steps of a colour map
DARK = 0.179  # relative luminance below which white is told better than black (WCAG 2.2, contrast ratio)
SHORT = 28  # ours: letters of a cell that are not broken
# columns of words that tables.LEFT does not know
WORDS = (
    "run", "commit", "hardware", "command", "finished", "input", "sha256 or id", "measure", "what", "found", "check",
    "packages", "kept in", "against",
)  # fmt: skip


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with a heading that can be linked to; without any content it says so."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of text."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def missing(text: str) -> str:
    """What there is nothing to show of, and why."""
    return paragraph(text, "none")


def folded(title: str, body: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>" if body else ""


def table(rows: Sequence[Row], caption: str) -> str:
    """A table that scrolls in a box of its own; names to the left, numbers to the right, a dash where there is none."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    sides = {column: _side(column, [row.get(column, "-") for row in rows]) for column in columns}
    head = "".join(f'<th scope="col"{sides[column]}>{escape(column)}</th>' for column in columns)
    first, *others = columns
    lines = (
        f'<tr><th scope="row"{sides[first]}>{escape(row.get(first, "-"))}</th>'
        + "".join(f"<td{sides[column]}>{escape(row.get(column, '-'))}</td>" for column in others)
        + "</tr>"
        for row in rows
    )
    return _box(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>", caption)


def heat_map(
    rows: Mapping[str, Mapping[str, tuple[float | None, str, str]]],
    caption: str,
    *,
    corner: str = "",
    low: float = 0.0,
    high: float = 1.0,
    colours: str = "cividis",
) -> str:
    """Row to column to (value that gives the colour, its text, a smaller text below): no cell tells by colour alone."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    palette = _palette(colours)
    head = "".join(
        f'<th scope="col"{" class=word" * (len(column) <= SHORT)}>{escape(column)}</th>' for column in columns
    )
    lines = []
    for name, cells in rows.items():
        shown = "".join(_cell(cells.get(column, (None, "-", "")), palette, low, high) for column in columns)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    body = f"<thead><tr><th>{escape(corner)}</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return _box(f'<table class="heat">{body}</table>', caption)


def _cell(
    cell: tuple[float | None, str, str], palette: Sequence[tuple[float, float, float]], low: float, high: float
) -> str:
    value, text, below = cell
    small = f"<small>{escape(below)}</small>" if below else ""
    if value is None or not math.isfinite(value):
        return f"<td>{escape(text)}{small}</td>"
    place = (value - low) / (high - low) if high > low else 0.5
    red, green, blue = palette[round((LEVELS - 1) * min(1.0, max(0.0, place)))]
    light = sum(
        weight * _linear(part) for weight, part in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
    )
    ink = "#ffffff" if light < DARK else "#000000"
    back = "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
    return f'<td style="background:#{back};color:{ink}">{escape(text)}{small}</td>'


def _linear(part: float) -> float:
    """Light of a colour's part in sRGB."""
    return part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4


def _palette(name: str) -> list[tuple[float, float, float]]:
    from matplotlib import colormaps  # half a second, and only a page draws

    colours = colormaps[name].resampled(LEVELS)
    return [(red, green, blue) for red, green, blue, _ in map(colours, range(LEVELS))]


def _side(column: str, cells: Sequence[str]) -> str:
    """Numbers to the right; short words in one line."""
    if column not in LEFT and column not in WORDS:
        return ' class="number"'
    return ' class="word"' if max(map(len, cells)) <= SHORT else ""


def number(value: float, form: str) -> str:
    """A number as text, without a minus before zero."""
    text = format(value, form)
    return text.replace("-", "", 1) if text.startswith("-") and not text.strip("-0.") else text


def _box(inner: str, caption: str) -> str:
    """A table below its caption; it scrolls alone where it is wide, and a focus lets the arrow keys do it."""
    told = f'<p class="caption">{escape(caption)}</p>\n' if caption else ""
    return f'{told}<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">{inner}</div>'
