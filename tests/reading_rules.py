"""What readers, DICOM and ingest make of invented files: reference outputs for test_versions.py.

Pictures count by what they look like: bytes of a PNG depend on who compressed it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import test_dicom
from PIL import Image
from solving import record
from test_training_sources import lines, put

from mmedexpert.curation import ingest
from mmedexpert.data.images import changes, open_image
from mmedexpert.data.records import plain
from mmedexpert.errors import UserError
from mmedexpert.sources import gmai_reasoning, medvlthinker, reasoning_text, vqa_table
from mmedexpert.sources.dicom import open_picture

PAIR = {"A": "Cyst", "B": "Mass"}


def image(number: int) -> bytes:
    """The beginning of a PNG: readers look no further."""
    return b"\x89PNG\r\n\x1a\n" + bytes([number])


def read(load: Callable[..., Any], root: Path, **settings: Any) -> Any:
    """What a reader makes of a folder: all of its records, and why rows are none."""
    records, image_root, bad = load(root, root / "out", **settings)
    there = [(image_root / name).is_file() for record in records for name in record.images]
    told = sorted([one, why.replace(f"{root}", "")[:60]] for one, why in bad)  # the rest may be another library's words
    return [[plain(one) for one in records], told, there]


def vqa_tables(folder: Path) -> Any:
    """Options in each form, answers by letter and text, what is missing; patients of a column and of a DICOM file."""
    root = folder / "mine"
    for n in range(3):
        put(root / "images" / f"{n}.png", image(n))
    for n in range(2):
        test_dicom.write(root / f"{n}.dcm", test_dicom.RAMP, PatientID=f"MRN{n}")
    row = {
        "id": "a",
        "image": "0.png",
        "question": " Why? ",
        "options": PAIR,
        "answer": "B",
        "why": "Round.",
        "who": "x",
    }
    rows = [
        row, {**row, "id": "b", "options": ["A. Cyst", "B. Mass"], "answer": "mass", "lang": "zh", "who": "y"},
        {**row, "id": "", "options": str(PAIR), "answer": "(A) Cyst", "image": ["1.png", "./2.png"], "kind": "CT"},
        {**row, "id": "c", "options": None, "answer": "Yes", "image": "0.dcm", "who": ""},
        {**row, "id": "d", "options": None, "answer": "a mass", "image": "1.dcm", "who": "unknown"},
        {**row, "id": "e", "answer": "C"}, {**row, "id": "f", "image": "gone.png"}, {**row, "id": "g", "image": ""},
        {**row, "id": "h", "question": " "}, row, {**row, "id": "i", "image": "../0.png"},
        {**row, "id": "j", "options": {"A": "Cyst"}}, {**row, "id": "k", "answer": ""},
    ]  # fmt: skip
    put(root / "t.jsonl", lines(rows) + '{"id": ')
    put(root / "letters.csv", "q,a,b,c,answer\nWhat?,Cyst,Mass,,B\nIs it?,,,,no\nWhat?,Cyst\n")
    cells = [{"image": {"bytes": image(n), "path": None}, "question": "Which? A) Cyst B) Mass", "answer": "B"}
             for n in (5, 6)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(cells), root / "cells.parquet")
    names = {"image": "image", "id": "id", "options": "options", "rationale": "why", "patient": "who",
             "modality": "kind", "language": "lang"}  # fmt: skip
    about = {"license": "CC0", "modality": "MRI", "body_system": "Chest"}
    return [
        read(vqa_table.load, root, files="*.jsonl", columns=names, name="mine", **about),
        read(vqa_table.load, root, files=["*.csv"], columns={"question": "q", "options": ["a", "b", "c"]}),
        read(vqa_table.load, root, files="*.parquet", columns={"image": "image", "options": "inline"}, split="val"),
    ]  # fmt: skip


def medvlthinkers(folder: Path) -> Any:
    row = {"images": [{"bytes": image(1), "path": "1.png"}], "question": "Why?", "options": json.dumps(PAIR),
           "answer_label": "B", "answer": "Mass", "reasoning": " It is round. ", "dataset_name": "pmc_vqa",
           "dataset_index": 7, "hash": "0"}  # fmt: skip
    rows = [row, {**row, "dataset_index": 8, "answer": "Cyst"}, {**row, "dataset_index": 9, "images": None},
            {**row, "dataset_index": 10, "answer": "As it is round"}, {**row, "dataset_name": "m23k", "images": []},
            {**row, "dataset_index": None}, {**row, "dataset_index": 11, "options": None}]  # fmt: skip
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/train-00000-of-00001.parquet")
    return read(medvlthinker.load, folder)


def gmai_reasonings(folder: Path) -> Any:
    put(folder / "2d/1.png", image(1))
    said = "<image>\nWhat is it?\nA. Cyst\nB. Mass\n"
    replies = ["B", "<think>It is round, not A.</think><answer>B</answer>", "<think>So.</think> A", "C", "none"]
    ends = ["Please select one.", "Answer with the letter.", "", "Think.", "Please provide the answer."]
    rows = [
        {
            "image": "2d/1.png",
            "conversations": [{"from": "human", "value": said + end}, {"from": "gpt", "value": reply}],
        }
        for end, reply in zip(ends, replies, strict=True)
    ]
    put(folder / "t.jsonl", lines([*rows, {**rows[0], "conversations": []}, {**rows[0], "image": "2d/2.png"}]))
    return read(gmai_reasoning.load, folder)


def reasoning_texts(folder: Path) -> Any:
    row = {"question": "A man is ill.", "options": str(PAIR), "answer_idx": "B", "answer": "Mass", "Question": "Open?",
           "Ground-True Answer": "A mass", "Complex_CoT": "Hm.", "Response": "Long."}  # fmt: skip
    rows = [row, {key: row[key] for key in ("Question", "Response")}, {"question": "Is it?", "answer": "Yes",
            "reasoning": "So.", "id": "own"}, {"question": "?"}, {**row, "answer_idx": "E"}]  # fmt: skip
    put(folder / "t.json", json.dumps(rows))
    return [
        read(reasoning_text.load, folder, files="*.json", form=form, license="MIT", name="x")
        for form in ("choice", "open")
    ]


def dicoms(folder: Path) -> Any:
    """Some pixels of each kind of file, and what is told of it; why others are none."""
    ramp = test_dicom.RAMP
    window = {"WindowCenter": 600, "WindowWidth": 200}
    padded = ramp.astype(np.int16)
    padded[:8] = -2000
    frames = np.stack([ramp // 8, ramp // 8 + 50, ramp // 8 + 90]).astype(np.uint8)
    made: list[tuple[Any, dict[str, Any]]] = [
        (ramp, window),
        (ramp, {**window, "PhotometricInterpretation": "MONOCHROME1"}),
        (ramp, {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": [176, 40], "WindowWidth": [399, 80]}),
        (ramp.astype(np.int16) - 600, {"WindowCenter": 0, "WindowWidth": 700, "VOILUTFunction": "LINEAR_EXACT"}),
        (padded, {"PixelPaddingValue": -2000}),
        (ramp, {**window, "WindowWidth": 0}),
        (frames, {"WindowCenter": 128, "WindowWidth": 256}),
        (np.stack([ramp % 256, ramp % 7, ramp // 8], axis=-1).astype(np.uint8), {}),
        (np.full_like(ramp, 7), {"PatientName": "Doe^Jane", "StationName": "s", "BurnedInAnnotation": "YES"}),
        (None, {}),
        (ramp, {"Rows": 40_000, "Columns": 40_000}),
    ]
    found = []
    for number, (values, tags) in enumerate(made):
        path = test_dicom.write(folder / f"{number}.dcm", values, **tags)
        try:
            picture = open_picture(path)
        except UserError as error:
            found.append(str(error).replace(f"{path}", ""))
            continue
        found.append([list(picture.size), np.asarray(picture)[3::7, 2::9].tolist(), list(changes(picture))])
    return found


def ingested(folder: Path) -> Any:
    """Records of two sources, and looks of the pictures stored: kept as they are, made smaller, of another format."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (folder / "in").mkdir()
    for name in ("a.png", "b.bmp", "big.png", "huge.png"):
        size = {"big.png": (1200, 30), "huge.png": (400, 400)}.get(name, (40, 24))
        Image.fromarray(noise).resize(size).save(folder / "in" / name)
    test_dicom.write(folder / "in" / "c.dcm", test_dicom.RAMP, PatientID="7", WindowCenter=600, WindowWidth=900)
    put(folder / "in" / "torn.png", image(1))
    free = ["CC BY 4.0", "cc-by-sa-3.0", "CC0 1.0", "Creative Commons Attribution-ShareAlike 4.0", "MIT License",
            "Public Domain", "CC BY-NC 4.0", "CC BY-ND", "not stated", "research only", ""]  # fmt: skip
    names = ["a.png", "b.bmp", "big.png", "huge.png", "c.dcm", "torn.png", "gone.png", "../in/a.png"]
    records = [record(n, images=(name,), license=free[n]) for n, name in enumerate(names)]
    records += [record(0, images=("a.png", "b.bmp")), record(8, images=()), record(9, images=(), modality="text")]

    def load(_: Path, out_dir: Path) -> Any:
        return records, folder / "in", [("x", f"{folder / 'in'}/t.jsonl: the question is empty")]

    sources = [
        ingest.Source("one", load, folder / "in"),
        ingest.Source("two", load, folder / "in", license="MIT", redistribute=False, revision="0f3a"),
    ]
    changed = Counter[str]()
    verdicts = list(ingest.ingest(sources, folder / "out", folder / "kept", max_pixels=150_000, changed=changed))
    rows, looks = [], []
    for verdict in verdicts:
        about = verdict.record.provenance
        images = about.pop("images", [])
        about["revision"] = about["revision"].partition(":")[0]
        for name, one in zip(verdict.record.images, images, strict=True):
            picture = open_image(folder / "kept" / name)
            file = folder / "kept" / name
            named = name.startswith(f"{one['sha256'][:2]}/{one['sha256'][:32]}.")
            own = any(file.read_bytes() == other.read_bytes() for other in (folder / "in").iterdir())
            about.setdefault("stored", []).append([file.suffix, named, own, picture.size, one.get("changes"), *one])
            looks.append(np.asarray(picture.resize((2, 2)), dtype=float).mean(axis=2).tolist())
        made = verdict.record
        rows.append([made.id, verdict.reason, verdict.detail, made.license, made.image_group, about])
    licences = {one: ingest.may_redistribute(one) for one in free}
    return {"records": [rows, dict(changed), licences], "looks": looks}


READING: dict[str, Callable[[Path], Any]] = {
    "vqa_table": vqa_tables,
    "medvlthinker": medvlthinkers,
    "gmai_reasoning": gmai_reasonings,
    "reasoning_text": reasoning_texts,
    "dicom": dicoms,
    "ingest": ingested,
}
