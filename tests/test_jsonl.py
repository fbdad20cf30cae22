"""Lines that were appended one by one, cut anywhere: what is whole is kept, what is damaged is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.errors import UserError
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.schema import LoggerConfig
from mmedexpert.stages.gba import _gain, _Watch


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(max_size=8), max_size=4), cut=st.integers(0, 200), ascii=st.booleans())
def test_a_file_cut_at_any_byte_gives_its_whole_lines(tmp_path_factory, texts, cut, ascii):
    rows = [{"id": i, "text": text.encode(errors="replace").decode()} for i, text in enumerate(texts)]
    lines = [json.dumps(row, ensure_ascii=ascii).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)[:cut]
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(data)
    whole = [row for i, row in enumerate(rows) if len(b"\n".join(lines[: i + 1])) <= len(data)]
    assert read_lines(path, ("id",)) == whole


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl", ("id",)) == []


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b'{"no": 1}',
        b'{"id": 1',
        b"\xe5\xb7",
        b"[" * 100_000,
        b'{"id": "\xff", "perspective": 1, "response": 2}',
    ],
)
def test_damage_that_no_kill_leaves_is_told(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n' + bad + b'\n{"id": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is damaged.*delete this line"):
        read_lines(path, ("id",))


def test_the_curve_of_a_killed_training_is_cut_to_where_it_goes_on(tmp_path):
    curve = tmp_path / "curve.jsonl"
    rows = [{"rollout": i, "reward": i / 3, "accuracy": 0.5, "adherence": 0.1 * i} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)

    class Nothing:
        outcome = adherence = None

    curve.write_text(text[:-9])  # the last line is cut
    watch = _Watch(curve, tmp_path, None, LoggerConfig("none", log_completions_every=0))
    with pytest.raises(AttributeError):  # after the curve was cut; nothing to add here
        watch(4, [], Nothing())
    assert curve.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:4])
    assert _gain(curve)["reward/end"] == 1.0 and _gain(curve)["reward/start"] == 0.0
