"""What counts as asked before, by question and image, and how images near each other are found and grouped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.curation import duplicates as module
from mmedexpert.curation.duplicates import CONTRADICTION, NEAR, SAME, duplicates, report
from mmedexpert.curation.near import Index, bands, distances, near_images, parts
from mmedexpert.curation.steps import Records, Verdict, run_step, write_step
from mmedexpert.data.record import Record

LONG = "Which finding in this chest radiograph of a patient with fever and cough explains the shortness of breath today"


def phash(seed: int) -> str:
    """256 bits of which half are set, as a comparable hash has them."""
    bits = np.zeros(256, np.uint8)
    bits[np.random.default_rng(seed).permutation(256)[:128]] = 1
    return np.packbits(bits).tobytes().hex()


def flipped(hash_: str, count: int, seed: int = 0) -> str:
    """The hash with `count` (even) of its bits changed, half of them still set."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hash_), np.uint8))
    rng = np.random.default_rng(seed)
    for value in (0, 1):
        bits[rng.choice(np.flatnonzero(bits == value), count // 2, replace=False)] = 2
    bits[bits == 2] = 1 - np.unpackbits(np.frombuffer(bytes.fromhex(hash_), np.uint8))[bits == 2]
    return np.packbits(bits).tobytes().hex()


def picture(seed: int, hash_: str = "", grey_std: float = 50.0) -> dict:
    return {"sha256": f"{seed:064x}", "pixels": f"{seed:064x}", "phash": hash_ or phash(seed), "grey_std": grey_std}


def record(
    name: str, question: str, answer: str, pictures: Sequence[dict] = (), options: dict | None = None, source: str = "s"
) -> Record:
    images = tuple(f"{name}-{place}.png" for place in range(len(pictures)))
    return Record(
        id=name, images=images, question=question, options=options, answer=answer, specialties=("all",), source=source,
        license="CC0", split="train", image_group=name, provenance={"source": source, "images": list(pictures)},
    )  # fmt: skip


def kept_in(folder: Path, records: Sequence[Record]) -> Records:
    return write_step("in", map(Verdict, records), folder, folder, given=None)


def judged(tmp_path: Path, records: Sequence[Record], **settings: object) -> dict[str, Verdict]:
    found = list(duplicates(kept_in(tmp_path, records), **settings))  # type: ignore[arg-type]
    assert [verdict.record.id for verdict in found] == [one.id for one in records]
    return {verdict.record.id: verdict for verdict in found}


def reasons(tmp_path: Path, records: Sequence[Record], **settings: object) -> dict[str, str]:
    return {name: verdict.reason for name, verdict in judged(tmp_path, records, **settings).items() if verdict.reason}


def test_a_question_asked_of_every_image_is_a_duplicate_on_the_same_image_alone(tmp_path: Path) -> None:
    asked = "What modality is this?"
    records = [
        record("a", asked, "CT", [picture(1)]),
        record("b", asked, "CT", [picture(2)]),
        record("c", asked + " ", "ct", [picture(1)]),
        record("d", "Which plane is shown?", "axial", [picture(1)]),
    ]
    found = judged(tmp_path, records)
    assert {name: verdict.reason for name, verdict in found.items()} == {"a": "", "b": "", "c": SAME, "d": ""}
    assert found["c"].detail == "as a"
    groups = {name: verdict.record.image_group for name, verdict in found.items()}
    assert groups["a"] == groups["c"] == groups["d"] != groups["b"]


def test_other_options_order_is_the_same_question_and_other_options_are_another(tmp_path: Path) -> None:
    one = {"A": "Pneumonia", "B": "Oedema", "C": "Fibrosis"}
    records = [
        record("a", "What is shown?", "A", [picture(1)], one),
        record("b", "What is shown?", "C", [picture(1)], {"A": "Oedema", "B": "Fibrosis", "C": "Pneumonia"}),
        record("c", "What is shown?", "A", [picture(1)], {"A": "Chest", "B": "Head", "C": "Knee"}),
        record("d", "What is shown?", "B", [picture(2)], one),
        record("e", "What is shown?", "C", [picture(2)], one),
    ]
    assert reasons(tmp_path, records) == {"b": SAME, "d": CONTRADICTION, "e": CONTRADICTION}


def test_answers_that_do_not_agree_drop_all_of_them(tmp_path: Path) -> None:
    records = [
        record("a", "Is the heart normal?", "Yes", [picture(1)]),
        record("b", "Is the heart normal?", "yes", [picture(1)]),
        record("c", "Is the heart normal?", "no", [picture(1)]),
        record("d", "Where is the mass?", "left lung", [picture(1)]),
        record("e", "Where is the mass?", "the left lung", [picture(1)]),  # says no other place
        record("f", "What is seen?", "pneumonia", [picture(1)]),
        record("g", "What is seen?", "no pneumonia", [picture(1)]),
        record("h", "Which lobe?", "left", [picture(1)]),
        record("i", "Which lobe?", "left lower", [picture(1)]),
        record("j", "Which lobe?", "left upper", [picture(1)]),  # agrees with h, but not with i
    ]
    found = judged(tmp_path, records)
    assert {name for name, verdict in found.items() if verdict.reason == CONTRADICTION} == set("abcfghij")
    assert found["e"].reason == SAME and not found["d"].reason
    assert found["a"].detail == "as c" and found["c"].detail == "as a, b"


def test_near_same_questions_and_what_tells_them_apart(tmp_path: Path) -> None:
    def pair(name: str, one: str, other: str, answers: tuple[str, str] = ("yes", "yes"), seed: int = 1) -> list[Record]:
        return [record(f"{name}{place}", text, answer, [picture(seed)]) for place, (text, answer) in enumerate(
            zip((one, other), answers, strict=True))]  # fmt: skip

    records = [
        *pair("typo", LONG, LONG.replace("finding", "findings"), seed=1),
        *pair("side", f"{LONG} on the left side", f"{LONG} on the right side", seed=2),
        *pair("number", f"{LONG} after 12 days", f"{LONG} after 13 days", seed=3),
        *pair("answer", LONG, LONG.replace("finding", "findings"), ("yes", "no"), seed=4),
        *pair(
            "other", LONG, "Which plane is shown in this chest radiograph of a patient with fever and cough?", seed=5
        ),
    ]
    assert reasons(tmp_path, records) == {"typo1": NEAR}
    assert reasons(tmp_path, records, min_jaccard=0.95, min_ratio=0.999) == {}


def test_text_alone_tells_records_without_images(tmp_path: Path) -> None:
    options = {"A": "Thrombosis", "B": "Nephroblastoma"}
    records = [
        record("a", LONG, "A", (), options),
        record("b", LONG.replace("patient", "person"), "A", (), options),
        record("c", LONG, "A", [picture(1)], options),  # shows an image: another question
        record("d", LONG, "B", (), {"A": "Asthma", "B": "Oedema"}),
    ]
    assert reasons(tmp_path, records) == {"b": NEAR}


@pytest.mark.parametrize(("bits", "dropped"), [(8, True), (10, False)])
def test_near_images_within_eight_bits(tmp_path: Path, bits: int, dropped: bool) -> None:
    near = picture(2, flipped(phash(1), bits))
    records = [
        record("a", "Is it normal?", "yes", [picture(1)]),
        record("b", "Is it normal?", "yes", [near]),
        record("c", "What modality is this?", "CT", [near]),
    ]
    found = judged(tmp_path, records)
    assert (found["b"].reason == NEAR) == dropped
    assert (found["a"].record.image_group == found["c"].record.image_group) == dropped
    if dropped:
        assert "8 of 256 bits apart" in found["b"].detail
        others = [*records[:1], replace(records[1], answer="no")]  # they may differ in what is asked: both stay
        assert reasons(tmp_path, others) == {}


def test_near_by_a_chain_is_one_group_but_no_duplicate(tmp_path: Path) -> None:
    first = phash(1)
    second = flipped(first, 8)
    third = flipped(second, 8, seed=5)
    assert distances(*(np.frombuffer(bytes.fromhex(x), np.uint64)[None] for x in (first, third)))[0] > 8
    hashes = [picture(1, first), picture(2, second), picture(3, third)]
    a, b, c = (record(name, "Is it normal?", "yes", [one]) for name, one in zip("abc", hashes, strict=True))
    found = judged(tmp_path, [a, b, c])
    assert len({verdict.record.image_group for verdict in found.values()}) == 1
    assert [found[name].reason for name in "abc"] == ["", NEAR, ""]  # c is near b alone, which is not kept


def test_flat_images_count_by_their_pixels_alone(tmp_path: Path) -> None:
    records = [record(name, "Is it normal?", "yes", [picture(seed, phash(1), 1.0)]) for seed, name in enumerate("ab")]
    found = judged(tmp_path, records)
    assert not any(verdict.reason for verdict in found.values())
    assert found["a"].record.image_group != found["b"].record.image_group


def test_all_images_of_a_record_count(tmp_path: Path) -> None:
    records = [
        record("a", "What changed?", "size", [picture(1), picture(2)]),
        record("b", "What changed?", "size", [picture(1), picture(3)]),
        record("c", "What changed?", "size", [picture(2), picture(1)]),
        record("d", "What changed?", "size", [picture(1)]),
        record("e", "What changed?", "size", [picture(4, flipped(phash(1), 4)), picture(2)]),
    ]
    assert reasons(tmp_path, records) == {"c": SAME, "e": NEAR}


def test_the_first_by_source_then_id_is_kept_whatever_the_order(tmp_path: Path) -> None:
    records = []
    for seed in range(12):
        shown = [picture(seed, flipped(phash(seed // 2), 2 * (seed % 2)))]
        for source in ("big", "own"):
            asked = LONG if source == "own" else LONG.replace("today", "now")
            records.append(record(f"{source}-{seed}", asked, "yes", shown, source=source))
    wanted = judged(tmp_path, records, sources=["own", "big"])
    kept = {name: verdict.record.image_group for name, verdict in wanted.items() if not verdict.reason}
    assert set(kept) == {f"own-{seed}" for seed in range(0, 12, 2)} and len(set(kept.values())) == 6
    for seed in range(3):
        random.Random(seed).shuffle(records)
        found = judged(tmp_path, records, sources=["own", "big"])
        assert {name: verdict.record.image_group for name, verdict in found.items() if not verdict.reason} == kept
    assert all(name.startswith("big") for name in kept) is False
    assert {n[:3] for n, v in judged(tmp_path, records, sources=["big"]).items() if not v.reason} == {"big"}


def test_unknown_pictures_and_odd_texts_stop_nothing(tmp_path: Path) -> None:
    odd = [
        replace(record("a", "", "", [picture(1)]), provenance={}),
        replace(record("b", "???", "+", [picture(1)]), provenance={"images": [{"pixels": 3}]}),
        replace(record("c", "???", "-", ()), image_group=""),
        replace(record("d", "\u80ba\u708e\u5417\uff1f", "\u662f", ()), provenance={"images": "none"}),
    ]
    found = judged(tmp_path, odd)
    assert not any(verdict.reason for verdict in found.values())
    assert found["c"].record.image_group.startswith("text:")
    assert list(duplicates(kept_in(tmp_path, []))) == []


def test_report_names_thresholds_and_groups(tmp_path: Path) -> None:
    records = [record(str(n), f"Question {n} of what is seen?", "yes", [picture(n // 3)]) for n in range(6)]
    kept = run_step("duplicates", duplicates, kept_in(tmp_path / "in", records), tmp_path / "out")
    rows = {row["what"]: row["value"] for row in report(kept, max_distance=6)}
    assert rows["image groups"] == 2 and rows["records of the largest image group"] == 3
    assert rows["near image: perceptual hash within, of 256 bits"] == 6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 60))
def test_the_search_finds_what_brute_force_finds(seed: int, limit: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    for row in range(1, count):  # most are near one before, by as many bits as the limit, one more or less
        if rng.random() < 0.8:
            bits = np.unpackbits(hashes[rng.integers(row)].view(np.uint8))
            bits[rng.choice(256, max(0, limit + rng.integers(-2, 3)), replace=False)] ^= 1
            hashes[row] = np.packbits(bits).view(np.uint64)
    found = set()
    for one, other in near_images(Index(parts(hashes, limit)), hashes, hashes, limit):
        found |= set(zip(one.tolist(), other.tolist(), strict=True))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(2)
    assert found == set(zip(*(row.tolist() for row in np.nonzero(apart <= limit)), strict=True))


def test_blocks_cut_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(0, 5, (40, 2)).astype(np.uint64)
    whole = [list(zip(one.tolist(), other.tolist(), strict=True)) for one, other in Index(keys).pairs(keys)]
    monkeypatch.setattr("mmedexpert.curation.near.BLOCK", 7)
    cut = [list(zip(one.tolist(), other.tolist(), strict=True)) for one, other in Index(keys).pairs(keys)]
    assert list(chain(*whole)) == list(chain(*cut)) and len(cut) > len(whole) and max(map(len, cut)) == 7


def test_bands_of_near_texts_agree_and_are_the_same_everywhere() -> None:
    one, near, far = bands([LONG, f"{LONG} ago", "What is the most common cause of a low blood sugar in the newborn"])
    assert (one == near).any() and not (one == far).any()
    assert (bands(["x y z", LONG])[1] == one).all()
    assert int(one[0]) == 14346866618397535852


def test_a_batch_cuts_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    records = [record(str(n), LONG, "yes", [picture(n % 3)]) for n in range(7)]
    assert reasons(tmp_path, records) == {"3": SAME, "4": SAME, "5": SAME, "6": SAME}


def test_questions_of_text_alone_are_compared_where_no_source_has_an_image(tmp_path: Path) -> None:
    asked = "A 54-year-old man with long standing gout has a swollen painful toe after a night of beer. What is it?"
    records = [record("a", asked, "gout"), record("b", asked.replace("long standing", "longstanding"), "gout")]
    assert [one.reason for one in duplicates(kept_in(tmp_path, records))] == ["", NEAR]


def test_a_question_of_text_alone_shares_its_group_with_those_of_other_sets_and_ages(tmp_path: Path) -> None:
    asked = "A 54-year-old man with long standing gout has a painful toe. What is it?"
    records = [
        record("a", asked, "gout", source="one"),
        record("b", asked.replace("54", "61"), "A", options={"A": "gout", "B": "no"}),
        record("c", "A child coughs at night. Why?", "asthma", source="one"),
    ]  # fmt: skip
    groups = [one.record.image_group for one in duplicates(kept_in(tmp_path, records))]
    assert groups[0] == groups[1] != groups[2]
