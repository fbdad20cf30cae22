"""Difficulty: pass counts by which records stay, nothing asked twice after a kill, and the same bytes."""

from __future__ import annotations

import json

import pytest
from solving import Fake, record, says, stored

from mmedexpert.curation.difficulty import REFUSED, difficulty, figure, histogram
from mmedexpert.curation.replies import UNJUDGED, asked
from mmedexpert.curation.steps import run_step
from mmedexpert.errors import UserError
from mmedexpert.models.encode import prompt_text

RIGHT, WRONG = says("normal lung"), says("fracture")


def solves(counts):
    """Who solves record q<n> in its first counts[n] samples."""
    return lambda ask: (RIGHT if ask.sample < counts[int(ask.id[1:])] else WRONG)(ask)


def verdicts(tmp_path, records, engine, **settings):
    return list(difficulty(stored(tmp_path / "before", records), engine, tmp_path / "kept.jsonl", **settings))


def check(verdict):
    return verdict.record.provenance["checks"]["difficulty"]


def test_the_ends_fall_and_the_hard_half_is_marked(tmp_path):
    counts = [0, 1, 7, 8, 15, 16]
    found = verdicts(tmp_path, [record(n) for n in range(6)], Fake(solves(counts)))
    assert [one.reason for one in found] == ["never solved in 16", "", "", "", "", "solved in all 16"]
    assert [check(one) for one in found[:5]] == [
        {"passed": count, "of": 16, "hard": hard}
        for count, hard in zip(counts, (False, True, True, False, False), strict=False)
    ]
    assert found[5].detail == "solved in 16 of 16"


def test_reasons_tell_the_setting(tmp_path):
    engine = Fake(solves([0, 1, 2, 3, 4]))
    settings = {"rollouts": 4, "keep": (2, 2), "hard": (1, 2)}
    found = verdicts(tmp_path, [record(n) for n in range(5)], engine, **settings)
    few, many = "solved in fewer than 2 of 4", "solved in more than 2 of 4"
    assert [one.reason for one in found] == [few, few, "", many, many] and len(engine.asked) == 20


def test_flag_drops_nothing(tmp_path):
    engine = Fake(lambda ask: None if ask.id == "q2" else solves([0, 16])(ask))
    found = verdicts(tmp_path, [record(0), record(1), record(2), record(3, "Z")], engine, mode="flag")
    assert not any(one.reason for one in found)
    assert [check(one).get("passed") for one in found] == [0, 16, 0, None]
    assert check(found[2])["refused"] == 16 and check(found[3])["unjudged"]


def test_what_is_refused_even_once_is_not_called_unsolved(tmp_path):
    engine = Fake(lambda ask: None if ask.id == "q1" or (ask.sample == 9 and ask.id == "q2") else WRONG(ask))
    found = verdicts(tmp_path, [record(n) for n in range(4)], engine)
    never = "never solved in 16"
    assert [one.reason for one in found] == [never, REFUSED, REFUSED, never]
    assert found[1].detail == "16 of 16: not about people" and found[2].detail == "1 of 16: not about people"
    assert histogram(tmp_path / "kept.jsonl") == ([2] + [0] * 16, 2)


def test_a_question_passed_over_is_no_wrong_answer(tmp_path):
    def deaf(asks):
        yield from (pair for pair in Fake(RIGHT)(asks) if asks[pair[0]].id != "q0")

    first, second = verdicts(tmp_path, [record(0), record(1)], deaf)
    assert first.reason == REFUSED and first.detail == "16 of 16: no reply" and second.reason == "solved in all 16"


def test_it_is_asked_as_evaluation_asks_with_its_images(tmp_path):
    engine = Fake(RIGHT)
    one = record(1, images=("a.png", "b/c.png"))
    verdicts(tmp_path, [one], engine)
    assert {ask.text for ask in engine.asked} == {prompt_text(one)}
    folder = tmp_path / "before" / "images"
    assert {ask.images for ask in engine.asked} == {(folder / "a.png", folder / "b/c.png")}
    assert sorted(ask.sample for ask in engine.asked) == list(range(16))


def test_text_only_records_are_asked_too(tmp_path):
    (one,) = verdicts(tmp_path, [record(1, images=(), modality="text")], Fake(solves({1: 5})))
    assert check(one) == {"passed": 5, "of": 16, "hard": True}


def test_a_record_whose_answer_cannot_be_judged_falls_alone(tmp_path):
    first, second = verdicts(tmp_path, [record(0, "Z"), record(1)], Fake(solves([0, 3])))
    assert first.reason == UNJUDGED and not second.reason


def test_impossible_settings_are_told(tmp_path):
    for settings in ({"keep": (1, 17)}, {"keep": (5, 2)}, {"hard": (-1, 2)}):
        with pytest.raises(UserError, match="range of 0 to 16"):
            verdicts(tmp_path, [record(1)], Fake(RIGHT), **settings)


# --- what is kept -----------------------------------------------------------------------------------------------------

COUNTS = [0, 3, 16, 9, 1, 15, 4]


def by_count(ask):
    return None if ask.id == "q3" else solves(COUNTS)(ask)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def funnel(tmp_path, engine, batch=3):
    records, folder = stored(tmp_path / "before", [record(n) for n in range(len(COUNTS))]), tmp_path / "difficulty"
    run_step("difficulty", lambda given: difficulty(given, engine, folder / "kept.jsonl", batch=batch), records, folder)
    return files(folder)


@pytest.mark.parametrize("die_after", [0, 5, 48, 50, 100])
def test_a_killed_run_asks_nothing_twice_and_ends_with_the_same_bytes(tmp_path, die_after):
    whole = funnel(tmp_path / "whole", Fake(by_count))
    killed, again = Fake(by_count, die_after=die_after), Fake(by_count)
    with pytest.raises(KeyboardInterrupt):
        funnel(tmp_path / "killed", killed)
    assert funnel(tmp_path / "killed", again) == whole
    assert set(whole) == {"records.jsonl", "dropped.jsonl", "counts.json", "kept.jsonl"}
    both = [(ask.id, ask.sample) for ask in killed.asked + again.asked if ask.id != "q3"]
    assert len(both) == len(set(both)) == 16 * (len(COUNTS) - 1)
    nothing = Fake(by_count)
    assert funnel(tmp_path / "killed", nothing) == whole and not nothing.asked


@pytest.mark.parametrize("file", ["kept.jsonl", "kept.asking.jsonl"])
def test_a_line_cut_by_a_kill_is_done_again(tmp_path, file):
    whole = funnel(tmp_path / "whole", Fake(by_count))
    with pytest.raises(KeyboardInterrupt):
        funnel(tmp_path / "killed", Fake(by_count, die_after=60))
    path = tmp_path / "killed" / "difficulty" / file
    path.write_bytes(path.read_bytes()[:-9])
    assert funnel(tmp_path / "killed", Fake(by_count), batch=2) == whole  # nor does the size of a batch matter


def test_replies_to_other_questions_and_damage_are_told(tmp_path):
    path = tmp_path / "kept.jsonl"
    verdicts(tmp_path, [record(0), record(1)], Fake(RIGHT))
    with pytest.raises(UserError, match=r"kept\.jsonl holds replies to other questions than those about q0"):
        verdicts(tmp_path, [record(0, question="Another?"), record(1)], Fake(RIGHT))
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first[:50] + b"\n" + second + b"\n")
    with pytest.raises(UserError, match=r"kept\.jsonl line 1 is damaged"):
        verdicts(tmp_path, [record(0), record(1)], Fake(RIGHT))


def test_a_reply_is_in_the_file_before_the_next_is_awaited(tmp_path):
    lines = []

    def watched(asks):
        for pair in Fake(RIGHT)(asks):
            yield pair
            lines.append((tmp_path / "kept.asking.jsonl").read_bytes().count(b"\n"))

    verdicts(tmp_path, [record(0)], watched)
    assert lines == list(range(1, 17))


def test_equal_records_are_asked_once_and_both_told(tmp_path):
    engine = Fake(solves({1: 2}))
    first, second = verdicts(tmp_path, [record(1), record(1)], engine)
    assert check(first) == check(second) == {"passed": 2, "of": 16, "hard": True} and len(engine.asked) == 16


def test_replies_are_kept_whole_for_who_wants_to_read_them(tmp_path):
    verdicts(tmp_path, [record(1)], Fake(solves({1: 1})))
    (row,) = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    assert row["id"] == "q1" and [reply["right"] for reply in row["replies"]] == [True] + [False] * 15
    assert row["replies"][0] == {
        "kind": "rollout", "text": "<think>It is so.</think><answer>B</answer>", "finish_reason": "stop", "right": True,
    }  # fmt: skip


def test_records_come_out_before_later_ones_are_read(tmp_path):
    read = []

    def given():
        for number in range(10):
            read.append(number)
            yield record(number)

    rows = asked(given(), lambda one: [], Fake(RIGHT), tmp_path / "kept.jsonl", batch=2)
    next(rows)
    assert read == [0, 1]


def test_the_figure_is_drawn_from_the_histogram(tmp_path):
    verdicts(tmp_path, [record(n) for n in range(3)], Fake(solves([0, 5, 5])))
    counts, refused = histogram(tmp_path / "kept.jsonl")
    assert counts[0] == 1 and counts[5] == 2 and sum(counts) == 3 and refused == 0
    for name in ("passes.png", "passes.svg"):
        assert figure(counts, tmp_path / name).stat().st_size > 1000
    again = figure(dict(enumerate(counts)), tmp_path / "again.png")
    assert again.read_bytes() == (tmp_path / "passes.png").read_bytes()
