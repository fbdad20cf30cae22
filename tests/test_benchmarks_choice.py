"""Loaders of the multiple-choice benchmarks on fixtures in their published layouts, and on real records if present."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedexpert.data.images import check_image
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.sources import gmai, medxpertqa, omnimedvqa, pmc_vqa, unpack
from mmedexpert.sources.unpack import lettered, unpack_images, write_image
from mmedexpert.stages.benchmark import askable

CONF = Path(__file__).parents[1] / "conf" / "benchmark"
NAMES = ("medxpertqa_mm", "omnimedvqa", "omnimedvqa_medr1", "pmc_vqa", "pmc_vqa_clean", "gmai_mmbench")


def picture(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def table(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def by_id(records: list[Record]) -> dict[str, Record]:
    assert len({record.id for record in records}) == len(records)
    return {record.id: record for record in records}


def assert_usable(records: list[Record], image_root: Path, split: str = "test") -> None:
    for record in records:
        assert record.asked_as == "choice" and record.split == split and record.specialties == ("all",)
        assert record.options is not None and list(record.options) == list("ABCDE"[: len(record.options)])
        assert record.answer in record.options and record.image_group and record.source and record.license
        for name in record.images:
            check_image(image_root / name)


# --- zips and images --------------------------------------------------------------------------------------------------


def test_unpack_takes_what_is_wanted_and_goes_on_after_a_kill(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"top/x.png": b"xx", "top/y.png": b"yyy", "__MACOSX/top/._x.png": b"fork"})
    other = zipped(tmp_path / "b.zip", {"y.png": b"other", "z.txt": b"no"})
    out = tmp_path / "out"
    put(out / "x.png", b"XX")  # complete: right size, left as it is
    put(out / "y.png", b"y")  # cut short
    unpack_images([archive, other], out, lambda name: Path(name).name if name.endswith(".png") else None)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"x.png": b"XX", "y.png": b"yyy"}


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/evil.png", "..\\evil.png"])
def test_an_entry_that_leaves_the_folder_is_refused_and_nothing_is_written(tmp_path, name):
    archive = zipped(tmp_path / "slip.zip", {"good.png": b"g", name: b"evil"})
    with pytest.raises(UserError, match=r"slip\.zip: entry .*evil\.png.* leaves the folder"):
        unpack_images([archive], tmp_path / "deep" / "out", lambda entry: entry)
    assert [path.name for path in tmp_path.rglob("*")] == ["slip.zip"]


def test_a_target_that_leaves_the_folder_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"good.png": b"g"})
    with pytest.raises(UserError, match="leaves the folder"):
        unpack_images([archive], tmp_path / "out", lambda entry: f"../{entry}")


def test_links_bombs_and_giants_are_refused(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="symbolic link"):
        unpack_images([tmp_path / "link.zip"], tmp_path / "out", str)
    bomb = zipped(tmp_path / "bomb.zip", {"b.png": bytes(3 * 2**20)})
    with pytest.raises(UserError, match=r"bomb\.zip.*decompression bomb"):
        unpack_images([bomb], tmp_path / "out", str)
    monkeypatch.setattr(unpack, "MAX_ENTRY", 10)
    giant = zipped(tmp_path / "giant.zip", {"g.png": b"0123456789a"})
    with pytest.raises(UserError, match="11 bytes, above the limit of 10"):
        unpack_images([giant], tmp_path / "out", str)
    assert not (tmp_path / "out").exists()


def test_broken_zips_are_named(tmp_path):
    whole = zipped(tmp_path / "a.zip", {"x.png": bytes(range(256)) * 40}).read_bytes()
    with pytest.raises(UserError, match=r"cut\.zip cannot be opened as a zip"):
        unpack_images([put(tmp_path / "cut.zip", whole[: len(whole) // 2])], tmp_path / "out", str)
    damaged = bytearray(whole)
    damaged[60] ^= 0xFF
    with pytest.raises(UserError, match=r"bad\.zip: entry 'x\.png' is damaged"):
        unpack_images([put(tmp_path / "bad.zip", bytes(damaged))], tmp_path / "out", str)
    with pytest.raises(UserError, match=r"none\.zip cannot be opened"):
        unpack_images([tmp_path / "none.zip"], tmp_path / "out", str)
    assert not list(tmp_path.glob("out/**/*.png"))


def test_of_several_images_of_one_name_none_is_taken(tmp_path):
    """Folders of one archive that share a file name: nothing tells which picture a question is about."""
    entries = {"train/1.png": b"one", "test/1.png": b"two", "train/2.png": b"same", "test/2.png": b"same"}
    archives = [zipped(tmp_path / "a.zip", entries), zipped(tmp_path / "b.zip", {"1.png": b"three", "3.png": b"4"})]
    unclear = unpack_images(archives, tmp_path / "out", lambda entry: f"images/{Path(entry).name}")
    assert unclear == {"images/1.png"}
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["2.png", "3.png"]
    drafts = [record_of(name) for name in ("1.png", "2.png", "3.png")]
    records, _, bad = unpack.place_images(drafts, tmp_path, tmp_path / "out", folders=["."], archives=archives)
    assert [record.id for record in records] == ["2.png", "3.png"]
    assert [(name, "has several files of that name" in reason) for name, reason in bad] == [("1.png", True)]


def record_of(name: str) -> Record:
    return Record(
        id=name, images=(name,), question="What?", options={"A": "a", "B": "b"}, answer="A", specialties=("all",),
        source="s", license="l", split="test", image_group=name,
    )  # fmt: skip


def test_too_little_disk_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match="make room"):
        unpack_images([zipped(tmp_path / "a.zip", {"x.png": b"1"})], tmp_path / "out", str)


def test_write_image_replaces_a_part_and_leaves_no_part_behind(tmp_path):
    path = put(tmp_path / "deep" / ("n" * 250 + ".png"), b"1")
    write_image(path, b"123")
    write_image(path, b"456")  # same size: taken for complete
    assert path.read_bytes() == b"123" and len(list(path.parent.iterdir())) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=4)), max_size=5))
def test_lettered_keeps_texts_in_order_from_a(texts):
    options, positions = lettered(texts)
    assert "".join(options) == "ABCDE"[: len(options)]
    assert list(options.values()) == [texts[position] for position in positions]
    assert positions == [n for n, text in enumerate(texts) if text and text.strip()]


# --- MedXpertQA -------------------------------------------------------------------------------------------------------


def medxpert(number: int, **more: Any) -> dict[str, Any]:
    question = {
        "id": f"MM-{number}", "question": "Which step?\nAnswer Choices: (A) one (B) two",
        "options": {"A": "one", "B": "two"}, "label": "B", "images": [f"MM-{number}-a.jpeg", f"MM-{number}-b.jpeg"],
        "question_type": "Reasoning", "medical_task": "Diagnosis", "body_system": "Skeletal",
    }  # fmt: skip
    return {**question, **more}


def github(data: dict[str, Any]) -> dict[str, Any]:
    options = [{"letter": letter, "content": text} for letter, text in data["options"].items()]
    images = [{"image_path": name} for name in data["images"]]
    return {**data, "options": options, "label": [data["label"]], "images": images}


def medxpert_images(count: int) -> dict[str, bytes]:
    return {f"images/MM-{n}-{part}.jpeg": picture(n, "JPEG") for n in range(count) for part in "ab"}


@pytest.mark.parametrize("layout", ["hub", "list", "parquet", "github"])
def test_medxpertqa_layouts_give_the_same_records(tmp_path, layout):
    root, questions = tmp_path / "root", [medxpert(0), medxpert(1, options={"A": "x", "B": "x"}, label="A")]
    lines = "\n".join(json.dumps(data) for data in questions)
    if layout == "hub":
        put(root / "MM" / "test.jsonl", lines + "\n")
    elif layout == "list":
        put(root / "MM" / "test.json", json.dumps(questions))
    elif layout == "parquet":
        import pyarrow
        import pyarrow.parquet

        (root / "MM").mkdir(parents=True)
        wide = [{**data, "options": {**data["options"], "C": None}} for data in questions]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wide), root / "MM" / "test-00000-of-00001.parquet")
    else:
        put(root / "medxpertqa_mm_input.jsonl", "\n".join(json.dumps(github(data)) for data in questions))
    zipped(root / "images.zip", medxpert_images(2))
    records, image_root, bad = medxpertqa.load(root, tmp_path / "out")
    assert bad == [] and image_root == tmp_path / "out"
    assert_usable(records, image_root)
    first, second = records
    assert first.id == "MM-0" and first.question.endswith("Answer Choices: (A) one (B) two")
    assert first.options == {"A": "one", "B": "two"} and first.answer == "B"
    assert first.images == ("images/MM-0-a.jpeg", "images/MM-0-b.jpeg")
    assert first.image_group == "MM-0-a.jpeg+MM-0-b.jpeg" and first.body_system == "Skeletal"
    assert first.groups == {"question_type": "Reasoning", "medical_task": "Diagnosis", "body_system": "Skeletal"}
    assert second.options == {"A": "x", "B": "x"} and second.answer == "A"


def test_medxpertqa_images_in_a_folder_are_used_in_place(tmp_path):
    put(tmp_path / "MM" / "test.jsonl", json.dumps(medxpert(0)))
    for name, data in medxpert_images(1).items():
        put(tmp_path / name, data)
    records, image_root, bad = medxpertqa.load(tmp_path, tmp_path / "out")
    assert image_root == tmp_path and not (tmp_path / "out").exists() and bad == []
    assert_usable(records, image_root)


def test_medxpertqa_bad_rows_are_told_and_the_rest_goes_on(tmp_path):
    rows: list[Any] = [
        medxpert(0), medxpert(1, label="F"), medxpert(2, label=["A", "B"]), medxpert(3, question=" "),
        medxpert(4, options={"A": "one", "C": "two"}), medxpert(5, images=[]), medxpert(6, images=["gone.jpeg"]),
        medxpert(7, images=["../MM-0-a.jpeg"]), medxpert(8, options={"A": "one", "B": 2}), "no object", medxpert(0),
        medxpert(9, images="MM-0-a.jpeg"), medxpert(10, label={}),
        medxpert(11, images=["x" * 100_000]), medxpert(12, images=["a\0b"]),
    ]  # fmt: skip
    put(tmp_path / "MM" / "test.jsonl", "\n".join(json.dumps(row) for row in rows))
    zipped(tmp_path / "images.zip", medxpert_images(1))
    records, _, bad = medxpertqa.load(tmp_path, tmp_path / "out")
    assert [record.id for record in records] == ["MM-0"]
    reasons = dict(bad)
    assert len(bad) == len(rows) - 1 and "'F' is none of the options A, B" in reasons["MM-1"]
    assert "test.jsonl line 2:" in reasons["MM-1"] and "question is empty" in reasons["MM-3"]
    assert "gone.jpeg is missing" in reasons["MM-6"] and "../MM-0-a.jpeg is missing" in reasons["MM-7"]
    assert "the id occurs twice" in reasons["MM-0"] and "test.jsonl line 10" in reasons


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(medxpert(0)) + "\n" + json.dumps(medxpert(1))[:50], r"test\.jsonl line 2 is not JSON"),
        ('{"q": "?", "a": "A"}\n', r"test\.jsonl: unknown schema, no entry has id, question, options"),
        ("", r"test\.jsonl: unknown schema.*empty"),
        (b"\xff\xfe\x00", r"test\.jsonl cannot be read as text in UTF-8"),
        ("[" * 100_000, r"test\.jsonl line 1 is not JSON"),
    ],
)
def test_medxpertqa_broken_files_are_named(tmp_path, text, message):
    put(tmp_path / "MM" / "test.jsonl", text)
    with pytest.raises(UserError, match=message):
        medxpertqa.load(tmp_path, tmp_path / "out")


def test_medxpertqa_without_a_known_file(tmp_path):
    with pytest.raises(UserError, match=r"holds none of MM/test\.jsonl"):
        medxpertqa.load(tmp_path, tmp_path / "out")
    put(tmp_path / "MM" / "test.parquet", b"PAR1 no")
    with pytest.raises(UserError, match=r"test\.parquet is truncated or no Parquet file"):
        medxpertqa.load(tmp_path, tmp_path / "out")


def test_medxpertqa_real_records(shared, tmp_path):
    file = shared / "data" / "medxpertqa" / "medxpertqa_mm_input.jsonl"
    shutil.copy(file, tmp_path)
    assert len(medxpertqa.load(tmp_path, tmp_path / "out")[2]) == 2000  # no image is there
    (tmp_path / "images").mkdir()
    for line in file.read_text(encoding="utf-8").splitlines():
        for image in json.loads(line)["images"]:
            (tmp_path / "images" / image["image_path"]).touch()
    records, image_root, bad = medxpertqa.load(tmp_path, tmp_path / "out")
    assert bad == [] and image_root == tmp_path and len(by_id(records)) == 2000
    counts = {key: Counter(record.groups[key] for record in records) for key in ("question_type", "medical_task")}
    assert counts["question_type"] == {"Reasoning": 1446, "Understanding": 554}
    assert sorted(counts["medical_task"].values()) == [353, 448, 1199]
    assert Counter(record.answer for record in records) == {"A": 399, "B": 408, "C": 383, "D": 386, "E": 424}
    assert Counter(record.body_system for record in records)["Skeletal"] == 491
    assert Counter(len(record.images) for record in records) == {1: 1581, 2: 236, 3: 59, 4: 22, 5: 78, 6: 24}


# --- OmniMedVQA -------------------------------------------------------------------------------------------------------


def omni(number: int, **more: Any) -> dict[str, Any]:
    question = {
        "dataset": "Chest CT Scan", "question_id": f"Chest CT Scan_{number:04}", "gt_answer": "CT",
        "question_type": "Modality Recognition", "question": "What imaging technique?",
        "image_path": f"Images/Chest CT Scan/a ({number}).png", "option_A": "MRI", "option_B": "CT",
        "option_C": "X-ray", "option_D": "PET", "modality_type": "CT(Computed Tomography)",
    }  # fmt: skip
    return {key: value for key, value in {**question, **more}.items() if value is not ...}


def omni_files() -> dict[str, bytes]:
    """Two files with what is odd in the published ones."""
    first = [
        omni(0, modality_type=..., modality="CT(Computed Tomography)"),
        omni(1, option_C=..., option_D=...),
        omni(2, option_A="CT", option_D="CT"),
        omni(3, gt_answer="CT ", option_B=" CT"),
        omni(4, option_B=..., option_D="CT"),
    ]
    second = [
        omni(5, dataset="MRI set", modality_type="MR (Mag-netic Resonance Imaging)", question_id="m_0"),
        omni(6, dataset="OCT set", modality_type="OCT (Optical Coherence Tomography", question_id="m_0"),
        omni(7, question_id="kid", image_path="Images/Chest X-Ray PA/person576_bacteria_2376.png"),
    ]
    images = {omni(n)["image_path"]: picture(n) for n in range(7)}
    images["Images/Chest X-Ray PA/person576_bacteria_2376.png"] = picture(99)
    questions = {"Chest CT Scan.json": json.dumps(first).encode(), "Other.json": json.dumps(second).encode()}
    return {**images, **{f"QA_information/Open-access/{name}": data for name, data in questions.items()}}


@pytest.mark.parametrize(
    "layout", ["zip", "nested zip", "folder", "nested folder", "folder of questions, zip of images"]
)
def test_omnimedvqa_layouts_and_odd_keys(tmp_path, layout):
    root, files = tmp_path / "root", omni_files()
    restricted = {"QA_information/Restricted-access/Closed.json": b"[]"}
    top = "OmniMedVQA/" if "nested" in layout else ""
    if layout.endswith("zip"):
        zipped(root / "OmniMedVQA.zip", {top + name: data for name, data in {**files, **restricted}.items()})
    elif layout.endswith("folder"):
        for name, data in {**files, **restricted}.items():
            put(root / top / name, data)
    else:
        for name, data in files.items():
            if name.endswith(".json"):
                put(root / name, data)
        zipped(root / "Images.zip", {name: data for name, data in files.items() if name.endswith(".png")})
    records, image_root, bad = omnimedvqa.load(root, tmp_path / "out")
    assert bad == [] and image_root == (root if layout.endswith("folder") else tmp_path / "out")
    assert_usable(records, image_root)
    found = by_id(records)
    assert list(found) == [*(f"Chest CT Scan_000{n}" for n in range(5)), "m_0", "m_0 #2", "kid"]
    assert {record.groups["question_type"] for record in records} == {"Modality Recognition"}
    odd, short, double, blank, gap = records[:5]
    assert odd.groups["modality_type"] == "CT(Computed Tomography)" == odd.modality
    assert short.options == {"A": "MRI", "B": "CT"} and short.answer == "B"
    assert double.answer == "D"  # the last option equal to the answer
    assert blank.options is not None and blank.options["B"] == " CT" and blank.answer == "B"
    assert gap.options == {"A": "MRI", "B": "X-ray", "C": "CT"} and gap.answer == "C"
    assert found["m_0"].groups["modality_type"] == "MR (Mag-netic Resonance Imaging)"
    assert found["m_0 #2"].groups["modality_type"] == "OCT (Optical Coherence Tomography"
    assert found["kid"].image_group == "cxr_pediatric:person576"
    again = omnimedvqa.load(root, tmp_path / "out")
    assert again == (records, image_root, bad)


def test_omnimedvqa_bad_rows_and_missing_images(tmp_path):
    rows = [omni(0), omni(1, gt_answer="Ultrasound"), omni(2, question=""), omni(3), omni(4, gt_answer=None), 5,
            omni(6, option_B=..., option_C=..., option_D=..., gt_answer="MRI")]  # fmt: skip
    put(tmp_path / "QA_information" / "Open-access" / "x.json", json.dumps(rows))
    put(tmp_path / omni(0)["image_path"], picture(0))
    records, _, bad = omnimedvqa.load(tmp_path, tmp_path / "out")
    assert [record.id for record in records] == ["Chest CT Scan_0000"] and len(bad) == 6
    reasons = dict(bad)
    assert "'Ultrasound' is none of the options" in reasons["Chest CT Scan_0001"]
    assert "a (3).png is missing" in reasons["Chest CT Scan_0003"]
    assert "1 option(s)" in reasons["Chest CT Scan_0006"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([omni(0)])[:-20], r"x\.json is not JSON .*line 1"),
        ('[{"q": 1}]', r"x\.json: unknown schema, no entry has question, gt_answer, image_path"),
        ('{"a": 1}', r"x\.json: unknown schema, not a list"),
    ],
)
def test_omnimedvqa_broken_files_are_named(tmp_path, text, message):
    put(tmp_path / "QA_information" / "Open-access" / "x.json", text)
    with pytest.raises(UserError, match=message):
        omnimedvqa.load(tmp_path, tmp_path / "out")


def test_omnimedvqa_roots_without_questions(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        omnimedvqa.load(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match=r"holds no question of split 'test': put OmniMedVQA\.zip"):
        omnimedvqa.load(tmp_path / "root", tmp_path / "out")
    zipped(tmp_path / "root" / "OmniMedVQA.zip", {"QA_information/Open-access/../../../x.json": b"[]"})
    with pytest.raises(UserError, match="holds no question"):  # no folder of questions by its name: not extracted
        omnimedvqa.load(tmp_path / "root", tmp_path / "out")
    assert not list(tmp_path.rglob("*.json"))


def medr1_row(image: str, letter: str = "B", **more: str) -> dict[str, str]:
    problem = "What is it? A)CT, B)MRI, T1, C)X-ray"
    return {"image": image, "problem": problem, "solution": f"<answer> {letter} </answer>", **more}


def test_omnimedvqa_in_med_r1s_schema(tmp_path):
    for name in "abcd":
        put(tmp_path / "Images" / f"{name}.png", picture(ord(name)))
    a, b, c, d = (f"Images/{name}.png" for name in "abcd")
    rows = [medr1_row(a), medr1_row(b), medr1_row(c, split="train"), medr1_row(a, "Z"), medr1_row("Images/gone.png")]
    put(tmp_path / "Splits" / "modality" / "test" / "CT_test.json", json.dumps(rows))
    put(tmp_path / "Splits" / "modality" / "train" / "CT_train.json", json.dumps([medr1_row(d)]))
    by_type = [medr1_row(a, question_type="Modality Recognition"), medr1_row(b, "C")]
    put(tmp_path / "Splits" / "question_type" / "test" / "M_test.json", json.dumps(by_type))
    records, image_root, bad = omnimedvqa.load(tmp_path, tmp_path / "out")
    assert image_root == tmp_path and [record.images for record in records] == [(a,)]
    assert_usable(records, image_root)
    assert records[0].options == {"A": "CT", "B": "MRI, T1", "C": "X-ray"} and records[0].answer == "B"
    assert records[0].groups == {"question_type": "Modality Recognition"}
    assert sorted(reason.split(" (")[0] for _, reason in bad) == [
        "M_test.json entry 1: asked before about Images/b.png, with another answer",
        "answer Z is none of the options A, B, C",
        "image Images/gone.png is missing",
    ]
    train, _, _ = omnimedvqa.load(tmp_path, tmp_path / "out", split="train")
    assert {record.images[0] for record in train} == {d}


def test_omnimedvqa_real_med_r1_records(shared, tmp_path):
    root = shared / "data" / "omnimedvqa"
    lines = [json.loads(line) for line in (root / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    total = 0
    for split in ("train", "test"):
        asked = {(line["image"], line["problem"]) for line in lines if line["split"] == split}
        records, image_root, bad = omnimedvqa.load(root, tmp_path, split=split)
        assert image_root == root and len(by_id(records)) + len({name for name, _ in bad}) == len(asked)
        assert len(bad) <= 0.01 * len(records)
        assert {record.groups["modality_type"] for record in records} <= {line["modality"] for line in lines}
        assert_usable(records[:20], image_root, split)
        total += len(records)
    assert total > 1450 and not list(tmp_path.iterdir())


# --- PMC-VQA ----------------------------------------------------------------------------------------------------------


def pmc(number: int, version: int, answer: str = "B", **more: str) -> dict[str, str]:
    choices = {f"Choice {letter}": f" {letter}:choice, {number} " for letter in "ABCD"}
    figure, question = f"PMC{number}_F1.jpg", f'What is "{number}"?\nSecond line'
    if version == 1:
        row = {"Figure_path": figure, "Question": question, "Answer": "text", **choices, "Answer_label": answer}
    else:
        row = {"index": str(number), "Figure_path": figure, "Caption": "c, d", "Question": question, **choices}
        row |= {"Answer": answer, "split": "test"}
    return {**row, **more}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("place", ["figures", "images", "zip"])
def test_pmc_vqa_files_and_places(tmp_path, version, place):
    file = {1: "test_clean.csv", 2: "test_2.csv"}[version]
    root = tmp_path / "root"
    table(root / file, [pmc(0, version), pmc(1, version, " D ")])
    images = {f"PMC{n}_F1.jpg": picture(n, "JPEG") for n in range(2)}
    if place == "zip":
        entries = {f"{'images' if version == 1 else 'figures'}/{name}": data for name, data in images.items()}
        zipped(root / ("images.zip" if version == 1 else "images_2.zip"), {**entries, "figures/unasked.jpg": b"x"})
    else:
        for name, data in images.items():
            put(root / place / name, data)
    records, image_root, bad = pmc_vqa.load(root, tmp_path / "out", file=file)
    assert bad == []
    assert_usable(records, image_root)
    assert image_root == (tmp_path / "out" if place == "zip" else root)
    assert not list((tmp_path / "out").rglob("unasked.jpg"))
    assert [record.answer for record in records] == ["B", "D"]
    assert {record.source for record in records} == {f"PMC-VQA {file} (2 rows)"}
    assert records[0].question == 'What is "0"?\nSecond line'
    assert records[0].options is not None and records[0].options["B"] == " B:choice, 0 "  # raw, as MedEvalKit sees it
    assert records[0].id == f"{Path(file).stem}-0" and records[0].images[0].endswith("/PMC0_F1.jpg")


def test_pmc_vqa_bad_rows_are_told_and_counted_in_the_source(tmp_path):
    rows = [pmc(0, 2), pmc(1, 2, "E"), pmc(2, 2, Question=" "), pmc(3, 2), pmc(4, 2, Figure_path="../../x.jpg"),
            pmc(5, 2, **{"Choice C": ""}), pmc(6, 2, Figure_path="")]  # fmt: skip
    table(tmp_path / "test_2.csv", rows)
    put(tmp_path / "figures" / "PMC0_F1.jpg", picture(0, "JPEG"))
    records, _, bad = pmc_vqa.load(tmp_path, tmp_path / "out")
    assert [record.source for record in records] == ["PMC-VQA test_2.csv (7 rows)"]
    reasons = dict(bad)
    assert set(reasons) == {f"test_2-{n}" for n in range(1, 7)} and "line 5: answer 'E'" in reasons["test_2-1"]
    assert "PMC3_F1.jpg is missing" in reasons["test_2-3"] and "choice C is empty" in reasons["test_2-5"]


def test_pmc_vqa_cut_or_unknown_csv_is_named(tmp_path):
    path = table(tmp_path / "test_2.csv", [pmc(0, 2), pmc(1, 2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"test_2\.csv line \d: \d columns instead of 10; the file is cut short"):
        pmc_vqa.load(tmp_path, tmp_path / "out")
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"test_2\.csv line 1: unknown schema, no column figure_path, question"):
        pmc_vqa.load(tmp_path, tmp_path / "out")
    path.write_bytes(whole.split(b"\r\n")[0] + b"\r\n")
    with pytest.raises(UserError, match="holds no question"):
        pmc_vqa.load(tmp_path, tmp_path / "out")
    path.write_bytes(whole.replace(b"What", b"Wh\xff\xfe"))
    with pytest.raises(UserError, match=r"test_2\.csv after line \d: .*the file is damaged"):
        pmc_vqa.load(tmp_path, tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no header"):
        pmc_vqa.load(tmp_path, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"test_2\.csv cannot be read"):
        pmc_vqa.load(tmp_path, tmp_path / "out")


def test_pmc_vqa_broken_zip_is_named(tmp_path):
    table(tmp_path / "test_2.csv", [pmc(0, 2)])
    put(tmp_path / "images_2.zip", b"<html>not found</html>")
    with pytest.raises(UserError, match=r"images_2\.zip cannot be opened as a zip"):
        pmc_vqa.load(tmp_path, tmp_path / "out")


# --- GMAI-MMBench -----------------------------------------------------------------------------------------------------


def gmai_row(number: int, image: bytes | str, **more: str) -> dict[str, str]:
    cell = image if isinstance(image, str) else base64.b64encode(image).decode()
    row = {
        "index": str(number), "image": cell, "question": "What is\tshown?", "A": "cyst", "B": "mass",
        "C": "none, at all", "D": "", "E": "", "answer": "B", "category": "x", "clinical VQA task": "Disease Diagnosis",
        "department": "Dermatology", "perceptual granularity": "image", "modality": "Dermoscopy", "original task": "t",
    }  # fmt: skip
    return {**row, **more}


def test_gmai_reads_base64_and_writes_each_image_once(tmp_path):
    png, jpg = picture(3), picture(4, "JPEG")
    rows = [gmai_row(0, png), gmai_row(1, png, D="d", E="e", answer="E"), gmai_row(2, jpg), gmai_row(3, "2"),
            gmai_row(4, jpg, B="", answer="C")]  # fmt: skip
    table(tmp_path / gmai.FILE, rows, "\t")
    limit = csv.field_size_limit()
    records, image_root, bad = gmai.load(tmp_path, tmp_path / "out")
    assert bad == [] and image_root == tmp_path / "out" and csv.field_size_limit() == limit
    assert_usable(records, image_root)
    first, second, third, fourth, gap = records
    assert first.images == second.images and third.images == fourth.images and first.images != third.images
    written = sorted(path.suffix for path in (image_root / "images").iterdir())
    assert written == [".jpg", ".png"] and (image_root / first.images[0]).read_bytes() == png
    assert first.question == "What is\tshown?" and list(first.options or ()) == ["A", "B", "C"]
    assert list(second.options or ()) == list("ABCDE") and second.answer == "E"
    assert gap.options == {"A": "cyst", "B": "none, at all"} and gap.answer == "B"
    assert first.groups == {
        "clinical_vqa_task": "Disease Diagnosis", "department": "Dermatology", "perceptual_granularity": "image",
        "modality": "Dermoscopy",
    }  # fmt: skip


def test_gmai_cells_beyond_the_csv_limit(tmp_path):
    large = picture(1) + bytes(200_000)
    table(tmp_path / gmai.FILE, [gmai_row(0, large)], "\t")
    records, image_root, _ = gmai.load(tmp_path, tmp_path / "out")
    assert (image_root / records[0].images[0]).stat().st_size == len(large)


def test_gmai_bad_rows_and_files(tmp_path):
    good = picture(0)
    rows = [
        gmai_row(0, good), gmai_row(1, "!" * 100), gmai_row(2, ""), gmai_row(3, good, answer="D"),
        gmai_row(4, good, question=""), gmai_row(5, "77"), gmai_row(0, good), gmai_row(6, good, A="", C=""),
    ]  # fmt: skip
    path = table(tmp_path / gmai.FILE, rows, "\t")
    records, _, bad = gmai.load(tmp_path, tmp_path / "out")
    reasons = dict(bad)
    assert [record.id for record in records] == ["0"] and len(bad) == 7
    assert "not base64" in reasons["1"] and "'D' is none of the options A, B, C" in reasons["3"]
    assert "row '77', which is not there" in reasons["5"] and "the index occurs twice" in reasons["0"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"GMAI-MMBench_VAL\.tsv line \d: \d+ columns instead of 15"):
        gmai.load(tmp_path, tmp_path / "out")
    table(path, [{key: value for key, value in gmai_row(0, good).items() if key != "answer"}], "\t")
    with pytest.raises(UserError, match="unknown schema, no column answer"):  # a TEST part
        gmai.load(tmp_path, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"GMAI-MMBench_VAL\.tsv cannot be read"):
        gmai.load(tmp_path, tmp_path / "out")


GMAI = Record(
    "0", ("i.png",), "What?", {"A": "Cyst", "B": "Solid mass", "C": "Normal", "D": "Edema", "E": "Fracture"}, "B",
    ("all",), "s", "l", "test", "g",
)  # fmt: skip


def test_gmai_prompt_is_vlmevalkits():
    assert gmai.ask(GMAI) == (
        "Question: What?\nOptions:\nA. Cyst\nB. Solid mass\nC. Normal\nD. Edema\nE. Fracture\n"
        "Please select the correct answer from the options above. \n"
    )


@pytest.mark.parametrize(
    ("response", "picked"),
    [
        ("B", "B"), ("(B)", "B"), ("**B**", "B"), ("B. Solid mass", "B"), ("{E}", "E"), ("b", None), ("", None),
        ("I choose the option B", "B"),
        ("B is my choice", "B"),  # the fourth word from the end
        ("B is what I see", None),  # the fifth: too early, and no text
        ("B or maybe B it is then or so B", None),  # the first place counts
        ("A or B", None),
        ("The correct answer is **C**, because A and B do not fit what the image shows at all", "C"),
        ("the Answer  IS\n*d and so on, A B", "D"),  # its case does not matter
        ("The correct answer is E, since the line that runs across", None),  # a sentence tells A to D only
        ("It is normal.", "C"), ("normal or edema", None), ("Z", None), ("Z normal", None),
        ("solid mass " + "x" * 55, "B"), ("solid mass " + "x" * 56, None),  # up to twice the length of all options
        ("Cannot determine the answer. B", None), ("I'm sorry, but without the image provided: normal", None),
        ("Failed to obtain answer via API B", None), ("Failed to obtain answer via API normal", "C"),
        ("B:", "B"), ("B/C", None), ("x" * 100_000, None),
    ],
)  # fmt: skip
def test_gmai_verdicts_are_vlmevalkits(response, picked):
    verdict = gmai.judge(GMAI, response)
    assert (verdict.picked, verdict.correct, verdict.parsed) == (picked, picked == "B", picked is not None)


def test_gmai_judges_the_options_that_are_there():
    two = Record("0", ("i",), "?", {"A": "yes", "B": "no"}, "A", ("all",), "s", "l", "test", "g")
    assert gmai.judge(two, "A, not C").picked == "A"
    assert gmai.judge(two, "the answer is C").picked is None
    with pytest.raises(ValueError, match="no options"):
        gmai.judge(Record("0", ("i",), "?", None, "x", ("all",), "s", "l", "test", "g"), "A")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_gmai_judges_any_text(response):
    verdict = gmai.judge(GMAI, response)
    assert verdict.parsed == (verdict.picked is not None) and verdict.picked in (None, *"ABCDE")
    assert verdict.correct == (verdict.picked == "B")


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_its_loader_and_only_groups_that_it_gives(name):
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert text.startswith(f"# @package benchmark.{name}\n") and config["name"] == name
    keys = ["name", "repo", "revision", "patterns", "root", "load", "ask", "judge", "breakdowns"]
    assert list(config)[:9] == keys and set(config) - set(keys) <= {"train_split"} and f"benchmark={name}" in text
    module = {"mmedexpert.sources": None}
    target = config["load"].pop("_target_").rsplit(".", 2)
    loader = {"medxpertqa": medxpertqa, "omnimedvqa": omnimedvqa, "pmc_vqa": pmc_vqa, "gmai": gmai}[target[1]]
    assert target[0] in module and target[2] == "load"
    assert set(config["load"]) <= set(loader.load.__annotations__)


def test_what_cannot_be_asked_is_left_out_and_what_was_changed_is_counted(tmp_path):
    """By the code that opens images for a model; a published question with its answer twice is asked, and counted."""
    for number, size in enumerate([(40, 40), (900, 3), (40, 40), (40, 40)]):
        values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    Image.fromarray(np.arange(1600).reshape(40, 40).astype(np.uint16)).save(tmp_path / "2.png")
    records = [record_of(f"{number}.png") for number in range(4)]
    records[0] = replace(records[0], options={"A": "Mass", "B": "mass "})
    records[3] = replace(records[3], question="half \ud800")
    good, bad = askable(records, tmp_path)
    assert [record.id for record in good] == ["0.png", "2.png"]
    assert [name for name, _ in bad] == ["1.png", "3.png"]
    assert "900 x 3 pixels, which Qwen-VL cannot patch" in bad[0][1] and "no Unicode" in bad[1][1]
    assert bad.changed == {
        "images: deep grey, scaled by its bit depth": 1,
        "questions: the right answer stands under two letters": 1,
    }


def test_gmai_reads_what_stands_in_an_answer_tag(tmp_path):
    """VLMEvalKit's reader takes `<answer>B</answer>` for one word, and what was trained to answer so for wrong."""
    table(tmp_path / gmai.FILE, [gmai_row(0, picture(3), answer="B")], "\t")
    (one,), *_ = gmai.load(tmp_path, tmp_path / "out")
    thought = "<think>" + "A wide heart, not a slim one. " * 20 + "</think>"
    for said, right in (("<answer>B</answer>", True), ("<answer>B.</answer>", True), ("<answer>A</answer>", False)):
        found = gmai.judge(one, thought + said)
        assert found.parsed and found.correct == right
    assert gmai.judge(one, "B").correct
