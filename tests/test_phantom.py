"""The phantoms: what is drawn, asked and reasoned follows from one exact value and its guideline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.guidelines import PERSPECTIVES, guidelines
from mmedexpert.sources.phantom import lessons
from mmedexpert.sources.phantom.families import FAMILIES, SPECIALTIES_OF, draw_value, family_of, rules_of
from mmedexpert.sources.phantom.source import TOP, phantom
from mmedexpert.sources.phantom.text import LETTERS, options, question, trace

CASES = [(name, level) for name in SPECIALTIES_OF for level in range(len(guidelines()[name].labels))]
NUMBER = r"\d+(?:\.\d+)?"
seeds = st.integers(0, 2**32 - 1)


def drawn(name: str, level: int, seed: int, perspective: str) -> dict[str, Any]:
    """Everything of one phantom question, drawn in a fixed order from one seed."""
    rng = np.random.default_rng(seed)
    guideline, family = guidelines()[name], family_of(name)
    value = draw_value(family, guideline, level, rng)
    choices, letter = options(family, guideline.labels, guideline.labels[level], rng)
    return {
        "value": value,
        "options": choices,
        "letter": letter,
        "question": question(family, guideline, rng),
        "steps": trace(family, guideline, value, letter, perspective, rng).steps,
        "pixels": np.asarray(family.paint(value, rng)).tobytes(),
    }


def test_every_guideline_has_a_family_and_every_specialty_two() -> None:
    assert set(SPECIALTIES_OF) == set(guidelines())
    for specialty in {name for names in SPECIALTIES_OF.values() for name in names}:
        families = {family_of(rule.id).modality for rule in rules_of(specialty)}
        assert len(families) >= 2, specialty


@pytest.mark.parametrize("name", SPECIALTIES_OF)
def test_draws_are_fixed_by_the_seed(name: str) -> None:
    assert drawn(name, 0, 7, "bayesian") == drawn(name, 0, 7, "bayesian")
    assert drawn(name, 0, 7, "bayesian")["pixels"] != drawn(name, 0, 8, "bayesian")["pixels"]


@pytest.mark.parametrize(("name", "level"), CASES)
def test_values_lie_on_their_level_and_apart_from_other_levels(name: str, level: int) -> None:
    guideline, family = guidelines()[name], family_of(name)
    rng = np.random.default_rng(level)
    others = [bound for i, span in enumerate(family.ranges[name]) if i != level for bound in span]
    for _ in range(200):
        value = draw_value(family, guideline, level, rng)
        assert guideline.level(value) == level
        assert family.span[0] <= value <= family.span[1]
        assert min(abs(value - bound) for bound in others) >= 0.05 * (family.span[1] - family.span[0])
        assert value == float(family.text(value))  # the text shows the value that is drawn


@pytest.mark.parametrize("key", [key for key, family in FAMILIES.items() if family.lookalike])
def test_lookalikes_conflict_between_populations(key: str) -> None:
    family = FAMILIES[key]
    adult, child = (guidelines()[name] for name in family.ranges)
    assert adult.population == "adult" and child.population in ("newborn", "infant")
    for low, high in family.lookalike:
        for value in np.linspace(low, high, 20):
            labels = {rule.labels[rule.level(value)] for rule in (adult, child)}
            assert len(labels) == 2, value
        for rule in (adult, child):  # both specialties draw there
            level = rule.level(low)
            rng = np.random.default_rng(0)
            values = [draw_value(family, rule, level, rng) for _ in range(60)]
            assert any(low <= value <= high for value in values)


@given(st.sampled_from(CASES), seeds)
@settings(max_examples=60, deadline=None)
def test_options_hold_the_gold_label_once_and_four_texts(case: tuple[str, int], seed: int) -> None:
    name, level = case
    one = drawn(name, level, seed, "intuitive")
    assert tuple(one["options"]) == tuple(LETTERS)
    assert len(set(one["options"].values())) == 4
    assert one["options"][one["letter"]] == guidelines()[name].labels[level]
    assert set(guidelines()[name].labels) <= set(one["options"].values())


@given(st.sampled_from(CASES), seeds)
@settings(max_examples=60, deadline=None)
def test_questions_give_nothing_away(case: tuple[str, int], seed: int) -> None:
    name, level = case
    one = drawn(name, level, seed, "analytical")
    asked = one["question"].lower()
    assert guidelines()[name].population in asked
    assert not re.search(r"\d", asked)  # neither measurement nor threshold
    assert not any(text in asked for text in one["options"].values())
    assert not any(pattern in asked for pattern in family_of(name).patterns)


@given(st.sampled_from(CASES), seeds)
@settings(max_examples=80, deadline=None)
def test_analytical_traces_compare_rightly(case: tuple[str, int], seed: int) -> None:
    name, level = case
    one = drawn(name, level, seed, "analytical")
    cuts = [family_of(name).text(cut) for cut in guidelines()[name].cuts]
    chain = re.search(rf"{NUMBER}(?: [<>=] {NUMBER})+", " ".join(one["steps"]))
    assert chain is not None
    parts = chain[0].split()
    for low, sign, high in zip(parts[0::2], parts[1::2], parts[2::2], strict=False):
        assert {"<": float(low) < float(high), ">": float(low) > float(high), "=": float(low) == float(high)}[sign]
    assert set(parts[0::2]) <= {family_of(name).text(one["value"]), *cuts}
    assert family_of(name).text(one["value"]) in parts


@given(st.sampled_from(CASES), seeds)
@settings(max_examples=80, deadline=None)
def test_bayesian_traces_update_rightly(case: tuple[str, int], seed: int) -> None:
    text = " ".join(drawn(*case, seed, "bayesian")["steps"])
    prior, posterior = (int(value) / 100 for value in re.findall(r"(\d+)%", text))
    ratio = re.search(rf"ratio ({NUMBER})\.", text.replace("Cardiothoracic ratio", "").replace("Cup-to-disc ratio", ""))
    assert ratio is not None
    odds = prior / (1 - prior) * float(ratio[1])
    assert odds / (1 + odds) == pytest.approx(posterior, abs=0.02)


@pytest.mark.parametrize("perspective", PERSPECTIVES)
@pytest.mark.parametrize(("name", "level"), CASES)
def test_traces_end_in_the_gold_label_and_its_letter(name: str, level: int, perspective: str) -> None:
    one = drawn(name, level, 3, perspective)
    assert one["steps"][-1].endswith(f"{one['options'][one['letter']]} {one['letter']}.")


def test_a_trace_needs_a_known_perspective() -> None:
    with pytest.raises(ValueError, match="lateral"):
        drawn("ctr_adult", 0, 0, "lateral")


def test_records_are_fixed_by_the_seed_and_balanced(tmp_path: Path) -> None:
    sizes = {"train": 8, "val": 2, "test": 2}
    records, root, notes = phantom(None, tmp_path / "one", seed=1, **sizes)
    again, other, _ = phantom(None, tmp_path / "two", seed=1, **sizes)
    assert records == again and notes == []
    assert len({record.id for record in records}) == len(records) == len(TOP) * 12
    pixels = {(root / record.images[0]).read_bytes() for record in records}
    assert pixels == {(other / record.images[0]).read_bytes() for record in again} and len(pixels) == len(records)
    assert records != phantom(None, tmp_path / "three", seed=2, **sizes)[0]
    for specialty in TOP:
        train = [record for record in records if record.split == "train" and specialty in record.specialties]
        assert {record.trace.perspective for record in train if record.trace} >= set(PERSPECTIVES[:2])
    for record in records:
        rule = guidelines()[record.latent["guideline"]]
        assert record.options and record.options[record.answer] == rule.labels[rule.level(record.latent["value"])]


# --- lessons ----------------------------------------------------------------------------------------------------------


def listed(prompt: str) -> dict[str, str]:
    """Option texts to letters, as a prompt lists them."""
    return {text: letter for letter, text in re.findall(r"^([A-D])\. (.+)$", prompt, re.MULTILINE)}


def stated_cuts(prompt: str) -> list[float]:
    """The cuts of the criterion that a lesson states; none where it states none."""
    found = re.search(rf"Criterion ({NUMBER})(?: to ({NUMBER}))?", prompt)
    return [float(cut) for cut in found.groups() if cut] if found else []


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_looking_is_solvable_from_its_text(seed: int) -> None:
    lesson = lessons.looking(np.random.default_rng(seed))
    letters, cuts = listed(lesson.prompt), stated_cuts(lesson.prompt)
    parts = re.fullmatch(r"<think>(.*)</think><answer>([A-D])</answer>", lesson.completion)
    assert parts is not None and len(letters) == 4
    thought, answer = parts.groups()
    measured = re.match(rf"(\D+) ({NUMBER})", thought)
    assert measured is not None
    rule = next(
        rule
        for rule in guidelines().values()
        if rule.finding == measured[1].lower() and set(rule.labels) <= set(letters)
    )
    if cuts:
        assert len(cuts) == len(rule.cuts) and cuts == sorted(set(cuts)) and float(measured[2]) not in cuts
        level = sum(float(measured[2]) > cut for cut in cuts)
        assert answer == letters[rule.labels[level]]
    else:
        assert "unknown" in thought and not any(label in thought for label in rule.labels)
    assert lesson.image is not None and lesson.image.size == (112, 112)


def test_looking_teaches_no_real_threshold() -> None:
    real = {rule.cuts for rule in guidelines().values()}
    stated = [tuple(stated_cuts(lessons.looking(np.random.default_rng(seed)).prompt)) for seed in range(200)]
    known = [cuts for cuts in stated if cuts]
    assert 100 < len(known) < 200
    assert sum(cuts in real for cuts in known) < 0.1 * len(known)
    assert len(set(known)) > 0.5 * len(known)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_reading_is_solvable_from_its_text(seed: int) -> None:
    lesson = lessons.reading(np.random.default_rng(seed))
    letters = listed(lesson.prompt)
    assert len(letters) == 4
    said = re.findall(r" (.+?) ([A-D])(?= |$)", lesson.completion)
    assert dict(said) == letters
