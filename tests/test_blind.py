"""Needs the image: what is solved without it falls, a habit is no knowledge, and luck is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from solving import OPTIONS, Fake, letter_of, longest, record, says, shown, stored

from mmedexpert.curation.blind import (
    FROM_OPTIONS,
    GUESS,
    WHICH,
    WITHOUT_IMAGE,
    chance,
    needs_image,
    reordered,
    report,
)
from mmedexpert.curation.replies import UNJUDGED
from mmedexpert.errors import UserError

LONGEST = max(OPTIONS, key=lambda letter: len(OPTIONS[letter]))


def verdicts(tmp_path, records, engine, **settings):
    return list(needs_image(stored(tmp_path / "before", records), engine, tmp_path / "kept.jsonl", **settings))


def check(verdict):
    return verdict.record.provenance["checks"]["needs_image"]


def only_with_question(ask):
    """Who knows the answer of a question, and guesses another where options stand alone."""
    return says("fracture" if WHICH in ask.text else "normal lung")(ask)


def test_what_is_solved_from_the_question_falls_and_its_options_alone_did_not_tell(tmp_path):
    (one,) = verdicts(tmp_path, [record(1)], Fake(only_with_question))
    assert one.reason == WITHOUT_IMAGE == "solved without its image"
    assert check(one) == {"question_only": 4, "options_only": 0, "of": 4, "solved": WITHOUT_IMAGE}
    assert one.detail == "question_only 4, options_only 0 of 4"


def test_what_the_longest_option_gives_away_falls_by_its_options(tmp_path):
    records = [record(1, LONGEST), record(2, "A")]
    engine = Fake(lambda ask: longest(ask) if WHICH in ask.text else "I cannot tell.")
    first, second = verdicts(tmp_path, records, engine)
    assert first.reason == FROM_OPTIONS == "solved from its options alone"
    assert not second.reason and check(second) == {"question_only": 0, "options_only": 0, "of": 4}


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("letter", "AB")
def test_a_habit_of_one_letter_solves_nothing(tmp_path, size, letter):
    options = {name: f"finding {name}" for name in "ABCDE"[:size]}
    records = [record(n, name, options=options) for n, name in enumerate(options)]
    kept = verdicts(tmp_path, records, Fake(lambda ask: f"<answer>{letter}</answer>"))
    assert not [one for one in kept if one.reason]
    assert all(check(one)["question_only"] < 4 for one in kept)


def test_one_wrong_try_keeps_a_record(tmp_path):
    engine = Fake(lambda ask: says("fracture" if ask.sample == 3 else "normal lung")(ask))
    (one,) = verdicts(tmp_path, [record(1)], engine)
    assert not one.reason and check(one) == {"question_only": 3, "options_only": 3, "of": 4}


def test_flag_drops_nothing_and_marks_the_same(tmp_path):
    records = [record(n) for n in range(3)]
    dropped = verdicts(tmp_path / "drop", records, Fake(says("normal lung")))
    flagged = verdicts(tmp_path / "flag", records, Fake(says("normal lung")), mode="flag")
    assert {one.reason for one in dropped} == {WITHOUT_IMAGE} and {one.reason for one in flagged} == {""}
    assert [check(one) for one in dropped] == [check(one) for one in flagged]
    with pytest.raises(ValueError, match="mode"):
        verdicts(tmp_path / "other", records, Fake(longest), mode="keep")


def test_neither_image_nor_question_is_shown_and_each_try_is_another_sample_and_order(tmp_path):
    engine = Fake(longest)
    verdicts(tmp_path, [record(1)], engine)
    alone = [ask for ask in engine.asked if WHICH in ask.text]
    whole = [ask for ask in engine.asked if WHICH not in ask.text]
    assert not any(ask.images for ask in engine.asked)
    assert not any("picture 1" in ask.text for ask in alone) and all("picture 1" in ask.text for ask in whole)
    for asks in (alone, whole):
        assert {ask.sample for ask in asks} == {0, 1, 2, 3} and len({ask.text for ask in asks}) == 4
        assert {letter_of(ask, "normal lung") for ask in asks} == set("ABCD")
        assert all(ask.text.endswith(GUESS) and set(shown(ask).values()) == set(OPTIONS.values()) for ask in asks)


def test_an_order_keeps_letters_and_the_right_text():
    for number in range(9):
        one = reordered(record(1), number)
        assert list(one.options) == list("ABCD") and one.options[one.answer] == "normal lung"
        assert sorted(one.options.values()) == sorted(OPTIONS.values())
    assert reordered(record(1), 0) == record(1)
    assert len({tuple(reordered(record(1), number).options.values()) for number in range(8)}) == 8


def test_options_that_name_letters_stay_in_place_and_own_labels_do_not_wander():
    named = record(1, options={"A": "rib", "B": "lung", "C": "both A and B", "D": "neither"})
    assert all(reordered(named, number) == named for number in range(4))
    labelled = record(1, options={"A": "A: rib", "B": "B: lung"})
    assert reordered(labelled, 1).options == {"A": "lung", "B": "rib"} and reordered(labelled, 1).answer == "A"
    bacterium = record(1, options={"D": "S. aureus", "E": "E. coli"}, answer="E")
    assert reordered(bacterium, 1).options == {"D": "E. coli", "E": "S. aureus"}


def test_records_without_an_image_pass_marked_and_unasked(tmp_path):
    engine = Fake(says("normal lung"))
    both = verdicts(tmp_path, [record(1, modality="text"), record(2, images=())], engine)
    assert [(one.reason, check(one)) for one in both] == [("", {"text_only": True})] * 2
    assert not engine.asked


def test_open_answers_count_by_an_exact_match_and_have_no_options_to_show(tmp_path):
    plain = record(1, "the left lung", options=None)
    replies = [
        ("<answer>Left lung.</answer>", WITHOUT_IMAGE), ("The answer is: left lung", WITHOUT_IMAGE),
        ("<answer>the left lung and heart</answer>", ""), ("<answer></answer>", ""), ("", ""),
    ]  # fmt: skip
    for number, (reply, reason) in enumerate(replies):
        engine = Fake(lambda ask, reply=reply: reply)
        (one,) = verdicts(tmp_path / f"{number}", [plain], engine)
        assert one.reason == reason and "options_only" not in check(one)
        assert len(engine.asked) == 4


def test_yes_or_no_is_read_as_such(tmp_path):
    (one,) = verdicts(tmp_path, [record(1, "yes", options=None, kind="yes_no")], Fake(lambda ask: "Yes, it is."))
    assert one.reason == WITHOUT_IMAGE


@pytest.mark.parametrize("reply", ["", "A or B or C", "<answer>", "{", "I see no image."])
def test_malformed_replies_solve_nothing(tmp_path, reply):
    (one,) = verdicts(tmp_path, [record(1)], Fake(lambda ask: reply))
    assert not one.reason and check(one) == {"question_only": 0, "options_only": 0, "of": 4}


def test_a_refused_try_is_not_solved_and_is_told(tmp_path):
    engine = Fake(lambda ask: None if ask.id == "q1" and ask.sample == 2 else says("normal lung")(ask))
    first, second = verdicts(tmp_path, [record(1), record(2)], engine)
    assert not first.reason and check(first) == {"question_only": 3, "options_only": 3, "refused": 2, "of": 4}
    assert second.reason


def test_a_record_whose_answer_cannot_be_judged_falls_unasked_and_alone(tmp_path):
    bad = [record(1, "F"), record(2, "b"), record(3, "maybe", options=None, kind="yes_no")]
    bad.append(record(4, "?", options=None))
    engine = Fake(longest)
    found = verdicts(tmp_path, [*bad, record(5)], engine)
    assert [one.reason for one in found] == [UNJUDGED] * 4 + [""] and all(one.detail for one in found[:4])
    assert {ask.id for ask in engine.asked} == {"q5"}
    flagged = verdicts(tmp_path / "flag", bad, engine, mode="flag")
    assert not any(one.reason for one in flagged) and all(check(one)["unjudged"] for one in flagged)


def test_luck_is_a_probability_by_options_and_tries(tmp_path):
    four = record(1)
    assert chance(four, 4) == pytest.approx(1 - (1 - 4**-4) ** 2)
    assert chance(replace(four, options=None, answer="yes", kind="yes_no"), 4) == 2**-4
    assert chance(replace(four, options=None, answer="lung"), 4) == 0
    assert chance(replace(four, modality="text"), 4) == 0


def test_the_report_counts_each_way_and_what_luck_would_lose(tmp_path):
    records = stored(tmp_path / "before", [record(1, LONGEST), record(2), record(3, modality="text")])
    engine = Fake(lambda ask: longest(ask) if WHICH in ask.text else says("normal lung")(ask))
    list(needs_image(records, engine, tmp_path / "kept.jsonl"))
    found = report(records, tmp_path / "kept.jsonl", tries=4)
    assert found.pop("lost_by_luck") == pytest.approx(2 * chance(record(1), 4))
    assert found == {"asked": 2, "text_only": 1, "question_only": 1, "options_only": 1, "both": 0, "refused": 0}


def test_records_are_asked_about_in_batches(tmp_path):
    engine = Fake(longest)
    verdicts(tmp_path, [record(n) for n in range(7)], engine, batch=3, tries=2)
    assert engine.calls == [12, 12, 4]


def test_where_all_is_refused_the_setting_is_at_fault(tmp_path):
    records = [record(n) for n in range(30)]
    with pytest.raises(UserError, match="refused"):
        verdicts(tmp_path, records, Fake(lambda ask: None))
    mended = verdicts(tmp_path, records, Fake(says("normal lung")))  # the same command, once that is mended
    assert {one.reason for one in mended} == {WITHOUT_IMAGE}
