"""Rubrics: own traces score high and other perspectives low, prose is read, cues without substance earn little."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.guidelines import PERSPECTIVES, guidelines
from mmedexpert.guidelines.rubrics import adherence, criteria
from mmedexpert.sources.phantom.families import SPECIALTIES_OF, draw_value, family_of
from mmedexpert.sources.phantom.text import options as draw_options
from mmedexpert.sources.phantom.text import trace

LUNG = {"A": "Pneumonia", "B": "Pulmonary edema", "C": "Pneumothorax", "D": "Pleural effusion"}
HEART = {"A": "Normal heart", "B": "Cardiomegaly", "C": "Pericarditis", "D": "Dextrocardia"}
RATE = {"A": "Bradycardia", "B": "Tachycardia", "C": "Normal rate", "D": "Asystole"}
CASES = [(name, level) for name in SPECIALTIES_OF for level in range(len(guidelines()[name].labels))]

DIFFERENTIAL = "Candidates: cardiomegaly, normal heart. Against normal heart: wide heart shadow. So cardiomegaly B."
INTUITIVE = "Pattern: wide heart shadow. So cardiomegaly B."
ANALYTICAL = "Cardiothoracic ratio 0.57. Criterion for an adult: 0.50. 0.57 > 0.50 so high cardiomegaly B."
BAYESIAN = "Prior of cardiomegaly 50%. Wide heart shadow, likelihood ratio 4. Posterior 80%. So cardiomegaly B."


def said(thought: str, letter: str = "B") -> str:
    return f"<think>{thought}</think><answer>{letter}</answer>"


def scores(thought: str, options: dict[str, str] | None = None, letter: str = "B") -> list[float]:
    return [adherence(said(thought, letter), options or HEART, name) for name in PERSPECTIVES]


def one(thought: str, perspective: str, options: dict[str, str] | None = None, letter: str = "B") -> dict[str, float]:
    return criteria(said(thought, letter), options or HEART, perspective)


# --- phantoms ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(CASES), st.sampled_from(PERSPECTIVES), st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_phantom_traces_follow_their_own_perspective_only(case: tuple[str, int], asked: str, seed: int) -> None:
    guideline, family = guidelines()[case[0]], family_of(case[0])
    rng = np.random.default_rng(seed)
    value = draw_value(family, guideline, case[1], rng)
    choices, letter = draw_options(family, guideline.labels, guideline.labels[case[1]], rng)
    text = said(" ".join(trace(family, guideline, value, letter, asked, rng).steps), letter)
    by_name = {name: adherence(text, choices, name) for name in PERSPECTIVES}
    own = by_name.pop(asked)
    assert own >= 0.9
    assert all(other <= own - 0.3 for other in by_name.values()), by_name
    wrong = next(key for key in choices if key != letter)  # the thought does not lead to this answer
    assert adherence(text.replace(f"<answer>{letter}", f"<answer>{wrong}"), choices, asked) < own


# --- free prose -------------------------------------------------------------------------------------------------------

PROSE = [
    ("differential", LUNG, "A",
     "The differential includes pneumonia and pulmonary oedema. Oedema is unlikely because there is no "
     "cardiomegaly. A focal consolidation remains, so pneumonia."),
    ("differential", LUNG, "A",
     "Possible diagnoses are pneumonia, pulmonary edema and pneumothorax. The absence of Kerley lines "
     "argues against pulmonary edema, and the visible vascular markings rule out pneumothorax."),
    ("differential", LUNG, "C",
     "Let me consider the options:\n- Pneumonia: unlikely, no consolidation is seen.\n- Pulmonary "
     "edema: unlikely since vessels are thin.\n- Pleural effusion: excluded by the sharp costophrenic "
     "angle.\n- Pneumothorax: a visceral pleural line is visible.\nSo the answer is pneumothorax."),
    ("differential", LUNG, "D",
     "**Option A** is unlikely because there is no air bronchogram. Option B can be ruled out given a "
     "normal vessel size. Option C doesn't fit: markings reach the wall. The meniscus leaves pleural "
     "effusion."),
    ("differential", LUNG, "D",
     "First, consider each option. Pneumonia would show air bronchograms, which argues against it. "
     "Pneumothorax has no lung markings at the edge, so it is unlikely. A meniscus leaves pleural effusion."),
    ("intuitive", LUNG, "C",
     "This looks like a classic pneumothorax: a sharp pleural line with no markings beyond."),
    ("intuitive", LUNG, "D",
     "Blunted angle with a meniscus, typical of pleural effusion."),
    ("intuitive", HEART, "B",
     "At a glance the heart shadow is huge; cardiomegaly."),
    ("analytical", HEART, "B",
     "The cardiothoracic ratio of 0.57 is greater than the 0.50 threshold, so cardiomegaly."),
    ("analytical", HEART, "B",
     "**Step 1**: The CTR = 14.2 cm / 25.0 cm = 0.57. **Step 2**: Normal adults have CTR < 0.5. **Step "
     "3**: 0.57 > 0.5, so **cardiomegaly**."),
    ("analytical", RATE, "C",
     "The heart rate is 75 bpm. The normal range for adults is 60-100 bpm. 75 is between 60 and 100, so "
     "this is a normal rate."),
    ("analytical", RATE, "C",
     "The rate is 75/min, which lies within the normal range of 60 to 100/min. Hence normal rate."),
    ("analytical", HEART, "B",
     "The shift measures 7 mm. This exceeds the 5 mm threshold. So cardiomegaly."),
    ("analytical", HEART, "A",
     "The ratio is 0.45 (normal < 0.50). 0.45 is below 0.50, so a normal heart."),
    ("analytical", HEART, "A",
     "The ratio is 0.45. A ratio above 0.50 suggests cardiomegaly. As 0.45 < 0.50, normal heart."),
    ("analytical", HEART, "A",
     "The ratio is 0.45; if it is above the 0.50 limit, cardiomegaly. 0.45 is not above 0.50: normal "
     "heart."),
    ("analytical", HEART, "B",
     "The heart takes 57% of the chest. Normal is less than 50%. As 57% > 50%, cardiomegaly."),
    ("analytical", HEART, "B",
     "The posterior wall is 12 mm, above the normal limit of 11 mm, so cardiomegaly."),
    ("bayesian", HEART, "B",
     "The prior probability of cardiomegaly is 20%. A wide heart shadow has a likelihood ratio of 6. "
     "The posterior probability is 60%. Therefore cardiomegaly."),
    ("bayesian", LUNG, "A",
     "The pretest probability of pneumonia is about 30%. Consolidation raises the probability to 80%. "
     "Pneumonia is the answer."),
    ("bayesian", LUNG, "A",
     "Consolidation increases the probability of pneumonia from 30% to 85%. So pneumonia."),
    ("bayesian", LUNG, "A",
     "The baseline probability of pneumonia is around 45%. A focal consolidation increases the likelihood "
     "of pneumonia to about 75%. The final answer is pneumonia."),
    ("bayesian", LUNG, "B",
     "The pre-test probability of pneumonia is 40 percent. A clear lung lowers the odds; the post-test "
     "probability of pneumonia is 10 percent. Pulmonary edema then."),
    ("bayesian", LUNG, "A",
     "With a prior of 0.1, fever (likelihood ratio 3) and consolidation (likelihood ratio 9), the "
     "posterior is 0.75, so pneumonia."),
]  # fmt: skip


@pytest.mark.parametrize(("perspective", "options", "letter", "thought"), PROSE)
def test_free_prose(perspective: str, options: dict[str, str], letter: str, thought: str) -> None:
    by_name = dict(zip(PERSPECTIVES, scores(thought, options, letter), strict=True))
    assert by_name.pop(perspective) == 1.0, criteria(said(thought, letter), options, perspective)
    assert max(by_name.values()) <= 0.5


def test_open_questions_take_candidates_from_the_thought() -> None:
    thought = (
        "The differential includes pneumonia, asthma and embolism. Asthma and embolism are unlikely: focal shadow."
    )
    assert adherence(f"<think>{thought}</think><answer>Pneumonia</answer>", None, "differential") == 1.0
    assert adherence(f"<think>{thought}</think><answer>Asthma</answer>", None, "differential") < 0.7


def test_without_tags_the_text_before_the_answer_is_the_thought() -> None:
    bare = adherence(f"{ANALYTICAL}\n<answer>B</answer>", HEART, "analytical")
    opened_by_the_prompt = adherence(f"{ANALYTICAL}</think><answer>B</answer>", HEART, "analytical")
    assert bare == opened_by_the_prompt == 1.0
    assert adherence(f"<think></think><answer>B</answer>{ANALYTICAL}", HEART, "analytical") == 0.0


@pytest.mark.parametrize("perspective", PERSPECTIVES)
@pytest.mark.parametrize(
    "text", ["", " \n", "<think></think>", "<think></think><answer>B</answer>", "<answer>B</answer>"]
)
def test_no_thought_scores_nothing(text: str, perspective: str) -> None:
    assert set(criteria(text, HEART, perspective).values()) == {0.0}


def test_unknown_perspective() -> None:
    with pytest.raises(ValueError, match="lateral"):
        criteria("x", HEART, "lateral")


# --- each criterion can fail ------------------------------------------------------------------------------------------


def test_differential_criteria() -> None:
    assert one("Candidates: cardiomegaly. So cardiomegaly.", "differential")["candidates"] == 0
    half = "Candidates: cardiomegaly, normal heart, pericarditis. Against normal heart: wide shadow. So cardiomegaly."
    assert one(half, "differential") == {"candidates": 1.0, "exclusion": 0.5, "conclusion": 1.0}
    without_finding = "Candidates: cardiomegaly, normal heart. Normal heart is unlikely. So cardiomegaly."
    assert one(without_finding, "differential") == {"candidates": 1.0, "exclusion": 0.0, "conclusion": 0.0}
    of_the_answer = "Candidates: cardiomegaly, normal heart. Against cardiomegaly: slim shadow. So cardiomegaly."
    assert one(of_the_answer, "differential") == {"candidates": 1.0, "exclusion": 0.0, "conclusion": 0.0}
    of_all = "Candidates: cardiomegaly, normal heart. Cardiomegaly and normal heart are excluded by the odd shadow."
    assert one(of_all, "differential")["conclusion"] == 0
    negated = "Candidates: cardiomegaly, normal heart. Normal heart cannot be excluded because the film is rotated."
    assert one(negated, "differential")["exclusion"] == 0
    spared = "Candidates: cardiomegaly, normal heart. A wide shadow does not rule out normal heart. So cardiomegaly."
    assert one(spared, "differential")["exclusion"] == 0
    effusions = {"A": "Pleural effusion", "B": "Pericardial effusion"}
    short = "Candidates: pleural effusion, pericardial effusion. Effusion is unlikely: sharp angles."  # which one?
    assert [one(short, "differential", effusions, letter)["exclusion"] for letter in "AB"] == [0, 0]


def test_intuitive_criteria() -> None:
    assert one(INTUITIVE, "intuitive") == {"pattern": 1.0, "commitment": 1.0, "brevity": 1.0}
    assert scores("Cardiomegaly.")[1] == 0  # short, but no pattern
    assert one("The shadow is not typical of cardiomegaly.", "intuitive")["pattern"] == 0
    assert one("Pattern: cardiomegaly. So cardiomegaly.", "intuitive")["pattern"] == 0  # the answer is no finding
    assert one(f"Normal heart? {INTUITIVE}", "intuitive")["commitment"] == 0  # weighs another option first
    late = f"Pattern: wide heart shadow. {'well ' * 25}So cardiomegaly."
    assert one(late, "intuitive") == {"pattern": 1.0, "commitment": 0.0, "brevity": pytest.approx(29 / 30)}
    middling = f"{INTUITIVE} {'well ' * 38}"  # 7 words and 38
    assert one(middling, "intuitive")["brevity"] == pytest.approx(0.5)
    assert one(f"{INTUITIVE} {'well ' * 60}", "intuitive")["brevity"] == 0


def test_analytical_criteria() -> None:
    full = {"measurement": 1.0, "criterion": 1.0, "comparison": 1.0, "agreement": 1.0, "conclusion": 1.0}
    assert one(ANALYTICAL, "analytical") == full
    assert one(ANALYTICAL.replace("0.57 >", "0.57 <"), "analytical") == full | {
        "comparison": 0.0, "agreement": 0.0, "conclusion": 0.0,
    }  # fmt: skip
    unrelated = full | {"agreement": 0.0, "conclusion": 0.0}
    assert one(ANALYTICAL.replace("0.57 > 0.50", "2 > 1"), "analytical") == unrelated
    assert one(ANALYTICAL.replace("Criterion for an adult: 0.50. ", ""), "analytical")["criterion"] == 0
    assert one(ANALYTICAL.replace("Cardiothoracic ratio 0.57. ", ""), "analytical")["measurement"] == 0
    assert one(ANALYTICAL, "analytical", letter="A") == full | {"conclusion": 0.0}
    described = "The shadow is normal with a ratio of 0.45. Criterion 0.50. 0.45 < 0.50 so normal heart."
    assert one(described, "analytical", letter="A") == full
    age = "The man is 65 years old. Criterion 60. 65 > 60 so cardiomegaly."  # no measurement
    assert one(age, "analytical")["measurement"] == 0
    early = "So cardiomegaly. Ratio 0.57. Criterion 0.50. 0.57 > 0.50."
    assert one(early, "analytical") == full | {"conclusion": 0.0}
    assert one(f"{ANALYTICAL} 3 > 4.", "analytical")["comparison"] == 0  # one wrong comparison spoils it


@given(
    st.integers(0, 300), st.integers(0, 300), st.sampled_from(["<", ">", "=", "is above", "is below", "is at least"])
)
@settings(max_examples=150, deadline=None)
def test_comparisons_are_checked(value: int, cut: int, sign: str) -> None:
    true = {
        "<": value < cut, ">": value > cut, "=": value == cut,
        "is above": value > cut, "is below": value < cut, "is at least": value >= cut,
    }[sign]  # fmt: skip
    found = one(f"Heart rate {value}/min. Threshold {cut}. {value} {sign} {cut} so cardiomegaly.", "analytical")
    assert found["comparison"] == found["agreement"] == found["conclusion"] == float(true)


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 150), st.sampled_from(["chain", "between", "within"]))
@settings(max_examples=150, deadline=None)
def test_ranges_are_checked(value: int, low: int, high: int, wording: str) -> None:
    drawn = {
        "chain": f"{low} < {value} < {high}",
        "between": f"{value} is between {low} and {high}",
        "within": f"{value} lies within the range {low}-{high}",
    }[wording]
    true = low < value < high if wording == "chain" else low <= value <= high
    found = one(f"Heart rate {value}/min. Criterion: {low} to {high}. {drawn} so cardiomegaly.", "analytical")
    assert found["comparison"] == found["conclusion"] == float(true)


def test_bayesian_criteria() -> None:
    full = {"prior": 1.0, "effect": 1.0, "posterior": 1.0, "update": 1.0, "conclusion": 1.0}
    assert one(BAYESIAN, "bayesian") == full
    assert one(BAYESIAN.replace("80%", "95%"), "bayesian") == full | {"update": 0.0, "conclusion": 0.0}
    assert one(BAYESIAN.replace("Wide heart shadow, l", "L"), "bayesian")["effect"] == 0  # the effect of what?
    assert one(BAYESIAN.replace("Posterior 80%. ", ""), "bayesian")["posterior"] == 0
    assert one(BAYESIAN.replace("Prior of cardiomegaly 50%. ", ""), "bayesian")["prior"] == 0
    assert one(BAYESIAN, "bayesian", letter="A")["conclusion"] == 0
    of_another = BAYESIAN.replace("So cardiomegaly B", "So normal heart A")
    assert one(of_another, "bayesian", letter="A") == full | {"conclusion": 0.0}
    against = "Prior of cardiomegaly 50%. A wide shadow lowers the probability. Posterior 80%. So cardiomegaly."
    assert one(against, "bayesian") == full | {"update": 0.0, "conclusion": 0.0}


@given(st.integers(2, 98), st.integers(1, 60), st.integers(1, 99))
@settings(max_examples=150, deadline=None)
def test_updates_are_checked(prior: int, ratio: int, posterior: int) -> None:
    odds = prior / (100 - prior) * ratio
    expected = abs(odds / (1 + odds) - posterior / 100) <= 0.02 + 1e-9
    text = f"Prior {prior}%. Wide shadow, likelihood ratio {ratio}. Posterior {posterior}%. So cardiomegaly."
    assert one(text, "bayesian")["update"] == float(expected)


# --- reward hacking ---------------------------------------------------------------------------------------------------

SALAD = (
    "candidates differential excluded unlikely because pattern classic typical criterion threshold measurement above "
    "prior likelihood ratio posterior probability raises so therefore "
)


@pytest.mark.parametrize(
    "thought",
    [
        SALAD,
        SALAD * 20,
        SALAD + "1 2 3 50% 4 80%. So cardiomegaly.",
        SALAD + ". Candidates: normal heart, cardiomegaly. Against normal heart: unlikely. So cardiomegaly.",
        "Candidates: normal heart, cardiomegaly, pericarditis, dextrocardia.",
        "2 > 1 so cardiomegaly B.",
        "50% 80% so cardiomegaly B.",
        "Cardiomegaly " * 50,
        "Pattern. Pattern: typical classic. So cardiomegaly.",
    ],
)
def test_cues_without_substance_earn_little(thought: str) -> None:
    assert max(scores(thought)) <= 0.4


def test_all_templates_at_once_are_not_intuitive() -> None:
    for order in ((0, 1, 2, 3), (1, 0, 2, 3)):
        parts = [(DIFFERENTIAL, INTUITIVE, ANALYTICAL, BAYESIAN)[i] for i in order]
        assert scores(" ".join(parts))[1] <= 0.8
    assert scores(INTUITIVE)[1] == 1.0


# --- garbage ----------------------------------------------------------------------------------------------------------


FRAGMENTS = "@0 0.5 1,000 > = between and cardiomegaly 50% . <answer> </think> not option b .5 - \u0665 \xb2".split()
ODD_OPTIONS = [HEART, None, {"A": "", "B": "b", "C": "...", "D": "5 (mm)"}, {"A": "Yes", "B": "yes"}]


@given(
    st.text(max_size=300) | st.lists(st.sampled_from(SALAD.split() + FRAGMENTS), max_size=80).map(" ".join),
    st.sampled_from(ODD_OPTIONS),
    st.sampled_from(PERSPECTIVES),
)
@settings(max_examples=400, deadline=None)
def test_any_text_scores_in_the_unit_interval(text: str, options: dict[str, str] | None, perspective: str) -> None:
    for completion in (text, said(text), f"<answer>{text}</answer>"):
        found = criteria(completion, options, perspective)
        assert all(0.0 <= value <= 1.0 and isinstance(value, float) for value in found.values())
        assert adherence(completion, options, perspective) == pytest.approx(sum(found.values()) / len(found))


@pytest.mark.parametrize(
    "unit",
    ["a", "<think>", "0.5 ", "> 1 ", "1 > 0 ", "cardiomegaly ", "against cardiomegaly ", "candidates ", "a-", "1,111",
     "-", "not very ", "1.1.1.1", " ", "\n", "likelihood ratio 4 ", "prior 50% posterior 60% ",
     "normal heart ", "option "],
)  # fmt: skip
def test_long_texts_take_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    for perspective in PERSPECTIVES:
        adherence(said(text), HEART, perspective)
        adherence(f"<answer>{text}</answer>", None, perspective)
    assert time.process_time() - start < 8  # quadratic time would be minutes
