"""Loaders of the benchmarks with yes/no, closed and open questions, on small files in the published layouts."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedexpert.data.record import Record
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.runtime.build import function
from mmedexpert.scoring import medevalkit
from mmedexpert.sources import mmmu, path_vqa, slake, vqa_rad
from mmedexpert.sources.parquet import find_parquet, read_parquet

CONF = Path(__file__).parents[1] / "conf" / "benchmark"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(seed: int, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(values).save(file, format=kind)
    return file.getvalue()


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], image_columns: Sequence[str] = ("image",)) -> Path:
    """A Parquet file as `datasets` writes it, images as {bytes, path}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        name: pa.array([row[name] for row in rows], type=IMAGE if name in image_columns else None) for name in rows[0]
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def vqa_rows(*pairs: tuple[str | None, str | None], seed: int = 0) -> list[dict[str, Any]]:
    cells = [{"bytes": picture(seed + n), "path": None} for n in range(len(pairs))]
    return [{"image": cell, "question": q, "answer": a} for cell, (q, a) in zip(cells, pairs, strict=True)]


def loads_and_validates(loaded: tuple[list[Record], Path, list[tuple[str, str]]]) -> list[Record]:
    records, image_root, _ = loaded
    assert validate(records, image_root) == (records, [])  # decodes every image
    assert all(record.specialties == ("all",) for record in records)
    return records


# Parquet files of the hub: VQA-RAD, PathVQA


def test_hub_rows_become_records_and_rows_that_cannot_be_asked_are_named(tmp_path: Path) -> None:
    rows = vqa_rows(("Is it big?", "Yes "), ("What is it?", "a cyst"), ("", "no"), ("Why?", None), ("Lost?", "no"))
    rows[1]["image"] = {"bytes": picture(0, "JPEG"), "path": "x.jpg"}
    rows[4]["image"] = {"bytes": None, "path": "gone.jpg"}
    write_parquet(tmp_path / "hub/data/test-00000-of-00001-e5bc.parquet", rows)
    write_parquet(tmp_path / "hub/data/train-00000-of-00001-eb88.parquet", vqa_rows(("Train?", "no")))
    loaded = vqa_rad.load(tmp_path / "hub", tmp_path / "out")
    first, second = loads_and_validates(loaded)
    assert (first.kind, first.answer, first.question, first.options) == ("yes_no", "Yes ", "Is it big?", None)
    assert (second.kind, second.answer, second.split) == ("open", "a cyst", "test")
    assert loaded[1] == tmp_path / "out" / "images"
    assert [Path(record.images[0]).suffix for record in (first, second)] == [".png", ".jpg"]
    assert first.image_group == first.images[0]
    assert [(name, reason.split(": ")[1]) for name, reason in loaded[2]] == [
        ("vqa_rad-test-00002", "the question is empty"),
        ("vqa_rad-test-00003", "the answer is empty"),
        ("vqa_rad-test-00004", "the row holds no image"),
    ]
    train = loads_and_validates(vqa_rad.load(tmp_path / "hub", tmp_path / "out", split="train"))
    assert [(record.question, record.split, record.images) for record in train] == [("Train?", "train", first.images)]


def test_questions_on_one_image_share_its_file_and_a_second_run_writes_nothing(tmp_path: Path) -> None:
    rows = vqa_rows(("a?", "no"), ("b?", "no"), ("c?", "no"))
    rows[2]["image"] = rows[0]["image"]
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    records, image_root, _ = path_vqa.load(tmp_path, tmp_path / "out")
    assert records[0].image_group == records[2].image_group != records[1].image_group
    written = {path: path.stat().st_mtime_ns for path in image_root.iterdir()}
    assert len(written) == 2
    assert path_vqa.load(tmp_path, tmp_path / "out")[0] == records
    assert {path: path.stat().st_mtime_ns for path in image_root.iterdir()} == written


def test_shards_are_read_in_order_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for shard in range(3):
        rows = vqa_rows((f"q{shard}?", "yes"), (f"r{shard}?", "nuclei"), seed=shard * 2)
        write_parquet(tmp_path / f"data/test-0000{shard}-of-00003.parquet", rows)
    records = loads_and_validates(path_vqa.load(tmp_path, tmp_path / "out"))
    assert [record.question for record in records] == ["q0?", "r0?", "q1?", "r1?", "q2?", "r2?"]
    assert [record.id for record in records] == [f"path_vqa-test-0000{n}" for n in range(6)]
    (tmp_path / "data/test-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="holds 2 test Parquet files, their names say 3"):
        path_vqa.load(tmp_path, tmp_path / "out")


def test_hub_validation_files_are_the_val_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", vqa_rows(("q?", "yes")))
    assert path_vqa.load(tmp_path, tmp_path / "out", split="val")[0][0].split == "val"
    with pytest.raises(UserError, match=r"holds no test-\*\.parquet"):
        path_vqa.load(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("load", [vqa_rad.load, path_vqa.load, slake.load])
def test_unknown_splits_and_empty_folders_say_what_to_give(load: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        load(tmp_path, tmp_path / "out", split="dev")
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path, tmp_path / "out")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 100), flip=st.integers(0, 100), value=st.integers(0, 255))
def test_damaged_parquet_is_a_user_error_or_still_rows(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "test-00000-of-00001.parquet"
    whole = write_parquet(path, vqa_rows(("q?", "yes"), ("r?", "no"), ("s?", "no"))).read_bytes()
    data = bytearray(whole[: len(whole) * (cut if flip % 2 else 100) // 100])
    if data:
        data[(len(data) - 1) * flip // 100] = value
    path.write_bytes(data)
    try:
        assert len(list(read_parquet(path, ("image", "question", "answer")))) <= 3
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(data) == len(whole), "a truncated file was read"


def test_parquet_without_the_columns_names_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", [{"prompt": "q?", "label": "yes"}])
    with pytest.raises(UserError, match=r"no column image, question, answer \(it has prompt, label\)"):
        vqa_rad.load(tmp_path, tmp_path / "out")
    assert list(read_parquet(path, ("label",), ("prompt", "gone"))) == [{"label": "yes", "prompt": "q?"}]
    assert find_parquet(tmp_path / "nowhere", "test") == []


# VQA-RAD: the authors' JSON


def native(**more: Any) -> dict[str, Any]:
    row = {"qid": 1, "phrase_type": "test_freeform", "image_name": "a.png", "image_organ": "HEAD", "answer": "Yes"}
    return {**row, "question": "Is it?", "question_type": "PRES", "answer_type": "CLOSED ", **more}


def native_folder(root: Path, files: dict[str, Any], images: str = "VQA_RAD Image Folder") -> Path:
    (root / images).mkdir(parents=True)
    (root / images / "a.png").write_bytes(picture(0))
    for name, rows in files.items():
        (root / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return root


def test_native_json_is_split_by_phrase_type_and_used_in_place(tmp_path: Path) -> None:
    odd = [
        native(qid="2", answer=4, question_type="COUNT"),
        native(qid=3, phrase_type="para", answer="No"),
        native(qid=4, question=" "),
        native(qid=5, image_name="gone.png"),
        native(qid=6, image_name="../a.png"),
        native(qid=7, image_name="a" * 300),
        native(qid=8, answer=["a"]),
        native(qid=None),
        "no object",
    ]
    root = native_folder(tmp_path / "rad", {vqa_rad.NATIVE: [native(), *odd]})
    loaded = vqa_rad.load(root, tmp_path / "out")
    first, second = loads_and_validates(loaded)
    assert loaded[1] == root and not (tmp_path / "out").exists()
    assert first.groups == {"question_type": "PRES", "answer_type": "CLOSED", "image_organ": "HEAD"}
    assert (first.id, first.kind, first.answer) == ("vqa_rad-test-1", "yes_no", "Yes")
    assert (second.id, second.kind, second.answer) == ("vqa_rad-test-2", "open", "4")
    assert [reason[:12] for _, reason in loaded[2]] == [
        "the question", "the answer i", "it has no qi", "image gone.p", "image ../a.p", "image aaaaaa",
    ]  # fmt: skip
    train, _, bad = vqa_rad.load(root, tmp_path / "out", split="train")
    assert [record.id for record in train] == ["vqa_rad-train-3"]
    assert bad == [(f"{vqa_rad.NATIVE} entry 9", "the row is no object")]


def test_split_files_go_before_the_one_file(tmp_path: Path) -> None:
    files = {"split_testset.json": [native(qid=9, phrase_type="freeform")], vqa_rad.NATIVE: [native(qid=1)]}
    root = native_folder(tmp_path / "rad", files, images="images")
    assert [record.id for record in vqa_rad.load(root, tmp_path / "out")[0]] == ["vqa_rad-test-9"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps([native(), native(qid=2)], indent=1)[:-40], r"not JSON .*line \d+"),
        ("{}", "not a list"),
        ("[]", "it is empty"),
        ('[{"q": 1}]', "no entry has question, answer, image_name, phrase_type"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_native_json_is_named(content: str, says: str, tmp_path: Path) -> None:
    root = native_folder(tmp_path / "rad", {vqa_rad.NATIVE: content})
    with pytest.raises(UserError, match=says) as caught:
        vqa_rad.load(root, tmp_path / "out")
    assert vqa_rad.NATIVE in str(caught.value)


def test_native_json_without_images_says_where_they_go(tmp_path: Path) -> None:
    (tmp_path / vqa_rad.NATIVE).write_text(json.dumps([native()]))
    with pytest.raises(UserError, match="no folder 'VQA_RAD Image Folder' or 'images'"):
        vqa_rad.load(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("cells", [
    pa.array([b"yes", b"\xff\xfe"], pa.binary()).view(pa.string()),
    pa.array([0, 2**62], pa.int64()).view(pa.timestamp("us")),
])  # fmt: skip
def test_a_cell_that_cannot_be_read_refuses_its_file(tmp_path: Path, cells: pa.Array) -> None:
    pq.write_table(pa.table({"question": ["Q?"] * 2, "answer": cells}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has a cell that cannot be read .*: download it again"):
        list(read_parquet(tmp_path / "a.parquet"))


def test_real_vqa_rad_has_the_published_counts(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "vqa_rad"
    records, image_root, bad = vqa_rad.load(root, tmp_path)
    assert validate(records, image_root) == (records, []) and bad == []
    assert Counter(record.kind for record in records) == {"yes_no": 251, "open": 200}
    assert Counter(record.groups["answer_type"] for record in records) == {"CLOSED": 272, "OPEN": 179}
    assert Counter(record.groups["image_organ"] for record in records) == {"CHEST": 174, "ABD": 158, "HEAD": 119}
    train, _, bad = vqa_rad.load(root, tmp_path, split="train")
    assert len(train) == 3064 and bad == []
    assert Counter(record.groups["answer_type"] for record in train) == {"CLOSED": 1823, "OPEN": 1241}
    assert len({record.image_group for record in records}) == 203
    assert {record.image_group for record in records} <= {record.image_group for record in train}


def test_real_vqa_rad_is_divided_alike_by_phrase_type(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "vqa_rad"
    (tmp_path / vqa_rad.NATIVE).symlink_to(root / vqa_rad.NATIVE)
    (tmp_path / "images").symlink_to(root / "images")
    one, two = vqa_rad.load(tmp_path, tmp_path / "out")[0], vqa_rad.load(root, tmp_path / "out")[0]
    asked = [
        Counter((r.images, r.question.strip(), r.answer.strip().lower()) for r in records) for records in (one, two)
    ]
    assert asked[0] == asked[1] and sum(asked[0].values()) == 451


# SLAKE


def slake_row(qid: int, **more: Any) -> dict[str, Any]:
    row = {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "Is it?", "answer": "Yes", "q_lang": "en"}
    groups = {"location": "Lung", "modality": "CT", "answer_type": "CLOSED", "content_type": "Organ", "triple": ["v"]}
    return {"qid": qid, **row, **groups, **more}


SLAKE_ROWS = [
    slake_row(1),
    slake_row(2, answer="no"),
    slake_row(3, answer="Left Lung", answer_type="OPEN ", img_name="xmlab2/source.jpg"),
    slake_row(3, question="图像里有什么器官?", answer="肺", answer_type="OPEN", q_lang="zh"),
    slake_row(4, question="这是CT吗?", answer="是", q_lang="zh"),
    slake_row(5, q_lang="de"),
    slake_row(6, answer_type="MAYBE"),
    slake_row(7, img_name="xmlab9/source.jpg"),
    slake_row(8, answer=None),
]


def slake_folder(root: Path, *, zipped: bool = True) -> Path:
    root.mkdir(parents=True)
    (root / "test.json").write_text(json.dumps(SLAKE_ROWS, ensure_ascii=False), encoding="utf-8")
    files = {f"imgs/xmlab{n}/source.jpg": picture(n, "JPEG") for n in (1, 2)}
    if zipped:
        with zipfile.ZipFile(root / "imgs.zip", "w") as archive:
            for name, data in {**files, "imgs/xmlab1/mask.png": picture(9), "imgs/xmlab1/question.json": b"{}"}.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(data)
    return root


def test_slake_from_the_zip(tmp_path: Path) -> None:
    loaded = slake.load(slake_folder(tmp_path / "slake"), tmp_path / "out")
    records = loads_and_validates(loaded)
    assert [(record.id, record.kind, record.answer) for record in records] == [
        ("slake-test-en-1", "closed", "Yes"),
        ("slake-test-en-2", "yes_no", "no"),
        ("slake-test-en-3", "open", "Left Lung"),
        ("slake-test-zh-3", "open", "肺"),
        ("slake-test-zh-4", "closed", "是"),
    ]
    assert records[3].question == "图像里有什么器官?" and records[3].language == "zh"
    assert records[2].groups == {
        "answer_type": "OPEN", "content_type": "Organ", "modality": "CT", "location": "Lung", "language": "en",
    }  # fmt: skip
    assert records[2].modality == "CT" and records[2].image_group == "xmlab2/source.jpg"
    found = sorted(path.relative_to(loaded[1]).as_posix() for path in loaded[1].rglob("*") if path.is_file())
    assert found == ["images/xmlab1/source.jpg", "images/xmlab2/source.jpg"]  # no masks
    assert loaded[2] == [
        ("test.json entry 5", "q_lang 'de' is none of en, zh"),
        ("test.json entry 6", "answer_type 'MAYBE' is neither OPEN nor CLOSED"),
        ("test.json entry 8", "the answer is empty"),
        ("slake-test-en-7", f"image xmlab9/source.jpg is missing (looked in {tmp_path / 'slake' / 'imgs.zip'})"),
    ]


def test_slake_images_in_a_folder_are_used_in_place(tmp_path: Path) -> None:
    zipped = slake.load(slake_folder(tmp_path / "a"), tmp_path / "out")
    root = slake_folder(tmp_path / "b", zipped=False)
    folder = slake.load(root, tmp_path / "none")
    assert folder[1] == root and not (tmp_path / "none").exists()
    assert [record.images[0] for record in loads_and_validates(folder)][:1] == ["imgs/xmlab1/source.jpg"]
    assert [replace(record, images=()) for record in folder[0]] == [replace(r, images=()) for r in zipped[0]]


def test_slake_languages_are_chosen_and_checked(tmp_path: Path) -> None:
    root = slake_folder(tmp_path / "slake")
    for language, count in (("en", 3), ("zh", 2)):
        records = slake.load(root, tmp_path / "out", languages=[language])[0]
        assert [record.language for record in records] == [language] * count
    for languages in ([], ["fr"]):
        with pytest.raises(UserError, match=r"load\.languages"):
            slake.load(root, tmp_path / "out", languages=languages)


@pytest.mark.parametrize("name", ["validation.json", "validate.json"])
def test_slake_validation_has_two_names(name: str, tmp_path: Path) -> None:
    root = slake_folder(tmp_path / "slake")
    (root / "test.json").rename(root / name)
    assert {record.split for record in slake.load(root, tmp_path / "out", split="val")[0]} == {"val"}
    with pytest.raises(UserError, match=r"holds no test\.json"):
        slake.load(root, tmp_path / "out")


def test_slake_without_images_says_what_is_missing(tmp_path: Path) -> None:
    root = slake_folder(tmp_path / "slake")
    (root / "imgs.zip").unlink()
    with pytest.raises(UserError, match=r"neither imgs\.zip nor a folder imgs"):
        slake.load(root, tmp_path / "out")


def test_slake_asks_all_but_open_questions_with_the_closed_prompt(tmp_path: Path) -> None:
    closed, yes_no, open_, zh, _ = slake.load(slake_folder(tmp_path / "slake"), tmp_path / "out")[0]
    config = yaml.safe_load((Path(__file__).parents[1] / "conf" / "benchmark" / "slake.yaml").read_text())
    ask = function(config["ask"], "ask")
    for record in (closed, yes_no):
        assert ask(record) == "Is it?\nAnswer the question using a single word or phrase."
    assert ask(open_) == "Is it?\nPlease answer the question concisely."
    assert ask(zh).startswith(f"{zh.question}\n") and "concisely" not in ask(zh)


# MMMU


def mmmu_row(number: int, subject: str, **more: Any) -> dict[str, Any]:
    row = {"id": f"validation_{subject}_{number}", "question": "In <image 1>, what?", "answer": "B"}
    row |= {"options": "['Cyst', \"Crohn's\", 'T2 lesion']", "question_type": "multiple-choice", "subfield": "Anatomy"}
    images = {"image_1": {"bytes": picture(number), "path": "1.png"}, "image_2": {"bytes": b"unused", "path": "2"}}
    return {**row, **images, "topic_difficulty": "Hard", **more}


def mmmu_folder(root: Path, rows: Sequence[dict[str, Any]] = ()) -> Path:
    for subject in mmmu.SUBJECTS:
        content = rows if rows and subject == "Pharmacy" else [mmmu_row(1, subject), mmmu_row(2, subject)]
        write_parquet(root / subject / "validation-00000-of-00001.parquet", content, ("image_1", "image_2"))
        write_parquet(root / subject / "dev-00000-of-00001.parquet", [mmmu_row(9, subject)], ("image_1", "image_2"))
    return root


def test_mmmu_loads_the_five_subjects(tmp_path: Path) -> None:
    loaded = mmmu.load(mmmu_folder(tmp_path / "mmmu"), tmp_path / "out")
    records = loads_and_validates(loaded)
    assert loaded[2] == [] and len(records) == 10
    assert Counter(record.groups["subject"] for record in records) == dict.fromkeys(mmmu.SUBJECTS, 2)
    first = records[0]
    assert first.id == "mmmu-validation_Basic_Medical_Science_1"
    assert first.options == {"A": "Cyst", "B": "Crohn's", "C": "T2 lesion"} and first.answer == "B"
    assert first.kind == "choice" and len(first.images) == 1 and first.split == "test"
    assert first.groups["topic_difficulty"] == "Hard" and first.groups["subfield"] == "Anatomy"


def test_mmmu_rows_that_cannot_be_asked_are_named(tmp_path: Path) -> None:
    odd = [
        mmmu_row(1, "P", options="[]", question_type="open", answer="4.5"),
        mmmu_row(2, "P", answer="D"),
        mmmu_row(3, "P", options="__import__('os').getcwd()"),
        mmmu_row(4, "P", options="['a', ''"),
        mmmu_row(5, "P", options="['a', '']"),
        mmmu_row(6, "P", options=str(list(range(11)))),
        mmmu_row(7, "P", question=None),
        mmmu_row(8, "P", image_1=None),
        mmmu_row(9, "P", question_type="essay"),
        mmmu_row(10, "P", id=None),
        mmmu_row(11, "P", options="(" * 5000),
        mmmu_row(12, "P", options="[2, 2.5, '3 mg']"),
    ]
    records, _, bad = mmmu.load(mmmu_folder(tmp_path / "mmmu", odd), tmp_path / "out")
    pharmacy = [record for record in records if record.groups["subject"] == "Pharmacy"]
    assert [(record.kind, record.answer, record.options) for record in pharmacy] == [
        ("open", "4.5", None),
        ("choice", "B", {"A": "2", "B": "2.5", "C": "3 mg"}),
    ]
    reasons = [reason.split(": ", 1)[1] for _, reason in bad]
    assert reasons[0] == "answer 'D' is none of the options A, B, C"
    assert reasons[1].startswith("the options \"__import__('os').getcwd()\" are no list")
    assert ["no list" in reasons[2], "empty" in reasons[3], "2 to 10" in reasons[4]] == [True] * 3
    assert reasons[5] == "the question is empty" and reasons[6] == "the row holds no image"
    assert "'essay'" in reasons[7] and reasons[8] == "it has no id" and "no list" in reasons[9]
    assert bad[0][0] == "mmmu-validation_P_2" and bad[8][0] == "mmmu-Pharmacy row 9"


def test_mmmu_without_a_subject_or_with_another_schema(tmp_path: Path) -> None:
    root = mmmu_folder(tmp_path / "mmmu")
    pharmacy = root / "Pharmacy" / "validation-00000-of-00001.parquet"
    pharmacy.unlink()
    with pytest.raises(UserError, match="in Pharmacy: give"):
        mmmu.load(root, tmp_path / "out")
    write_parquet(pharmacy, [{"id": "1", "question": "q?"}])
    with pytest.raises(UserError, match="no column options, answer, image_1, question_type"):
        mmmu.load(root, tmp_path / "out")


def choice(record_id: str = "mmmu-1", answer: str = "C") -> Record:
    options = {"A": "Joint fluid", "B": "Bone", "C": "Cartilage", "D": "Bone marrow"}
    return Record(
        id=record_id, images=("a.png",), question="What is <image 1>?", options=options, answer=answer,
        specialties=("all",), source="mmmu_medical", license="Apache-2.0", split="test", image_group="a", kind="choice",
    )  # fmt: skip


def open_question() -> Record:
    return Record(
        id="mmmu-2", images=("a.png",), question="How many?", options=None, answer="7", specialties=("all",),
        source="mmmu_medical", license="Apache-2.0", split="test", image_group="a", kind="open",
    )  # fmt: skip


def test_mmmu_prompts_keep_the_templates_blanks() -> None:
    assert mmmu.ask(choice()) == (
        "\nWhat is <image 1>?\n\n(A) Joint fluid\n(B) Bone\n(C) Cartilage\n(D) Bone marrow\n\n\n"
        "        Answer with the option's letter from the given choices directly."
    )
    assert mmmu.ask(open_question()) == "\nHow many?\n\n        Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("response", "picked"),
    [
        ("C", "C"),
        ("C.", "C"),
        ("'C'.", "C"),
        ("c", None),
        ("(B)", "B"),
        ("not (A) but (C), so (B)", "B"),
        ("(A) is the one, B and C are not", "A"),  # brackets go before bare letters
        ("A or B then C it is", "C"),
        ("A is wrong", "A"),
        ("A.Joint", None),
        ("<answer>B</answer>", "B"),
        ("<answer>B</answer> and <answer>C</answer>", "C"),  # "B C": the last one
        ("<answer>B</answer> \\boxed{C}", "B"),
        ("\\boxed{A} then \\boxed{D}", "D"),
        ("so \\boxed{\\text{(C)}}", "C"),
        ("A \\boxed{B", None),  # the box is never closed: the parser reads "None"
        ("<answer>A", None),
        ("I see hyaline cartilage in this image", "C"),
        ("cartilage", None),  # a text counts in more than five words only
        ("this is the marrow, the bone marrow", "B"),  # "bone" and "bone marrow" end at the same place: the first
        ("cartilage, and bone, and last joint fluid", "A"),
        ("", None),
        ("!?.,", None),
    ],
)
def test_mmmu_parser(response: str, picked: str | None) -> None:
    verdict = mmmu.judge(choice(), response)
    assert (verdict.picked, verdict.parsed) == (picked, picked is not None)
    if picked:
        assert verdict.correct == (picked == "C")


def test_mmmu_draws_are_random_over_questions_and_repeatable_for_one() -> None:
    verdicts = [mmmu.judge(choice(f"mmmu-{n}"), "no idea").correct for n in range(400)]
    assert 70 <= sum(verdicts) <= 130  # a quarter of 400, within 3.5 standard deviations
    assert verdicts == [mmmu.judge(choice(f"mmmu-{n}"), "something else").correct for n in range(400)]
    one = [mmmu.judge(choice("mmmu-7", answer), "").correct for answer in "ABCD"]
    assert sum(one) == 1  # the draw does not look at the answer


def test_an_open_mmmu_question_is_never_right_there() -> None:
    assert [mmmu.judge(open_question(), text).correct for text in ("7", "\\boxed{7}", "")] == [False] * 3


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ABCDabone (){}\\<>/.!xn\n", max_size=60) | st.text(max_size=40))
def test_mmmu_judges_any_text(response: str) -> None:
    verdicts = [mmmu.judge(choice(answer=answer), response) for answer in "ABCD"]
    assert sum(verdict.correct for verdict in verdicts) == 1
    assert len({verdict.picked for verdict in verdicts}) == 1


def test_a_very_long_response_is_judged_at_once() -> None:
    assert mmmu.judge(choice(), "<answer>" * 12_000 + " (C) ").picked == "C"
    assert mmmu.judge(choice(), "\\boxed{" * 14_000).picked is None


# configs


@pytest.mark.parametrize("name", ["vqa_rad", "slake", "path_vqa", "mmmu_medical"])
def test_the_config_names_functions_that_exist_and_groups_that_are_set(name: str, tmp_path: Path) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# @package benchmark.{name}\n")
    config = yaml.safe_load(text)
    assert config["name"] == name and len(config["revision"]) == 40 and config["root"] is None
    targets = [config[part]["_target_"] for part in ("load", "ask", "judge")]
    modules = {f"mmedexpert.sources.{m.__name__.rpartition('.')[2]}": m for m in (vqa_rad, slake, path_vqa, mmmu)}
    modules["mmedexpert.scoring.medevalkit"] = medevalkit
    assert all(callable(getattr(modules[module], function)) for module, _, function in map(_split, targets))
    groups = {
        "vqa_rad": {"question_type", "answer_type", "image_organ"},
        "slake": {"language", *slake.GROUPS},
        "path_vqa": set(),
        "mmmu_medical": {"subject", "question_type", "topic_difficulty", "subfield"},
    }
    assert set(config["breakdowns"]) <= groups[name]


def _split(target: str) -> tuple[str, str, str]:
    return target.rpartition(".")
