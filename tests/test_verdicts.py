"""What a judge's reply says: every rule of both parsers, every listed quirk; nothing is a verdict by accident."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preferring import verdict

from mmedexpert.data.pairs import DIMENSIONS, INVALID
from mmedexpert.judging.verdicts import canonical, med_rewardbench, pairwise, read

MIXED = dict(zip(DIMENSIONS, "ABBAAB", strict=True))
LINES = "\n".join(f"{name}: {letter}" for name, letter in MIXED.items())
ALL_A = dict.fromkeys(DIMENSIONS, "A")
NONE = dict.fromkeys(DIMENSIONS, INVALID)


@pytest.mark.parametrize(
    ("reply", "said", "rule"),
    [
        (json.dumps(MIXED), MIXED, "json"),
        (f"Here is my verdict:\n```json\n{json.dumps(MIXED)}\n```\nI hope that it helps; a pity for B.", MIXED, "json"),
        (json.dumps({k.upper(): v.lower() for k, v in MIXED.items()}), MIXED, "json"),
        (json.dumps({**MIXED, "reason": "A is better than B"}), MIXED, "json"),
        (json.dumps({k: {"verdict": v, "why": "..."} for k, v in MIXED.items()}), MIXED, "json"),
        (f"<think>{verdict('B')}</think>{verdict('A')}", ALL_A, "json"),
        (f"{verdict('A')} {verdict('A')}", ALL_A, "json"),
        (f"{verdict('A')} No: {verdict('B')}", NONE, "several verdicts"),
        (json.dumps({**MIXED, "overall": "tie"}), {**MIXED, "overall": "tie"}, "json"),
        (json.dumps({**MIXED, "overall": "A or B"}), {**MIXED, "overall": INVALID}, "json, partly"),
        (json.dumps({**MIXED, "overall": None}), {**MIXED, "overall": INVALID}, "json, partly"),
        (json.dumps({"accuracy": "B"}), {**NONE, "accuracy": "B"}, "json, partly"),
        (json.dumps(MIXED)[:60], NONE, "cut off"),
        (LINES, MIXED, "lines"),
        (LINES.replace("accuracy: A", "- **Accuracy**: [A]."), MIXED, "lines"),
        (LINES + "\noverall: A", NONE, "several verdicts"),
        (LINES.partition("\n")[2], NONE, "no verdict"),
        ("Assistant one gives a better description", NONE, "no verdict"),
        ("[[A]]", NONE, "no verdict"),
        ("A", NONE, "no verdict"),
        ("Both A and B are good.", NONE, "no verdict"),
        ("Accuracy: A, since the other is wrong about the heart.", NONE, "no verdict"),
        ("Antwort A ist in jeder Hinsicht besser.", NONE, "no verdict"),
        ("I cannot judge medical images.", NONE, "no verdict"),
        ("{}", NONE, "no verdict"),
        (f'{{"first": {verdict("A")}, "final": {verdict("B")}}}', NONE, "no verdict"),
        (f'{{"first": {verdict("A")}, "final": {verdict("B")}'[:-9], NONE, "broken object"),
        (f'{{"quoted": {verdict("A")}, "accuracy": "B", "relev', NONE, "broken object"),
        (f'{{"quote": {verdict("A")}, "accuracy": "B", "accuracy": "B"}}', NONE, "broken object"),
        (verdict("A").replace("}", ', "ACCURACY ": "B"}'), NONE, "several verdicts"),
        (f"Answer A says that I should reply {verdict('A')}, which I ignore.", NONE, "in a sentence"),
        (f"Verdict: {verdict('A')}", ALL_A, "json"),
        ('{"accuracy": "A"}\n{"relevance": "B"}', {**NONE, "accuracy": "A", "relevance": "B"}, "json, partly"),
        ('{"accuracy": "A"}\n{"accuracy": "B"}', NONE, "several verdicts"),
        (LINES.replace("overall", "> overall"), NONE, "no verdict"),  # a quotation
        ("{note}\n" + LINES, NONE, "broken object"),
        ("", NONE, "empty"),
        ("<think>A is better", NONE, "empty"),
    ],
)  # fmt: skip
def test_pairwise(reply, said, rule):
    found = pairwise(reply, DIMENSIONS)
    assert (found.said, found.rule) == (said, rule)


@pytest.mark.parametrize(
    ("reply", "said", "rule"),
    [
        (json.dumps(MIXED), MIXED, "json"),
        (f"Sure! {json.dumps(MIXED)} Done.", MIXED, "json"),
        (json.dumps({**MIXED, "reason": "short"}), MIXED, "json"),
        (json.dumps({k: v.lower() for k, v in MIXED.items()}), MIXED, "json"),
        (f"{verdict('A')} or {verdict('B')}", ALL_A, "pairs"),  # from the first { to the last } is no JSON
        (LINES, MIXED, "pairs"),
        (json.dumps(MIXED)[:-1], MIXED, "pairs"),  # without its }
        (json.dumps({**MIXED, "overall": "tie"}), NONE, "invalid"),
        (LINES.replace("accuracy: A", "inaccuracy: A"), NONE, "invalid"),
        (LINES.replace(": ", " = "), NONE, "invalid"),  # a colon is asked for
        (LINES.replace("overall: B", "") + " [[B]]", dict.fromkeys(DIMENSIONS, "B"), "brackets"),
        ("[[A]] because it is better than B", ALL_A, "brackets"),
        ("The better one is b.", dict.fromkeys(DIMENSIONS, "B"), "letter"),
        ("Assistant one gives a better description", ALL_A, "letter"),  # its defect 1: the article
        ("Both A and B are good.", NONE, "invalid"),
        ("I give a point to a careful answer.", NONE, "invalid"),
        ("", NONE, "invalid"),
        ("No verdict.", NONE, "invalid"),
    ],
)  # fmt: skip
def test_med_rewardbench(reply, said, rule):
    found = med_rewardbench(reply)
    assert (found.said, found.rule) == (said, rule)


def test_a_reply_that_ran_into_its_limit_after_its_object_is_cut_off():
    told = f"{verdict('A')}\nBut wait, B is better since"
    assert pairwise(told, DIMENSIONS).rule == "json" and pairwise(told, DIMENSIONS, cut=True).rule == "cut off"
    assert pairwise(f"Draft:\n{verdict('A')}\n```\n", DIMENSIONS, cut=True).rule == "json"
    assert read(told, DIMENSIONS, "pairwise", finish_reason="length").said == NONE
    assert pairwise(LINES[:40], DIMENSIONS, cut=True).rule == "cut off"


def test_a_looping_reply_is_read_in_time_that_grows_with_its_length():
    """Two hundred times the length of the short one may take ten thousand times as long only where it is quadratic."""
    for part in ("-\n", '\n"', "*", "overall", "accuracy: ", "{", '{"accuracy": ', " \t"):
        start = time.perf_counter()
        pairwise(part * 20_000, DIMENSIONS)
        med_rewardbench(part * 20_000)
        assert time.perf_counter() - start < 20, part


def test_a_refused_question_has_no_verdict_under_any_protocol():
    for protocol in ("pairwise", "med_rewardbench"):
        found = read(verdict("A"), DIMENSIONS, protocol, finish_reason="refused")
        assert (found.said, found.rule) == (NONE, "refused")
    assert read(verdict("A"), DIMENSIONS, "med_rewardbench").rule == "json"
    assert read("Assistant one gives a better description", DIMENSIONS, "pairwise").rule == "no verdict"


def test_the_slots_of_the_other_order_are_the_other_answers():
    assert [canonical(said, "ab") for said in ("A", "B", "tie", INVALID)] == ["A", "B", "tie", INVALID]
    assert [canonical(said, "ba") for said in ("A", "B", "tie", INVALID)] == ["B", "A", "tie", INVALID]


@given(st.text(max_size=300), st.sampled_from(["", '{"accuracy": "A"', "[[B]]", "accuracy: A\n", "{" * 40]))
def test_any_text_is_read_and_says_something_of_every_dimension(text, more):
    for protocol in ("pairwise", "med_rewardbench"):
        found = read(text + more + text, DIMENSIONS, protocol)
        assert list(found.said) and set(found.said) == set(DIMENSIONS)
        assert set(found.said.values()) <= {"A", "B", "tie", INVALID} and found.rule
