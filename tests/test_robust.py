"""The robust judge: what it reads of every kind of question, and what it must not read."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.data.record import Record
from mmedexpert.scoring.judged import Judged
from mmedexpert.scoring.robust import judge, read_text, read_yes_no

WRAPPERS = [
    "{}",
    "<answer>{}</answer>",
    "<think>Yes or no? No. Right lung.</think>{}",
    "<think>a</think><answer>{}</answer>",
]


def question(kind: str, answer: str, options: dict[str, str] | None = None, language: str = "en") -> Record:
    return Record(
        id="q", images=("a.png",), question="What is it?", options=options, answer=answer, specialties=("all",),
        source="SLAKE test.json", license="CC0", split="test", image_group="a", kind=kind, language=language,
    )  # fmt: skip


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


# --- choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"A": "CT", "B": "MRI"}, {"A": " A:CT ", "B": "B: MRI"}])
def test_choice(options: dict[str, str]) -> None:
    for response, picked in (("(B)", "B"), ("MRI", "B"), ("B: MRI", "B"), ("ct", "A"), ("A or B", None), ("", None)):
        for gold in "AB":
            expected = Judged(picked == gold, picked, picked is not None)
            assert judge(question("choice", gold, options), response) == expected, response


# --- yes or no --------------------------------------------------------------------------------------------------------

FORMS = [
    "{x}", "{x}.", "**{x}**", "({x})", '"{x}"', "__{x}__", "`{x}`", "[{x}]", "$ {x} $", r"\boxed{{{x}}}",
    r"$\boxed{{\text{{{x}}}}}$", "The answer is {x}", "The answer is: {x}", "**Answer:** {x}", "Answer: {x}.",
    "Final answer: ({x}).", "Therefore, {x}", "So the answer would be {x}.", "I think the answer is {x}",
    "{x} is the correct answer", "{x}, it is", "{x}; the lesion is large", "It is: {x}",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    word=st.sampled_from(["yes", "no"]),
    wrapper=st.sampled_from(WRAPPERS),
    case=st.sampled_from([str, str.upper, str.capitalize, full_width]),
    space=st.text(" \n\t\r", max_size=3),
)
def test_formatting_never_changes_yes_or_no(
    form: str, word: str, wrapper: str, case: Callable[[str], str], space: str
) -> None:
    response = wrapper.format(space + case(form.format(x=word)) + space)
    for gold in ("yes", "no", "Yes", "No"):
        for kind in ("yes_no", "closed"):
            assert judge(question(kind, gold), response) == Judged(gold.lower() == word, word, True), response


@pytest.mark.parametrize(
    ("response", "picked"),
    [
        ("Yes, there is no fracture.", "yes"), ("No, the heart is not enlarged.", "no"), ("Yes it is.", "yes"),
        ("No there is none.", "no"), ("Yes - both lungs.", "yes"), ("Yes (see the arrow)", "yes"),
        ("There is no effusion, so the answer is yes", "yes"), ("The opacity is seen.\n\nYes", "yes"),
        ("No\n\nThe lungs are clear.", "no"), ("The finding is \\boxed{no} as shown", "no"), ("No. The heart.", "no"),
        ("the answer is no</think>Yes", "yes"), ("<answer>no</answer><answer>No.</answer>", "no"), ("yes, yes", "yes"),
    ],
)  # fmt: skip
def test_a_reason_does_not_hide_yes_or_no(response: str, picked: str) -> None:
    assert read_yes_no(response, "en") == picked


@pytest.mark.parametrize(
    "response",
    [
        "", " ", "not", "normal", "know", "nothing", "eyes", "yesterday", "none", "unknown", "maybe", "\\boxed{}",
        "yes or no", "yes/no", "Yes and no", "yes no", "no-yes", "Yes, or no", "Yes. No.", "Whether yes, or no",
        "Yes, it is present or No, it is absent", "no fracture", "No abnormality is seen", "no answer", "No. 5", 
        "The answer is not yes", "I cannot say yes", "Yes is wrong", "the answer is not no", "\u662f",
        "no or (yes)", "No or minimal effusion",
        "<think>yes", "<think>yes</think>", "<answer>yes", "yes <answer>", "<answer></answer>yes",
        "<answer>yes</answer></think>", "<answer>yes or no</answer>", "<THINK>Yes</THINK>",
        "<answer>no</answer><answer>yes</answer>", "<answer>yes</answer> <answer>it is",
        "<answer>yes</answer><answer>or</answer>",
    ],
)  # fmt: skip
def test_unparsed_yes_no(response: str) -> None:
    for gold in ("yes", "no"):
        assert judge(question("yes_no", gold), response) == Judged(False, None, False), response


@settings(max_examples=300, deadline=None)
@given(
    first=st.sampled_from(FORMS),
    second=st.sampled_from(FORMS),
    joiner=st.sampled_from([" ", "\n", ", ", " or ", " and ", "; ", "/", " / ", ". ", " - ", "-", "|", " vs "]),
    words=st.sampled_from([("yes", "no"), ("no", "yes")]),
    tagged=st.booleans(),
)
def test_yes_and_no_together_are_never_rewarded(
    first: str, second: str, joiner: str, words: tuple[str, str], tagged: bool
) -> None:
    response = first.format(x=words[0]) + joiner + second.format(x=words[1])
    response = f"<answer>{response}</answer>" if tagged else response
    correct = [judge(question("yes_no", gold), response).correct for gold in ("yes", "no")]
    assert correct == [False, False], response


@settings(max_examples=200, deadline=None)
@given(thought=st.text("yesno <>/.", max_size=30) | st.sampled_from(FORMS).map(lambda form: form.format(x="no")))
def test_a_thought_is_never_read(thought: str) -> None:
    thought = thought.replace("</think>", "")
    assert read_yes_no(f"<think>{thought}</think>yes", "en") == "yes"
    assert read_yes_no(f"<think>{thought}", "en") is None
    assert read_text(f"<think>{thought}</think>left lung", "en") == "left lung"
    assert read_text(f"<think>{thought}", "en") is None


@pytest.mark.parametrize(
    ("response", "picked"),
    [
        ("\u662f", "yes"), ("\u662f\u7684\u3002", "yes"), ("**\u5426**", "no"), ("\u4e0d\u662f", "no"), ("Yes", "yes"),
        ("\u7b54\u6848\u662f\u5426", "no"), ("\u7b54\u6848\uff1a\u5426", "no"),
        ("\u7b54\u6848\u662f\uff1a\u662f", "yes"),
        ("\u6700\u7ec8\u7b54\u6848\u4e3a\u662f\u3002", "yes"), ("\u662f\uff0c\u6709\u80bf\u7624", "yes"),
        ("\\boxed{\u5426}", "no"), ("<think>\u5426</think>\u662f", "yes"),
        ("\u662f\u5426", None), ("\u7b54\u6848\u662f", None), ("\u8fd9\u662f\u80ba", None),
        ("\u662f\u3002\u5426", None),
        ("\u662f\u548c\u5426", None), ("\u662f\uff0c\u6216\u5426", None), ("\u662f/\u5426", None), ("\u662f no", None),
        ("", None),
    ],
)  # fmt: skip
def test_chinese_yes_no(response: str, picked: str | None) -> None:
    assert read_yes_no(response, "zh") == picked
    for gold, meaning in (("\u662f", "yes"), ("\u5426", "no"), ("\u4e0d\u662f", "no"), ("yes", "yes")):
        judged = judge(question("yes_no", gold, language="zh"), response)
        assert judged == Judged(picked == meaning, picked, picked is not None)


def test_gold_of_a_yes_no_question_must_be_yes_or_no() -> None:
    with pytest.raises(ValueError, match="yes or no"):
        judge(question("yes_no", "maybe"), "yes")


# --- closed and open --------------------------------------------------------------------------------------------------

TEXT_FORMS = [
    "{x}", "{x}.", "**{x}**", "({x})", '"{x}"', "The {x}", r"\boxed{{{x}}}", r"\boxed{{\text{{{x}}}}}", "Answer: {x}",
    "**Answer:** {x}", "**Answer**: {x}", "The answer is {x}.", "The answer is: the {x}", "So \\boxed{{{x}}} it is.",
    "The opacity is on the right side.\n\nFinal answer: {x}", "Answer: {x}\nBecause of the opacity.",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(TEXT_FORMS),
    text=st.sampled_from(["left lung", "2.5 cm", "MRI", "5-6", "t2 weighted"]),
    wrapper=st.sampled_from(WRAPPERS),
    case=st.sampled_from([str, str.upper, str.title, full_width]),
    kind=st.sampled_from(["open", "closed"]),
)
def test_formatting_never_changes_a_text(
    form: str, text: str, wrapper: str, case: Callable[[str], str], kind: str
) -> None:
    answer = form.format(x=text) if "\\" in form else case(form.format(x=text))
    judged = judge(question(kind, text), wrapper.format(answer))
    assert judged.correct and judged.parsed and judged.scores["exact_match"] == judged.scores["f1"] == 1, answer
    assert not judge(question(kind, "heart"), wrapper.format(answer)).correct


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        ("Hepatitis A", "hepatitis", False), ("HER2+", "HER2-", False), ("5", "-5", False), ("two", "2", True),
        ("1,000", "1000", True), ("left lung", "left lung, right lung", False), ("left lung", "not left lung", False),
        ("left lung", "left lung or heart", False), ("Lung, Liver", "lung liver", True),
        ("x-ray", "X ray", True), ("left lung", "The lesion is in the left lung.", False),
    ],
)  # fmt: skip
def test_open_truth_table(gold: str, response: str, correct: bool) -> None:
    judged = judge(question("open", gold), response)
    assert judged.correct is correct and judged.parsed


@pytest.mark.parametrize(
    "response",
    [
        "", "  ", "...", "<answer></answer>", "<think>left lung", "<answer>left lung", "\\boxed{}",
        "\\boxed{left lung} \\boxed{heart}", "Answer: heart. Answer: left lung",
        "<answer>heart</answer><answer>left lung</answer>",
    ],
)  # fmt: skip
def test_unparsed_text(response: str) -> None:
    judged = judge(question("open", "left lung"), response)
    assert (judged.correct, judged.picked, judged.parsed) == (False, None, False)
    assert set(judged.scores.values()) == {0.0}


def test_chinese_text() -> None:
    for response in ("\u5de6\u80ba", "\u5de6\u80ba\u3002", "\u7b54\u6848\u662f\u5de6\u80ba", "**\u5de6\u80ba**"):
        assert judge(question("open", "\u5de6\u80ba", language="zh"), response).correct, response
    assert judge(question("open", "\u5de6\u80ba", language="zh"), "\u53f3\u80ba").scores["f1"] == 0.5


@settings(max_examples=200, deadline=None)
@given(
    response=st.text(max_size=40),
    gold=st.text(max_size=20),
    kind=st.sampled_from(["closed", "open"]),
    language=st.sampled_from(["en", "zh"]),
)
def test_any_text_gets_a_verdict(response: str, gold: str, kind: str, language: str) -> None:
    judged = judge(question(kind, gold, language=language), response)
    assert judged.parsed == (judged.picked is not None) and judged.correct <= judged.parsed
    assert all(0 <= score <= 1 for score in judged.scores.values())


@pytest.mark.parametrize(
    "unit",
    [
        "x",
        " ",
        "\n",
        "yes",
        "yes ",
        "no. ",
        "- ",
        "\\boxed{",
        "\\boxed{a} ",
        "<answer>",
        "answer ",
        "the ",
        "} {",
        "\u662f",
    ],
)
@pytest.mark.parametrize("kind", ["yes_no", "open"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_huge_responses_are_fast(unit: str, kind: str, language: str) -> None:
    start = time.process_time()
    judge(question(kind, "yes" if kind == "yes_no" else "left lung", language=language), (unit * 100_000)[:100_000])
    assert time.process_time() - start < 15  # quadratic time would be minutes
