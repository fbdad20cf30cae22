"""MedEvalKit's prompts and verdicts: all known vectors, and rules that commit 9b12e3b follows by reading it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.data.record import Record
from mmedexpert.runtime.build import function
from mmedexpert.scoring.judged import Judged
from mmedexpert.scoring.medevalkit import ask, choice_texts, judge

CONF = Path(__file__).parents[1] / "conf"
ELBOW = {
    "A": "Lateral ligament", "B": "Capsular plication", "C": "Radial head replacement", "D": "ORIF",
    "E": "Medial collateral",
}  # fmt: skip


def question(kind: str, answer: str, options: dict[str, str] | None = None, language: str = "en") -> Record:
    return Record(
        id="q", images=("a.png",), question="What is it?", options=options, answer=answer, specialties=("all",),
        source="s", license="CC0", split="test", image_group="a", kind=kind, language=language,
    )  # fmt: skip


def rules_of(benchmark: str) -> tuple[Any, Any]:
    """How a benchmark's file has its questions asked and judged."""
    config = yaml.safe_load((CONF / "benchmark" / f"{benchmark}.yaml").read_text())
    return tuple(function(config[part], part) for part in ("ask", "judge"))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_choice_prompt() -> None:
    assert ask(question("choice", "A", {"A": "CT", "B": "MRI"})) == (
        "\nQuestion: What is it?\nOptions: \nA. CT\nB. MRI\nAnswer with the option's letter from the given choices"
        " directly."
    )
    raw = question("choice", "A", {"A": "A:CT ", "B": " B: MRI"})
    asked, _ = rules_of("pmc_vqa")
    assert asked(raw).splitlines()[2:5] == ["Options: ", "A:CT ", " B: MRI"]
    assert choice_texts(raw) == ["A. A:CT ", "B.  B: MRI"]  # of any other data set


@pytest.mark.parametrize(
    ("kind", "language", "benchmark", "instruction"),
    [
        ("yes_no", "en", "vqa_rad", "Please output 'yes' or 'no'(no extra output)."),
        ("closed", "en", "slake", "Answer the question using a single word or phrase."),
        ("yes_no", "en", "slake", "Answer the question using a single word or phrase."),
        ("open", "en", "path_vqa", "Please answer the question concisely."),
        ("open", "zh", "slake", "\u8bf7\u7b80\u8981\u56de\u7b54\u8be5\u95ee\u9898\u3002"),
    ],
)
def test_other_prompts(kind: str, language: str, benchmark: str, instruction: str) -> None:
    asked, _ = rules_of(benchmark)
    assert asked(question(kind, "yes", language=language)) == f"What is it?\n{instruction}"


def test_chinese_prompts_are_chinese() -> None:
    for kind in ("yes_no", "closed", "open", "choice"):
        options = {"A": "CT"} if kind == "choice" else None
        prompt = ask(question(kind, "A", options, "zh"))
        assert "Please" not in prompt and "Answer" not in prompt and prompt.endswith("\u3002")


# --- choice -----------------------------------------------------------------------------------------------------------


def test_all_vectors(shared: Path) -> None:
    vectors = json.loads((shared / "docs" / "medevalkit_vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) == 600
    for vector in vectors:
        options = {choice[0]: choice[3:] for choice in vector["choices"]}
        record = question("choice", vector["gold"], options)
        assert choice_texts(record) == vector["choices"]
        assert judge(record, vector["response"]).correct == vector["correct"], vector


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("", "A"),
        ("C", "C"),
        ("(C)", "E"),
        ("The answer is: C", "D"),
        ("<answer>B</answer> then <answer>C</answer>", "B"),
    ],
)
def test_choice_truth_table(response: str, letter: str) -> None:
    for gold in ELBOW:
        assert judge(question("choice", gold, ELBOW), response) == Judged(gold == letter, letter, True)


def test_pmc_is_not_searched_for_tags_first() -> None:
    pmc = {letter: f"{letter}:{text}" for letter, text in ELBOW.items()}
    _, of_pmc = rules_of("pmc_vqa")
    assert of_pmc.keywords == rules_of("pmc_vqa_clean")[1].keywords
    for response, before, after in (
        (r"<answer>B</answer> \boxed{C}", "B", "C"),
        ("C\n\n<answer>B</answer>", "B", "C"),
        ("<answer>C</answer>", "C", "C"),
    ):
        assert judge(question("choice", "A", ELBOW), response).picked == before
        assert of_pmc(question("choice", "A", pmc), response).picked == after
    assert of_pmc(question("choice", "B", pmc), "B:Capsular plication").picked == "B"


# --- yes or no --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "picked"),
    [
        ("yes", "yes"), ("Yes.", "yes"), ("**Yes**", "yes"), ("No", "no"), ("", None), ("yes or no", None),
        ("not sure", "no"), ("normal", "no"), ("I know", "no"), ("eyes", "yes"), ("Yes, it is not normal", None),
        ("y.e\ns", "yes"), ("no. the answer is yes", "yes"), ("yes\nAnswer: no", "no"), ("maybe", None),
        ("<think>no</think><answer>yes</answer>", "yes"), (r"<think>no</think>\boxed{Yes}", "yes"),
        ("<answer>no</answer><answer>yes</answer>", None), ("<answer></answer> no", "no"),
        (r"\boxed{no} <answer>yes</answer>", "no"), (r"\boxed{yes", None), ("it is boxed: yes", None),
        ("boxed <answer>yes</answer>", "yes"), ("<ANSWER>yes</ANSWER> no", "yes"),
        ("\u7b54\u6848: yes \u7b54\u6848: no", "no"), ("<think>no</think>yes", None),
    ],
)  # fmt: skip
def test_yes_no_truth_table(response: str, picked: str | None) -> None:
    for gold in ("yes", "no", "Yes"):
        expected = Judged(picked == gold.lower(), picked, picked is not None)
        assert judge(question("yes_no", gold), response) == expected, response


# --- closed and open --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        ("Lung", "lung", True), ("Lung", "Lung.", True), ("Lung", "lu\nng", True), ("Lung", " lung", False),
        ("Lung", "The lung", False), ("Lung", "answer:lung", True), ("Lung", "answer: lung", False),
        ("Lung", "<answer> lung </answer>", True), ("Lung", r"\boxed{ Lung }", True),
        ("Yes", "yes", True), ("Yes", "Yes, it is", False), ("yes", "Yes, it is", True), ("no", "normal", True),
        ("Lung.", "lung.", False), ("\u80ba", "\u80ba", True), ("\u80ba", "\u80ba\u3002", False),
    ],
)  # fmt: skip
def test_closed_truth_table(gold: str, response: str, correct: bool) -> None:
    assert rules_of("slake")[1](question("closed", gold), response).correct is correct


@pytest.mark.parametrize(
    ("gold", "response", "benchmark", "correct"),
    [
        ("Left lung", " left lung\n", "vqa_rad", True), ("Left lung", " left lung\n", "slake", False),
        (" Left lung", "left lung", "path_vqa", True), ("left lung", "left lung.", "vqa_rad", False),
        ("left lung", "The answer is left lung", "vqa_rad", False), ("x", r"a \boxed{X}", "slake", True),
    ],
)  # fmt: skip
def test_open_truth_table(gold: str, response: str, benchmark: str, correct: bool) -> None:
    judged = rules_of(benchmark)[1](question("open", gold), response)
    assert judged.correct is correct and judged.scores["exact_match"] == correct


def test_open_scores_keep_the_swapped_names_and_the_package_s_numbers() -> None:
    scores = judge(question("open", "the left lung"), "left lung lobe apex").scores
    # true precision 2/4, recall 2/3, F1 4/7; BLEU-1 2/4, BLEU-2 sqrt(2/4 * 1/3); ROUGE's denominators have + 1e-8
    assert scores == pytest.approx(
        {
            "exact_match": 0, "precision": 4 / 7, "recall": 1 / 2, "f1": 2 / 3,
            "bleu1": 1 / 2, "bleu2": (1 / 6) ** 0.5, "bleu3": 0, "bleu4": 0,
            "rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7,
        },
        abs=1e-7,
    )  # fmt: skip
    # a full stop is a token of BLEU, and parts sentences of ROUGE, which counts distinct words
    scores = judge(question("open", "lung"), "lung lung.").scores
    assert (scores["bleu1"], scores["precision"]) == pytest.approx((1 / 3, 2 / 3))
    assert scores["rouge1"] == pytest.approx(1) and scores["rougeL"] == pytest.approx(1)


def test_nothing_to_read() -> None:
    for kind in ("yes_no", "closed", "open"):
        judged = judge(question(kind, "yes"), "")
        assert (judged.correct, judged.picked, judged.parsed) == (False, None, False)
    assert set(judge(question("open", "lung"), "").scores.values()) == {0.0}
    assert set(judge(question("open", "lung"), "...").scores.values()) == {0.0}


@settings(max_examples=200, deadline=None)
@given(
    response=st.text(max_size=40)
    | st.lists(
        st.sampled_from(["yes", "no", " ", "\n", ".", "<answer>", "</answer>", r"\boxed{", "}", "answer is"])
    ).map("".join),
    kind=st.sampled_from(["yes_no", "closed", "open"]),
    gold=st.sampled_from(["yes", "no", "Left lung", ".", " "]),
)
def test_any_text_gets_a_verdict(response: str, kind: str, gold: str) -> None:
    judged = judge(question(kind, gold), response)
    assert judged.parsed == (judged.picked is not None) and (bool(judged.scores) == (kind == "open"))
    assert all(0 <= score <= 1 for score in judged.scores.values())
    if kind == "yes_no":
        opposite = judge(question(kind, {"yes": "no", "no": "yes"}.get(gold, gold)), response)
        assert not (judged.correct and opposite.correct and gold in ("yes", "no"))


@pytest.mark.parametrize(
    "unit", ["x", " ", "\n", "a.", "a b ", "left lung. ", "<answer>", r"\boxed{", "answer is ", "\u80ba"]
)
@pytest.mark.parametrize("kind", ["yes_no", "closed", "open", "choice"])
def test_huge_responses_are_fast(unit: str, kind: str) -> None:
    record = question(kind, "A" if kind == "choice" else "the left upper lung", ELBOW if kind == "choice" else None)
    start = time.process_time()
    judge(record, (unit * 100_000)[:100_000])
    assert time.process_time() - start < 15  # quadratic time would be minutes
