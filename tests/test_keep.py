"""`gba.keep`: how often the start solves each question is counted once and kept; RL sees those in range alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from commands import run
from test_config import composed

from mmedexpert.errors import UserError
from mmedexpert.stages.measured import COLUMNS, _measured, _passed, passed, within
from mmedexpert.stages.reasoner_key import reasoner_key

RECORDS = [SimpleNamespace(id=f"q{i}") for i in range(7)]


@dataclass
class Sampler:
    """Solves question i in i % 4 of 4 completions; notes who was asked by which seeds."""

    asked: list

    def __call__(self, records, seeds):
        self.asked.append(([r.id for r in records], list(seeds)))
        right = [float(place < int(r.id[1:]) % 4) for r in records for place in range(4)]
        return SimpleNamespace(parts={"accuracy": right})


def test_counts_are_per_question_and_what_is_written_is_not_sampled_again(tmp_path):
    path, first = tmp_path / "difficulty.jsonl", Sampler([])

    def counted(sampler, seed=5):
        return {row["id"]: row["passed"] for row in _measured(path, COLUMNS, RECORDS, sampler, 3, seed, _passed)}

    counts = counted(first)
    assert counts == {f"q{i}": i % 4 for i in range(7)} == passed(path)
    assert [ids for ids, _ in first.asked] == [["q0", "q1", "q2"], ["q3", "q4", "q5"], ["q6"]]
    assert len({seed for _, seeds in first.asked for seed in seeds}) == 7
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:9])  # killed in the second batch
    again = Sampler([])
    assert counted(again) == counts == passed(path)
    assert again.asked == first.asked[1:]
    assert counted(Sampler([]), seed=6) == counts  # nothing left to ask


def test_both_ends_of_the_range_stay_and_an_empty_one_is_refused():
    counts = {record.id: place % 4 for place, record in enumerate(RECORDS)}
    assert [record.id for record in within(RECORDS, counts, [1, 2])] == ["q1", "q2", "q5", "q6"]
    assert within(RECORDS, counts, [0, 4]) == RECORDS
    with pytest.raises(UserError, match=r"gba\.keep=\[4, 4\] leaves no .* 0 times: 2, 1 times: 2"):
        within(RECORDS, counts, [4, 4])


def test_without_a_range_nothing_of_it_decides_a_reasoner():
    key = reasoner_key(composed(), ["x"])
    assert "keep" not in key["gba"] and reasoner_key(composed("gba.keep_rollouts=4"), ["x"]) == key
    some = reasoner_key(composed("gba.keep=[1,7]", "gba.keep_rollouts=8"), ["x"])
    assert some["gba"].pop("keep") == [1, 7] and some == key


@pytest.mark.parametrize("keep", ["[3,1]", "[1,17]", "[1]", "[-1,3]"])
def test_a_range_must_be_one(keep):
    with pytest.raises(UserError, match=r"gba\.keep=.* 0 to gba\.keep_rollouts=16"):
        composed(f"gba.keep={keep}")


def test_the_command_counts_once_and_trains_on_what_is_in_range(tmp_path):
    given = ["stage=gba", "gba.init=base", "gba.keep_rollouts=4", "data.limit=4"]
    run(tmp_path, *given, "gba.keep=[0,4]")
    (folder,) = tmp_path.glob("difficulty/*/")
    lines = [json.loads(line) for line in (folder / "difficulty.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["of"] for line in lines} == {4}
    (made,) = tmp_path.glob("gba/*/metrics.json")
    assert json.loads(made.read_text())["train_records"] == 16
    solved = next(iter(lines))["passed"]
    if {line["passed"] for line in lines} == {solved}:  # an untaught model solves nothing
        other = "[1,4]" if solved == 0 else "[0,0]"
        done = run(tmp_path, *given, f"gba.keep={other}", code=2)
        assert "leaves no training question" in done.stderr
    assert len([*tmp_path.glob("difficulty/*/")]) == 1


def test_questions_of_other_specialties_than_those_trained_can_be_asked(tmp_path):
    given = ["stage=eval", "eval.models=[base]", "specialty=pediatrics"]
    run(tmp_path, *given, "eval.specialties=[adult_medicine,pediatrics]")
    (path,) = tmp_path.glob("eval/*/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {name for row in rows for name in row["specialties"]} >= {"adult_medicine", "pediatrics"}
    summary = json.loads((path.parent / "summary.json").read_text())
    assert list(summary["per_specialty"]) == ["adult_medicine", "pediatrics"]
    done = run(tmp_path, *given, "eval.specialties=[pediatric]", code=2)
    assert "eval.specialties: 'pediatric' has no test record" in done.stderr and "did you mean" in done.stderr
