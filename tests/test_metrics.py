"""Open-answer metrics: known values, bounds, normalisation, and time on huge texts."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.scoring.text import bleu, open_scores, tokens

NAMES = {
    "exact_match", "precision", "recall", "f1", "bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The Left  lung.", "en", "left lung"), ("**Left-lung**", "en", "left lung"),
        ("\uff2c\uff45\uff46\uff54 lung", "en", "left lung"),  # full width
        ("A mass in the lung", "en", "mass in lung"), ("an MRI", "en", "mri"),
        ("Hepatitis A", "en", "hepatitis a"), ("type A dissection", "en", "type a dissection"), ("A", "en", "a"),
        ("two", "en", "2"), ("2.0 cm", "en", "2 cm"), ("2.50cm", "en", "2.5 cm"), ("1,000", "en", "1000"),
        (".5", "en", "0.5"), ("-5", "en", "-5"), ("C5-6", "en", "c 5 6"), ("007", "en", "7"), ("0", "en", "0"),
        ("HER2+", "en", "her 2 +"), ("< 5 %", "en", "< 5 %"),
        ("Crohn's", "en", "crohns"), ("Crohn\u2019s", "en", "crohns"),
        ("\u5de6\u80ba\u3002", "zh", "\u5de6 \u80ba"), ("\u7ef4\u751f\u7d20A", "zh", "\u7ef4 \u751f \u7d20 a"),
        ("A CT", "zh", "a ct"), ("", "en", ""), ("...", "en", ""),
    ],
)  # fmt: skip
def test_tokens(text: str, language: str, expected: str) -> None:
    assert tokens(text, language) == expected.split()


def test_known_values() -> None:
    scores = open_scores("The left lower lung", "left lung", "en")
    assert scores == pytest.approx(
        {
            "exact_match": 0, "precision": 2 / 3, "recall": 1, "f1": 0.8, "bleu1": 2 / 3, "bleu2": 0, "bleu3": 0,
            "bleu4": 0, "rouge1": 0.8, "rouge2": 0, "rougeL": 0.8,
        }
    )  # fmt: skip
    scores = open_scores("a b c d x", "a b c d e f", "zh")
    expected = [(4 / 5) ** 1, (4 / 5 * 3 / 4) ** (1 / 2), (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 3)]
    brevity = 2.718281828459045 ** (1 - 6 / 5)
    assert [scores["bleu1"], scores["bleu2"], scores["bleu3"]] == pytest.approx([brevity * x for x in expected])
    assert scores["rougeL"] == pytest.approx(8 / 11) and scores["rouge2"] == pytest.approx(6 / 9)
    # the order of words: counted by ROUGE-L, not by ROUGE-1
    swapped = open_scores("lung left", "left lung", "en")
    assert (swapped["rouge1"], swapped["rougeL"], swapped["f1"], swapped["exact_match"]) == (1, 0.5, 1, 0)
    # repeated words do not raise the recall
    assert open_scores("lung lung lung", "left lung", "en")["recall"] == 0.5
    assert open_scores("\u53f3\u80ba", "\u5de6\u80ba", "zh")["f1"] == 0.5


def test_bleu_is_unsmoothed_and_of_the_given_order() -> None:
    assert bleu(["lung"], ["lung"])["bleu1"] == 1 and bleu(["lung"], ["lung"])["bleu4"] < 1e-70
    assert set(bleu(["lung"], ["lung"], [1, 1, 1, 1]).values()) == {1.0}


@settings(max_examples=150, deadline=None)
@given(response=st.text(max_size=40), gold=st.text(max_size=40), language=st.sampled_from(["en", "zh"]))
def test_scores_are_bounded_and_an_exact_match_is_one(response: str, gold: str, language: str) -> None:
    scores = open_scores(response, gold, language)
    assert set(scores) == NAMES and all(0 <= value <= 1 for value in scores.values())
    same = open_scores(gold, gold, language)
    has_words = bool(tokens(gold, language))
    for name in NAMES - {"rouge2"}:  # one token has no bigram
        assert same[name] == pytest.approx(float(has_words)), name
    assert scores["exact_match"] == float(has_words and tokens(response, language) == tokens(gold, language))


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["left", "Right", "lung", "2", "CT"]), min_size=1, max_size=5),
    before=st.sampled_from(["", "The ", "**", '"', " \n", "- "]),
    after=st.sampled_from(["", ".", "**", "!", "\n", " ."]),
    case=st.sampled_from([str, str.upper, str.lower]),
)
def test_formatting_never_changes_the_scores(words: list[str], before: str, after: str, case: type[str]) -> None:
    text = " ".join(words)
    assert open_scores(before + case(text) + after, text, "en") == open_scores(text, text, "en")


def test_empty_texts_score_zero() -> None:
    for response, gold in (("", "lung"), ("lung", ""), ("", ""), ("...", "lung"), ("", "...")):
        assert set(open_scores(response, gold, "en").values()) == {0.0}


@pytest.mark.parametrize("unit", ["x", " ", "lung ", "left lung. ", "\u80ba", "1,000", ".5", "a'", "-", "the "])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_huge_texts_are_fast(unit: str, language: str) -> None:
    text = (unit * 100_000)[:100_000]
    start = time.process_time()
    assert all(0 <= value <= 1 for value in open_scores(text, "left lung " * 10, language).values())
    assert time.process_time() - start < 15  # quadratic time would be minutes


def test_two_huge_texts_are_fast() -> None:
    start = time.process_time()
    open_scores("lung left " * 10_000, "left lung " * 10_000, "en")
    assert time.process_time() - start < 15
