"""MedEvalKit's verdicts on known vectors, and the properties that make the robust parser safe as a reward."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.scoring import Protocol, Verdict, score_choice
from mmedexpert.scoring.choice import has_format

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
        "The finding is \\boxed{C} as shown", "<answer>C</answer> so <answer>C. Radial head replacement</answer>",
        "C</answer>", "<answer></answer><answer>C</answer>",
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
        "<answer>B</answer> wait <answer>C</answer>", "<answer>A<answer>C</answer>", "<answer>C</answer><answer>B",
        "<think>a</think><answer>B</answer><think>b</think><answer>C</answer>", "<answer>C</answer><answer>or</answer>",
    ],
)  # fmt: skip
def test_unparsed(response: str) -> None:
    assert [score_choice(response, ELBOW, gold, "robust") for gold in LETTERS] == [UNPARSED] * 5


# --- robust: sentences, corrections and negations ---------------------------------------------------------------------

LUNG = ["A. Pulmonary edema", "B. Pneumonia", "C. Normal lung", "D. Pneumothorax"]

READ = {
    "I would pick B \u2014 a safe choice.": "B", "Answer: B \u2014 Pneumonia": "B", "I choose B - it fits.": "B",
    "Answer: D, not B": "D", "The answer is D rather than B": "D", "The correct option is D, not A or B.": "D",
    "The answer is D and not A": "D", "The diagnosis is pneumonia, not pulmonary edema.": "B",
    "Answer: A\nAfter checking the reasoning, I need to correct this.\nAnswer: B": "B",
    "Answer: A. Correction. Answer: B": "B", "A: no. B: yes.": "B", "A\nI was wrong.\nB": "B",
    "My initial answer is A, but the final answer is B": "B", "It is not A, the answer is B": "B",
    "There is no effusion, so the answer is B": "B", "Option A is wrong so the answer is B": "B",
    "The image shows pneumonia.": "B", "This chest X-ray demonstrates a pneumothorax.": "D",
    "The CT scan is most consistent with pneumonia.": "B", "The findings are suggestive of pneumonia.": "B",
    "The patient most likely has pneumonia.": "B", "He has pneumonia": "B",
    "The chest radiograph is consistent with pneumonia (Option B).": "B",
    "Based on the image, the most likely diagnosis is pneumonia.": "B",
    "In this image, the diagnosis is pneumonia": "B", "Given the findings, I choose B": "B",
    "The image shows pneumonia. The answer is D.": "D", "The image shows pneumonia.\n\nD": "D",
    "\u7b54\u6848\u662fB": "B", "\u7b54\u6848\u4e3aB\u3002": "B", "\u6b63\u786e\u7b54\u6848\u662f**B**": "B",
    "\u9009B": "B", "\u6545\u9009B\u3002": "B", "B\u662f\u6b63\u786e\u7b54\u6848": "B",
    "\u7b54\u6848\u662fB\uff0c\u56e0\u4e3a\u6709\u5b9e\u53d8": "B",
}  # fmt: skip
NOT_READ = [
    "I do not think the answer is B", "I don't believe the answer is B", "I doubt the answer is B",
    "I cannot tell whether the answer is B", "The wrong answer is B", "The least likely answer is B",
    "A possible answer is B", "Is it pneumonia? No, it is not.", "Is the answer B?", "B. Wait, that is wrong.",
    "B. Incorrect.", "A: no", "A) Wrong.", "Answer: B. I made a mistake.", "I was wrong. I need to correct this.",
    "I choose A - no, B", "I would pick B \u2014 or C", "I would pick B \u2014 not sure",
    "I would not pick B \u2014 no.",
    "Answer: D, not D", "Answer: A or D, not B", "Answer: not B", "The answer is A, not", "Rather than B",
    "The answer A is not B", "Answer: D, not B but C", "D. Answer: A, not D",
    "The image shows a", "The image shows B", "The image shows no pneumonia.", "The image may show pneumonia",
    "The image shows pneumonia or pulmonary edema.", "The image shows pneumonia. This is unlikely.",
    "The image shows pneumonia. Pneumothorax is also seen.", "The image shows pneumonia. He has pneumothorax.",
    "The chest radiograph is consistent with pneumonia (Option C).", "The findings exclude pneumonia.",
    "The chest radiograph is not consistent with pneumonia (Option B).", "The image shows pneumonia? I doubt it.",
    "The image shows pneumonia. I cannot say more, the answer is unclear.", "The patient doesn't have pneumonia.",
    "Maybe B", "It could be B", "Rules out C, leaving D", "I'm sorry, I cannot help with medical images such as B.",
    "\u7b54\u6848\u4e0d\u662fB", "\u4e0d\u9009B", "\u7b54\u6848\u662fB\u8fd8\u662fC", "B\u548cC", "B\u662f\u9519\u7684",
]  # fmt: skip


@pytest.mark.parametrize(("response", "letter"), READ.items())
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sentences_and_corrections_are_read(response: str, letter: str, wrapper: str) -> None:
    assert picked(wrapper.format(response), LUNG) == letter


@pytest.mark.parametrize("response", NOT_READ)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_a_reader_would_not_take_is_unparsed(response: str, wrapper: str) -> None:
    assert picked(wrapper.format(response), LUNG) is None


STATEMENTS = [
    "The image shows {t}.", "This chest X-ray demonstrates a {t}.",
    "The findings are consistent with {t} (Option {x}).",
    "The patient most likely has {t}.", "Based on the scan, the most likely diagnosis is {t}.", "Answer: {x}, not {y}",
    "I would pick {x} \u2014 a safe choice.", "\u7b54\u6848\u662f{x}\u3002",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(STATEMENTS),
    letters=st.lists(st.sampled_from("ABCD"), min_size=2, max_size=2, unique=True),
    case=st.sampled_from([str, str.lower, str.upper]),
    denial=st.sampled_from(["", "It is not so. ", "No. ", "I doubt it: ", "Or is it? ", "However, "]),
)
def test_a_statement_is_read_as_its_own_option_or_not_at_all(
    form: str, letters: list[str], case: Callable[[str], str], denial: str
) -> None:
    texts = [LUNG["ABCD".index(letter)].partition(". ")[2] for letter in letters]
    response = case(form.format(x=letters[0], y=letters[1], t=texts[0]))
    assert picked(response, LUNG) == letters[0], response
    assert picked(f"{denial}{response}", LUNG) in (letters[0], None)
    other = case(form.format(x=letters[1], y=letters[0], t=texts[1]))
    assert picked(f"{response} {other}", LUNG) is None, f"{response} {other}"
    if "{t}" in form:
        assert picked(response.replace(case(texts[0]), f"no {case(texts[0])}"), LUNG) is None


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
        "The answer is a lesion. ", "the image shows pneumonia ", "the ct ", "answer: b \u2014 ", ", answer", "not ",
        "answer a not b ", "\u7b54\u6848\u662f", "<answer>A</answer><think>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", ["medevalkit", "robust"])
def test_long_responses_are_fast(unit: str, protocol: Protocol) -> None:
    response = (unit * 100_000)[:100_000]
    start = time.process_time()
    picked(response, CHEST, protocol)
    has_format(response)
    assert time.process_time() - start < 15  # quadratic time would be minutes


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
