"""Hostile rows: of tables as a user writes them, and of Parquet files as benchmarks come in."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawn import ODD, WORDS, text, value
from PIL import Image

from mmedexpert.data.record import Record
from mmedexpert.data.records import line_of, record_of
from mmedexpert.data.validation import Bad, validate
from mmedexpert.errors import UserError
from mmedexpert.scoring import robust
from mmedexpert.sources import parquet, vqa_table


def row(rng: random.Random) -> Any:
    """A row of a table, most of them with something odd in a cell or two."""
    made: dict[str, Any] = {
        "id": f"q{rng.randrange(10**9)}", "image": "a.png", "question": "What is it?", "answer": "B",
        "options": {"A": "Cyst", "B": "Mass"},
    }  # fmt: skip
    for _ in range(rng.randrange(3)):
        name = rng.choice([*made])
        odd = {
            "image": ["../a.png", "/etc/hostname", "link.png", "a.png\0", "x/../../a.png", "bad.png", "", "sub"],
            "options": [{"A": "x"}, {"A": "x", "B": "x"}, "A) x, B) y", '{"A": "x"', ["x", "y"], [{"letter": "A"}]],
            "answer": ["A", "b", "C", "Mass", "x" * 20000, "Cyst and Mass"], "id": ["q1", "../q", "q\n1"],
        }.get(name, [])  # fmt: skip
        made[name] = rng.choice([*odd, value(rng)])
        if rng.random() < 0.1:
            del made[name]
    return made if rng.random() < 0.97 else value(rng)


def table(rng: random.Random, folder: Path, size: int = 50) -> Counter[str]:
    """A file of rows, read as a data set: every row is a record or refused with one line, and no record leaves the
    root; those that are usable can be written and read again."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    given, kind = [row(rng) for _ in range(size)], rng.choice(["jsonl", "csv", "json"])
    path = folder / f"rows.{kind}"
    if kind == "csv":
        rows = [
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in one.items()}
            for one in given
            if isinstance(one, dict)
        ]
        given = [one for one in rows if any(one.get(name) for name in ("id", "image", "question", "options", "answer"))]
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            writer = csv.DictWriter(file, ["id", "image", "question", "options", "answer"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(given)
    else:
        lines = [json.dumps(one, ensure_ascii=rng.random() < 0.5) for one in given]
        whole = "\n".join(lines) + "\n" if kind == "jsonl" else f"[{','.join(lines)}]"
        path.write_bytes(whole.encode("utf-8", "surrogatepass"))
    columns = {name: name for name in ("id", "image", "question", "options", "answer")}
    records, root, bad = vqa_table.load(folder, folder / "out", files=path.name, columns=columns)
    path.unlink()
    assert len(records) + len(bad) == len(given), (
        f"{len(given)} rows, {len(records)} records and {len(bad)} refused ({kind})"
    )
    return checked(records, root, bad, len(given))


def hub_files(rng: random.Random, folder: Path, size: int = 50) -> Counter[str]:
    """A Parquet file in the hub's layout (image, question, answer), its columns of any type, some cut off or without a
    column: one line for the file, or a record or a line for each row."""
    shutil.rmtree(folder / "hub", ignore_errors=True)
    out, path = folder / "hub", folder / "hub" / "test-00000-of-00001.parquet"
    out.mkdir()
    columns = {"image": images(rng, folder, size), "question": texts(rng, size), "answer": texts(rng, size)}
    if rng.random() < 0.1:
        columns["when"] = pa.array([rng.choice([0, 2**62]) for _ in range(size)], pa.int64()).view(pa.timestamp("us"))
    whole, lacks = not any(map(unreadable, columns.values())), rng.random() < 0.1
    if lacks:
        del columns[rng.choice(["image", "question", "answer"])]
    pq.write_table(pa.table(columns), path, row_group_size=rng.choice([1, 7, size]))
    if rng.random() < 0.1:
        whole, data = False, path.read_bytes()
        if rng.random() < 0.5:
            path.write_bytes(data[: rng.randrange(len(data))])
        else:  # a page of another file, or of none
            at = rng.randrange(4, len(data) - 8)
            path.write_bytes(data[:at] + rng.randbytes(min(64, len(data) - 8 - at)) + data[at + 64 :])
    try:
        records, root, bad = parquet.load_vqa([path], out, name="x", source="made up", license="CC0", split="test")
    except UserError as error:
        assert lacks or not whole, f"a whole file was refused: {error}"
        assert "\n" not in str(error) and len(str(error)) < 500, "more than a line"
        return Counter({"files refused": 1})
    assert not lacks, "a file without a column was read"
    if whole or len(records) + len(bad) == size:  # what a damaged file still gives is of all its rows
        return checked(records, root, bad, size)
    raise AssertionError(f"{size} rows, {len(records)} records and {len(bad)} refused (a damaged file)")


def unreadable(cells: pa.Array) -> bool:
    """Whether Python has no value for one of them."""
    try:
        cells.to_pylist()
    except (ValueError, OverflowError):
        return not pa.types.is_timestamp(cells.type)  # of a column that nobody asks for
    return False


def images(rng: random.Random, folder: Path, size: int) -> pa.Array:
    """Cells of images: structs as the hub has them, bytes alone, or no images at all."""
    good = (folder / "a.png").read_bytes()
    broken = [b"", None, b"\x89PNG\r\n\x1a\n" + b"\0" * 40, good[: len(good) // 2], b"GIF89a" + good, b"<svg/>", good]
    cells = [rng.choice([good, good, rng.choice(broken), rng.randbytes(20)]) for _ in range(size)]
    paths = [rng.choice(["a.png", "../../a.png", "/etc/hostname", "", None, "x" * 5000]) for _ in range(size)]
    structs = [
        rng.choice([{"bytes": cell, "path": path}] * 20 + [None]) for cell, path in zip(cells, paths, strict=True)
    ]
    kinds = [
        lambda: pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        lambda: pa.array(cells, pa.large_binary()),
        lambda: pa.array([path or "" for path in paths]),
        lambda: pa.array([rng.randrange(9) for _ in range(size)]),
        lambda: pa.nulls(size),
    ]
    return rng.choices(kinds, [6, 2, 1, 1, 1])[0]()


def texts(rng: random.Random, size: int) -> pa.Array:
    """Cells of text: odd ones, none, text as a dictionary, bytes that are no UTF-8, numbers, lists."""
    said = [rng.choice([text(rng, WORDS), "yes", "What is it?", "", None, rng.choice(ODD)]) for _ in range(size)]
    clean = [None if one is None else one.encode("utf-8", "replace").decode() for one in said]
    kinds = [
        lambda: pa.array(clean, pa.large_string()),
        lambda: pa.array(clean).dictionary_encode(),
        lambda: pa.array([(one or "").encode("utf-16") for one in clean], pa.binary()),
        # a column that says it is text and holds bytes that are none
        lambda: pa.array([rng.choice([b"yes", b"\xff\xfe", b"ok\x80"]) for _ in range(size)], pa.binary()).view(
            pa.string()
        ),
        lambda: pa.array([rng.choice([0.5, float("nan"), None, 3.0]) for _ in range(size)]),
        lambda: pa.array([[one or "", "x"] for one in clean]),
        lambda: pa.nulls(size),
    ]
    return rng.choices(kinds, [8, 3, 1, 1, 1, 1, 1])[0]()


def checked(records: list[Record], root: Path, bad: Bad, given: int) -> Counter[str]:
    """All rows are accounted for, and what is usable can be written and read again, and judged."""
    good, left = validate(records, root, bad=bad, on_bad_record="skip")
    assert len(good) + len(left) == given, f"{given} rows, {len(good)} usable and {len(left)} left out"
    for record in good:
        assert record_of(line_of(record)) == record, "it is not read as it was written"
        inside = [not Path(name).is_absolute() and ".." not in Path(name).parts for name in record.images]
        assert all(inside), f"an image outside of the root: {record.images}"  # links are the user's own
        robust.judge(record, "A")
    assert len({record.id for record in good}) == len(good), "an id stands twice"
    return Counter(usable=len(good), refused=len(left))


def prepared(folder: Path) -> Path:
    """The images that rows name, in `folder`/root, and one outside of it."""
    root = folder / "root"
    root.mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "../a.png")):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / name)
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (root / "link.png").symlink_to("../a.png")
    (root / "sub").mkdir()
    return root
