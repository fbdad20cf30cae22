"""What drops a record as part of a benchmark: its images, passages of its question, the question as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedexpert.curation import decontaminate as module
from mmedexpert.curation.decontaminate import IMAGE, NEAR, PASSAGE, Benchmarks, decontaminate
from mmedexpert.curation.steps import Verdict, write_step
from mmedexpert.data.record import Record

CASE = (
    "A retired sailor of 71 years describes tingling in both feet since he moved into a painted farmhouse last spring. "
    "His gums show a dark line, his wrist drops when he lifts a cup, and a smear of his blood holds red cells with "
    "fine blue dots. Which metal should be looked for first?"
)
PHRASES = "Which of the following is the most likely diagnosis in this patient based on the image that is shown here?"


def picture(seed: int, flip: int = 0, grey_std: float = 50.0) -> dict:
    bits = np.zeros(256, np.uint8)
    order = np.random.default_rng(seed).permutation(256)
    bits[order[:128]] = 1
    bits[order[: flip // 2]] = 0
    bits[order[128 : 128 + flip // 2]] = 1
    name = f"{1000 * seed + flip:064x}"
    return {"sha256": name, "pixels": name, "phash": np.packbits(bits).tobytes().hex(), "grey_std": grey_std}


def record(name: str, question: str, pictures: Sequence[dict] = (), options: dict | None = None) -> Record:
    return Record(
        id=name, images=tuple(f"{name}-{place}.png" for place in range(len(pictures))), question=question,
        options=options, answer="A" if options else "yes", specialties=("all",), source="s", license="CC0",
        split="train", image_group=name, provenance={"source": "s", "images": list(pictures)},
    )  # fmt: skip


def verdicts(tmp_path: Path, records: Sequence[Record], benchmarks: Benchmarks) -> dict[str, Verdict]:
    given = write_step("in", map(Verdict, records), tmp_path, tmp_path, given=None)
    found = list(decontaminate(given, benchmarks=benchmarks))
    assert [verdict.record for verdict in found] == list(given)
    return {verdict.record.id: verdict for verdict in found}


def reason(question: str | Record, benchmarks: Benchmarks) -> str:
    asked = record("x", question) if isinstance(question, str) else question
    (verdict,) = decontaminate([asked], benchmarks=benchmarks)  # type: ignore[arg-type]
    return verdict.reason


def test_an_image_of_a_benchmark_drops_whatever_is_asked(tmp_path: Path) -> None:
    benchmarks = Benchmarks([("bench", [record("t1", "Is it normal?", [picture(1)])], None)])
    found = verdicts(tmp_path, [
        record("same", "Which plane is this?", [picture(1)]),
        record("near", "Is it normal?", [picture(1, 8)]),
        record("far", "Is it normal?", [picture(1, 10)]),
        record("second", "Is it normal?", [picture(7), picture(1, 4)]),
        record("flat", "Is it normal?", [picture(1, 2, grey_std=1.0)]),
        record("text", "Is it normal?"),
    ], benchmarks)  # fmt: skip
    assert {name for name, verdict in found.items() if verdict.reason == IMAGE} == {"same", "near", "second"}
    assert found["same"].detail == "bench t1: same pixels"
    assert found["near"].detail == "bench t1: 8 of 256 bits apart (limit 8)"
    assert reason(record("x", "?", [picture(1, 8)]), Benchmarks([("b", [record("t", "?", [picture(1)])], None)],
                  max_distance=6)) == ""  # fmt: skip


def test_images_of_a_benchmark_are_read_from_its_folder_and_missing_ones_told(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((96, 96)).save(tmp_path / "t-0.png")
    plain = replace(record("t", "Is it normal?", [picture(1)]), provenance={})
    absent = replace(record("u", "Is it normal?", [picture(1)]), provenance={})
    benchmarks = Benchmarks([("bench", [plain, absent], tmp_path), ("no folder", [plain], None)], tmp_path / "cache")
    (seen,) = benchmarks.pictures
    shown = {"pixels": "0" * 64, "phash": seen.phash, "grey_std": seen.grey_std}
    assert reason(record("x", "What is this?", [shown]), benchmarks) == IMAGE
    rows = {row["benchmark"]: row for row in benchmarks.report() if "benchmark" in row}
    missing = "images that cannot be read (text alone is compared)"
    assert (rows["bench"]["images"], rows["bench"][missing]) == (1, 1)
    assert (rows["no folder"]["images"], rows["no folder"][missing]) == (0, 1)


def test_a_question_copied_cut_or_wrapped_is_found_and_another_case_is_not() -> None:
    benchmarks = Benchmarks([("bench", [record("t1", CASE, [picture(1)])], None)])
    words = CASE.split()
    half, wrapped = (
        " ".join(words[: len(words) // 2]),
        f"Think about this case step by step. {CASE} Explain your choice.",
    )
    passage = PASSAGE.format(8)
    assert [reason(text, benchmarks) for text in (CASE, CASE.upper(), half, wrapped)] == [passage] * 4
    # one passage of many words is a phrase that any case may hold
    other = (
        " ".join(words[:9]) + " the loss of his job, and a rash that came with fever after a walk in the woods in May."
    )
    assert reason(other, benchmarks) == ""
    strict = Benchmarks([("bench", [record("t1", CASE, [picture(1)])], None)], min_share=0.0)
    assert reason(other, strict) == passage
    (verdict,) = decontaminate([record("x", half)], benchmarks=benchmarks)  # type: ignore[arg-type]
    assert verdict.detail == "bench t1: shares 100% of the passages"


def test_a_reworded_question_is_near_same() -> None:
    words = CASE.split()
    words[4::7] = [f"{word}x" for word in words[4::7]]  # no eight words in a row are left
    benchmarks = Benchmarks([("bench", [record("t1", CASE)], None)])
    assert reason(" ".join(words), benchmarks) == NEAR
    (verdict,) = decontaminate([record("x", " ".join(words))], benchmarks=benchmarks)  # type: ignore[arg-type]
    assert verdict.detail.startswith("bench t1: Jaccard 0.") and "at least 0.5 and 0.9" in verdict.detail
    for limit in ({"min_jaccard": 0.95}, {"min_ratio": 0.999}):
        assert reason(" ".join(words), Benchmarks([("bench", [record("t1", CASE)], None)], **limit)) == ""
    words[::2] = ["x"] * len(words[::2])
    assert reason(" ".join(words), benchmarks) == ""


def test_short_questions_on_images_are_told_by_the_image_alone() -> None:
    asked = "What modality is used to take this image?"
    benchmarks = Benchmarks([("bench", [record("t1", asked, [picture(1)])], None)])
    assert reason(record("x", asked, [picture(2)]), benchmarks) == ""
    assert reason(record("x", asked, [picture(1)]), benchmarks) == IMAGE
    assert reason(record("x", asked, [picture(2)]), Benchmarks([("b", [record("t1", asked, [picture(1)])], None)],
                  min_words=8)) == PASSAGE.format(8)  # fmt: skip


def test_short_questions_without_images_are_told_with_their_options() -> None:
    options = {"A": "Carbamazepine", "B": "Ethosuximide"}
    benchmarks = Benchmarks([("bench", [record("t1", "Drug of choice for absences?", (), options)], None)])
    turned = {"A": "Ethosuximide", "B": "Carbamazepine"}
    assert reason(record("x", "drug of choice for absences", (), turned), benchmarks) == NEAR
    assert reason(record("x", "Drug of choice for absences?", (), {"A": "Atropine", "B": "Digoxin"}), benchmarks) == ""
    assert reason(record("x", "Drug of choice for absences?", [picture(2)], options), benchmarks) == ""


def test_options_inside_the_question_are_no_part_of_it() -> None:
    inline = record("t1", f"{CASE}\nAnswer Choices: (A) Lead (B) Iron (C) Zinc (D) a very long list of other metals")
    assert reason(CASE, Benchmarks([("bench", [inline], None)], min_ratio=0.99, min_share=1.0)) == PASSAGE.format(8)
    listed = f"Name what you see.\nAnswer Choices: {CASE}"
    assert reason(listed, Benchmarks([("bench", [record("t1", CASE)], None)])) == ""


def test_phrases_of_many_questions_condemn_nothing() -> None:
    starts = ["After a fall", "With a cough", "Since a bite", "Without fever", "Before surgery"]
    asked = [record(str(n), f"{start}, {PHRASES[0].lower()}{PHRASES[1:]}") for n, start in enumerate(starts)]
    candidate = f"Now tell me, {PHRASES[0].lower()}{PHRASES[1:]} Answer with a letter and nothing else at all, please."
    strict = {"min_ratio": 1.0}
    assert reason(candidate, Benchmarks([("bench", asked, None)], common=3, **strict)) == ""
    assert reason(candidate, Benchmarks([("bench", asked, None)], common=5, **strict)) == PASSAGE.format(8)
    assert reason(candidate, Benchmarks([("bench", asked[:3], None)], common=3, **strict)) == PASSAGE.format(8)
    # asked of many images, it is one question; and what is common counts within a benchmark, not over all
    same = [record(str(n), PHRASES, [picture(n)]) for n in range(9)]
    assert reason(PHRASES, Benchmarks([("bench", same, None)])) == PASSAGE.format(8)
    several = [(f"bench {n}", [one], None) for n, one in enumerate(asked)]
    assert reason(candidate, Benchmarks(several, **strict)) == PASSAGE.format(8)
    rows = Benchmarks([("bench", asked, None)]).report()
    assert rows[-1]["passages too common to count"] == 13


def test_each_of_many_records_gets_its_own_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 3)
    benchmarks = Benchmarks([
        ("one", [record("t1", CASE, [picture(1)])], None), ("two", [record("t2", "Is it?", [picture(2)])], None),
    ])  # fmt: skip
    kinds = [("Is it?", [picture(2, 2)]), (CASE, ()), ("Is it?", [picture(3)]), ("", ()), ("?!", [picture(1)])]
    many = [record(str(n), *kinds[n % 5]) for n in range(23)]
    found = verdicts(tmp_path, many, benchmarks)
    wanted = [IMAGE, PASSAGE.format(8), "", "", IMAGE]
    assert [found[str(n)].reason for n in range(23)] == [wanted[n % 5] for n in range(23)]
    assert {found[str(n)].detail[:6] for n in (0, 5)} == {"two t2"} and found["4"].detail == "one t1: same pixels"


def test_without_benchmarks_nothing_is_dropped_and_thresholds_are_told() -> None:
    benchmarks = Benchmarks([])
    assert reason(record("x", CASE, [picture(1)]), benchmarks) == ""
    values = [row["value"] for row in benchmarks.report()]
    assert values == [8, 8, 0.3, 3, 16, 0.5, 0.9]
    assert list(decontaminate([], benchmarks=benchmarks)) == []  # type: ignore[arg-type]


def test_a_question_that_two_benchmarks_ask_counts_once() -> None:
    words = CASE.split()
    part = " ".join([*words[:18], *(f"word{n}" for n in range(len(words) - 18))])
    benchmarks = Benchmarks([(name, [record("t1", CASE)], None) for name in ("one", "other")])
    (verdict,) = decontaminate([record("x", part)], benchmarks=benchmarks)  # type: ignore[arg-type]
    assert verdict.reason == ""
    lower = Benchmarks([(name, [record("t1", CASE)], None) for name in ("one", "other")], min_share=0.1)
    (verdict,) = decontaminate([record("x", part)], benchmarks=lower)  # type: ignore[arg-type]
    assert verdict.reason == PASSAGE.format(8) and "shares 23% of the passages" in verdict.detail
