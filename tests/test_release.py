"""The released folder: loads with `datasets`, equal to the byte, only what may be released, read back as it was."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image
from releasing import draft, pictured, written

from mmedexpert.curation.release import release
from mmedexpert.data.record import Record, Trace
from mmedexpert.errors import UserError
from mmedexpert.models.encode import target_text
from mmedexpert.sources.mmedexpert import load

VIEWS = ("contextual", "feature", "mechanistic", "probabilistic")


def invented(images: Path, count: int = 24) -> list[Record]:
    """Records of all kinds: with and without a trace, open, text only, several images, that may not be released."""
    rows = [
        pictured(draft(f"r{n}", perspective=VIEWS[n % 4], split=("train", "val", "test")[n % 3]), images, n)
        for n in range(count)
    ]
    rows[3] = replace(rows[3], options=None, kind="yes_no", answer="yes", trace=None)
    rows[4] = replace(rows[4], images=(), provenance={**rows[4].provenance, "images": []}, image_group="text 4")
    both = [*rows[5].provenance["images"], *rows[6].provenance["images"]]
    rows[5] = replace(
        rows[5], images=rows[5].images + rows[6].images, provenance={**rows[5].provenance, "images": both}
    )
    rows[7] = replace(
        rows[7], trace=Trace("feature", ("It cannot be told.",), "B"), question="Größe? <b>½</b> \u2028 中"
    )
    rows[8] = replace(rows[8], provenance={**rows[8].provenance, "redistribute": False}, license="none stated")
    rows[9] = replace(rows[9], provenance={}, license="none stated")
    return rows


@pytest.fixture()
def made(tmp_path):
    rows = invented(tmp_path / "images")
    summary = release(written(rows, tmp_path / "balance", tmp_path / "images"), tmp_path / "out")
    return rows, tmp_path / "out", summary


def test_datasets_loads_the_folder_with_pictures_and_every_column(made, tmp_path):
    rows, folder, summary = made
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == summary["splits"] == {"train": 7, "val": 8, "test": 7}
    known = {record.id: record for record in rows}
    for split, part in loaded.items():
        for row in part:
            record = known[row["id"]]
            assert record.split == split == row["split"]
            assert all(isinstance(image, Image.Image) and image.size == (32, 24) for image in row["images"])
            assert len(row["images"]) == len(record.images) == len(row["image_sha256"])
            assert row["image_sha256"] == [image["sha256"] for image in record.provenance["images"]]
            assert row["primary"] == "pediatrics" and row["evidence"] == "4-year-old"
            assert row["source"] == "invented" and row["source_id"] == f"s-{record.id}" and row["revision"] == "0f3a"
            assert json.loads(row["checks"]) == {"difficulty": {"passed": 5, "of": 16}}
            assert row["completion"] == (target_text(record) if record.trace else None)
            assert row["answer_text"] == ("a fracture" if record.options else "yes")
    row = next(row for row in loaded["val"] if row["id"] == "r1")
    assert row["completion"] == "<think>The cortex is broken. So it is a fracture.</think><answer>A</answer>"
    assert row["options"] == [{"letter": "A", "text": "a fracture"}, {"letter": "B", "text": "nothing"}]


def test_what_is_read_back_is_what_was_released(made, tmp_path):
    rows, folder, _ = made
    records, image_root, bad = load(folder, tmp_path / "back")
    assert bad == []
    released = [record for record in rows if record.provenance.get("redistribute")]
    assert sorted(records, key=lambda r: r.id) == sorted(released, key=lambda r: r.id)
    for record in records:
        digests = [hashlib.sha256((image_root / name).read_bytes()).hexdigest() for name in record.images]
        assert digests == [image["sha256"] for image in record.provenance["images"]]


def test_what_is_released_again_is_the_same_to_the_byte(made, tmp_path):
    _, folder, summary = made
    records, image_root, _ = load(folder, tmp_path / "back")
    again = release(written(records, tmp_path / "again", image_root), tmp_path / "second")
    assert again["files"] == summary["files"]


def test_equal_records_give_equal_bytes_in_any_order_and_anywhere(made, tmp_path):
    rows, folder, _ = made
    shuffled = random.Random(1).sample(rows, len(rows))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").rename(tmp_path / "elsewhere" / "images")
    moved = written(shuffled, tmp_path / "elsewhere" / "balance", tmp_path / "elsewhere" / "images")
    release(moved, tmp_path / "elsewhere" / "out")
    for name in ["release.json", *(f"data/{path.name}" for path in (folder / "data").iterdir())]:
        one, two = (folder / name).read_bytes(), (tmp_path / "elsewhere" / "out" / name).read_bytes()
        assert one == two
        assert str(tmp_path).encode() not in one


def test_what_may_not_be_redistributed_stays_local_and_is_counted(made):
    _, folder, summary = made
    text = b"".join(path.read_bytes() for path in (folder / "data").iterdir())
    ids = {row for path in (folder / "data").iterdir() for row in pq.read_table(path, columns=["id"])["id"].to_pylist()}
    assert ids == {f"r{n}" for n in range(24)} - {"r8", "r9"} and b"none stated" not in text
    assert summary["local"] == [
        {"source": "Invented set, 2026", "licence": "none stated", "records": 1},
        {"source": "invented", "licence": "none stated", "records": 1},
    ]
    assert summary["licences"] == [{"source": "invented", "revision": "0f3a", "licence": "CC BY 4.0", "records": 22}]


def test_image_files_are_named_by_content_so_that_no_name_tells_a_label(tmp_path):
    record = pictured(draft("r"), tmp_path / "images", 0)
    (tmp_path / "images" / record.images[0]).rename(tmp_path / "images" / "pneumonia_smith.png")
    named = replace(record, images=("pneumonia_smith.png",))
    release(written([named], tmp_path / "balance", tmp_path / "images"), tmp_path / "out")
    assert b"smith" not in (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").read_bytes()
    assert load(tmp_path / "out", tmp_path / "back")[0] == [record]


def test_shards_are_cut_by_the_size_of_their_images_and_numbered(tmp_path):
    rows = [pictured(draft(f"r{n}"), tmp_path / "images", n) for n in range(10)]
    size = max(path.stat().st_size for path in (tmp_path / "images").iterdir())
    summary = release(written(rows, tmp_path / "b", tmp_path / "images"), tmp_path / "out", shard_bytes=4 * size)
    assert list(summary["files"]) == [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert [facts["records"] for facts in summary["files"].values()] == [4, 4, 2]
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == 10


def test_a_changed_or_missing_image_is_told_in_one_line(tmp_path):
    record = pictured(draft("r"), tmp_path / "images", 0)
    records = written([record], tmp_path / "balance", tmp_path / "images")
    path = tmp_path / "images" / record.images[0]
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="its images have changed"):
        release(records, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        release(records, tmp_path / "out")


def test_an_old_release_stays_until_the_new_one_is_whole(made, tmp_path):
    rows, folder, _ = made
    before = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    (tmp_path / "images" / rows[-1].images[0]).unlink()
    with pytest.raises(UserError):
        release(written(rows, tmp_path / "balance", tmp_path / "images"), folder)
    assert {path.name: path.read_bytes() for path in (folder / "data").iterdir()} == before


def test_nothing_to_release_is_no_error(tmp_path):
    rows = [pictured(draft("r", redistribute=False), tmp_path / "images", 0)]
    summary = release(written(rows, tmp_path / "b", tmp_path / "images"), tmp_path / "out")
    assert summary["records"] == 0 and summary["files"] == {} and summary["local"][0]["records"] == 1
    with pytest.raises(UserError, match="holds no data"):
        load(tmp_path / "out", tmp_path / "back")


def test_a_damaged_row_is_told_and_the_others_are_read(made, tmp_path):
    _, folder, _ = made
    path = folder / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["groups"] = "{not json"
    pq.write_table(table.from_pylist(rows, table.schema), path)
    records, _, bad = load(folder, tmp_path / "back")
    assert [record_id for record_id, _ in bad] == [rows[0]["id"]] and len(records) == 21
