"""MedEvalKit's verdicts on known vectors, and the properties that make the robust parser safe as a reward."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.scoring import Protocol, Verdict, has_format, score_choice

ELBOW = [
    "A. Lateral ligament",
    "B. Capsular plication",
    "C. Radial head replacement",
    "D. ORIF",
    "E. Medial collateral",
]
CHEST = ["A. Pneumonia", "B. No finding", "C. Pleural effusion", "D. Pneumothorax"]
LETTERS = "ABCDE"
UNPARSED = Verdict(correct=False, picked=None, parsed=False)


def picked(response: str, choices: list[str] = ELBOW, protocol: Protocol = "robust") -> str | None:
    return score_choice(response, choices, "A", protocol).picked


# --- medevalkit -------------------------------------------------------------------------------------------------------


def test_medevalkit_vectors() -> None:
    shared = Path(os.environ.get("MMEDEXPERT_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "docs" / "medevalkit_vectors.json"
    if not path.is_file():
        pytest.skip(f"no {path}: verdicts of the original scorer are not part of this repository")
    vectors = json.loads(path.read_text(encoding="utf-8"))
    assert len(vectors) == 600
    for vector in vectors:
        verdict = score_choice(vector["response"], vector["choices"], vector["gold"], "medevalkit")
        assert verdict.correct == vector["correct"], vector


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("", "A"), (r"\boxed{}", "A"),
        ("C", "C"), ("C\n", "C"), ("C. because x", "C"), ("The answer is C", "C"), ("because\n\nC", "C"),
        ("<answer> C </answer>", "C"), (r"\boxed{C. Radial head replacement}", "C"), ("final answer C", "C"),
        (r"\boxed{Radial head replacement}", "C"), ("Answer: C) Radial head", "C"),
        (r"<think> the answer is B </think> \boxed{C}", "C"), ("<answer>C: Radial head replacement</answer>", "C"),
        ("(C)", "E"), ("C)", "E"), ("**C**", "E"), (r"\boxed{(C)}", "E"), (r"\boxed{C)}", "E"),
        ("<answer>(C)</answer>", "E"), ("C is correct", "E"), ("I choose C.", "E"),
        ("Option C", "B"), ("The correct option is C", "B"), ("The answer is C because x", "B"),
        ("<answer>B</answer> then <answer>C</answer>", "B"),
        ("The answer is: C", "D"), ("The word boxed appears.\n\nC", "C"), ("The word boxed appears: C", "D"),
    ],
)  # fmt: skip
def test_medevalkit_truth_table(response: str, letter: str) -> None:
    verdicts = {gold: score_choice(response, ELBOW, gold, "medevalkit") for gold in LETTERS}
    assert [gold for gold, verdict in verdicts.items() if verdict.correct] == [letter]
    assert all(verdict.parsed and verdict.picked == letter for verdict in verdicts.values())


# --- robust: what it reads --------------------------------------------------------------------------------------------

# Every way to write one answer; {x} is the letter, {t} the option's text.
FORMS = [
    "{x}", "({x})", "[{x}]", "{x})", "{x}.", "{x}:", "{x},", "**{x}**", "**({x})**", "__{x}__", '"{x}"', "$ {x} $",
    r"\boxed{{{x}}}", r"\boxed{{({x})}}", r"$\boxed{{\text{{{x}}}}}$", r"\boxed{{{x}. {t}}}", r"\boxed{{{t}}}",
    "The answer is {x}", "The answer is: {x}", "**Answer:** {x}", "Final answer: ({x}).", "Option {x}", "I choose {x}.",
    "The correct option is {x}", "{x} is correct", "Therefore, {x}", "{t}", "{t}.", "{x}. {t}", "({x}) {t}", "{x}) {t}",
    "{x}: {t}", "{x}.{t}", "**{x}. {t}**", "{x} ({t})", "The answer is {t}.", "Diagnosis: {t}",
]  # fmt: skip
WRAPPERS = ["{}", "<answer>{}</answer>", "<think>It may be (B) or D.</think>{}", "<think>A?</think><answer>{}</answer>"]


def write(form: str, letter: str, choices: list[str] = ELBOW) -> str:
    return form.format(x=letter, t=choices[LETTERS.index(letter)].partition(". ")[2])


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    letter=st.sampled_from(LETTERS),
    wrapper=st.sampled_from(WRAPPERS),
    case=st.sampled_from([str, str.lower, str.upper, full_width]),
    space=st.text(" \n\t\r", max_size=4),
)
def test_formatting_never_changes_the_letter(
    form: str, letter: str, wrapper: str, case: Callable[[str], str], space: str
) -> None:
    answer = case(write(form, letter))
    response = wrapper.format(f"{space}{answer}{space}")
    for gold in LETTERS:
        verdict = score_choice(response, ELBOW, gold.lower(), "robust")
        assert (verdict.picked, verdict.parsed, verdict.correct) == (letter, True, gold == letter), response


@pytest.mark.parametrize(
    "response",
    [
        "C because x", "C. because x", "The answer is C because B is excluded", "because\n\nC",
        "C\n\nThe opacity is seen.", "Based on the blunted angle, the answer is C.", "C, C and C",
        "Option A is wrong. The answer is C.", "The answer is not A. The answer is C.", "Answer: C) Radial head",
        "The finding is \\boxed{C} as shown",
        "<answer>B</answer> wait <answer>C</answer>", "<answer>A<answer>C</answer>", "C</answer>",
        "the answer is B</think>C", "<answer>C</answer><think>or B",
        "<think>a</think>B<think>b</think><answer>C</answer>",
    ],
)  # fmt: skip
def test_a_reason_or_a_draft_does_not_hide_the_answer(response: str) -> None:
    assert picked(response) == "C"


def test_options_that_look_like_letters_or_like_each_other() -> None:
    blood = ["A. O", "B. A", "C. B", "D. AB"]
    assert [picked(text, blood) for text in ("A", "AB", "B. A", "O")] == ["A", "D", None, "A"]
    stages = ["A. Stage I", "B. Stage II", "C. No stage I", "D. normal", "E. Normal"]
    assert [picked(text, stages) for text in ("stage i", "Stage II", "no stage I")] == ["A", "B", "C"]
    assert [picked(text, stages) for text in ("normal", "E. Normal", "D) normal")] == [None, "E", "D"]
    signs = ["A. < 2.5 mm", "B. > 2.5 mm", "C. HER2+", "D. HER2-"]
    assert [picked(text, signs) for text in ("> 2.5 mm", "<2.5 mm", "HER2+", "HER2-")] == ["B", "A", "C", "D"]
    germs = ["A. S. aureus", "B. E. coli", "C. C. difficile", "D. Neither", "E. Both"]
    assert [picked(text, germs) for text in ("The answer is E. coli", "C. difficile", "B. E. coli")] == ["B", "C", "B"]
    assert picked("Pleural effusion", ["Pneumonia", "Pleural effusion"]) == "B"


# --- robust: what it must not read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        "", "   ", "\\boxed{}", "neither", "None of the above", "A or B", "A, B", "AB", "A/B", "A-C", "(A)(B)", "Z",
        "The answer is not A.", "The answer isn't A", "A is wrong", "A is not correct", "Unlike option A, it is large.",
        "A fracture is seen.", "This is a fracture.", "The answer is a fracture of the elbow.", "I see a.",
        "It is a correct option", "e.g. a lesion, i.e. e.g.", "Hepatitis B is present.", "vitamin D.",
        "No radial head replacement", "It is ORIF, not lateral ligament.", "A. ORIF", "D. Medial collateral",
        "<answer></answer>", "<answer>C", "C <answer>", "</answer>C<answer>", "<answer>A or C</answer> C",
        "<think>C", "<think>C</think>", "<answer>C</answer></think>", "<think><answer>C</answer>", "<THINK>C",
        "A A Final answer: (B).", "A final answer: B",
    ],
)  # fmt: skip
def test_unparsed(response: str) -> None:
    assert [score_choice(response, ELBOW, gold, "robust") for gold in LETTERS] == [UNPARSED] * 5


@settings(max_examples=300, deadline=None)
@given(
    forms=st.lists(st.sampled_from(FORMS), min_size=2, max_size=4),
    letters=st.lists(st.sampled_from(LETTERS), min_size=2, max_size=4).filter(lambda chosen: len(set(chosen)) > 1),
    joiner=st.sampled_from([" ", "\n", ", ", " or ", " and ", "; ", " / ", ". ", "\n\n"]),
    tagged=st.booleans(),
)
def test_several_answers_are_never_rewarded(forms: list[str], letters: list[str], joiner: str, tagged: bool) -> None:
    response = joiner.join(write(forms[i % len(forms)], letter) for i, letter in enumerate(letters))
    if tagged:
        response = f"<think>so</think><answer>{response}</answer>"
    assert not any(score_choice(response, ELBOW, gold, "robust").parsed for gold in LETTERS), response


@settings(max_examples=200, deadline=None)
@given(
    thought=st.text("ABCabc <>/\n.()", max_size=40) | st.sampled_from([write(form, "B") for form in FORMS]),
    answer=st.sampled_from(["", *(write(form, "C") for form in FORMS)]),
    tags=st.sampled_from(
        [("<think>", "</think>"), ("<Think>", "</THINK>"), ("", "</think>"), ("<think><think>", "</think>")]
    ),
)
def test_a_thought_is_never_read(thought: str, answer: str, tags: tuple[str, str]) -> None:
    for body in (answer, f"<answer>{answer}</answer>"):
        assert picked(f"{tags[0]}{thought}{tags[1]}{body}") == ("C" if answer else None)
    assert picked(f"<think>{tags[0]}{thought.replace('</think>', '')}") is None


PROSE = ["this", "shows", "is", "the", "answer", "with", "of", "it", "an", "adult", "seen", "lesion"]


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from(PROSE), max_size=6),
    article=st.sampled_from(["a", "A"]),
    noun=st.sampled_from(["fracture", "nodule", "finding", "choice", "option", "correct"]),
    end=st.sampled_from(["", ".", " is seen.", "\n"]),
)
def test_an_article_is_not_option_a(words: list[str], article: str, noun: str, end: str) -> None:
    assert picked(" ".join([*words, article, noun]) + end) is None


@settings(max_examples=300, deadline=None)
@given(
    response=st.text(max_size=60)
    | st.lists(st.sampled_from([*"ABC ().\n{}", "<answer>", "</answer>", "<think>", "</think>", "\\boxed{"])).map(
        "".join
    ),
    choices=st.lists(st.text(max_size=8), min_size=1, max_size=10),
    protocol=st.sampled_from(["medevalkit", "robust"]),
)
def test_any_text_gets_one_verdict(response: str, choices: list[str], protocol: Protocol) -> None:
    letters = "ABCDEFGHIJ"[: len(choices)]
    verdicts = [score_choice(response, choices, gold, protocol) for gold in letters]
    choice = verdicts[0].picked
    assert choice is None or choice in letters
    assert [verdict.correct for verdict in verdicts] == [gold == choice for gold in letters]
    assert all(verdict.parsed == (choice is not None) for verdict in verdicts)
    assert choice is not None or protocol == "robust"


@pytest.mark.parametrize(
    "unit",
    [
        "x", " ", "\n", "(", "**A** ", "A ", "a.", "a'", "<answer>", "</answer>", "<answer>A</answer>",
        "<think>", "</think>", "\\boxed{", "\\boxed ", "\\boxed{ {", "\\boxed{A} ", "pneumonia ", "pleural effusio",
        "The answer is a lesion. ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", ["medevalkit", "robust"])
def test_long_responses_are_fast(unit: str, protocol: Protocol) -> None:
    response = (unit * 100_000)[:100_000]
    start = time.process_time()
    picked(response, CHEST, protocol)
    has_format(response)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("gold", ["", "E", "AB", "1", "Pneumonia"])
def test_gold_must_be_the_letter_of_a_choice(gold: str) -> None:
    with pytest.raises(ValueError, match="gold"):
        score_choice("A", CHEST, gold, "robust")


def test_protocol_must_be_known() -> None:
    with pytest.raises(ValueError, match="protocol"):
        score_choice("A", CHEST, "A", "strict")  # type: ignore[arg-type]


# --- has_format -------------------------------------------------------------------------------------------------------

PIECES = ["<think>", "why", "</think>", "<answer>", "C", "</answer>"]


def test_format_is_one_thought_then_one_answer() -> None:
    assert has_format("".join(PIECES)) and has_format("\n" + "\n ".join(PIECES) + "\n")
    assert has_format("<think></think><answer>C</answer>")


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.sampled_from([*PIECES, " "]), max_size=9))
def test_nothing_else_has_the_format(pieces: list[str]) -> None:
    tags = [piece for piece in pieces if piece.startswith("<")]
    tagged = tags == [piece for piece in PIECES if piece.startswith("<")]
    depths = [
        sum(p.startswith("<") for p in pieces[:i]) for i, p in enumerate(pieces) if not p.startswith("<") and p != " "
    ]
    assert has_format("".join(pieces)) == (tagged and all(depth in (1, 3) for depth in depths))


@pytest.mark.parametrize("extra", ["x", "<answer>C</answer>", "<think></think>", "</answer>"])
def test_anything_around_or_between_breaks_the_format(extra: str) -> None:
    thought, answer = "<think>why</think>", "<answer>C</answer>"
    assert not any(
        map(has_format, (extra + thought + answer, thought + extra + answer, thought + answer + extra, extra))
    )
    assert not has_format(answer + thought) and not has_format(full_width(thought + answer))
