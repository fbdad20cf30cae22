"""What is no question, and how options are put in an order of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mmedexpert.curation.structure import (
    BLANK,
    EMPTY,
    FEW,
    NAMED,
    NO_GOLD,
    TWINS,
    UNREADABLE,
    report,
    shuffled,
    structure,
)
from mmedexpert.data.record import Record, Trace

FOUR = {"A": "Pneumonia", "B": "Oedema", "C": "Fibrosis", "D": "Atelectasis"}


def record(question: str = "What is shown?", options: dict | None = FOUR, answer: str = "A", **other: object) -> Record:
    values: dict = {
        "id": "x", "images": ("x.png",), "specialties": ("all",), "source": "s", "license": "CC0", "split": "train",
        "image_group": "x", "provenance": {"images": [picture(50.0)]}, **other,
    }  # fmt: skip
    return Record(question=question, options=options, answer=answer, **values)


def picture(grey_std: float) -> dict:
    return {"sha256": "0" * 64, "pixels": "0" * 64, "phash": "0" * 64, "grey_std": grey_std}


def fault(one: Record, **settings: float) -> tuple[str, str]:
    (verdict,) = structure([one], **settings)  # type: ignore[arg-type]
    assert verdict.record == one
    return verdict.reason, verdict.detail


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (record(), ""),
        (record(options=None, answer="pneumonia"), ""),
        (record(images=(), provenance={}), ""),
        (record(question=" \n"), EMPTY),
        (record(options=None, answer=" "), EMPTY),
        (record(options={**FOUR, "C": "  "}), EMPTY),
        (record(options={"A": "Pneumonia"}), FEW),
        (record(options={}), FEW),
        (record(answer="E"), NO_GOLD),
        (record(answer="Pneumonia"), NO_GOLD),
        (record(options=None, answer="B"), NO_GOLD),
        (record(provenance={}), UNREADABLE),
        (record(images=("x.png", "y.png")), UNREADABLE),
        (record(images=("x.png", "y.png"), provenance={"images": [picture(50.0), picture(1.9)]}), BLANK),
        (record(provenance={"images": [picture(2.0)]}), ""),
    ],
)
def test_what_is_no_question(one: Record, wanted: str) -> None:
    assert fault(one)[0] == wanted


def test_blank_is_a_setting_and_the_image_is_named() -> None:
    assert fault(record(provenance={"images": [picture(5.0)]}), blank=6.0) == (BLANK, "x.png: standard deviation 5")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Pleural effusion", "pleural  effusion.", True),
        ("X-ray", "x ray", True),
        ('"Oedema"', "oedema", True),
        ("Stage IIId", "Stage IIId", True),
        ("1.5 cm", "15 cm", False),
        ("<5 mm", ">5 mm", False),
        ("-5", "5", False),
        ("+", "-", False),
        ("AA", "Aa", False),
        ("T2 N0", "T2 N1", False),
        ("Left lung", "Right lung", False),
    ],
)
def test_two_options_that_say_the_same(one: str, other: str, same: bool) -> None:
    options = {"A": "Nothing at all", "B": one, "C": "A third thing", "D": other}
    assert fault(record(options=options)) == ((TWINS, "B and D") if same else ("", ""))


@pytest.mark.parametrize(
    ("question", "options", "named"),
    [
        ("A case of pneumonia: what is shown?", FOUR, True),
        ("What condition would have the diagnosis Pneumonia?", FOUR, True),
        ("Is it pneumonia or oedema?", FOUR, False),
        ("Is it pneumonia-like or pneumoniae?", {**FOUR, "A": "monia"}, False),
        ("What does oedema hide?", FOUR, False),
        ("Which structure of Figure A is it?", {"A": "A", "B": "B", "C": "C"}, False),
        ("Is there no fracture?", {"A": "No", "B": "Yes"}, False),
        ("Is this image normal?", {"A": "normal", "B": "abnormal"}, False),
        ("He had a pneumonia last year. " + "He walks a lot. " * 10 + "What is shown?", FOUR, False),
        ("He had a cold last year. " + "He walks a lot. " * 10 + "What does this pneumonia come from?", FOUR, True),
        ("What is shown?\nAnswer Choices: (A) Pneumonia", FOUR, False),
        ("A chest film. Which one fits? Prevalence of pneumonia 10%.", FOUR, False),
        ("Prevalence of oedema 10%. What is this pneumonia?", FOUR, True),
    ],
)
def test_a_question_that_names_its_answer(question: str, options: dict, named: bool) -> None:
    assert fault(record(question, options)) == ((NAMED, options["A"]) if named else ("", ""))


def test_shuffling_makes_letters_even_and_keeps_the_answer() -> None:
    given = [record(id=str(number)) for number in range(1000)]
    found = [verdict.record for verdict in structure(given, shuffle_options=True)]  # type: ignore[arg-type]
    assert all(one.options and one.options[one.answer] == "Pneumonia" for one in found)
    assert all(one.options and sorted(one.options.values()) == sorted(FOUR.values()) for one in found)
    assert all(200 < count < 300 for count in Counter(one.answer for one in found).values())
    assert len({tuple((one.options or {}).values()) for one in found}) == 24
    one = found[0]
    order = one.provenance["checks"]["structure"]["order"]
    assert list((one.options or {}).values()) == [FOUR[letter] for letter in order]
    again = [shuffled(one) for one in found]
    assert [(a.options, a.answer) for a in again] == [(a.options, a.answer) for a in found]
    turned = record(id="7", options=dict(zip("ABCD", reversed(FOUR.values()), strict=True)), answer="D")
    assert shuffled(turned).options == found[7].options  # whatever order they came in
    assert [verdict.record for verdict in structure(given)] == given  # type: ignore[arg-type]


@pytest.mark.parametrize("last", ["None of the above", "All of these.", "none", "Both of the above", "All are correct"])
def test_options_that_speak_of_others_keep_their_place(last: str) -> None:
    found = [shuffled(record(id=str(n), options={**FOUR, "D": last}, answer="ADBC"[n % 4])) for n in range(40)]
    assert {(one.options or {})["D"] for one in found} == {last}
    assert all(one.answer == "D" for one in found[1::4])
    assert len({tuple((one.options or {}).values()) for one in found}) == 6


@pytest.mark.parametrize(
    "one",
    [
        record(options={"A": "Oedema", "B": "Fibrosis", "C": "Both A and B", "D": "B or C"}),
        record(options={"A": "5 mm", "B": "1,000 mm", "C": "2,000.5 mm"}),
        record(options={"A": "C7", "B": "C6", "C": "C5"}),
        record(question="Why is option B wrong?"),
        record(question="What is shown?\nAnswer Choices: (A) Pneumonia (B) Oedema"),
        record(trace=Trace("p", ("The first option fits.",))),
        record(options=None, answer="pneumonia"),
    ],
)
def test_options_whose_order_has_a_meaning_stay(one: Record) -> None:
    assert all(shuffled(replace(one, id=str(number))) == replace(one, id=str(number)) for number in range(20))


def test_numbers_out_of_order_and_figures_named_are_free() -> None:
    for one in (
        record(options={"A": "5 mm", "B": "1,000 mm", "C": "20 mm"}),
        record(question="Figures A and B are given. What is shown?"),
        record(options={"A": "Both lungs", "B": "No fracture", "C": "All four lobes"}),
    ):
        texts = {tuple((shuffled(replace(one, id=str(number))).options or {}).values()) for number in range(60)}
        assert len(texts) > 5


def test_report_tells_how_often_each_letter_is_right() -> None:
    before = [record(answer=letter) for letter in "AAAB"] + [record(options=None, answer="yes"), record(answer="Z")]
    rows = report(before, [record(options={"A": "x", "B": "y"}, answer="B")], blank=3.0)
    assert rows[0]["value"] == 3.0
    assert rows[1] == {"letters": "before", "options": 4, "records": 4, "right": {"A": 0.75, "B": 0.25}}
    assert rows[2] == {"letters": "after", "options": 2, "records": 1, "right": {"B": 1.0}}


def test_labels_of_their_own_go_before_options_are_shuffled() -> None:
    """As PMC-VQA has them: a label that stays with its text would name another letter."""
    labelled = {letter: f" {letter}:{text}" for letter, text in FOUR.items()}
    for number in range(20):
        found, bare = (shuffled(record(id=str(number), options=one, answer="C")) for one in (labelled, FOUR))
        assert sorted(found.options.values()) == sorted(FOUR.values())
        assert found.options[found.answer] == FOUR["C"] == bare.options[bare.answer]
    some = {**labelled, "B": "Oedema"}  # not of all: a part of the texts
    assert sorted(shuffled(record(options=some)).options.values()) == sorted(some.values())
