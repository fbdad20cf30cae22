"""The funnel as table and figure, and the page of samples, whose texts are untrusted."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from releasing import draft, pictured, written
from rich.console import Console

from mmedexpert.curation.balance import perspective_of, primary
from mmedexpert.curation.funnel import funnel_figure, funnel_markdown, funnel_table, read_counts
from mmedexpert.curation.page import NOT_CLINICAL, PRIVATE, SIDE, draw, write_page
from mmedexpert.data.record import Record, Trace
from mmedexpert.errors import UserError

STEPS = [
    {"step": "ingest", "in": 4021, "out": 3000, "reasons": {"no answer": 21, "line is no JSON": 1000}},
    {"step": "structure", "in": 3000, "out": 2972, "reasons": {f"fault {n}": n for n in range(1, 8)}},
    {"step": "needs the image", "in": 2972, "out": 2972, "reasons": {}},
    {"step": "traces", "in": 2972, "out": 0, "reasons": {"wrong | answer": 2972}},
    {"step": "balance", "in": 0, "out": 0, "reasons": {}},
]
VIEWS = ("contextual", "feature", "mechanistic", "probabilistic")
NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> & \" '"


def test_the_table_tells_each_step_and_each_reason():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(funnel_table(STEPS))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "ingest 4,021 1,021 3,000" in lines and "traces 2,972 2,972 0" in lines
    assert lines.index("line is no JSON 1,000") < lines.index("no answer 21")
    assert sum(line.startswith("fault") for line in lines) == 7


def test_the_markdown_has_a_row_a_step_and_says_where_a_step_makes_more():
    lines = funnel_markdown([*STEPS, {"step": "views", "in": 10, "out": 35, "reasons": {"slow": 5}}]).splitlines()
    assert lines[2] == "| ingest | 4,021 | 1,021 | 3,000 | line is no JSON 1,000; no answer 21 |"
    assert lines[4] == "| needs the image | 2,972 | 0 | 2,972 | - |"
    assert lines[5] == "| traces | 2,972 | 2,972 | 0 | wrong &#124; answer 2,972 |"
    assert lines[7] == "| views | 10 | 5 | 35 | makes 30 more of those it keeps; slow 5 |"


def test_counts_are_read_from_the_steps_folders(tmp_path):
    records = written([draft("r")], tmp_path / "traces")
    assert read_counts([records.folder]) == [{"step": "traces", "in": 1, "out": 1, "reasons": {}}]
    with pytest.raises(UserError, match="counts"):
        read_counts([tmp_path / "nothing"])


@pytest.mark.parametrize("steps", [STEPS, [], [{"step": "a $b$ " * 9, "in": 1, "out": 0, "reasons": {"$x_ " * 30: 1}}]])
def test_the_figure_is_drawn_the_same_twice(tmp_path, steps):
    one, two = funnel_figure(steps, tmp_path / "a.png"), funnel_figure(steps, tmp_path / "b.png")
    assert one.read_bytes() == two.read_bytes()
    assert Image.open(one).size[0] == 1650


def test_the_figure_shows_what_was_kept_to_scale(tmp_path):
    steps = [
        {"step": "a", "in": 100, "out": 100, "reasons": {}},
        {"step": "b", "in": 100, "out": 25, "reasons": {"x": 75}},
    ]
    pixels = np.asarray(Image.open(funnel_figure(steps, tmp_path / "a.png")).convert("RGB")).reshape(-1, 1650, 3)
    blue = (pixels == (0x2A, 0x6F, 0x97)).all(-1).sum(1)
    assert blue.max() == pytest.approx(4 * blue[len(blue) // 2 + 50 :].max(), rel=0.02)


class Reader(HTMLParser):
    """Tags with their attributes, and the text, as a browser would meet them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def nasty(record: Record) -> Record:
    known = {
        **record.provenance, "source": NASTY, "revision": NASTY, "source_id": NASTY, 
        "checks": {NASTY: {NASTY: [NASTY]}},
        "labels": [{"label": NASTY, "score": 1, "method": NASTY, "evidence": [NASTY], "version": NASTY}],
    }  # fmt: skip
    return replace(
        record, id=NASTY, question=NASTY, options={"A": NASTY, "B": NASTY}, source=NASTY, license=NASTY,
        specialties=(NASTY,), modality=NASTY, body_system=NASTY, trace=Trace(NASTY, (NASTY,)), provenance=known,
    )  # fmt: skip


def test_whatever_a_record_holds_is_text_and_the_page_needs_nothing_else(tmp_path):
    rows = [nasty(pictured(draft("r"), tmp_path, 0))]
    write_page(written(rows, tmp_path / "s", tmp_path), tmp_path / "page.html", title=NASTY)
    page = (tmp_path / "page.html").read_text()
    found = Reader(page)
    assert found.open == [] and "".join(found.texts).count("<script>") >= 15
    assert {tag for tag, _ in found.tags} <= {
        *"html head meta title style body h1 h2 h3 p nav a article header footer span div img".split(),
        *"ul ol li table tr th td br b".split(),
    }
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in next(a["content"] for t, a in found.tags if "http-equiv" in a)
    assert "url(" not in page and "@import" not in page


def test_the_page_shows_a_samples_parts_and_marks_the_right_answer(tmp_path):
    write_page(
        written([pictured(draft("r7"), tmp_path, 0)], tmp_path / "s", tmp_path), tmp_path / "page.html", title="Samples"
    )
    page = (tmp_path / "page.html").read_text()
    for wanted in (
        "What does picture r7 show?", '<li class="gold">A. a fracture</li>', "<li>B. nothing</li>", "4-year-old",
        "<li>The cortex is broken.</li>", "passed: 5", "CC BY 4.0", "s-r7", "mechanistic", "0f3a", NOT_CLINICAL,
    ):  # fmt: skip
        assert wanted in page, wanted


def test_a_page_with_images_that_must_stay_says_so(tmp_path):
    open_ = pictured(draft("a"), tmp_path, 0)
    write_page(written([open_], tmp_path / "s", tmp_path), tmp_path / "page.html", title="t")
    assert PRIVATE not in (tmp_path / "page.html").read_text()
    closed = pictured(draft("b", redistribute=False), tmp_path, 1)
    write_page(written([open_, closed], tmp_path / "s", tmp_path), tmp_path / "page.html", title="t")
    page = (tmp_path / "page.html").read_text()
    assert PRIVATE in page and page.count("local only") == 1


def test_large_pictures_are_scaled_and_lost_ones_are_told(tmp_path):
    Image.fromarray(np.zeros((900, 600, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    rows = [draft("a", image="large.png"), draft("b", image="lost.png"), replace(draft("c"), images=())]
    write_page(written(rows, tmp_path / "s", tmp_path), tmp_path / "page.html", title="t")
    page = (tmp_path / "page.html").read_text()
    (content,) = re.findall(r"base64,([^\"]+)", page)
    assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) == SIDE
    assert "cannot be read" in page and "no image" in page


def test_samples_come_from_each_specialty_and_perspective_in_turn_whatever_the_order(tmp_path):
    rows = [draft(f"a{n}", "adult_medicine", VIEWS[n % 4]) for n in range(400)]
    rows += [draft(f"p{n}", "pediatrics", VIEWS[n % 4]) for n in range(20)] + [draft("o", "other", None)]
    shown = draw(rows, 40, 0)
    counts = Counter((primary(r), perspective_of(r)) for r in shown)
    assert len(shown) == 40 and counts[("other", "no trace")] == 1 and min(counts.values()) == 1
    assert set(list(counts.values())) <= {1, 4, 5}
    assert [r.id for r in draw(random.Random(2).sample(rows, len(rows)), 40, 0)] == [r.id for r in shown]
    assert {r.id for r in draw(rows, 40, 1)} != {r.id for r in shown}
    assert len(draw(rows[:3], 40, 0)) == 3


def test_the_same_page_twice_and_an_empty_one(tmp_path):
    records = written([pictured(draft(f"r{n}"), tmp_path, n) for n in range(4)], tmp_path / "s", tmp_path)
    digests = set()
    for name in ("a.html", "b.html"):
        write_page(records, tmp_path / name, title="t")
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1 and str(tmp_path) not in (tmp_path / "a.html").read_text()
    assert write_page(written([], tmp_path / "none"), tmp_path / "c.html", title="t") == []
    assert "No record came through" in (tmp_path / "c.html").read_text()
