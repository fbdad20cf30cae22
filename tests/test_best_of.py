"""Best of n: pass@k, the vote and a judge's pick by hand; nothing asked twice; the greedy evaluation left alone."""

from __future__ import annotations

import json
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Any

import pytest
import test_benchmarks_open as open_
from commands import run
from hydra import compose, initialize_config_dir
from test_evaluate import Refusing, Scripted, questions, record
from test_openai_engine import Server, completion, prompt_of

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.evaluation.best_of import (
    FILE,
    chosen,
    flat,
    numbers_of,
    pass_at,
    read_answers,
    read_samples,
    sample,
    sizes,
    voted,
)
from mmedexpert.evaluation.predict import asks_of
from mmedexpert.judging.picking import TOGETHER, scores_of
from mmedexpert.judging.scorer import Group, Scores
from mmedexpert.sources import vqa_rad
from mmedexpert.stages import best_of
from mmedexpert.unread import notes

CONF = Path(__file__).parents[1] / "conf"


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", range(5))
@pytest.mark.parametrize("k", range(1, 5))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right, k):
    draws = list(combinations([True] * right + [False] * (4 - right), k))
    assert pass_at(k, right, 4) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("picked", "place"),
    [
        (["A", "B", "B"], 1),
        (["C", "B", "A", "A", "B"], 1),  # a tie of A and B: B was given first
        ([None, None, None, "D"], 3),  # what cannot be read has no vote
        ([None, "A", None, "B"], 1),
        ([None, None], 0),
        (["left lung", "lung", "left lung"], 0),
    ],
)
def test_the_vote_is_the_earliest_sample_of_the_commonest_answer(picked, place):
    assert voted(picked) == place


@pytest.mark.parametrize(
    ("scores", "place"),
    [([0.1, 0.9, 0.3], 1), ([0.5, 0.9, 0.9], 1), ([-3.0, None, -5.0], 0), ([None, -9.0], 1), ([None, None], None)],
)
def test_the_pick_is_the_first_of_the_best_scored(scores, place):
    assert chosen(scores) == place


def test_numbers_are_of_all_powers_of_two_and_all_samples():
    assert [sizes(n) for n in (2, 3, 4, 6, 8)] == [[1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def rows() -> list[dict[str, Any]]:
    """Three questions of which the gold answer is A, on an image each; four samples."""
    told = [("ABBB", [1, 0, 0, 0], True), ("BABA", [0, 2, 2, 2], False), ("BBBB", [None] * 4, False)]
    return [
        {"id": f"{place}", "image_group": f"{place}", "picked": list(picked), "scores": scores, "greedy": greedy,
         "correct": [one == "A" for one in picked]}
        for place, (picked, scores, greedy) in enumerate(told)
    ]  # fmt: skip


def test_numbers_are_those_counted_by_hand():
    found = numbers_of(rows(), picked=True, num_resamples=200, seed=0)
    values = {name: one["accuracy"] for name, one in found["scores"].items()}
    assert values == pytest.approx({
        "greedy": 1 / 3, "mean": (1 / 4 + 1 / 2) / 3,
        "pass@1": (1 / 4 + 1 / 2) / 3, "pass@2": (1 / 2 + 5 / 6) / 3, "pass@4": 2 / 3,
        "vote@1": 1 / 3, "vote@2": 1 / 3, "vote@4": 0,  # of the second question A, B, A, B: B was given first
        "pick@1": 1 / 3, "pick@2": 2 / 3, "pick@4": 2 / 3,
    })  # fmt: skip
    assert found["missing"] == pytest.approx(1 / 3) and found["n"] == 3 and found["samples"] == 4
    assert {name: one["difference"] for name, one in found["differences"].items()} == pytest.approx(
        {"pick_minus_vote": 2 / 3, "pick_minus_greedy": 1 / 3, "vote_minus_greedy": -1 / 3}
    )
    for one in found["scores"].values():
        assert 0 <= one["ci_low"] <= one["accuracy"] <= one["ci_high"] <= 1 and one["n"] == 3
    assert all(one["p_holm"] >= one["p"] > 0 for one in found["differences"].values())
    told = flat(found | {"cost": {"samples": {"tokens": 7.0}}, "unparsed": 0.25, "truncated": 0.0})
    assert told["best_of/pick@4"] == values["pick@4"] and told["best_of/cost/samples/tokens"] == 7
    assert {"best_of/pick@4/ci_low", "best_of/mean/ci_high", "best_of/pick_minus_vote/p", "best_of/missing"} <= set(
        told
    )


def test_scores_out_of_comparisons_pick_among_all_samples_alone():
    found = numbers_of(rows(), picked=True, num_resamples=50, seed=0, alone=False)["scores"]
    count = max(int(name[5:]) for name in found if name.startswith("pass@"))
    assert [name for name in found if name.startswith("pick")] == [f"pick@{count}"] and "vote@1" in found


def test_without_a_judge_all_else_is_there():
    found = numbers_of(rows(), picked=False, num_resamples=50, seed=0)
    assert not any("pick" in name for name in [*found["scores"], *found["differences"]]) and "missing" not in found
    assert found["scores"]["vote@4"]["accuracy"] == 0 and set(found["differences"]) == {"vote_minus_greedy"}


# --- samples ----------------------------------------------------------------------------------------------------------


def drawn(engine, asked, path: Path, count: int = 3):
    asks = asks_of(asked, protocol="robust", perspectives="rotate", style="small")
    return sample(engine, asks, path, count=count, title="t")


def test_a_killed_run_of_samples_asks_nothing_twice(tmp_path):
    asked, path = questions(tmp_path, [record(i) for i in range(4)]), tmp_path / FILE
    first = Scripted(lambda ask: f"{ask.id} {ask.sample}", die_after=7)
    with pytest.raises(KeyboardInterrupt):
        drawn(first, asked, path)
    path.write_bytes(path.read_bytes()[:-20])  # the last line is cut in its middle
    second = Scripted(lambda ask: f"{ask.id} {ask.sample}")
    found = drawn(second, asked, path)
    assert len(second.asked) == 6 and len({(a.id, a.sample) for a in first.asked[:6] + second.asked}) == 12
    assert [row["response"] for row in found] == [f"q{i} {n}" for i in range(4) for n in range(3)]
    never = Scripted(lambda ask: "never")
    assert drawn(never, asked, path) == found and never.asked == []
    assert read_samples(path, asked.records, count=3)["q2"] == found[6:9]
    assert {"id", "sample", "perspective", "response", "tokens", "finish_reason", "seconds"} <= set(found[0])
    with pytest.raises(UserError, match="lacks sample 3 of q0"):
        read_samples(path, asked.records, count=4)


def test_a_refused_sample_is_wrong_has_no_vote_and_is_asked_again(tmp_path):
    asked, path = questions(tmp_path, [record(i, "A") for i in range(3)]), tmp_path / FILE
    drawn(Refusing({"q1"}), asked, path)
    kept = read_samples(path, asked.records, count=3)
    for protocol in ("robust", "medevalkit"):  # MedEvalKit reads A out of an empty response
        answers = read_answers(asked, kept, protocol=protocol)
        assert [one["correct"] for one in answers] == [[True] * 3, [False] * 3, [True] * 3]
        assert answers[1]["picked"] == [None] * 3
    later = Refusing(())
    drawn(later, asked, path)
    assert [one.id for one in later.asked] == ["q1"] * 3


def test_verdicts_are_the_protocols(tmp_path):
    asked, path = questions(tmp_path, [record(0)]), tmp_path / FILE
    drawn(Scripted(lambda ask: ("<answer>B</answer>", "", "<answer>C</answer>")[ask.sample]), asked, path)
    kept = read_samples(path, asked.records, count=3)
    assert read_answers(asked, kept, protocol="robust")[0]["picked"] == ["B", None, "C"]
    assert read_answers(asked, kept, protocol="medevalkit")[0]["picked"] == ["B", "A", "C"]


# --- scores -----------------------------------------------------------------------------------------------------------


class Judge:
    """A scorer of a table of texts, which remembers what it was asked and may die in a call."""

    def __init__(self, table: dict[str, float], die_in: int | None = None) -> None:
        self.table, self.die_in, self.asked = table, die_in, []

    def __call__(self, groups):
        if len(self.asked) == self.die_in:
            raise KeyboardInterrupt
        self.asked.append(list(groups))
        values = [[self.table[text] for text in group.answers] for group in groups]
        calls = sum(map(len, values))
        names = ("cached", "tokens", "prompt_tokens", "seconds", "judged", "missing")
        return Scores(values, {"calls": float(calls), **dict.fromkeys(names, 1.0)})


def test_equal_texts_are_judged_once_and_one_text_alone_is_not(tmp_path):
    judge = Judge({"x": 1.0, "y": nan})
    groups = [Group("a", "q", (), ("x", "y", "x")), Group("b", "q", (), ("x", "x")), Group("c", "q", (), ())]
    found, counts = scores_of(judge, groups, tmp_path / "scores.jsonl", title="t")
    assert judge.asked == [[Group("a", "q", (), ("x", "y"))]] and counts["calls"] == 2
    assert found == {"a": {"x": 1.0, "y": None}, "b": {"x": 0.0}, "c": {}}


def test_a_killed_judge_is_asked_nothing_twice_and_its_failures_again(tmp_path):
    groups = [Group(f"{i}", "q", (), ("x", "y" if i else "z")) for i in range(TOGETHER + 3)]
    path = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scores_of(Judge({"x": 1.0, "y": 2.0, "z": nan}, die_in=1), groups, path, title="t")
    path.write_bytes(path.read_bytes()[:-9])
    later = Judge({"x": 1.0, "y": 2.0, "z": 3.0})
    found, counts = scores_of(later, groups, path, title="t")
    assert [one.id for asked in later.asked for one in asked] == ["0", *map(str, range(TOGETHER - 1, TOGETHER + 3))]
    assert found["0"] == {"x": 1.0, "z": 3.0} and found["5"] == {"x": 1.0, "y": 2.0}
    assert counts["calls"] == 2 * TOGETHER + 2 * 5  # of both tries
    never = Judge({})
    assert scores_of(never, groups, path, title="t") == (found, counts) and never.asked == []
    other = [Group("5", "q", (), ("x", "new"))]  # a sample that was refused before
    again = Judge({"x": 1.0, "new": 0.5})
    assert scores_of(again, other, path, title="t")[0] == {"5": {"x": 1.0, "new": 0.5}} and len(again.asked) == 1


# --- the command ------------------------------------------------------------------------------------------------------

# question, gold, greedy answer, samples
ASKED = [
    ("Is it one?", "Yes", "no", ["yes", "no", "no", "no"]),
    ("Is it two?", "No", "no", ["no"] * 4),
    ("What is three?", "left lung", "right lung", ["Left lung", "left lung", "right lung", "heart"]),
    ("What is four?", "mass", "mass", ["cyst", "mass", "cyst", "mass"]),
]
TABLE = {"yes": 1, "no": 0, "Left lung": 2, "left lung": 2, "right lung": 3, "heart": 0, "mass": 1, "cyst": nan}


@pytest.fixture()
def server():
    one = Server()
    one.answer = answered
    yield one
    one.quit.set()
    one.http.shutdown()
    one.http.server_close()


def answered(prompt: str, _: int, body: dict[str, Any]) -> Any:
    _, _, greedy, samples = next(row for row in ASKED if row[0] in prompt)
    return completion(samples[body["seed"] - 3] if body["temperature"] else greedy)


def command(server: Server, folder: Path, *more: str) -> list[str]:
    root = folder / "rad"
    if not root.exists():
        told = [open_.native(qid=i, question=q, answer=a, image_name=f"{i}.png") for i, (q, a, *_) in enumerate(ASKED)]
        open_.native_folder(root, {vqa_rad.NATIVE: told})
        for place in range(len(ASKED)):
            (root / "VQA_RAD Image Folder" / f"{place}.png").write_bytes(open_.picture(place))
    return [
        "stage=eval", "benchmark=vqa_rad", f"benchmark.vqa_rad.root={root}", "engine=openai", "seed=3",
        "engine.endpoint.model=m", f"engine.endpoint.base_url={server.base_url}", "eval.contamination=false", *more,
    ]  # fmt: skip


def only(outputs: Path, stage: str) -> Path:
    (folder,) = (path for path in outputs.glob(f"{stage}/*-*") if path.is_dir())
    return folder


def test_samples_of_a_served_model_beside_its_greedy_answers(tmp_path, server, monkeypatch):
    out = tmp_path / "out"
    run(out, *command(server, tmp_path))
    greedy = only(out, "eval")
    key = json.loads((greedy / "identity.json").read_text())["key"]
    assert set(key) == {"asked", "specialties", "engine", "blank", "model"}  # nothing of the samples
    assert [body["temperature"] for body in server.bodies] == [0.0] * 4 and "seed" not in server.bodies[0]

    many = ["eval.best_of=4", "eval.temperature=0.7", "eval.top_p=0.9"]
    done = run(out, *command(server, tmp_path, *many))
    assert only(out, "eval") == greedy and not list(out.glob("best_of/*/scores.jsonl"))
    sampled = server.bodies[4:]
    assert len(sampled) == 16 and {(body["temperature"], body["top_p"]) for body in sampled} == {(0.7, 0.9)}
    assert {(prompt_of(body), body["seed"]) for body in sampled} == {
        (prompt_of(body), seed) for body in sampled for seed in (3, 4, 5, 6)
    }
    assert "Best of 4 on vqa_rad" in done.stdout and "no judge" in done.stdout
    found = json.loads((only(out, "best_of") / "metrics.json").read_text())
    wanted = {"greedy": 2 / 4, "mean": 2.25 / 4, "vote@4": 2 / 4, "pass@4": 1, "pass@2": (0.5 + 1 + 5 / 3) / 4}
    assert {name: found[f"best_of/{name}"] for name in wanted} == pytest.approx(wanted)
    assert "best_of/pick@4" not in found and found["best_of/cost/samples/tokens"] == 16 * 7

    judge = Judge(TABLE)
    monkeypatch.setattr(best_of, "scorer_of", lambda *_: judge)
    picker = ["eval.picker.base_url=http://127.0.0.1:9/v1", "eval.picker.model=judge"]
    done = run(out, *command(server, tmp_path, *many, *picker))
    assert len(server.bodies) == 20  # another judge asks the model nothing
    (asked,) = judge.asked
    assert [group.id for group in asked] == [f"vqa_rad-test-{i}" for i in (0, 2, 3)]  # the second has one answer alone
    assert asked[0].question == "Is it one?" and asked[0].answers == ("yes", "no") and asked[0].images[0].is_file()
    (folder,) = (path.parent for path in out.glob("best_of/*/scores.jsonl"))
    found = json.loads((folder / "metrics.json").read_text())
    assert "best_of/pick@1" not in found  # a server compares all four
    wanted = {"pick@4": 3 / 4, "pick_minus_vote": 1 / 4, "missing": 0, "cost/judge/calls": 8}
    assert {name: found[f"best_of/{name}"] for name in wanted} == pytest.approx(wanted)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answers[3]["scores"] == [None, 1, None, 1] and answers[2]["picked"][:2] == ["left lung"] * 2
    assert (folder / "best_of.png").stat().st_size > 10_000 and "| 4 |" in (folder / "table.md").read_text()
    run(out, *command(server, tmp_path, *many, *picker))
    assert len(server.bodies) == 20 and len(judge.asked) == 1  # all found again


def test_a_local_model_is_sampled_with_its_temperature_and_baselines_are_not(tmp_path):
    words = ["stage=eval", "eval.models=[base,blank_image]", "data.source.test=1", "eval.perspectives=intuitive"]
    run(tmp_path, *words, "eval.best_of=3", "eval.temperature=2.0", "model.max_new_tokens=8")
    told = [json.loads(line) for line in (only(tmp_path, "samples") / FILE).read_text().splitlines()]
    greedy = [json.loads(line) for line in next(tmp_path.glob("eval/base-*/predictions.jsonl")).open()]
    assert sorted((row["id"], row["sample"]) for row in told) == sorted((r["id"], n) for r in greedy for n in range(3))
    assert {row["perspective"] for row in told} == {"intuitive"}
    assert len({row["response"] for row in told}) > len(greedy)  # samples of a question differ
    assert only(tmp_path, "best_of").name.startswith("base-phantom-test-")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.best_of=0"], ["eval.best_of=0", "above 0"]),
        (["eval.best_of=4", "eval.temperature=0"], ["eval.temperature=0", "eval.best_of=1"]),
        (["eval.best_of=4", "eval.top_p=0"], ["eval.top_p=0", "above 0"]),
        (["eval.best_of=4", "eval.top_p=1.5"], ["eval.top_p=1.5", "at most 1"]),
        (["eval.best_of=4", "benchmark=phantom_pairs"], ["phantom_pairs holds pairs", "leave it out"]),
        (["eval.best_of=4", "eval.perspectives=vote"], ["eval.perspectives=vote", "needed"]),
        (["eval.best_of=4", "eval.picker.model=m"], ["eval.picker needs both base_url and model"]),
        (
            ["eval.best_of=4", "eval.picker.run=x", "eval.picker.model=m", "eval.picker.base_url=http://x/v1"],
            ["not both"],
        ),
        (["eval.best_of=4", "eval.models=[majority]"], ["eval.best_of", "baselines are not sampled"]),
        (["eval.best_of=4", "eval.picker.shows_answer=true"], ["eval.picker.shows_answer", "right answer"]),
        (["eval.best_of=4", "eval.picker.concurrency=2"], ["eval.picker.concurrency", "no judge is asked"]),
        (["eval.temperature=0.5"], ["eval.temperature", "eval.best_of=8"]),
        (["eval.picker.model=m", "eval.picker.base_url=http://x/v1"], ["eval.picker.model", "eval.best_of=8"]),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(overrides, words):
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(UserError) as caught:
        given = ["stage=eval", *overrides]
        notes(typed(compose("config", overrides=given), given), given)
    for word in words:
        assert word in str(caught.value), caught.value
