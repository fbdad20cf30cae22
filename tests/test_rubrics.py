"""The rubrics: strategies are told apart, text without substance earns nothing, ground truth is consulted."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.guidelines import PERSPECTIVES, guidelines
from mmedexpert.guidelines.labelled import measures, read_labelled
from mmedexpert.guidelines.measures import measure
from mmedexpert.guidelines.perspectives import perspectives
from mmedexpert.guidelines.reading import read
from mmedexpert.guidelines.rubrics import adherence, criteria, grades, weighed, weights
from mmedexpert.guidelines.soundness import FAULTS
from mmedexpert.guidelines.truth import Truth
from mmedexpert.sources.phantom.cases import draw_case
from mmedexpert.sources.phantom.families import PRACTICES
from mmedexpert.sources.phantom.text import options as draw_options
from mmedexpert.sources.phantom.text import trace

LABELLED = Path(__file__).parents[1] / "experiments" / "perspectives"
LUNG = {"A": "Pneumonia", "B": "Pulmonary edema", "C": "Pneumothorax", "D": "Pleural effusion"}
HEART = {"A": "Normal heart", "B": "Cardiomegaly", "C": "Pericarditis", "D": "Dextrocardia"}
AORTA = {"A": "Normal aorta", "B": "Surveillance", "C": "Repair", "D": "Dissection"}
RATE = {"A": "Bradycardia", "B": "Tachycardia", "C": "Normal rate", "D": "Asystole"}
CASES = [(name, needs) for name in PRACTICES for needs in PERSPECTIVES]
ADULT = Truth(guidelines()["ctr_adult"], 0.57)

DIFFERENTIAL = "Candidates: cardiomegaly, normal heart. Against normal heart: wide heart shadow. So cardiomegaly B."
INTUITIVE = (
    "Cardiothoracic ratio 0.57. Pattern at a glance: wide heart shadow, typical cardiomegaly. So cardiomegaly B."
)
ANALYTICAL = "Cardiothoracic ratio 0.57. Criterion for an adult: 0.50. 0.57 > 0.50 so high cardiomegaly B."
BAYESIAN = "Prior of cardiomegaly 50%. Wide heart shadow, likelihood ratio 4. Posterior 80%. So cardiomegaly B."


def said(thought: str, letter: str = "B") -> str:
    return f"<think>{thought}</think><answer>{letter}</answer>"


def scores(thought: str, options: dict[str, str] | None = None, letter: str = "B", truth: Truth | None = None):
    found = grades(said(thought, letter), options or HEART, truth).scores
    return [found[name] for name in PERSPECTIVES]


def faults(thought: str, options: dict[str, str] | None = None, letter: str = "B") -> tuple[str, ...]:
    return grades(said(thought, letter), options or LUNG).faults


# --- strategies are told apart ----------------------------------------------------------------------------------------


@given(st.sampled_from(CASES), st.sampled_from(PERSPECTIVES), st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_phantom_traces_follow_their_own_perspective_only(case: tuple[str, str], asked: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = draw_case(guidelines()[case[0]], case[1], rng)
    choices = draw_options(drawn, rng)
    steps = trace(drawn, choices, asked).steps
    text = said(" ".join(steps), steps[-1][-2])
    by_name = {name: adherence(text, choices, name) for name in PERSPECTIVES}
    assert by_name.pop(asked) >= 0.95
    assert max(by_name.values()) <= 0.1, by_name
    if asked == case[1]:
        assert adherence(text, choices, asked, Truth(drawn.rule, drawn.value, asked == "analytical")) >= 0.95


@pytest.mark.parametrize("author", ["internist", "chain_of_thought", "educator", "emergency"])
def test_own_labelled_texts(author: str) -> None:
    found = measures(read_labelled(LABELLED / f"{author}.json"))
    assert found["own strategy highest"] >= 0.8 and found["none: at most 0.25"] >= 0.84
    assert found["two: both at least 0.5"] >= 0.65
    assert min(value for name, value in found.items() if name.startswith("AUC")) >= 0.85


@pytest.mark.parametrize("name", ["rationales", "rationales_b"])
def test_labelled_texts_that_the_weights_have_not_seen(shared: Path, name: str) -> None:
    found = measures(read_labelled(shared / "data" / "perspectives" / f"{name}.json"))
    assert found["own strategy highest"] >= 0.85 and found["none: at most 0.25"] >= 0.90
    assert found["two: both at least 0.5"] >= 0.6
    assert min(value for name, value in found.items() if name.startswith("AUC")) >= 0.90


def test_published_exemplars(shared: Path) -> None:
    texts = read_labelled(shared / "data" / "perspectives" / "published_exemplars.json")
    assert sum(one.right() and one.scores[one.strategies[0]] >= 0.5 for one in texts) >= 7


@pytest.mark.parametrize("perspective", PERSPECTIVES)
def test_every_criterion_holds_in_its_own_example(perspective: str) -> None:
    for name, criterion in perspectives()[perspective].criteria.items():
        if "text" not in criterion.measure:
            options = {"A": "Metastasis", "B": "Cyst"} if name == "argued" else None
            assert measure(criterion.measure, read(said(criterion.example, "A"), options)) > 0, name


# --- what a score is made of ------------------------------------------------------------------------------------------


def test_a_score_is_style_times_soundness_by_hand() -> None:
    rows = {name: {"bias": -9.0} for name in (*PERSPECTIVES, "sound")}
    rows["analytical"] = {"bias": -1.25, "holds": 2.0}  # 0.75 + 0.25 = 1: of 2, so 1/2 + 1/4
    rows["sound"] = {"bias": 0.0, "findings": 1.05}  # 1.05 - 0.75 = 0.3: of 0.6
    features = {key: 1.0 for one in perspectives().values() for key in one.criteria} | {"findings": 1.0}
    styles, sound = weighed(features, rows)
    assert styles["analytical"] == pytest.approx(0.75) and sound == pytest.approx(0.75)
    assert weighed(features | {"holds": 0.0}, rows)[0]["analytical"] == 0.0  # -1.25 + 0.25: 1 below, nothing left
    none_of_its_own = {key: 0.0 for key in perspectives()["analytical"].criteria}
    rows["analytical"] = {"bias": 9.0}
    assert weighed(features, rows)[0]["analytical"] == 1.0
    assert weighed(features | none_of_its_own, rows)[0]["analytical"] == 0.25


def test_a_third_style_is_taken_from_all() -> None:
    features = {key: 1.0 for one in perspectives().values() for key in one.criteria}
    rows = {name: {"bias": 9.0} for name in (*PERSPECTIVES, "sound")}
    assert set(weighed(features, rows)[0].values()) == {0.0}
    rows["intuitive"] = rows["bayesian"] = {"bias": -9.0}
    assert weighed(features, rows)[0] == {"differential": 1, "intuitive": 0, "analytical": 1, "bayesian": 0}
    rows["intuitive"] = {"bias": 0.35}  # 0.6 of 2: 0.65, half way from free to none
    assert weighed(features, rows)[0]["analytical"] == pytest.approx(0.5)


def test_weights_know_every_criterion_and_no_other() -> None:
    known = {key for one in perspectives().values() for key in one.criteria} | {"bias", "concluded"}
    for name in PERSPECTIVES:
        own = perspectives()[name].criteria
        assert known <= set(weights()[name])
        assert max(weights()[name][key] for key in own) > 1.0  # a style is carried by its own criteria


# --- ground truth -----------------------------------------------------------------------------------------------------


def test_the_true_threshold_pays_and_another_does_not() -> None:
    assert scores(ANALYTICAL, truth=ADULT)[2] == 1.0
    other = ANALYTICAL.replace("0.50", "0.05")
    assert scores(other)[2] == 1.0  # nothing to check it by
    assert scores(other, truth=ADULT)[2] == 0.25
    newborn = Truth(guidelines()["ctr_newborn"], 0.57)  # the population decides
    assert scores(ANALYTICAL, truth=newborn)[2] == 0.25 * 0.25  # and 0.57 is no large heart in a newborn
    assert criteria(said(other), HEART, "analytical", ADULT)["threshold"] == 0.0
    assert criteria(said(other), HEART, "analytical")["threshold"] is None
    on_it = ANALYTICAL.replace("0.57", "0.50")  # a measurement may lie on the threshold
    assert criteria(said(on_it), HEART, "analytical", ADULT)["threshold"] == 1.0
    silent = "Cardiothoracic ratio 0.57. The heart shadow is wide because its wall is thick. So cardiomegaly B."
    assert criteria(said(silent), HEART, "analytical", ADULT)["threshold"] == 0.0  # no better than a false one
    assert scores(silent, truth=ADULT)[2] == pytest.approx(0.25 * scores(silent)[2])


@pytest.mark.parametrize(
    ("stated", "share"), [("0.57", 1.0), ("0.62", 1.0), ("0.67", 0.5), ("0.72", 0.0), ("0.91", 0.0)]
)
def test_a_measurement_is_held_against_the_true_value(stated: str, share: float) -> None:
    for place, text in enumerate((f"Cardiothoracic ratio 0.57. {DIFFERENTIAL}", INTUITIVE, ANALYTICAL)):
        found = scores(text.replace("0.57", stated), truth=ADULT)[place]
        left = 0.25 + 0.75 * share
        assert found == pytest.approx(left * scores(text.replace("0.57", stated))[place], abs=0.02)


def test_the_answer_must_be_what_the_guideline_says_of_the_stated_measurement() -> None:
    assert criteria(said(INTUITIVE), HEART, "intuitive", ADULT)["conclusion"] == 1.0
    small = INTUITIVE.replace("0.57", "0.45")  # and calls it a wide heart
    assert scores(small)[1] == 1.0 and scores(small, truth=Truth(guidelines()["ctr_adult"], 0.45))[1] == 0.25
    assert criteria(said("Wide heart shadow."), HEART, "intuitive")["conclusion"] is None


def test_a_comparison_is_of_what_was_measured() -> None:
    other = "Cardiothoracic ratio 0.57. Criterion for an adult: 0.50. 0.80. 0.50 < 0.80 so high cardiomegaly B."
    assert criteria(said(other), HEART, "analytical")["holds"] == 0.0
    assert scores(other, truth=ADULT)[2] < 0.5 < scores(ANALYTICAL, truth=ADULT)[2]
    for whole in (
        "The cardiothoracic ratio of 0.57 is above 0.50.",
        "The rim measures 2.4 cm, above the limit of 2 cm.",
    ):
        assert criteria(said(whole), HEART, "analytical")["holds"] == 1.0


def test_a_chance_must_move_towards_the_true_label() -> None:
    assert scores(BAYESIAN, truth=ADULT)[3] == 1.0
    of_another = BAYESIAN.replace("cardiomegaly", "normal heart").replace(" B.", " A.")
    assert (
        scores(of_another, letter="A")[3] == 1.0 and scores(of_another, letter="A", truth=ADULT)[3] == 0.25 * 0.25
    )  # the answer is false, too
    small = Truth(guidelines()["ctr_adult"], 0.42)
    assert scores(of_another, letter="A", truth=small)[3] == 1.0
    assert criteria(said(BAYESIAN), HEART, "bayesian", small)["direction"] == 0.0
    assert criteria(said("Wide heart shadow."), HEART, "bayesian", small)["direction"] is None


@pytest.mark.parametrize(
    ("rule", "value", "options", "letter", "perspective", "thought"),
    [
        ("ctr_adult", 0.62, HEART, "B", "analytical",
         "In an adult the cardiothoracic ratio should not exceed 0.50, because a larger silhouette means that volume "
         "load has stretched the ventricular muscle. Here the cardiothoracic ratio is 0.62, above 0.50: cardiomegaly."),
        ("aortic_diameter", 5.8, AORTA, "C", "analytical",
         "A 64 year old smoker has an aneurysm of the abdominal aorta. It measures 5.8 cm, above the 5.5 cm at which "
         "repair is advised, because wall tension rises with radius and the elastin is lost: it may rupture. Repair."),
        ("aortic_diameter", 5.8, AORTA, "C", "analytical",
         "The aortic diameter is 58 mm, above the threshold of 55 mm, because wall tension rises with radius and the "
         "elastin is lost, so the wall may rupture. Repair."),
        ("heart_rate_adult", 130, RATE, "B", "intuitive",
         "A 25 year old with racing QRS complexes, hardly a gap between them. One look at this strip and tachycardia "
         "comes to mind."),
        ("ctr_adult", 0.62, HEART, "B", "bayesian",
         "A normal heart is the likeliest at 70% before the film. The wide silhouette lowers it to 30%, the enlarged "
         "left border to 10%. That leaves cardiomegaly at 90%."),
    ],
)  # fmt: skip
def test_limits_ages_units_and_rivals_are_not_the_measurement(rule, value, options, letter, perspective, thought):
    text = said(thought, letter)
    told = adherence(text, options, perspective)
    assert told >= 0.9 and adherence(text, options, perspective, Truth(guidelines()[rule], value)) == told


def test_where_nothing_is_measured_the_answer_is_held_against_the_truth() -> None:
    assert criteria(said("Wide heart shadow."), HEART, "intuitive", ADULT)["conclusion"] == 1.0
    assert criteria(said("Slim heart shadow.", "A"), HEART, "intuitive", ADULT)["conclusion"] == 0.0


@pytest.mark.parametrize(
    "letters", [["AA", "BB"], ["1", "2"], ["", "("], ["a", "b"], ["A", "C"], [str(n) for n in range(30)]]
)
def test_letters_that_no_answer_can_be_read_by_are_no_crash(letters: list[str]) -> None:
    options = {letter: f"Finding {place}" for place, letter in enumerate(letters)}
    assert set(grades(said(SOUND), options).scores) == set(PERSPECTIVES)


# --- faults: text that a policy may try, each beside a sound twin -----------------------------------------------------

SOUND = (
    "Fever and a dense right lower lobe with air bronchograms point to pneumonia. Pulmonary edema would be bilateral "
    "with a large heart, and here the heart is small. Pneumothorax is ruled out by lung markings that reach the chest "
    "wall. So pneumonia."
)
TWINS = [
    ("few findings", "The pattern is classic. So it is pneumonia, without any doubt.", "A"),
    ("off the subject", "Soften two onions in butter, add ripe tomatoes and simmer until the soup is smooth.", "A"),
    ("placeholder", SOUND.replace("air bronchograms", "[finding]"), "A"),
    ("placeholder", SOUND.replace("air bronchograms", "____"), "A"),
    ("refusal", "I'm unable to interpret this radiograph of the chest. " + SOUND, "A"),
    ("repetition", "The dense lobe and the fever fit pneumonia. " * 6, "A"),
    ("repetition", " ".join(f"The dense lobe and the fever fit {name}." for name in LUNG.values()), "A"),
    ("one build", "Not edema: no lid gout. Not effusion: no urine clot. Not pneumothorax: no knee pus. Pneumonia", "A"),
    ("another option argued for", "Edema would widen the heart, and does not. Pneumothorax: a rim of air is left", "A"),
    ("another option argued for", "At a glance this is pneumothorax: a rim of air and a fine white line.", "A"),
    ("refusal", "I can't provide a diagnosis. Fever and a dense lobe with bronchograms may be pneumonia.", "A"),
    ("language", "Der Befund ist nicht so, und die Lunge ist auch dicht, aber das Herz ist klein: pneumonia.", "A"),
    ("language", "肺の右下葉に濃い陰影があり発熱もあるので肺炎と考えられます。心臓は小さい。pneumonia", "A"),
    ("false comparison", "The heart measures 0.42, above the limit of 0.50 for an adult chest film. So edema.", "B"),
    ("options copied", "Adult, chest film, lobe, fever. Pneumonia, pulmonary edema, pneumothorax, effusion.", "A"),
    ("answer excluded", SOUND, "C"),
    ("answer excluded", "Pneumonia: no. The lobe is clear, there is no fever and no bronchogram.", "A"),
    ("another option argued for", "Dense lobe and fever: pneumonia. The bronchograms are those of pneumonia.", "D"),
    (
        "chances against the words",
        "Pneumonia begins at 50%. Fever supports pneumonia: 30%. A dense lobe makes pneumonia more likely, 20%.",
        "A",
    ),
    (
        "answer grows unlikely",
        "Before the film pneumonia was at 60%. The clear lobes bring pneumonia down to 20%. The heart is small.",
        "A",
    ),
    (
        "chances that do not follow",
        "The prior of pneumonia is 50%. Dense lobe with fever, likelihood ratio 4. The posterior is 20%. So pneumonia.",
        "A",
    ),
    (
        "chances that do not follow",
        "The prior of pneumonia is 50%. Dense lobe with fever and cough. The posterior is 50%. So pneumonia.",
        "A",
    ),
    (
        "four templates",
        "Dense lobe. Pattern: dense right lobe. Candidates: pneumonia, edema. Against edema: dense lobe. Criterion "
        "2 cm, measured 3 cm. 3 > 2. Prior of pneumonia 50%, lobe, likelihood ratio 4. Posterior 80%. So pneumonia.",
        "A",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "thought", "letter"), TWINS)
def test_a_fault_is_told_and_scores_nothing(fault: str, thought: str, letter: str) -> None:
    assert fault in faults(thought, letter=letter)
    assert scores(thought, LUNG, letter) == [0.0] * 4


@pytest.mark.parametrize(
    ("thought", "letter"),
    [
        (SOUND, "A"),
        ("The heart measures 0.42, below the limit of 0.50 for an adult chest film. So no edema but pneumonia.", "A"),
        ("Pneumonia begins at 50%. Fever supports pneumonia: 60%. A dense lobe makes pneumonia more likely, 85%.", "A"),
        ("The prior of pneumonia is 50%. Dense lobe with fever, likelihood ratio 4. The posterior is 80%.", "A"),
        ("I cannot see any thrombus, so embolism is unlikely; fever and a dense lobe fit pneumonia.", "A"),
        ("Edema cannot be ruled out by the small heart alone, but the lobe is dense on one side: edema.", "B"),
        ("Pneumonia: no fever, yet a dense lobe with bronchograms and a cough. Pneumonia.", "A"),
        ("Pneumothorax: a fine line with no markings beyond. Pneumonia shows no such line. So pneumothorax.", "C"),
    ],
)
def test_sound_twins_have_none(thought: str, letter: str) -> None:
    assert faults(thought, letter=letter) == ()


def test_every_fault_is_tried() -> None:
    assert {fault for fault, _, _ in TWINS} == {*FAULTS, "four templates"}


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
        "zzz pattern cardiomegaly", "cardiomegaly unlikely zzz normal heart", "2 mm > limit 1 cardiomegaly",
        "Prior 50% zzz lr 1 posterior 50% cardiomegaly", "Criterion 0.05. 0.57 > 0.05 so cardiomegaly",
        "0.31 < 0.90 so low cardiomegaly",
        "Pattern zzz. Candidates cardiomegaly, normal heart. Against normal heart zzz. Criterion 1. 2 > 1. Prior 50%, "
        "lr 4, posterior 80%. So cardiomegaly",
        "Chest film of an adult. What follows? A. Normal heart B. Cardiomegaly C. Pericarditis D. Dextrocardia. B",
    ],
)  # fmt: skip
def test_cues_without_substance_earn_little(thought: str) -> None:
    assert max(scores(thought)) <= 0.25


# --- open questions, tags, garbage ------------------------------------------------------------------------------------


def test_open_questions_take_candidates_from_the_thought() -> None:
    thought = (
        "The differential includes pneumonia, asthma and embolism. Asthma would wheeze and is unlikely with a focal "
        "shadow. Embolism is ruled out by the normal oxygen and the quiet legs. Fever and a dense lobe leave pneumonia."
    )
    found = grades(f"<think>{thought}</think><answer>Pneumonia</answer>", None)
    assert found.scores["differential"] >= 0.9 and not found.faults
    assert grades(f"<think>{thought}</think><answer>Embolism</answer>", None).faults == ("answer excluded",)


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
    assert adherence(text, HEART, perspective) == 0.0


def test_unknown_perspective() -> None:
    for function in (criteria, adherence):
        with pytest.raises(ValueError, match="lateral"):
            function("x", HEART, "lateral")


FRAGMENTS = (
    "@0 0.5 1,000 > = between and cardiomegaly 50% . <answer> </think> not option b .5 - \u0665 \xb2 qoptionpq".split()
)
ODD_OPTIONS = [HEART, None, {}, {"A": "", "B": "b", "C": "...", "D": "5 (mm)"}, {"A": "Yes", "B": "yes"},
               {chr(65 + i): f"word{i} common" for i in range(26)}]  # fmt: skip


@given(
    st.text(max_size=300) | st.lists(st.sampled_from(SALAD.split() + FRAGMENTS), max_size=80).map(" ".join),
    st.sampled_from(ODD_OPTIONS),
)
@settings(max_examples=400, deadline=None)
def test_any_text_scores_in_the_unit_interval(text: str, options: dict[str, str] | None) -> None:
    for completion in (text, said(text), f"<answer>{text}</answer>"):
        found = grades(completion, options, ADULT)
        assert all(0.0 <= value <= 1.0 and isinstance(value, float) for value in found.scores.values())
        for held in found.criteria.values():
            assert all(value is None or 0.0 <= value <= 1.0 for value in held.values())


@pytest.mark.parametrize(
    "unit",
    ["a", "<think>", "0.5 ", "> 1 ", "1 > 0 ", "cardiomegaly ", "against cardiomegaly ", "candidates ", "a-", "1,111",
     "-", "not very ", "1.1.1.1", " ", "\n", "likelihood ratio 4 ", "prior 50% posterior 60% ", "[a", "<a", "{a ",
     "i am ", "\n- ", "\n1", "normal heart ", "option ", "one in ten ", "no need ", "A: no. "],
)  # fmt: skip
def test_long_texts_take_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    grades(said(text), HEART, ADULT)
    grades(f"<answer>{text}</answer>", None)
    grades(f"<think>{text}", HEART)
    assert time.process_time() - start < 20  # quadratic time would be minutes
