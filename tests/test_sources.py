"""Data sources: labelled image folders and Med-R1's records, on small fixtures and on real subsets where present."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedexpert.data.images import open_image
from mmedexpert.data.record import Record
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.sources.labelled import _who, labelled_images
from mmedexpert.sources.medr1 import gold_letter, medr1, parse_problem, parse_solution

SHARED = Path(os.environ.get("MMEDEXPERT_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real records at {SHARED} (set MMEDEXPERT_SHARED)")
OWN = {"specialties": ["pediatrics"], "distractors": ["Fracture", "Cyst", "Mass"]}


def noise(path: Path, seed: int, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def image_set(folder: Path, rows: list[dict[str, str]], about: dict | None = None) -> Path:
    """A labelled folder with one noise image per row (those that name no `seed` get one of their own)."""
    for number, row in enumerate(rows):
        noise(folder / row["file"], int(row.pop("seed", number)))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if about is not None:
        (folder / "dataset.yaml").write_text(json.dumps(about))  # JSON is YAML
    return folder


def rows_of(count: int, **more: str) -> list[dict[str, str]]:
    two = [("yes", "gone"), ("no", "here")]
    return [{"file": f"{two[n % 2][0]}/{n}.png", "label": two[n % 2][1], **more} for n in range(count)]


def assert_no_leak(records: list[Record]) -> None:
    for key in ("image_group", "images"):
        splits: dict[object, set[str]] = {}
        for record in records:
            splits.setdefault(getattr(record, key), set()).add(record.split)
        assert max(len(found) for found in splits.values()) == 1


# labelled image folders


def test_an_own_set_becomes_four_option_questions(tmp_path: Path) -> None:
    root = image_set(tmp_path / "mine", rows_of(20, age="8", sex="Female"), OWN)
    records, image_root, bad = labelled_images(root, tmp_path / "out", seed=0, questions_per_image=2)
    assert validate(records, image_root, bad=bad) == (records, [])
    assert len(records) == 40
    assert len({record.question for record in records}) == 3
    for record in records:
        assert list(record.options or {}) == list("ABCD")
        assert len({*(record.options or {}).values(), "gone", "here"}) == 4
        assert "of a female patient aged 8" in record.question
        assert record.specialties == ("pediatrics",)
        assert re.fullmatch(r"images/[0-9a-f]{24}\.png", record.images[0])
    assert {record.split for record in records} == {"train", "val", "test"}
    assert_no_leak(records)
    assert labelled_images(root, tmp_path / "out", seed=0, questions_per_image=2)[0] == records
    others = labelled_images(root, tmp_path / "out", seed=1, questions_per_image=2)[0]
    assert [record.answer for record in others] != [record.answer for record in records]


def test_the_answer_is_the_label_of_the_image(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    rows = rows_of(12)
    label_of = {row["file"]: row["label"] for row in rows}
    image_set(root, rows, OWN)
    records, image_root, _ = labelled_images(root, tmp_path / "out", seed=0)
    pixels = {np.asarray(open_image(root / file)).tobytes(): label for file, label in label_of.items()}
    for record in records:
        gold = pixels[np.asarray(open_image(image_root / record.images[0])).tobytes()]
        assert (record.options or {})[record.answer] == gold


def test_labels_are_texts_even_where_yaml_has_other_ideas(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.png", "label": ("no", "0", "null", "1e3")[n % 4]} for n in range(8)]
    root = image_set(tmp_path / "mine", rows)
    (root / "dataset.yaml").write_text("specialties: [x]\nlabels: {no: First, 0: Second, null: Third, 1e3: Fourth}\n")
    records, _, bad = labelled_images(root, tmp_path / "out", seed=0)
    assert bad == []
    assert Counter((one.options or {})[one.answer] for one in records) == dict.fromkeys(
        ("First", "Second", "Third", "Fourth"), 2
    )


def test_copies_are_cropped_and_limited(tmp_path: Path) -> None:
    root = image_set(tmp_path / "mine", rows_of(2), {**OWN, "crop": [0.0, 0.25, 0.5, 1.0]})
    records, out, _ = labelled_images(root, tmp_path / "out", seed=0)
    assert {open_image(out / record.images[0]).size for record in records} == {(12, 12)}
    source = np.asarray(open_image(root / "yes/0.png"))[4:, :12]
    assert any(np.array_equal(np.asarray(open_image(out / record.images[0])), source) for record in records)
    smaller, out, _ = labelled_images(root, tmp_path / "out", seed=0, max_side=6)
    assert {open_image(out / record.images[0]).size for record in smaller} == {(6, 6)}


def test_equal_bytes_are_one_image_and_patients_stay_together(tmp_path: Path) -> None:
    rows = [{**row, "patient": f"p{n // 3}", "seed": str(n)} for n, row in enumerate(rows_of(30))]
    rows.append({"file": "yes/copy.png", "label": "gone", "patient": "p9", "seed": "0"})  # joins p0 and p9
    root = image_set(tmp_path / "mine", rows, OWN)
    records, _, bad = labelled_images(root, tmp_path / "out", seed=3)
    assert (len(records), bad) == (30, [])
    assert len({record.image_group for record in records}) == 9
    assert bad.changed["rows: an equal file, asked once"] == 1
    assert_no_leak(records)


def test_bad_rows_are_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    rows = [*rows_of(6), {"file": "x/twin.png", "label": "here", "seed": "0"}, {"file": "x/cut.png", "label": "gone"}]
    rows += [{"file": f"x/{name}.png", "label": label} for name, label in (("odd", "other"), ("absent", "here"))]
    about = {**OWN, "labels": {"gone": "Gone", "here": "Here"}}
    root = image_set(tmp_path / "mine", rows, about)
    (root / "x/absent.png").unlink()
    (root / "x/cut.png").write_bytes((root / "x/cut.png").read_bytes()[:300])
    with (root / "labels.csv").open("a") as file:
        file.write("../outside.png,here\n")
    records, _, bad = labelled_images(root, tmp_path / "out", seed=0)
    assert len(records) == 5
    reasons = dict(bad)
    assert set(reasons) == {f"mine/{file}" for file in (
        "yes/0.png", "x/twin.png", "x/cut.png", "x/odd.png", "x/absent.png", "../outside.png"
    )}  # fmt: skip
    assert "labelled gone and here" in reasons["mine/x/twin.png"]
    assert "truncated" in reasons["mine/x/cut.png"]
    assert "'other'" in reasons["mine/x/odd.png"]


def truth(record: Record) -> str:
    return (record.options or {})[record.answer]


def wrong(record: Record) -> set[str]:
    return {text for letter, text in (record.options or {}).items() if letter != record.answer}


def test_a_label_in_several_spellings_is_one_class(tmp_path: Path) -> None:
    names = [
        "Pneumonia",
        "pneumonia",
        "PNEUMONIA ",
        "Pneumonia",
        "no_finding",
        "No Finding",
        "No-Finding",
        "No Finding",
    ]
    names += ["effusion", "lung mass", "Lung_mass"]
    rows = [{"file": f"{n}.png", "label": names[n % 11]} for n in range(44)]
    root = image_set(tmp_path / "chest", rows, {"specialties": ["x"]})
    records, image_root, bad = labelled_images(root, tmp_path / "out", seed=0)
    records, left = validate(records, image_root, bad=bad)
    shown = {"Pneumonia", "No Finding", "effusion", "lung mass"}  # the commonest, the first of two as common
    assert len(records) == 44 and not left
    assert all({*(record.options or {}).values()} == shown for record in records)
    assert Counter(map(truth, records)) == {"Pneumonia": 16, "No Finding": 16, "effusion": 4, "lung mass": 8}
    assert left.changed == {"labels: another spelling, folded": 4 * 5}


def test_declared_labels_are_found_in_any_spelling_and_codes_stay_apart(tmp_path: Path) -> None:
    codes = ["MEL", "mel ", "n", "N", "other_1", "Other-1"]
    rows = [{"file": f"{n}.png", "label": codes[n % 6]} for n in range(12)]
    labels = {"mel": "Melanoma", "n": "Naevus", "N": "Normal skin", "other_1": "Other"}
    root = image_set(tmp_path / "skin", rows, {"specialties": ["x"], "labels": labels})
    records, _, bad = labelled_images(root, tmp_path / "out", seed=0)
    assert not bad and Counter(map(truth, records)) == {"Melanoma": 4, "Naevus": 2, "Normal skin": 2, "Other": 4}


def test_of_several_findings_in_a_cell_one_is_asked_and_no_other_offered(tmp_path: Path) -> None:
    names = [
        "Effusion|Mass",
        "Effusion",
        "mass",
        "No Finding",
        "Nodule; effusion",
        "Nodule",
        "Mass, Nodule",
        "Fibrosis",
    ]
    names += ["Hernia", "Pneumonia, bacterial", "Pneumonia"]
    true = [{part.casefold() for part in re.split(r"[|;]\s*", name)} for name in names]
    true[6] = {"mass", "nodule"}
    rows = [{"file": f"{n}.png", "label": names[n % 11]} for n in range(33)]
    root = image_set(tmp_path / "nih", rows, {"specialties": ["x"]})
    of = {np.asarray(open_image(root / row["file"])).tobytes(): n % 11 for n, row in enumerate(rows)}
    records, out, bad = labelled_images(root, tmp_path / "out", seed=0, questions_per_image=2)
    assert len(records) == 66 and bad == []
    asked: dict[int, set[str]] = {}
    for record in records:
        number = of[np.asarray(open_image(out / record.images[0])).tobytes()]
        asked.setdefault(number, set()).add(truth(record).casefold())
        assert truth(record).casefold() in true[number]
        assert not {text.casefold() for text in wrong(record)} & true[number]
        # nor what is a part of the label, or of what it is a part
        assert number not in (9, 10) or not wrong(record) & {"Pneumonia", "Pneumonia, bacterial"}
    assert asked == dict(enumerate(true))  # both questions on an image together ask for both findings
    assert bad.changed["labels: several findings, one of them asked"] == 9


def test_too_few_options_are_left_where_most_is_true(tmp_path: Path) -> None:
    names = ["a lesion|b lesion", "a lesion", "b lesion", "c lesion", "d lesion"]
    rows = [{"file": f"{n}.png", "label": names[n]} for n in range(5)]
    records, _, bad = labelled_images(
        image_set(tmp_path / "few", rows, {"specialties": ["x"]}), tmp_path / "out", seed=0
    )
    assert len(records) == 4 and [reason for _, reason in bad] == ["fewer than 4 options are left for few/0.png"]


@pytest.mark.parametrize("cell", ["", "nan", "N/A", "Unknown", "?", "-"])
def test_a_cell_that_names_no_label_is_left_out(tmp_path: Path, cell: str) -> None:
    rows = [*rows_of(4), {"file": "x/9.png", "label": cell}]
    records, _, bad = labelled_images(image_set(tmp_path / "mine", rows, OWN), tmp_path / "out", seed=0)
    assert len(records) == 4 and [name for name, _ in bad] == ["mine/x/9.png"]
    assert not any(cell in (record.options or {}).values() for record in records)


def test_a_distractor_is_never_a_label_of_the_set(tmp_path: Path) -> None:
    about = {**OWN, "distractors": ["Gone", "HERE", "Cyst", "cyst", "Mass"], "also_column": "note"}
    rows = rows_of(8, note="also here, surely")
    root = image_set(tmp_path / "mine", rows, {**about, "distractors": [*about["distractors"], "Fracture"]})
    records, _, _ = labelled_images(root, tmp_path / "out", seed=0)
    for record in records:
        folded = [text.casefold() for text in (record.options or {}).values()]
        assert len({*folded}) == 4 and "Gone" not in wrong(record) and "HERE" not in wrong(record)
    with pytest.raises(UserError, match="also_patterns has ghost, which is no label"):
        labelled_images(
            image_set(tmp_path / "odd", rows_of(2), {**OWN, "also_patterns": {"ghost": "x"}}), tmp_path / "o", seed=0
        )


@pytest.mark.parametrize(
    "nobody", ["unknown", "Unknown", "NaN", "n/a", "none", "-", "0", "?", "Anonymous", "-1", "999"]
)
def test_a_patient_that_is_nobody_joins_nothing(tmp_path: Path, nobody: str) -> None:
    rows = [{**row, "Patient ID": nobody if n % 3 else f"p{n // 6}"} for n, row in enumerate(rows_of(30))]
    records, _, bad = labelled_images(image_set(tmp_path / "mine", rows, OWN), tmp_path / "out", seed=0)
    groups = Counter(record.image_group for record in records)
    assert len(records) == 30 and sorted(groups.values()) == [1] * 20 + [2] * 5
    assert bad.changed == {"rows whose patient or lesion is unknown: grouped by image alone": 20}
    assert_no_leak(records)


def test_patient_zero_is_a_patient_and_one_on_most_rows_is_told(tmp_path: Path) -> None:
    rows = [{**row, "patient_id": str(n // 5), "seed": str(n)} for n, row in enumerate(rows_of(30))]
    records, _, bad = labelled_images(image_set(tmp_path / "mine", rows, OWN), tmp_path / "out", seed=0)
    assert {*Counter(record.image_group for record in records).values()} == {5} and not bad.changed
    rows = [{**row, "patient": "P7" if n < 20 else f"{n}"} for n, row in enumerate(rows_of(30))]
    rows[3]["patient"] = "p7"  # the same person
    records, _, bad = labelled_images(image_set(tmp_path / "most", rows, OWN), tmp_path / "out", seed=0)
    assert max(Counter(record.image_group for record in records).values()) == 20
    assert bad.changed == {"rows of one patient or lesion, more than half of a set: all in one split": 20}


def test_patient_and_lesion_both_keep_rows_together(tmp_path: Path) -> None:
    people = [("1", "9"), ("unknown", "9"), ("9", "8"), ("1", "7"), ("unknown", ""), ("", "")]
    rows = [{**row, "patient": p, "lesion_id": q} for row, (p, q) in zip(rows_of(6), people, strict=True)]
    records, _, _ = labelled_images(image_set(tmp_path / "mine", rows, OWN), tmp_path / "out", seed=0)
    assert sorted(Counter(record.image_group for record in records).values()) == [1, 1, 1, 3]


def test_a_pattern_without_a_patient_joins_nothing(tmp_path: Path) -> None:
    rows = [{"file": f"{'p' * (n % 2)}{n // 4}_{n}.png", "label": ("gone", "here")[n % 2]} for n in range(12)]
    root = image_set(tmp_path / "mine", rows, {**OWN, "patient_pattern": r"^(p\d+)?"})
    records, _, _ = labelled_images(root, tmp_path / "out", seed=0)
    assert sorted(Counter(record.image_group for record in records).values()) == [1] * 6 + [2] * 3
    root = image_set(tmp_path / "odd", rows_of(2), {**OWN, "patient_pattern": r"^p\d+"})
    with pytest.raises(UserError, match="needs a group"):
        labelled_images(root, tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    ("cells", "told"),
    [({"age": "60", "sex": "F"}, "a female patient aged 60"), ({"age": "1.9", "sex": "M"}, "a male patient aged 1"),
     ({"age": "060Y", "sex": "unknown"}, "a patient aged 60"), ({"age": "18 months"}, "a patient aged 18 months"),
     ({"age": "018M"}, "a patient aged 18 months"), ({"age": "0"}, "a patient"), ({"age": "nan"}, "a patient"),
     ({"age": "003W"}, "a patient"), ({"age": "999"}, "a patient"), ({}, "a patient")],
)  # fmt: skip
def test_sex_and_age_are_told_where_they_can_be_read(cells: dict[str, str], told: str) -> None:
    assert _who(cells, "patient") == told


def table(folder: Path, text: str, encoding: str = "utf-8") -> tuple[list[Record], Any]:
    image_set(folder, rows_of(4), OWN)
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    records, _, bad = labelled_images(folder, folder.parent / "out", seed=0)
    return records, bad


def test_tables_as_people_write_them(tmp_path: Path) -> None:
    plain, bad = table(tmp_path / "a", "file,label\nyes/0.png,gone\nno/1.png,here\n")
    assert len(plain) == 2 and not bad
    for number, (text, encoding) in enumerate(
        [("File;Label\r\nyes/0.png;gone \r\n\r\nno/1.png; here\r\n", "utf-8-sig"),
         ("label\tfile\t\ngone\tyes/0.png\t\nhere\tno/1.png\t\n", "utf-8")]
    ):  # fmt: skip
        found, bad = table(tmp_path / f"b{number}", text, encoding)
        assert [truth(one) for one in found] == [truth(one) for one in plain] and not bad

    # an unquoted comma moves the rest of its row, and a name that stands twice hides a column: neither is guessed
    found, bad = table(tmp_path / "c", "file,label,sex\nyes/0.png,gone, mild,male\nno/1.png,here,male\n")
    assert len(found) == 1 and bad[0][0] == "c/labels.csv line 2" and "4 cells and the header 3" in bad[0][1]
    with pytest.raises(UserError, match="names the column label twice"):
        table(tmp_path / "d", "file,label,label\nyes/0.png,gone,here\n")
    with pytest.raises(UserError, match="cannot be read as CSV in UTF-8"):
        table(tmp_path / "e", "file,label\nyes/0.png,gone\n", "utf-16")


def test_pictures_of_a_set_are_checked_as_they_will_be_seen(tmp_path: Path) -> None:
    """Also after crop and size limit; and what reading them changed is counted once an image."""
    rows = rows_of(6)
    root = image_set(tmp_path / "mine", rows, {**OWN, "crop": [0.0, 0.0, 1.0, 0.25]})
    noise(root / "yes/0.png", 0, (800, 10))  # after the crop 800 x 2
    noise(root / "no/1.png", 1, (30, 1))  # after the crop empty
    deep = np.random.default_rng(2).integers(0, 4096, (40, 40)).astype(np.uint16)
    Image.fromarray(deep).save(root / "yes/2.png")
    records, image_root, bad = labelled_images(root, tmp_path / "out", seed=0)
    assert [name for name, _ in bad] == ["mine/yes/0.png", "mine/no/1.png"]
    assert "cropped, has 448 x 1 pixels" in bad[0][1] or "cropped, has 800 x 2 pixels" in bad[0][1]
    records, left = validate(records, image_root, bad=bad, on_bad_record="skip")
    assert len(records) == 4 and left.changed == {"images: deep grey, scaled by its bit depth": 1}
    again, _, bad = labelled_images(root, tmp_path / "out", seed=0)  # after a kill: the copies are there
    assert again == records and bad.changed == left.changed


def test_what_is_also_true_is_no_wrong_option(tmp_path: Path) -> None:
    seen = "suspected glaucoma, cataract"
    rows = [{"file": f"{n}_left.png", "label": "NDGCAHMO"[n % 8], "keywords": seen} for n in range(24)]
    records, _, bad = labelled_images(image_set(tmp_path / "fundus", rows), tmp_path / "out", seed=0)
    assert len(records) == 24
    assert not bad
    for record in records:
        wrong = {text for letter, text in (record.options or {}).items() if letter != record.answer}
        assert not wrong & {"Glaucoma", "Cataract"}


@pytest.mark.parametrize(
    ("about", "told"),
    [
        (None, "none of the known sets"),
        ({"specialties": ["pediatrics"]}, "fewer than 4 labels"),
        ({"specialties": "pediatrics"}, "are lists"),
        ({**OWN, "speciality": "x"}, "speciality"),
        ({**OWN, "labels": ["gone", "here"]}, "map a label to a text"),
        ({**OWN, "crop": ["left", 0, 1, 1]}, "could not convert"),
        ({**OWN, "crop": [0.5, 0, 0.2, 1]}, "crop"),
        ({**OWN, "label_column": "finding"}, "lacks the column finding"),
    ],
)
def test_a_set_that_cannot_be_asked_about_says_what_to_write(tmp_path: Path, about: dict | None, told: str) -> None:
    root = image_set(tmp_path / "mine", rows_of(2), about)
    with pytest.raises(UserError, match=told) as caught:
        labelled_images(root, tmp_path / "out", seed=0)
    assert "mine" in str(caught.value)


def test_folders_without_labels_are_named(tmp_path: Path) -> None:
    image_set(tmp_path / "sets/mine", rows_of(2), OWN)
    (tmp_path / "sets/other").mkdir()
    for root, told in (("sets", "other has no labels.csv"), ("sets/other", "neither"), ("absent", "not a folder")):
        with pytest.raises(UserError, match=told):
            labelled_images(tmp_path / root, tmp_path / "out", seed=0)


# Med-R1


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("Stage? A)Mass of the lobe, T2 N0 M0, Stage Ib, B)Cyst, C)None., D)GIST (T1)", 4),
        ("Normal? A)No., B)Yes", 2),
        ("Which?\nA) one\nB) two\nC) three", 3),
        ("Which? A. one B. two C. three D. four", 4),
        ("Which? A: one, B: two", 2),
        ("<image>Which? (A) vitamin B) or K (B) iron (C) zinc", 3),
        ("Is it COPD (A)? A)COPD (chronic), B)Asthma, C)Both", 3),
        ("Which? A)Hepatitis A), B)Vitamin (B) lack, C)T1 N0, M0", 3),
    ],
)
def test_options_are_found(problem: str, expected: int) -> None:
    question, options = parse_problem(problem)
    assert list(options) == list("ABCDEFGH"[:expected])
    assert question.endswith("?")
    assert not question.startswith("<")
    assert not any(text.endswith(",") for text in options.values())


words = st.from_regex(r"[a-z][a-z ]{0,8}[a-z](, [TNM][0-9]){0,3}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(words, st.lists(words, min_size=2, max_size=5))
def test_published_form_is_read_back(question: str, texts: list[str]) -> None:
    options = dict(zip("ABCDE", texts, strict=False))
    problem = f"{question}? " + ", ".join(f"{letter}){text}" for letter, text in options.items())
    assert parse_problem(problem) == (f"{question}?", options)


def test_solutions_are_read_or_refused() -> None:
    for solution in ("<answer> D </answer>", "D", "d)", "<think>A or B</think>\n<answer>(D) Mass</answer>"):
        assert parse_solution(solution) == "D"
    for solution in ("", "Mass", "<answer> </answer>", "<answer>Mass</answer>", "<answer>A mass</answer>", "A or B"):
        with pytest.raises(ValueError, match="solution"):
            parse_solution(solution)
    with pytest.raises(ValueError, match="no options"):
        parse_problem("What is this?")
    with pytest.raises(ValueError, match="empty option"):
        parse_problem("What is this? A), B)Mass")


OPTIONS = {"A": "Lung mass", "B": "Cyst.", "C": "No lung mass", "D": "T1 N0"}


@pytest.mark.parametrize(
    ("solution", "letter"),
    [("<answer> B </answer>", "B"), ("<answer>b) cyst</answer>", "B"), ("<answer>A: Lung Mass.</answer>", "A"),
     ("<answer>D) T1 N0, stage I</answer>", "D"), ("<answer>A</answer> so <answer>A</answer>", "A"),
     ("<answer>B) Lung mass</answer>", None), ("<answer>C) Lung mass</answer>", None), ("<answer>E</answer>", None),
     ("<answer>A</answer> or <answer>B</answer>", None), ("<answer>A) a stone</answer>", None)],
)  # fmt: skip
def test_a_solution_goes_with_its_option(solution: str, letter: str | None) -> None:
    if letter:
        assert gold_letter(solution, OPTIONS) == letter
    else:
        with pytest.raises(ValueError, match=r"says|letters|none of the options"):
            gold_letter(solution, OPTIONS)


def medr1_rows(root: Path, count: int) -> list[dict[str, str]]:
    for number in range(count):
        noise(root / f"Images/MIAS/{number}.png", number // 2)  # every two files hold the same bytes
    asked = {"problem": "What is it? A)Mass, left, B)Cyst", "solution": "<answer> B </answer>"}
    return [{"image": f"Images/MIAS/{n}.png", **asked} for n in range(count)]


def test_medr1_splits_by_content_and_reads_splits_or_records(tmp_path: Path) -> None:
    rows = medr1_rows(tmp_path, 20)
    (tmp_path / "Splits/modality").mkdir(parents=True)
    (tmp_path / "Splits/modality/CT_train.json").write_text(json.dumps(rows[:12]))
    (tmp_path / "Splits/modality/CT_test.json").write_text(json.dumps(rows[8:]))  # four are listed again
    (tmp_path / "dataset.json").write_text("{}")
    records, root, bad = medr1(tmp_path, None, seed=0)
    assert validate(records, root, bad=bad) == (records, [])
    assert len(records) == 20
    assert len({record.image_group for record in records}) == 10
    assert Counter(record.split for record in records) == {"train": 14, "test": 4, "val": 2}
    assert_no_leak(records)
    assert {record.specialties for record in records} == {("oncology_surgery",)}
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {record.id: record for record in medr1(tmp_path, None, seed=0)[0]} == {
        record.id: record for record in records
    }


def test_medr1_keeps_a_child_of_several_data_sets_in_one_split(tmp_path: Path) -> None:
    rows = medr1_rows(tmp_path, 12)
    for number, row in enumerate(rows):
        folder = ("CoronaHack", "OCT & X-Ray 2017")[number % 2]
        row["image"] = f"Images/{folder}/person{number // 2}_virus_{number}.png"
        noise(tmp_path / row["image"], number)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _, _ = medr1(tmp_path, None, seed=0)
    assert {record.image_group for record in records} == {f"cxr_pediatric:person{number}" for number in range(6)}
    assert_no_leak(records)


def test_medr1_reports_what_it_cannot_use(tmp_path: Path) -> None:
    first, *rows = medr1_rows(tmp_path, 8)
    changes: list[dict[str, Any]] = [{"problem": "What?"}, {"solution": "?"}, {"solution": "C"}]
    changes += [{"image": "Images/MIAS/no.png"}, {"image": "/etc/x.png"}, {"problem": 3}]
    changes += [{"image": "Images/New/7.png", "modality": "PET"}]
    noise(tmp_path / "Images/New/7.png", 99)
    rows = [{**row, **change} for row, change in zip(rows, changes, strict=True)]
    twice = {**first, "problem": "Which? A)Mass, B)Cyst"}
    rows += [first, twice, {**twice, "solution": "<answer> A </answer>"}]
    (tmp_path / "records.jsonl").write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in rows))
    records, _, bad = medr1(tmp_path, None, seed=0)
    assert [record.question for record in records] == ["What is it?"]
    parts = ["not JSON", "no options", "no <answer>", "answer C", "no.png", "absolute", "no specialty"]
    for part in (*parts, "needs the texts", "another answer"):
        assert sum(part in reason for _, reason in bad) == 1, part
    assert len(bad) == 9
    (tmp_path / "empty").mkdir()
    for root, part in (("empty", "no records"), ("absent", "not a folder")):
        with pytest.raises(UserError, match=part):
            medr1(tmp_path / root, None, seed=0)


# real records


@pytest.mark.slow
@needs_shared
def test_real_labelled_sets(tmp_path: Path) -> None:
    records, root, bad = labelled_images(SHARED / "labelled", tmp_path, seed=0)
    assert validate(records, root, bad=bad, check_images=False) == (records, [])
    assert len(records) > 1200
    found = Counter((specialty, record.split) for record in records for specialty in record.specialties)
    for specialty in ("adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery", "cardiology"):
        assert min(found[specialty, split] for split in ("train", "val", "test")) >= 8
    assert_no_leak(records)
    share = Counter(record.answer for record in records)
    assert all(0.2 < share[letter] / len(records) < 0.3 for letter in "ABCD")
    for record in records:
        assert len(set((record.options or {}).values())) == 4
        assert not any(text.lower() in record.question.lower() for text in (record.options or {}).values())
        assert not re.search(r"[/_\\{]|\.(jpe?g|png)", record.question + " ".join((record.options or {}).values()))
    ecg = [record for record in records if "cardiology" in record.specialties]
    assert {open_image(root / record.images[0]).size for record in ecg} == {(428, 251)}  # header and footer are gone


@needs_shared
def test_real_medr1_records() -> None:
    records, root, bad = medr1(SHARED / "omnimedvqa", None, seed=0)
    assert (len(records), bad) == (1537, [])
    assert validate(records, root, check_images=False) == (records, [])
    assert_no_leak(records)
    lines = (SHARED / "omnimedvqa/records.jsonl").read_text(encoding="utf-8").splitlines()
    for line, record in zip(map(json.loads, lines), records, strict=True):
        options = ", ".join(f"{letter}){text}" for letter, text in (record.options or {}).items())
        assert f"{record.question} {options}" == line["problem"]
        assert f"<answer> {record.answer} </answer>" == line["solution"]
        assert record.specialties == (line["specialty"],)


@pytest.mark.slow
def test_what_was_changed_is_told_and_stands_in_the_manifest(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.png", "label": ["gone", "Gone", "here|gone"][n % 3], "patient": "n/a"} for n in range(24)]
    root = image_set(tmp_path / "mine", rows, {**OWN, "distractors": ["Fracture", "Cyst", "Mass"]})
    deep = np.random.default_rng(2).integers(0, 4096, (40, 40)).astype(np.uint16)
    Image.fromarray(deep).save(root / "0.png")
    done = run(tmp_path / "out", "stage=data", "data=labelled_images", f"data.root={root}", "data.limit=null")
    (manifest,) = (json.loads(path.read_text()) for path in (tmp_path / "out/data").glob("*/manifest.json"))
    assert manifest["changed"] == {
        "images: deep grey, scaled by its bit depth": 1,
        "labels: another spelling, folded": 8,
        "labels: several findings, one of them asked": 8,
        "rows whose patient or lesion is unknown: grouped by image alone": 24,
    }
    assert "labelled_images: 8 labels: several findings, one of them asked" in done.stderr
