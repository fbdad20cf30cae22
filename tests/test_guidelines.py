"""The guidelines as data: which label a measurement gets, on the published bounds and around them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.guidelines import PERSPECTIVES, Guideline, guidelines, instructions
from mmedexpert.guidelines.perspectives import perspectives


def rule(
    upper: str, cuts: tuple[float, ...] = (2.0, 5.0), labels: tuple[str, ...] = ("low", "mid", "high")
) -> Guideline:
    return Guideline("rule", "size", "adult", "mm", cuts, labels, upper, "", "")


@pytest.mark.parametrize(
    ("upper", "levels"),
    [("inclusive", (0, 0, 1, 1, 2)), ("exclusive", (0, 1, 1, 2, 2)), ("mixed", (0, 1, 1, 1, 2))],
)
def test_level_on_and_between_the_cuts(upper: str, levels: tuple[int, ...]) -> None:
    assert tuple(rule(upper).level(value) for value in (1.9, 2.0, 3.0, 5.0, 5.1)) == levels


@given(st.sampled_from(["inclusive", "exclusive", "mixed"]), st.lists(st.floats(-10, 10), min_size=2, max_size=2))
@settings(max_examples=50, deadline=None)
def test_level_never_falls_as_the_value_rises(upper: str, values: list[float]) -> None:
    low, high = sorted(values)
    assert 0 <= rule(upper).level(low) <= rule(upper).level(high) <= 2


@pytest.mark.parametrize(
    ("cuts", "labels"), [((5.0, 2.0), ("a", "b", "c")), ((2.0,), ("a",)), ((2.0,), ("a", "b", "c"))]
)
def test_malformed_guideline_is_refused(cuts: tuple[float, ...], labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="rule"):
        rule("inclusive", cuts, labels)


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("ctr_adult", 0.50, "normal heart"),
        ("ctr_adult", 0.51, "cardiomegaly"),
        ("ctr_newborn", 0.60, "normal heart"),
        ("ctr_newborn", 0.61, "cardiomegaly"),
        ("heart_rate_adult", 59, "bradycardia"),
        ("heart_rate_adult", 60, "normal rate"),
        ("heart_rate_adult", 100, "normal rate"),
        ("heart_rate_adult", 101, "tachycardia"),
        ("heart_rate_infant", 99, "bradycardia"),
        ("heart_rate_infant", 100, "normal rate"),
        ("heart_rate_infant", 160, "normal rate"),
        ("heart_rate_infant", 161, "tachycardia"),
        ("pneumothorax_adult", 1.9, "observation"),
        ("pneumothorax_adult", 2.0, "drainage"),
        ("midline_shift", 5, "monitoring"),
        ("midline_shift", 6, "evacuation"),
        ("cup_disc", 0.60, "normal disc"),
        ("cup_disc", 0.61, "glaucoma"),
        ("lung_nodule", 5, "discharge"),
        ("lung_nodule", 6, "follow-up"),
        ("lung_nodule", 8, "follow-up"),
        ("lung_nodule", 9, "biopsy"),
        ("aortic_diameter", 2.9, "normal aorta"),
        ("aortic_diameter", 3.0, "surveillance"),
        ("aortic_diameter", 5.5, "repair"),
    ],
)
def test_published_bounds(name: str, value: float, label: str) -> None:
    guideline = guidelines()[name]
    assert guideline.labels[guideline.level(value)] == label


@pytest.mark.parametrize("name", guidelines())
def test_every_guideline_is_complete(name: str) -> None:
    guideline = guidelines()[name]
    assert guideline.id == name
    assert guideline.upper in ("inclusive", "exclusive", "mixed")
    assert all(math.isfinite(cut) for cut in guideline.cuts)
    assert len(set(guideline.labels)) == len(guideline.labels)
    texts = (guideline.finding, guideline.population, guideline.recommendation, guideline.source)
    assert all(text.strip() for text in texts)
    assert any(char.isdigit() for char in guideline.source) or "range" in guideline.source  # a year, or a named range


def test_order_of_the_perspectives() -> None:
    assert PERSPECTIVES == ("differential", "intuitive", "analytical", "bayesian")
    assert tuple(instructions()) == PERSPECTIVES
    for style in ("small", "full"):
        assert len({text.strip() for text in instructions(style).values()} - {""}) == len(PERSPECTIVES)
    assert instructions()["bayesian"] == "Reason by Bayesian update."
    assert min(len(text.split()) for text in instructions("full").values()) > 20


def test_every_perspective_is_told_whole() -> None:
    for one in perspectives().values():
        assert "Savage" in one.source and one.definition.endswith(".")
        texts = [text for criterion in one.criteria.values() for text in (criterion.meaning, criterion.example)]
        assert len(one.criteria) >= 5 and len(set(texts)) == 2 * len(one.criteria) and all(texts)
