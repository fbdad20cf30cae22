"""Readers of training sets: rows however they are written, single ones bad and none fatal; text without images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedexpert.data.record import Record
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.models.encode import IMAGE_TOKEN
from mmedexpert.sources import gmai_reasoning, medvlthinker, medxpertqa, omnimedvqa, pmc_vqa, reasoning_text, vqa_table
from mmedexpert.sources.rows import choices_of, gold_of, rows_of

PAIR = {"A": "Cyst", "B": "Mass"}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "value",
    [
        PAIR, ["Cyst", "Mass"], ["A. Cyst", "B. Mass"], json.dumps(PAIR), str(PAIR), "A) Cyst, B) Mass",
        "['Cyst', 'Mass']",
        [{"letter": "A", "content": "Cyst"}, {"letter": "B", "content": "Mass"}], {**PAIR, "C": None, "D": " "},
    ],
)  # fmt: skip
def test_options_are_read_however_they_are_written(value: Any) -> None:
    assert gold_of(choices_of(value), "B") == (PAIR, "B") == gold_of(choices_of(value), " mass ")


def test_options_that_are_none_or_unclear() -> None:
    assert choices_of(None) == choices_of("") == choices_of(float("nan")) == []
    for value in (7, "Cyst", "{'A': open('x')}"):
        with pytest.raises(ValueError, match="options"):
            choices_of(value)


@pytest.mark.parametrize(
    "options, answer, letter",
    [
        (PAIR, "(B)", "B"), (PAIR, "B. Mass", "B"), ({"B": "Cyst", "D": "Mass"}, "D", "B"),
        ({"1": "Cyst", "2": "Mass"}, "2", "B"),
    ],
)  # fmt: skip
def test_an_answer_is_a_key_a_text_or_both(options: dict, answer: str, letter: str) -> None:
    assert gold_of(choices_of(options), answer)[1] == letter


@pytest.mark.parametrize(
    "options, answer",
    [
        (PAIR, "C"), (PAIR, "A. Mass"), ({"A": "B", "B": "A"}, "A"), ({"A": "Mass", "B": "mass"}, "Mass"),
        ({"A": "Cyst"}, "A"),
    ],
)  # fmt: skip
def test_an_unclear_answer_is_refused(options: dict, answer: str) -> None:
    with pytest.raises(ValueError):
        gold_of(choices_of(options), answer)


@pytest.mark.parametrize(
    "name, data, good, told",
    [
        ("a.jsonl", b'{"q": 1}\n{"q": 2\n\n[3]\n{"q": "\xff"}\n{"q": 5}', [1, 5], ["line 2", "line 4", "line 5"]),
        ("a.jsonl", '\ufeff{"q": 1}\n{"q": "\u2028"}\n', [1, "\u2028"], []),
        ("a.json", b'[{"q": 1}, 2, {"q": "\xe4"}]', [1], ["entry 1", "entry 2"]),
        ("a.json", '{"info": 1, "questions": [{"q": 1}]}', [1], []),
        ("a.json", '[{"q": 1}', [], ["a.json"]),
        ("a.csv", b'q,r\n1,2\n"3,4\n\xff,6\n', ["1"], ["line 4"]),
        ("a.csv", b'q,r\n1,2\n3\n\xff,6\n"7,8",9\n', ["1", "7,8"], ["line 3", "line 4"]),
        ("a.tsv", "q\tr\n1,5\t2\n".encode("utf-16"), ["1,5"], []),
        ("a.parquet", b"PAR1 torn", [], ["a.parquet"]),
    ],
)  # fmt: skip
def test_a_broken_row_is_told_and_the_others_are_read(
    tmp_path: Path, name: str, data: bytes | str, good: list, told: list[str]
) -> None:
    bad: list[tuple[str, str]] = []
    assert [row["q"] for _, row in rows_of(put(tmp_path / name, data), bad)] == good
    assert [where.removeprefix(f"{name} ") for where, _ in bad] == told


def load(root: Path, files: str, out: str = "out", **columns: Any) -> tuple[list[Record], Path, list]:
    return vqa_table.load(root, root / out, files=files, columns=columns)


def test_one_table_in_five_formats_is_one_set_of_records(tmp_path: Path) -> None:
    for number in (1, 2):
        put(tmp_path / f"images/{number}.png", png(number))
    rows = [
        {"img": f"{n}.png", "q": f"What is {n}?", "o": json.dumps(PAIR), "key": "B", "name": f"n{n}"} for n in (1, 2)
    ]
    put(tmp_path / "t.json", json.dumps(rows))
    put(tmp_path / "t.jsonl", lines(rows))
    cells = [[*rows[0]], *([*row.values()] for row in rows)]
    put(
        tmp_path / "t.tsv",
        "".join("\t".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line) + "\n" for line in cells),
    )
    put(
        tmp_path / "t.csv",
        "".join(",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line) + "\n" for line in cells),
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = {"image": "img", "question": "q", "options": "o", "answer": "key", "id": "name"}
    found = [load(tmp_path, f"t.{kind}", **columns) for kind in ("json", "jsonl", "csv", "tsv", "parquet")]
    for records, image_root, bad in found:
        assert bad == [] and validate(records, image_root)[0] == records
        assert [(r.id, r.images, r.question, r.options, r.answer, r.split) for r in records] == [
            (f"n{n}", (f"images/{n}.png",), f"What is {n}?", PAIR, "B", "train") for n in (1, 2)
        ]


def test_columns_of_a_table(tmp_path: Path) -> None:
    put(tmp_path / "1.png", png(1))
    put(tmp_path / "2.png", png(2))
    row = {"one": "./1.png", "two": "2.png", "question": "Why?", "a": "Cyst", "b": "Mass", "c": "", "answer": "mass",
           "why": " As seen. ", "who": "MRN7", "kind": "CT"}  # fmt: skip
    put(tmp_path / "t.jsonl", lines([row, {**row, "a": "", "b": "", "answer": "No", "two": "", "kind": ""}]))
    columns = {"image": ["one", "two"], "options": ["a", "b", "c"], "rationale": "why", "patient": "who"}
    first, second = load(tmp_path, "t.jsonl", modality="kind", **columns)[0]
    assert (first.images, first.options, first.answer) == (("1.png", "2.png"), PAIR, "B")
    assert first.provenance == {"source_reasoning": "As seen."} and first.trace is None
    assert first.image_group == second.image_group and "MRN7" not in str([first, second])
    assert (first.modality, second.modality, second.kind, second.options) == ("CT", "", "yes_no", None)


def test_images_in_the_rows_and_options_in_the_question(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(n), "path": None}, "question": "Which? A) Cyst B) Mass", "answer": "B"} for n in (1, 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for _ in range(2):  # the second time over what the first has written
        records, image_root, bad = load(tmp_path, "t.parquet", image="image", options="inline")
        assert bad == [] and validate(records, image_root)[0] == records
        assert [(image_root / record.images[0]).read_bytes() for record in records] == [png(1), png(2)]
        assert (records[0].question, records[0].options) == ("Which?", PAIR)


def test_faults_of_rows_and_of_settings(tmp_path: Path) -> None:
    put(tmp_path / "1.png", png(1))
    good = {"image": "1.png", "question": "Why?", "answer": "So", "id": "x"}
    rows = [good, good, {**good, "image": ""}, {**good, "question": " "}, {**good, "image": "no.png", "id": "y"}]
    put(tmp_path / "t.jsonl", lines(rows))
    records, _, bad = load(tmp_path, "t.jsonl", image="image", id="id")
    assert len(records) == 1
    assert [next(word for word in ("no image", "empty", "twice", "missing") if word in why) for _, why in bad] == [
        "no image", "empty", "twice", "missing"
    ]  # fmt: skip
    for settings, told in [
        ({"files": "t.jsonl", "columns": {"picture": "image"}}, "picture"),
        ({"files": "t.jsonl", "columns": {"question": "Frage"}}, "Frage"),
        ({"files": "u.*", "columns": {}}, "u.*"),
        ({"files": "1.png", "columns": {}}, "none of .json"),
        ({"files": "t.jsonl", "columns": {}, "split": "all"}, "all"),
    ]:
        with pytest.raises(UserError) as caught:
            vqa_table.load(tmp_path, tmp_path / "out", **settings)
        assert told in str(caught.value)


def test_medvlthinker(tmp_path: Path) -> None:
    row = {"images": [{"bytes": png(1), "path": "1.png"}], "question": "Why?", "options": json.dumps(PAIR),
           "answer_label": "B", "answer": "Mass", "reasoning": "It is round.", "dataset_name": "pmc_vqa",
           "dataset_index": 7, "hash": "0" * 16}  # fmt: skip
    others = [{**row, "dataset_index": 8, "answer": "Cyst"}, {**row, "dataset_index": 9, "images": None},
              {**row, "dataset_index": 10, "answer": "Because it is round"}]  # fmt: skip
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([row, *others]), tmp_path / "data/train-00000-of-00001.parquet")
    records, image_root, bad = medvlthinker.load(tmp_path, tmp_path / "out")
    assert [why for _, why in bad] == ["answer 'B. Cyst' is none of the options Cyst, Mass"]
    assert validate(records, image_root)[0] == records
    assert [(r.id, r.answer, len(r.images), r.modality) for r in records] == [
        ("pmc_vqa-7", "B", 1, ""), ("pmc_vqa-9", "B", 0, "text"), ("pmc_vqa-10", "B", 1, "")
    ]  # fmt: skip
    assert records[0].provenance["source_reasoning"] == "It is round."
    assert records[0].license == "CC BY-SA" and records[0].groups == {"dataset": "pmc_vqa"}


def test_gmai_reasoning(tmp_path: Path) -> None:
    put(tmp_path / "2d/cls/1.png", png(1))
    asked = "<image>\nWhat is it?\nA. Cyst\nB. Mass\nPlease select one."

    def row(reply: str, **more: Any) -> dict:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]
        return {"image": "2d/cls/1.png", "conversations": turns, **more}

    replies = ["B", "<think>It is round, not A.</think><answer>B</answer>", "C", "none"]
    put(tmp_path / "t.jsonl", lines([*map(row, replies), row("A", conversations=[])]))
    records, image_root, bad = gmai_reasoning.load(tmp_path, tmp_path / "out")
    assert validate(records, image_root)[0] == records and len(bad) == 3
    assert [(r.question, r.options, r.answer) for r in records] == [("What is it?", PAIR, "B")] * 2
    assert [r.provenance for r in records] == [{}, {"source_reasoning": "It is round, not A."}]


def test_reasoning_of_text_alone(tmp_path: Path) -> None:
    huatuo = {"question": "A man is ill.", "options": str(PAIR), "answer_idx": "B", "answer": "Mass",
              "Question": "Open?", "Ground-True Answer": "A mass",
              "Complex_CoT": "Hm.", "Response": "Long."}  # fmt: skip
    plain = {"question": "Is it?", "answer": "Yes", "reasoning": "So."}
    put(
        tmp_path / "t.json",
        json.dumps([huatuo, {k: huatuo[k] for k in ("Question", "Response")}, plain, {"question": "?"}]),
    )
    records, image_root, bad = reasoning_text.load(tmp_path, tmp_path / "out", files="*.json")
    assert len(bad) == 1 and validate(records, image_root)[0] == records
    assert [(r.question, r.options, r.answer, r.kind) for r in records] == [
        ("A man is ill.", PAIR, "B", "choice"), ("Open?", None, "Long.", "open"), ("Is it?", None, "Yes", "yes_no")
    ]  # fmt: skip
    assert {(r.images, r.modality) for r in records} == {((), "text")}
    assert records[0].provenance == {"source_reasoning": "Hm."}
    open_ones = reasoning_text.load(tmp_path, tmp_path / "out", files="*.json", form="open")[0]
    assert (open_ones[0].question, open_ones[0].answer) == ("Open?", "A mass")
    assert len({r.image_group for r in records}) == 3


def test_training_parts_of_benchmarks(tmp_path: Path) -> None:
    put(tmp_path / "images/1.png", png(1))
    choices = "Choice A,Choice B,Choice C,Choice D"
    put(tmp_path / "train_2.csv", f"Figure_path,Question,{choices},Answer\n1.png,Why?,a,b,c,d,B\n")
    assert [r.split for r in pmc_vqa.load(tmp_path, tmp_path / "out", "train_2.csv")[0]] == ["train"]
    row = {"id": "d", "question": "Why?", "options": PAIR, "label": "B", "images": ["1.png"]}
    put(tmp_path / "MM/dev.jsonl", lines([row]))
    assert [r.split for r in medxpertqa.load(tmp_path, tmp_path / "out", split="dev")[0]] == ["train"]
    with pytest.raises(UserError, match="test"):
        medxpertqa.load(tmp_path, tmp_path / "out")
    row = {
        "image": "images/1.png",
        "problem": "Why? A)Cyst, B)Mass",
        "solution": "<answer> B </answer>",
        "split": "train",
    }
    put(tmp_path / "med/records.jsonl", lines([row]))
    put(tmp_path / "med/images/1.png", png(1))
    assert [r.split for r in omnimedvqa.load(tmp_path / "med", tmp_path / "out", split="train")[0]] == ["train"]


def test_a_prompt_without_an_image_is_the_text_alone(tiny: Any, tmp_path: Path) -> None:
    model, encoder = tiny
    record = Record("a", (), "Why?", PAIR, "B", ("all",), "s", "MIT", "train", "g", modality="text")
    assert validate([record], tmp_path) == ([record], [])
    prompt = encoder.prompt(record, tmp_path)
    assert prompt.images == [] and encoder.image_token_id not in prompt.input_ids
    assert "Why?" in encoder.tokenizer.decode(prompt.input_ids) and IMAGE_TOKEN not in encoder.decode(prompt.input_ids)
    batch, labels = encoder.collate([prompt], [encoder.completion("<answer>B</answer>")])
    assert "pixel_values" not in batch
    assert model(**batch, labels=labels).loss.isfinite()


def test_a_record_without_an_image_is_refused_unless_it_is_text(tmp_path: Path) -> None:
    record = Record("a", (), "Why?", PAIR, "B", ("all",), "s", "MIT", "train", "g", modality="CT")
    assert "names no image" in validate([record], tmp_path, on_bad_record="skip")[1][0][1]
