"""What makes the released set: quotas, caps, and splits that do not leak."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from releasing import draft, written

from mmedexpert.curation.balance import (
    NOT_WANTED,
    OVER_IMAGE,
    OVER_KIND,
    OVER_MODALITY,
    OVER_QUOTA,
    balance,
    make_up,
    perspective_of,
    primary,
    quotas,
    split,
)
from mmedexpert.errors import UserError

FOUR = ("adult_medicine", "brain_sensory", "oncology_surgery", "pediatrics")
VIEWS = ("contextual", "feature", "mechanistic", "probabilistic")


def many(count: int, specialty: str, **given):
    """Records of one specialty, their perspectives in turn."""
    return [draft(f"{specialty}-{n}", specialty, VIEWS[n % 4], **given) for n in range(count)]


def kept(records, folder: Path, **settings):
    settings = {"modality": 1.0, "kind": {}, **settings}
    return [verdict.record for verdict in balance(written(records, folder), **settings) if not verdict.reason]


def test_equal_quarters_and_equal_perspectives_where_all_have_enough(tmp_path):
    chosen = kept([r for name in FOUR for r in many(60, name)], tmp_path, target=160)
    assert Counter(map(primary, chosen)) == dict.fromkeys(FOUR, 40)
    assert set(Counter((primary(r), perspective_of(r)) for r in chosen).values()) == {10}


def test_no_shares_are_equal_ones(tmp_path):
    rows = [r for name in FOUR for r in many(20, name)]
    assert kept(rows, tmp_path, target=40, specialty={}, perspective={}) == kept(rows, tmp_path, target=40)


def test_what_a_specialty_lacks_falls_to_the_others_and_is_told(tmp_path, capsys):
    rows = many(10, "pediatrics") + [r for name in FOUR[:3] for r in many(60, name)]
    chosen = kept(rows, tmp_path, target=160)
    assert Counter(map(primary, chosen)) == {**dict.fromkeys(FOUR[:3], 50), "pediatrics": 10}
    assert "short" not in capsys.readouterr().err
    assert len(kept(rows, tmp_path, target=400)) == 190
    told = " ".join(capsys.readouterr().err.split())
    assert "190 records, 210 short of 400" in told and "pediatrics has 10 of 100" in told


def test_a_wanted_specialty_without_any_record_is_told(tmp_path, capsys):
    kept(many(10, "pediatrics"), tmp_path, target=20, specialty={"pediatrics": 1, "brain_sensory": 1})
    assert "brain_sensory has 0 of 10" in " ".join(capsys.readouterr().err.split())


def test_shares_are_exact_where_they_divide_the_target(tmp_path):
    rows = many(400, "pediatrics") + many(400, "adult_medicine") + many(9, "brain_sensory")
    chosen = kept(rows, tmp_path, target=80, specialty={"adult_medicine": 3, "pediatrics": 1})
    assert Counter(map(primary, chosen)) == {"adult_medicine": 60, "pediatrics": 20}
    views = {"mechanistic": 3, "feature": 1}
    chosen = kept(rows, tmp_path, target=80, specialty={"adult_medicine": 1}, perspective=views)
    assert Counter(map(perspective_of, chosen)) == {"mechanistic": 60, "feature": 20}


def test_the_same_are_chosen_in_any_order_and_others_under_another_seed(tmp_path):
    rows = [r for name in FOUR for r in many(40, name)]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, two = kept(rows, tmp_path / "a", target=60), kept(shuffled, tmp_path / "b", target=60)
    assert {r.id for r in one} == {r.id for r in two}
    assert {r.id for r in one} != {r.id for r in kept(rows, tmp_path / "a", target=60, seed=1)}


def test_caps_of_modality_question_type_and_image(tmp_path):
    films = many(60, "adult_medicine", modality="X-ray") + many(60, "pediatrics", modality="CT")
    nothing_told = many(60, "brain_sensory", modality="")
    chosen = kept(films + nothing_told, tmp_path, target=100, modality=0.2)
    assert Counter(r.modality for r in chosen) == {"X-ray": 20, "CT": 20, "": 60}

    polar = many(60, "adult_medicine", kind="yes_no") + many(60, "pediatrics")
    assert Counter(r.asked_as for r in kept(polar, tmp_path, target=40, kind={"yes_no": 0.25}))["yes_no"] == 10

    shared = many(12, "adult_medicine", image="one.png") + many(12, "pediatrics", image="two.png")
    assert Counter(r.images for r in kept(shared, tmp_path, target=24, per_image=4)) == {
        ("one.png",): 4, ("two.png",): 4,
    }  # fmt: skip


def test_copies_of_an_image_under_two_names_are_one_image(tmp_path):
    rows = [draft(f"r{n}", FOUR[0], VIEWS[0], image=f"{n}.png", pixels="same") for n in range(6)]
    assert len(kept(rows, tmp_path, target=6, per_image=2)) == 2
    names = {v.record.split for v in split(written(rows, tmp_path), seed=3)}
    assert len(names) == 1


def test_each_record_has_one_verdict_and_each_reason_its_case(tmp_path):
    rows = [
        *many(12, "adult_medicine", modality="X-ray", image="one.png"),
        *many(12, "pediatrics", modality="CT", kind="yes_no"), *many(30, "brain_sensory"), *many(3, "dentistry"),
    ]  # fmt: skip
    settings = {"modality": 0.2, "kind": {"yes_no": 0.1}, "per_image": 2}
    wanted = dict.fromkeys(FOUR[:2] + FOUR[3:], 1.0)
    verdicts = list(balance(written(rows, tmp_path), target=30, specialty=wanted, **settings))
    assert [v.record.id for v in verdicts] == [r.id for r in rows]
    assert Counter(v.reason for v in verdicts) == {"": 30, OVER_IMAGE: 10, OVER_KIND: 9, OVER_QUOTA: 5, NOT_WANTED: 3}
    capped = balance(written(rows, tmp_path), target=30, modality=0.05, kind={})
    assert next(v.detail for v in capped if v.reason == OVER_MODALITY) in ("X-ray", "CT")


@pytest.mark.parametrize(
    "settings",
    [{"target": 0}, {"specialty": {"a": 0.0}}, {"perspective": {"b": 0}}, {"modality": 2.0}, {"per_image": 0}],
)
def test_a_share_that_selects_nothing_is_the_users_mistake(tmp_path, settings):
    with pytest.raises(UserError):
        kept(many(3, "pediatrics"), tmp_path, **settings)


def test_quotas_by_largest_remainder():
    assert quotas(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert quotas(7, {"a": 3, "b": 1}) == {"a": 5, "b": 2}


def test_splits_join_what_shares_an_image_or_a_group_and_follow_the_fractions(tmp_path):
    rows = [draft(f"{n}", FOUR[n % 4], VIEWS[0], image=f"{n // 4}.png", group=f"patient {n // 8}") for n in range(800)]
    found = [v.record for v in split(written(rows, tmp_path), fractions=(0.8, 0.1, 0.1), seed=5)]
    assert [r.id for r in found] == [r.id for r in rows]
    for part in ("images", "image_group"):
        split_of: dict = {}
        for record in found:
            assert split_of.setdefault(getattr(record, part), record.split) == record.split
    assert Counter(r.split for r in found) == {"train": 640, "val": 80, "test": 80}


def test_the_make_up_counts_every_record_once_in_each_table(tmp_path):
    counts = make_up(written(many(8, "pediatrics", modality="CT") + many(2, "adult_medicine"), tmp_path))
    assert counts["specialty"] == {"adult_medicine": 2, "pediatrics": 8}
    assert counts["modality"] == {"CT": 8, "unknown": 2}
    assert all(sum(row.values()) == 10 for row in counts.values())
    assert counts["cells"]["pediatrics|feature|train"] == 2
