"""Drawn pairs: one answer is better by construction, in the dimensions that it is labelled in, and neither by place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmedexpert.data.pairs import pair_of
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.sources.phantom.cases import draw_case
from mmedexpert.sources.phantom.families import rules_of
from mmedexpert.sources.phantom.phantom_pairs import KINDS, PADDING, _otherwise, load
from mmedexpert.sources.phantom.source import TOP


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return load(None, tmp_path_factory.mktemp("pairs"), count=60)


def better(record):
    pair = pair_of(record, "kind")
    letter = pair.labels["overall"]
    return pair.answers[letter], pair.answers["B" if letter == "A" else "A"]


def test_each_kind_has_its_labels_and_half_of_the_better_answers_stand_first(drawn):
    records, image_root, bad = drawn
    assert bad == [] and len(records) == 240 and Counter(r.specialties[0] for r in records) == dict.fromkeys(TOP, 60)
    assert Counter(r.groups["kind"] for r in records) == dict.fromkeys(KINDS, 48)
    for record in records:
        labels = record.latent["labels"]
        assert set(labels) == set(KINDS[record.groups["kind"]]) and len(set(labels.values())) == 1
        assert (image_root / record.images[0]).is_file()
    assert 95 < sum(record.answer == "A" for record in records) < 145
    assert len({record.images for record in records}) == 240


def test_what_makes_one_better(drawn):
    for record in drawn[0]:
        good, worse = better(record)
        conclusion = good[good.rindex(" So ") + 1 :]
        kind = record.groups["kind"]
        if kind == "finding":
            assert worse[worse.rindex(" So ") + 1 :] != conclusion
        elif kind == "contradiction":
            assert worse.rpartition(" So ")[0] == good.rpartition(" So ")[0] and worse != good
        elif kind == "partial":
            assert worse == conclusion and len(good) > len(worse)
        elif kind == "padded":
            assert good in worse and sum(sentence in worse for sentence in PADDING) == 4
        else:
            whole = conclusion.partition(". ")[0]
            assert whole in worse and worse.count(worse.partition(".")[0]) == 2  # its first sentence again
            assert " if it " in good or " on the other side of " in good


def test_length_decides_no_dimension_but_what_it_is_about(drawn):
    """The longer answer is the better one where something is missing, the worse one where something is added."""
    longer = {
        kind: [len(good) > len(worse) for record in drawn[0] if record.groups["kind"] == kind
               for good, worse in [better(record)]]
        for kind in KINDS
    }  # fmt: skip
    assert all(longer["partial"]) and not any(longer["padded"])
    for kind in ("finding", "contradiction"):
        assert 0.2 < sum(longer[kind]) / len(longer[kind]) < 0.8


def test_the_contrary_picture_has_the_other_answer():
    rng = np.random.default_rng(0)
    for rule in [rule for specialty in TOP for rule in rules_of(specialty)]:
        for needs in PERSPECTIVES:
            for _ in range(30):
                case = draw_case(rule, needs, rng)
                other = _otherwise(case)
                assert other.gold in case.labels or needs == "differential"
                assert other.gold != case.gold and other.needs == needs and other.prevalence == case.prevalence


def test_splits_share_no_draw(tmp_path):
    seen = {}
    for split in ("train", "val", "test"):
        records, image_root, _ = load(None, tmp_path / split, split=split, count=10)
        seen[split] = {(image_root / record.images[0]).read_bytes() for record in records}
        assert {record.split for record in records} == {split} and len(seen[split]) == 40
    assert not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    again, image_root, _ = load(None, tmp_path / "again", count=10)
    assert {(image_root / record.images[0]).read_bytes() for record in again} == seen["test"]
    with pytest.raises(ValueError, match="split must be one of"):
        load(None, tmp_path, split="dev")
