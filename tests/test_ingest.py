"""Ingest: records of many sources under ids of their own, images by content; what is unreadable is counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_dicom import RAMP, write

from mmedexpert.curation.ingest import BROKEN_IMAGE, TWICE, UNREADABLE, Source, ingest, may_redistribute
from mmedexpert.curation.steps import Verdict, write_step
from mmedexpert.data.images import is_plain, open_image
from mmedexpert.data.pictures import picture_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import LeftOut, validate
from mmedexpert.errors import UserError
from mmedexpert.sources import pictures, vqa_table

COLUMNS = {"image": "image", "id": "id", "options": "options"}


def noise(path: Path, seed: int, size: tuple[int, int] = (24, 16), **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **how)
    return path


def table(root: Path, rows: list[dict | str], name: str = "rows.jsonl") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def row(number: int, image: str, **more: object) -> dict:
    about = {"id": f"q{number}", "image": image, "question": f"What is {number}?", "answer": "B"}
    return {**about, "options": {"A": "Cyst", "B": "Mass"}, **more}


def source(root: Path, name: str = "mine", **more: object) -> Source:
    return Source(name, partial(vqa_table.load, files="*.jsonl", columns=COLUMNS, license="CC BY 4.0"), root, **more)


def run(sources: list[Source], tmp_path: Path, **how: object) -> list[Verdict]:
    return list(ingest(sources, tmp_path / "out", tmp_path / "pictures", **how))


def test_a_record_has_its_source_licence_revision_and_images_by_content(tmp_path: Path) -> None:
    noise(tmp_path / "a/tumour/malignant.png", 0)
    root = table(tmp_path / "a", [row(1, "tumour/malignant.png"), row(2, "tumour/malignant.png")])
    first, second = run([source(root)], tmp_path)
    assert (first.reason, first.record.id, second.record.id) == ("", "mine/q1", "mine/q2")
    data = (root / "tumour/malignant.png").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert first.record.images == (f"{digest[:2]}/{digest[:32]}.png",) == second.record.images
    assert (tmp_path / "pictures" / first.record.images[0]).read_bytes() == data
    about = first.record.provenance
    picture = picture_of(open_image(root / "tumour/malignant.png"))
    assert about["images"] == [{"sha256": digest, **vars(picture)}]
    assert (about["source"], about["redistribute"]) == ("mine", True)
    assert about["revision"].startswith("sha256:")
    assert validate([first.record, second.record], tmp_path / "pictures")[1] == []


def test_a_changed_source_has_another_revision_and_one_that_is_told_is_kept(tmp_path: Path) -> None:
    noise(tmp_path / "a/1.png", 0)
    root = table(tmp_path / "a", [row(1, "1.png")])
    revisions = [run([source(root)], tmp_path)[0].record.provenance["revision"] for _ in range(2)]
    table(root, [row(1, "1.png", answer="A")])
    revisions.append(run([source(root)], tmp_path)[0].record.provenance["revision"])
    assert revisions[0] == revisions[1] != revisions[2]
    told = run([source(root, revision="abc")], tmp_path)
    assert told[0].record.provenance["revision"] == "abc"


def test_what_cannot_be_read_is_listed_with_its_reason_and_the_counts_add_up(tmp_path: Path) -> None:
    root = tmp_path / "a"
    noise(root / "good.png", 0)
    Image.new("L", (9000, 5600)).save(root / "huge.png")
    (root / "torn.png").write_bytes(noise(root / "torn.png", 1).read_bytes()[:200])
    write(root / "report.dcm", None)
    rows = [
        row(1, "good.png"), '{"id": "q2", "image"', row(3, "huge.png"), row(4, "torn.png"), row(5, "missing.png"),
        row(6, "report.dcm"), row(1, "good.png", question="Again?"), row(7, "good.png", answer="E"), "7",
        row(8, "../a/good.png"), row(9, "good.png", question="half \ud800"), row(10, ""),
    ]  # fmt: skip
    changed = Counter[str]()
    folder = tmp_path / "step"
    found = write_step(
        "ingest", iter(run([source(table(root, rows))], tmp_path, changed=changed)), folder, tmp_path, given=None
    )
    assert [record.id for record in found] == ["mine/q1"]
    assert found.counts["in"] == len(rows) == found.counts["out"] + sum(found.counts["reasons"].values())
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {one["id"]: (one["reason"], one["detail"]) for one in dropped}
    assert {one["source"] for one in dropped} == {"mine"}
    assert reasons["mine/q3"][0] == reasons["mine/q4"][0] == reasons["mine/q6"][0] == BROKEN_IMAGE
    assert "50400000" in reasons["mine/q3"][1].replace(" x ", "") or "above the limit" in reasons["mine/q3"][1]
    assert "truncated" in reasons["mine/q4"][1] and "without pixels" in reasons["mine/q6"][1]
    assert reasons["mine/rows.jsonl line 2"][0] == UNREADABLE and "not JSON" in reasons["mine/rows.jsonl line 2"][1]
    assert "missing" in reasons["mine/q5"][1] and "twice" in reasons["mine/q1"][1]
    assert str(tmp_path) not in json.dumps(dropped)


def test_an_id_that_a_reader_gives_twice_is_dropped_once(tmp_path: Path) -> None:
    noise(tmp_path / "a/1.png", 0)
    root = table(tmp_path / "a", [row(1, "1.png")])
    records, image_root, bad = source(root).load(root, tmp_path)
    twice = Source("mine", lambda *_: (records * 2, image_root, bad), root)
    assert [verdict.reason for verdict in run([twice], tmp_path)] == ["", TWICE]
    assert [verdict.reason for verdict in run([source(root, "x"), source(root, "y")], tmp_path)] == ["", ""]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    roots = []
    for name in "ab":
        for number in range(6):
            noise(tmp_path / name / f"{number}.jpg", number)
        roots.append(table(tmp_path / name, [row(n, f"{n}.jpg") for n in range(7)]))
    sources = [source(root, root.name) for root in roots]
    counts = Counter[str](), Counter[str]()
    one = run(sources, tmp_path / "one", changed=counts[0], max_side=20)
    two = run(sources, tmp_path / "two", changed=counts[1], max_side=20, processes=2)
    assert one == two and counts[0] == counts[1] and len(one) == 14
    made = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n / "pictures").rglob("*.png")}
            for n in ("one", "two")]  # fmt: skip
    assert len(made[0]) == 6  # shared by both sources
    assert {p.name: d for p, d in made[0].items()} == {p.name: d for p, d in made[1].items()}


def test_what_a_file_holds_beside_its_picture_is_not_stored(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "Doe")
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "Doe", 6
    noise(tmp_path / "a/text.png", 0, pnginfo=text)
    noise(tmp_path / "a/exif.jpg", 1, exif=exif)
    noise(tmp_path / "a/note.jpg", 2, comment=b"Doe")
    Image.fromarray((RAMP * 3).astype(np.uint16)).save(tmp_path / "a/deep.png")
    noise(tmp_path / "a/plain.jpg", 3)
    names = ["text.png", "exif.jpg", "note.jpg", "deep.png", "plain.jpg"]
    assert [is_plain(tmp_path / "a" / name) for name in names] == [False] * 4 + [True]
    for name, kind in (("plain.jpg", b"\xff\xe5\x00\x05Doe"), ("also.png", b"\x00\x00\x00\x03doEs Do____")):
        whole = noise(tmp_path / "b" / name, 4).read_bytes()
        place = 2 if name.endswith("jpg") else 33  # behind the start of the file, behind IHDR
        assert is_plain(tmp_path / "b" / name)
        for holds in (whole + b"Doe", whole[:place] + kind + whole[place:]):
            (tmp_path / "b" / name).write_bytes(holds)
            assert not is_plain(tmp_path / "b" / name)
    noise(tmp_path / "b/steps.jpg", 5, progressive=True)
    assert is_plain(tmp_path / "b/steps.jpg")
    changed = Counter[str]()
    root = table(tmp_path / "a", [row(n, name) for n, name in enumerate(names)])
    verdicts = run([source(root)], tmp_path, changed=changed)
    for verdict, name in zip(verdicts, names, strict=True):
        stored = tmp_path / "pictures" / verdict.record.images[0]
        assert b"Doe" not in stored.read_bytes()
        assert open_image(stored).tobytes() == open_image(root / name).tobytes()
    assert verdicts[4].record.images[0].endswith(".jpg")
    assert changed == {"images: deep grey, scaled by its bit depth": 1}
    assert verdicts[3].record.provenance["images"][0]["changes"] == ["deep grey, scaled by its bit depth"]


def test_large_images_are_made_smaller_and_told(tmp_path: Path) -> None:
    noise(tmp_path / "a/1.png", 0, (300, 200))
    root = table(tmp_path / "a", [row(1, "1.png")])
    record = run([source(root)], tmp_path, max_side=150)[0].record
    stored = open_image(tmp_path / "pictures" / record.images[0])
    assert stored.size == (150, 100)
    about = record.provenance["images"][0]
    assert about["changes"] == ["made smaller: longest side 150"] and about["pixels"] == picture_of(stored).pixels
    assert "changes" not in run([source(root)], tmp_path, max_side=0)[0].record.provenance["images"][0]


def test_a_dicom_image_of_a_table_is_stored_as_a_png_without_its_patient(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"a/{number}.dcm", RAMP + number, PatientID="MRN7", WindowCenter=600, WindowWidth=900)
    root = table(tmp_path / "a", [row(n, f"{n}.dcm") for n in (1, 2)])
    changed = Counter[str]()
    verdicts = run([source(root)], tmp_path, changed=changed)
    assert [verdict.reason for verdict in verdicts] == ["", ""]
    assert {verdict.record.image_group for verdict in verdicts} == {"a:patient 1"}
    assert changed["images: DICOM: PatientID present, left behind"] == 2
    stored = b"".join(path.read_bytes() for path in (tmp_path / "pictures").rglob("*.png"))
    assert b"MRN7" not in stored and "MRN7" not in str(verdicts)


def test_records_without_an_image_need_the_modality_text(tmp_path: Path) -> None:
    def record(name: str, modality: str) -> Record:
        return Record(name, (), "Why?", None, "so", ("all",), "s", "MIT", "train", "g", modality=modality,
                      provenance={"source_reasoning": "because"})  # fmt: skip

    def load(*_: Path) -> tuple[list[Record], Path, LeftOut]:
        bad = LeftOut([("c", "torn")])
        bad.changed["labels: folded"] += 3
        return [record("a", "text"), record("b", "CT")], tmp_path, bad

    changed = Counter[str]()
    torn, good, wrong = run([Source("s", load, tmp_path)], tmp_path, changed=changed)
    assert (torn.reason, torn.detail, torn.record.id) == (UNREADABLE, "torn", "s/c")
    assert good.reason == "" and good.record.provenance["images"] == []
    assert good.record.provenance["source_reasoning"] == "because" and good.record.trace is None
    assert wrong.reason == UNREADABLE
    assert changed == {"labels: folded": 3}


@pytest.mark.parametrize("names", [["a", "a"], ["a/b"], [""]])
def test_a_source_needs_a_name_of_its_own(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="needs a name"):
        run([Source(name, lambda *_: ([], tmp_path, []), tmp_path) for name in names], tmp_path)


@pytest.mark.parametrize(
    "license, free",
    [
        ("CC0 1.0", True), ("CC BY 4.0", True), ("cc-by-sa-4.0", True), ("MIT", True), ("Apache-2.0", True),
        ("ODbL 1.0", True), ("Creative Commons Attribution 4.0 International", True), ("CC BY-NC-SA 4.0", False),
        ("CC BY-ND 4.0", False), ("research only", False), ("not stated", False), ("", False),
        ("ODIR-5K challenge terms", False), ("CC BY 4.0, research only", False), ("Apache-2.0 with NC clause", False),
        ("MIT 仅供研究", False), ("CC BY 4.0 非商业性使用", False),
    ],
)  # fmt: skip
def test_a_licence_that_does_not_say_so_forbids_redistribution(license: str, free: bool) -> None:
    assert may_redistribute(license) is free


def test_settings_of_a_source_go_before_its_records(tmp_path: Path) -> None:
    noise(tmp_path / "a/1.png", 0)
    root = table(tmp_path / "a", [row(1, "1.png", license="CC BY-NC 4.0")])
    plain = Source("x", partial(vqa_table.load, files="*.jsonl", columns={**COLUMNS, "license": "license"}), root)
    kept = [run([one], tmp_path)[0].record for one in (
        plain, Source("x", plain.load, root, license="MIT"), Source("x", plain.load, root, redistribute=True))
    ]  # fmt: skip
    assert [(one.license, one.provenance["redistribute"]) for one in kept] == [
        ("CC BY-NC 4.0", False), ("MIT", True), ("CC BY-NC 4.0", True)
    ]  # fmt: skip


def test_each_image_is_opened_once_and_never_all_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("mmedexpert.curation.ingest.BATCH", 2)
    monkeypatch.setattr(pictures, "open_picture", lambda path, **how: opened.append(path.name) or open_image(path))
    for number in range(3):
        noise(tmp_path / f"a/{number}.png", number)
    root = table(tmp_path / "a", [row(n, f"{n % 3}.png") for n in range(9)])
    verdicts = ingest([source(root)], tmp_path / "out", tmp_path / "pictures")
    next(verdicts)
    assert opened == ["0.png", "1.png"]
    assert len(list(verdicts)) == 8 and opened == ["0.png", "1.png", "2.png"]
