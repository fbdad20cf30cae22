from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mmedexpert.curation import labels as step
from mmedexpert.curation.steps import Records, Verdict, write_step
from mmedexpert.data.ages import age_group, group_of
from mmedexpert.data.phrases import Phrases, words_of
from mmedexpert.data.record import Record
from mmedexpert.data.specialties import SPECIALTIES, labels, primary_specialty, read_rules
from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.errors import UserError

ADULT, CHILD, BRAIN, SURGERY = "adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery"


def primary(question: str, gold: str = "", **metadata: object) -> str:
    return primary_specialty(question=question, answer=gold, metadata=metadata)


def names(question: str, gold: str = "", **metadata: object) -> list[str]:
    return [label.label for label in labels(question=question, answer=gold, metadata=metadata)]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("A 7-month-old is seen", "minor"),
        ("A twelve-year-old comes in", "minor"),
        ("A forty-five-year-old comes in", "adult"),
        ("A patient, aged 2 weeks, vomits", "minor"),
        ("A male patient, age 11, limps", "minor"),
        ("a 36-hour-old", "minor"),
        ("17 y/o with a rash", "minor"),
        ("an 18-year-old recruit", "adult"),
        ("a 1½-year-old", "minor"),
        ("62F with a cough", "adult"),
        ("an elderly farmer", "adult"),
        ("A 24-year-old mother brings her 3-week-old son", "minor"),
        ("A 30-year-old woman brings her 4-year-old daughter", "minor"),
        ("A 4-week-old was born to a 24-year-old", "minor"),
        ("His 5-year-old son had a cold; the 40-year-old now coughs", "adult"),
        ("a 3-month-old fracture in a 40-year-old", "adult"),
        ("Her appendix was taken out at age 7", ""),
        ("A 6-month history of pain", ""),
    ],
)
def test_ages_of_all_spellings_are_the_patients_own(text: str, group: str) -> None:
    assert age_group(text)[0] == group


@pytest.mark.parametrize(
    ("age", "group"), [(9, "minor"), ("70", "adult"), ("006M", "minor"), ("3 weeks", "minor"), ("?", "")]
)
def test_ages_as_data_sets_state_them(age: object, group: str) -> None:
    assert group_of(age)[0] == group
    assert (primary("Which finding is shown?", age=age) == CHILD) == (group == "minor")


def test_phrases_are_whole_words_with_beginnings_and_ends() -> None:
    phrases = Phrases(["open reduction", "biops*", "*ectomy", "ear"])
    words = words_of("Colectomy, then a biopsy near the bear. Open; reduction. OPEN-reduction")
    assert phrases.find(words) == {"*ectomy": "colectomy", "biops*": "biopsy", "open reduction": "open reduction"}
    assert phrases.find(words_of("Open. Reduction")) == {}
    with pytest.raises(ValueError, match="Open"):
        Phrases(["Open reduction"])


@pytest.mark.parametrize(
    ("specialty", "question", "gold"),
    [
        (CHILD, "A 9-year-old has a cough.", ""),
        (CHILD, "A boy falls from his bike and breaks his wrist.", ""),
        (CHILD, "His parents say that he no longer plays in kindergarten.", ""),
        (CHILD, "Which line is the growth plate?", "Salter-Harris type II"),
        (CHILD, "A 29-year-old delivers a male newborn. The newborn is blue. What is wrong?", ""),
        (ADULT, "A 60-year-old has two children and a dry cough.", "Sarcoidosis"),
        (BRAIN, "What does the scan show?", "Subdural hematoma"),
        (BRAIN, "A 50-year-old has loss of vision in the left eye.", ""),
        (BRAIN, "A 40-year-old with tinnitus and hearing loss is seen.", ""),
        (BRAIN, "A 40-year-old with ataxia and a tremor is seen.", ""),
        (BRAIN, "Which structure moves in speech?", "Vocal cords"),
        (SURGERY, "A 50-year-old has a hip fracture. What comes next?", "Physical therapy"),
        (SURGERY, "A 30-year-old is hurt in a motor vehicle collision.", ""),
        (SURGERY, "A 70-year-old is short of breath. What is the cause?", "Adenocarcinoma of the lung"),
        (SURGERY, "A 70-year-old with lymphoma has a rash.", ""),
        (SURGERY, "A 45-year-old has a mass of the thigh. A biopsy is done.", ""),
        (SURGERY, "What does the mammogram show?", ""),
        (SURGERY, "A 45-year-old has pain. What comes next?", "Laparoscopic cholecystectomy"),
        (SURGERY, "On the third postoperative day a 45-year-old has a fever.", ""),
        (SURGERY, "A 20-year-old has pain. What is it?", "Appendicitis"),
        (ADULT, "A 45-year-old has chest pain. What does the ECG show?", "Pericarditis"),
    ],
)
def test_each_kind_of_word_decides(specialty: str, question: str, gold: str) -> None:
    assert primary(question, gold) == specialty


@pytest.mark.parametrize(
    "question",
    [
        "A 50-year-old has a cough. He denies hearing loss, eye pain, or seizures.",
        "A 50-year-old is breathless; oxygen is given by nasal cannula.",
        "A 50-year-old has a cough. Family history is notable for breast cancer.",
        "A 50-year-old has a cough. Her mother died of ovarian cancer and lymphoma.",
        "A 50-year-old has a cough without any fracture or dislocation.",
        "A 50-year-old has a body mass index of 33. A biopsy is planned.",
        "A 50-year-old has a cough. His medical history includes prostate cancer.",
    ],
)
def test_what_is_denied_or_of_relatives_or_past_does_not_decide(question: str) -> None:
    assert primary(f"{question} What is it?", "Asthma") == ADULT


def test_a_childs_brain_tumour_has_three_labels() -> None:
    found = labels(question="A 6-year-old has morning headaches and ataxia. What is it?", answer="Medulloblastoma")
    assert [label.label for label in found[:1]] == [CHILD]
    assert {label.label for label in found} >= {CHILD, SURGERY, BRAIN}
    scores = [label.score for label in found]
    assert scores == sorted(scores, reverse=True)


def test_evidence_names_the_rule_and_the_words() -> None:
    (first, *_) = labels(question="A 50-year-old broke her hip: a fracture.", metadata={})
    assert (first.label, first.method, first.version) == (SURGERY, "rule", read_rules().version)
    assert first.evidence == "trauma: case 'fracture'"
    (first, *_) = labels(question="What is shown?", metadata={"body_system": "Nervous"})
    assert (first.method, first.evidence) == ("dataset_map", "nervous_system: body_system 'nervous'")
    assert labels(question="What is shown?")[0].evidence == "adult: whatever is read"


OPTIONS = {"A": "Asthma", "B": "Glioblastoma", "C": "Hip fracture", "D": "Retinal detachment"}


@pytest.mark.parametrize(
    "question",
    [
        "A 50-year-old coughs. What is it?",
        "A 50-year-old coughs. What is it?\nAnswer Choices: (A) Asthma (B) Glioblastoma (C) Hip fracture",
        "A 50-year-old coughs. What is it? A)Asthma, B)Glioblastoma, C)Hip fracture, D)Retinal detachment",
        "A 50-year-old coughs, no asthma before. What is it? A. Asthma B. Glioblastoma C. Hip fracture",
    ],
)
def test_options_other_than_the_gold_one_do_not_decide(question: str) -> None:
    assert primary_specialty(question=question, options=OPTIONS, answer="A") == ADULT
    assert primary_specialty(question=question, options=OPTIONS, answer="B") == BRAIN
    assert primary_specialty(question=question, options=OPTIONS, answer="Hip fracture") == SURGERY


def test_choices_are_left_out_where_options_are_not_given_apart() -> None:
    stem = "A 50-year-old with asthma coughs; see Figures A) and B). What is it?"
    for tail in (
        "\nOptions: (A) Flu (B) Glioblastoma",
        " Answer choices: A. Flu B. Glioblastoma",
        " A) Flu, B) Glioblastoma",
    ):
        assert primary_specialty(question=stem + tail, answer="Flu") == ADULT
    assert primary("Figure A) shows a fracture, Figure B) a plate.") == SURGERY


def test_one_sign_is_a_hint_and_two_decide() -> None:
    assert names("A 50-year-old with a tremor coughs. What is it?")[:2] == [ADULT, BRAIN]
    assert names("A 50-year-old with a tremor and ataxia coughs. What is it?")[0] == BRAIN


@pytest.mark.parametrize(
    ("specialty", "metadata"),
    [
        (BRAIN, {"Body System": "nervous"}),
        (BRAIN, {"department": "Neurosurgery"}),
        (BRAIN, {"department": "Ophthalmology"}),
        (BRAIN, {"department": "Otolaryngology (ENT)/Head and Neck Surgery"}),
        (SURGERY, {"department": "Orthopedic Surgery"}),
        (SURGERY, {"department": "Cardiovascular Surgery"}),
        (SURGERY, {"department": "Oncology (Medical)"}),
        (SURGERY, {"department": "Urology"}),
        (ADULT, {"department": "Nephrology and Hypertension"}),
        (ADULT, {"department": "Laboratory Medicine and Pathology"}),
        (SURGERY, {"clinical vqa task": "Surgical Instrument Recognition", "department": "Nephrology"}),
        (BRAIN, {"dataset": "ACRIMA"}),
        (BRAIN, {"dataset": "Retinal OCT-C8"}),
        (SURGERY, {"dataset": "BreakHis"}),
        (SURGERY, {"source": "OmniMedVQA Chest CT Scan.json"}),
        (CHILD, {"dataset": "CoronaHack", "modality": "X-Ray"}),
        (CHILD, {"dataset": "OCT & X-Ray 2017", "modality": "X-Ray"}),
        (BRAIN, {"dataset": "OCT & X-Ray 2017", "modality": "Optical Coherence Tomography"}),
        (ADULT, {"dataset": "Covid CT", "modality": "CT(Computed Tomography)"}),
        (BRAIN, {"image_organ": "HEAD"}),
        (BRAIN, {"organ": "oral_cavity"}),
        (SURGERY, {"organ": "breast"}),
        (ADULT, {"organ": "CHEST"}),
        (CHILD, {"source": "PediatricsMQA"}),
        (BRAIN, {"modality": "Fundus Photography"}),
        (SURGERY, {"body_system": "Skeletal", "medical_task": "Treatment"}),
        (ADULT, {"zodiac": "cancer", "department": None}),
    ],
)
def test_what_a_benchmark_tells_decides(specialty: str, metadata: dict[str, object]) -> None:
    assert primary_specialty(question="Which of these is shown?", metadata=metadata) == specialty


def test_a_joint_disease_of_internists_is_none_of_surgeons() -> None:
    told = {"body_system": "Skeletal", "medical_task": "Treatment"}
    assert primary("A 50-year-old has hand pain with morning stiffness. What helps?", "Infliximab", **told) == ADULT


def test_the_same_question_always_has_the_same_labels() -> None:
    told = {"modality": "CT", "body_system": "Nervous", "source": "X"}
    once = labels(question="A 6-year-old with a fracture and a glioma.", metadata=told)
    again = labels(question="A 6-year-old with a fracture and a glioma.", metadata=dict(reversed(told.items())))
    assert once == again


def test_it_is_fast_enough_for_a_hundred_thousand_records() -> None:
    import time

    question = "A 63-year-old with a cough and a history of hypertension is seen in the clinic. " * 10
    start = time.process_time()
    for number in range(200):
        labels(question=f"{question}{number}?")
    assert time.process_time() - start < 2  # loosely: 0.1 s on one idle core


RULES = """
version: 1
ignored: [nasal cannula]
negations: [denies]
families: [family history]
histories: [medical history]
ends: ["."]
reach: 16
rules:
  - {id: adult, label: adult_medicine, score: 0.5, why: rest, when: {}}
  - {id: bones, label: oncology_surgery, score: 0.8, why: bones, when: {stem: [fracture*]}}
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("label: oncology_surgery", "label: surgery", "'bones'.*unknown label 'surgery'"),
        ("why: bones", "because: bones", "'bones'.*unknown key 'because'"),
        (", why: bones", "", "'bones' has no why"),
        ("stem: [fracture*]", "stemm: [fracture*]", "'bones'.*unknown field 'stemm'.*'stem'"),
        ("[fracture*]", "[Fracture]", "'bones', when.stem.*'Fracture'"),
        ("[fracture*]", "[no]", "'bones', when.stem.*quotes"),
        ("[fracture*]", "fracture", "'bones', when.stem.*list"),
        ("score: 0.8", "score: 8", "'bones': score 8"),
        ("id: bones", "id: adult", "two rules are called 'adult'"),
        ("id: bones, ", "", "no id"),
        ("reach: 16", "", "reach"),
        ("when: {}", "when: {stem: [x]}", "adult_medicine"),
    ],
)
def test_a_mistake_in_the_rules_is_told_with_the_rule(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    assert [rule.id for rule in read_rules(path).rules] == ["adult", "bones"]
    wrong = tmp_path / "wrong.yaml"
    assert RULES.count(old) >= 1
    wrong.write_text(RULES.replace(old, new))
    with pytest.raises(UserError, match=told) as error:
        read_rules(wrong)
    assert "\n" not in str(error.value)


# the step

RECORD = Record(
    id="x", images=("secret_glioma.png",), question="A 50-year-old coughs. What is it?", options=OPTIONS, answer="A",
    specialties=("all",), source="made", license="CC0", split="train", image_group="x", provenance={"source": "made"},
)  # fmt: skip


def records_in(folder: Path, *records: Record) -> Records:
    return write_step("made", map(Verdict, records), folder, folder, given=None)


def saying(*texts: str) -> tuple[list[list[Ask]], step.Engine]:
    asked: list[list[Ask]] = []

    def engine(asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        asked.append(list(asks))
        for place in reversed(range(len(asks))):
            text = texts[min(place, len(texts) - 1)]
            yield place, refusal("too long") if text == "refuse" else Reply(text, 1, "stop", 0.0, None)

    return asked, engine


def test_the_step_labels_by_rules_and_keeps_every_record(tmp_path: Path) -> None:
    child = replace(RECORD, id="y", question="A 6-year-old coughs and has a fracture. What is it?")
    organ = replace(RECORD, id="z", groups={"image_organ": "HEAD"})
    first, second, third = step.label(records_in(tmp_path, RECORD, child, organ))
    assert (first.record.specialties, first.reason) == ((ADULT,), "")
    assert second.record.specialties == (CHILD, SURGERY)
    assert third.record.specialties == (BRAIN,)
    assert second.record.provenance["labels"][0] == {
        "label": CHILD, "score": 1.0, "method": "rule", "evidence": "child_by_age: age '6-year-old'", "version": 1,
    }  # fmt: skip
    assert "checks" not in first.record.provenance


def test_others_need_a_score(tmp_path: Path) -> None:
    child = replace(RECORD, question="A 6-year-old coughs and has a fracture. What is it?")
    (only,) = step.label(records_in(tmp_path, child), also=0.9)
    assert only.record.specialties == (CHILD,)


def test_trusted_sources_keep_their_specialties_and_are_not_asked(tmp_path: Path) -> None:
    asked, engine = saying("{}")
    drawn = replace(RECORD, specialties=("cardiology", ADULT), provenance={"source": "phantom"})
    (verdict,) = step.label(records_in(tmp_path, drawn), engine=engine, trusted={"phantom"})
    assert verdict.record.specialties == (ADULT, "cardiology"), "the finer one behind its own"
    assert {entry["method"] for entry in verdict.record.provenance["labels"]} == {"source"}
    assert asked == []
    unsaid = replace(drawn, specialties=("all",))
    (verdict,) = step.label(records_in(tmp_path, unsaid), trusted={"phantom"})
    assert verdict.record.specialties == (ADULT,)


def test_a_model_is_asked_by_text_in_batches_and_its_opinion_stands_beside_the_rules(tmp_path: Path) -> None:
    asked, engine = saying(f'<think>{{}}</think>Sure: {{"primary": "{BRAIN}", "others": ["{ADULT}"], "reason": "eye"}}')
    rows = [replace(RECORD, id=f"x{number}") for number in range(5)]
    verdicts = list(step.label(records_in(tmp_path, *rows), engine=engine, batch=2))
    assert [len(asks) for asks in asked] == [2, 2, 1]
    assert [verdict.record.id for verdict in verdicts] == [row.id for row in rows]
    ask = asked[0][0]
    assert (ask.images, ask.format) == ((), step.FORMAT)
    assert "Asthma" in ask.text and "Glioblastoma" not in ask.text and "secret" not in ask.text
    record = verdicts[0].record
    assert record.specialties == (ADULT, BRAIN)
    assert record.provenance["checks"]["label"] == {"agreed": False}
    assert [entry["label"] for entry in record.provenance["labels"] if entry["method"] == "llm"] == [BRAIN, ADULT]
    assert not any(verdict.reason for verdict in verdicts)


def test_disagreement_drops_only_where_that_is_wished(tmp_path: Path) -> None:
    says = [f'{{"primary": "{name}", "others": [], "reason": ""}}' for name in (BRAIN, ADULT)]
    rows = records_in(tmp_path, RECORD, replace(RECORD, id="y"))
    first, second = step.label(rows, engine=saying(*says)[1], drop_disagreement=True)
    assert (first.reason, second.reason) == ("rules and model disagree on the specialty", "")
    assert ADULT in first.detail and BRAIN in first.detail
    assert second.record.provenance["checks"]["label"] == {"agreed": True}


@pytest.mark.parametrize("text", ["refuse", "", "brain", '{"primary": "skin"}', "{broken}", "[1]"])
def test_a_reply_that_says_nothing_neither_agrees_nor_drops(tmp_path: Path, text: str) -> None:
    (verdict,) = step.label(records_in(tmp_path, RECORD), engine=saying(text)[1], drop_disagreement=True)
    assert (verdict.reason, verdict.record.specialties) == ("", (ADULT,))
    assert verdict.record.provenance["checks"]["label"]["agreed"] is None


def test_images_are_shown_where_that_is_wished(tmp_path: Path) -> None:
    asked, engine = saying("{}")
    list(step.label(records_in(tmp_path, RECORD), engine=engine, show_images=True))
    assert asked[0][0].images == (tmp_path / "secret_glioma.png",)


def test_every_specialty_has_a_rule() -> None:
    assert {rule.label for rule in read_rules().rules} == set(SPECIALTIES)
