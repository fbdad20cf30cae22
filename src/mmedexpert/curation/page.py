"""One HTML file that shows samples of a curated set, to be read: picture, question, options, trace, labels, checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmedexpert.curation.balance import perspective_of, primary, source_of
from mmedexpert.curation.steps import Records
from mmedexpert.data.images import thumbnail
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.pages import data_url, document

SAMPLES = 40  # ours: what one reads in an hour
SIDE, QUALITY = 256, 85  # ours: longest side of a picture on the page, and its JPEG quality
PRIVATE = (
    "This page contains images that may not be redistributed. Keep it where it is: do not send it on, publish it or "
    "commit it."
)
NOT_CLINICAL = "Research data, made by programs from public records. Not for clinical use."
STYLE = """
body { max-width: 62rem; }
h2 { font-size: 1rem; margin: 0; }
nav a { display: inline-block; min-width: 2.2rem; padding: .2rem .4rem; text-align: center; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0;
  padding: 1rem; }
header { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin-bottom: .8rem; }
.local { background: var(--warn); }
.body { display: grid; grid-template-columns: 256px 1fr; gap: 1.2rem; }
.body > div { min-width: 0; }
.pictures img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; background: #000; }
.trace { border-left: 3px solid var(--blue); margin: .4rem 0 .8rem; padding: 0 0 0 2rem; }
h3 { font-size: .8rem; margin: .8rem 0 .2rem; color: var(--soft); font-weight: 600; }
table { width: 100%; }
td, th { min-width: 3.2rem; padding: .15rem .6rem .15rem 0; }
footer { font-size: .8rem; color: var(--soft); margin-top: .8rem; }
@media (max-width: 40rem) { body { padding: .5rem; } .body { grid-template-columns: 1fr; } }
"""


def write_page(records: Records, path: Path, *, title: str, samples: int = SAMPLES, seed: int = 0) -> list[Record]:
    """Write the page and return the records on it, in order; it needs nothing beside it. Texts are untrusted: escaped.

    Where one of them may not be redistributed the page says that it must stay local.
    """
    shown = draw(records, samples, seed)
    private = any(record.provenance.get("redistribute") is not True for record in shown)
    links = "".join(f'<a href="#s{number}">{number}</a>' for number in range(1, len(shown) + 1))
    articles = "\n".join(_article(n, record, records.image_root) for n, record in enumerate(shown, start=1))
    body = f"""<h1>{escape(title)}</h1>
<p>{len(shown)} of {len(records):,} records, drawn by a hash of their ids (seed {seed}) from each specialty and
perspective in turn. The right answer is shaded. {NOT_CLINICAL}</p>
{f'<p class="warning">{escape(PRIVATE)}</p>' if private else ""}
<nav>{links}</nav>
{articles or '<p class="none">No record came through the funnel.</p>'}"""
    write_atomic(path, document(title, body, style=STYLE))
    return shown


def draw(records: Iterable[Record], count: int, seed: int) -> list[Record]:
    """`count` records, one of each specialty and perspective in turn, in the order of a seeded hash of their ids."""
    cells: dict[tuple[str, str], list[tuple[bytes, str]]] = {}
    for record in records:
        order = hashlib.sha256(f"{seed}:{record.id}".encode()).digest()
        cells.setdefault((primary(record), perspective_of(record)), []).append((order, record.id))
    turns = [(turn, *cell, name) for cell, rows in cells.items() for turn, (_, name) in enumerate(sorted(rows)[:count])]
    chosen = {name: (cell, turn) for turn, *cell, name in sorted(turns)[:count]}
    found = {record.id: record for record in records if record.id in chosen}
    return sorted(found.values(), key=lambda record: chosen[record.id])


def _article(number: int, record: Record, image_root: Path) -> str:
    tags = [primary(record), perspective_of(record), record.modality, record.body_system, record.asked_as, record.split]
    marks = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags if tag)
    if record.provenance.get("redistribute") is not True:
        marks += '<span class="tag local">local only</span>'
    pictures = "".join(_picture(image_root / name, n) for n, name in enumerate(record.images, start=1))
    provenance = record.provenance
    facts = {
        "id": record.id, "source": source_of(record), "its id there": provenance.get("source_id"),
        "revision": provenance.get("revision"), "licence": record.license, "described as": record.source,
    }  # fmt: skip
    told = " &middot; ".join(f"{name}: {escape(str(value))}" for name, value in facts.items() if value)
    return f"""<article id="s{number}">
<header><h2>{number}</h2>{marks}</header>
<div class="body">
<div class="pictures">{pictures or '<p class="none">no image</p>'}</div>
<div>
<p class="question">{escape(record.question)}</p>
{_options(record)}
{_trace(record)}
{_labels(provenance.get("labels") or [])}
{_checks(provenance.get("checks") or {})}
</div>
</div>
<footer>{told}</footer>
</article>"""


def _picture(path: Path, number: int) -> str:
    try:
        content, (width, height) = thumbnail(path, SIDE, "JPEG", QUALITY)
    except UserError:
        return '<p class="none">the image cannot be read</p>'
    url = data_url("jpeg", content)
    return f'<img src="{url}" width="{width}" height="{height}" alt="image {number}">'


def _options(record: Record) -> str:
    if record.options is None:
        return f'<ul class="options"><li class="gold">{escape(record.answer)}</li></ul>'
    rows = "".join(
        f'<li{_gold(letter == record.answer)}>{escape(letter)}. {escape(text)}</li>'
        for letter, text in record.options.items()
    )  # fmt: skip
    return f'<ul class="options">{rows}</ul>'


def _gold(right: bool) -> str:
    return ' class="gold"' if right else ""


def _trace(record: Record) -> str:
    if record.trace is None:
        return '<h3>Trace</h3><p class="none">none</p>'
    steps = "".join(f"<li>{escape(step)}</li>" for step in record.trace.steps)
    answer = record.trace.answer or record.answer
    return f'<h3>Trace</h3><ol class="trace">{steps}</ol><p>It answers <b>{escape(answer)}</b>.</p>'


def _labels(labels: Sequence[Any]) -> str:
    if not labels:
        return ""
    keys = ("label", "score", "method", "evidence", "version")
    cells = ("".join(f"<td>{_text(row.get(key, ''))}</td>" for key in keys) for row in labels)
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    head = "".join(f"<th>{key}</th>" for key in keys)
    return f"<h3>Specialties</h3><table><tr>{head}</tr>{rows}</table>"


def _checks(checks: dict[str, Any]) -> str:
    if not checks:
        return ""
    rows = "".join(f"<tr><th>{escape(str(step))}</th><td>{_found(found)}</td></tr>" for step, found in checks.items())
    return f"<h3>Checks</h3><table>{rows}</table>"


def _found(found: Any) -> str:
    if not isinstance(found, dict):
        return _text(found)
    return "<br>".join(f"{escape(str(name))}: {_text(value)}" for name, value in found.items())


def _text(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
