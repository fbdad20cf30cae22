"""Asking, keeping, judging again and voting: no question lost, none asked twice, no number from nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedexpert.benchmarks import medevalkit
from mmedexpert.data.encode import prompt_text
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Reply
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.evaluate import QuestionSet, judge_again, majority_engine, predict, read_predictions, vote
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.summary import Summary, majority_accuracy, random_accuracy

OPTIONS = {"A": "pneumonia", "B": "normal", "C": "fracture", "D": "effusion"}


def record(number: int, answer: str = "B", image: str = "x.png", **fields) -> Record:
    plain = {
        "id": f"q{number}", "images": (image,), "question": f"What is shown in {number}?", "options": OPTIONS,
        "answer": answer, "specialties": ("all",), "source": "test", "license": "-", "split": "test",
        "image_group": image,
    }  # fmt: skip
    return Record(**(plain | fields))


def questions(folder: Path, records: list[Record]) -> QuestionSet:
    for name in {name for one in records for name in one.images}:
        Image.new("RGB", (28, 28), (len(name) * 9 % 255, 3, 7)).save(folder / name)
    return QuestionSet("test", records, folder, medevalkit.ask, medevalkit.judge)


class Scripted:
    """An engine that says what it is told, remembers what it was asked, and may die on the way."""

    def __init__(self, say, die_after: int | None = None) -> None:
        self.say, self.die_after, self.asked = say, die_after, []

    def __call__(self, asks):
        for number, place in enumerate(reversed(range(len(asks)))):  # any order is allowed
            if number == self.die_after:
                raise KeyboardInterrupt
            self.asked.append(asks[place])
            yield place, Reply(self.say(asks[place]), 3, "stop", 0.1, -0.5)


def ask(engine, asked: QuestionSet, path: Path, **options):
    settings = {"protocol": "robust", "perspectives": "rotate", "title": "t"} | options
    return predict(engine, asked, path, **settings)


def test_a_killed_run_goes_on_with_no_question_lost_or_asked_twice(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(10)])
    path = tmp_path / "predictions.jsonl"
    first = Scripted(lambda ask: "<answer>B</answer>", die_after=6)
    with pytest.raises(KeyboardInterrupt):
        ask(first, asked, path)
    assert len(read_predictions(path)) == 6
    path.write_bytes(path.read_bytes()[:-30])  # the last line is cut in its middle
    second = Scripted(lambda ask: "<answer>C</answer>")
    rows = ask(second, asked, path)
    assert len(second.asked) == 5 and len(rows) == 10
    assert [row["id"] for row in rows] == [r.id for r in asked.records]
    assert len({ask.id for ask in first.asked[:5] + second.asked}) == 10
    assert sum(row["robust"]["correct"] for row in rows) == 5
    third = Scripted(lambda ask: "never")
    assert ask(third, asked, path) == rows and third.asked == []


def test_protocols_differ_in_prompt_and_both_judge(tmp_path):
    asked = questions(tmp_path, [record(1)])
    ours, theirs = Scripted(lambda ask: "Option B"), Scripted(lambda ask: "Option B")
    (row,) = ask(ours, asked, tmp_path / "a.jsonl", perspectives="bayesian")
    (other,) = ask(theirs, asked, tmp_path / "b.jsonl", protocol="medevalkit")
    assert ours.asked[0].text == prompt_text(asked.records[0], instructions()["bayesian"])
    assert theirs.asked[0].text == medevalkit.ask(asked.records[0])
    assert row["perspective"] == "bayesian" and set(row["adherence"]) == {"bayesian"}
    assert other["perspective"] is None and other["adherence"] == {}
    assert row["robust"] == other["robust"] and row["medevalkit"] == other["medevalkit"]
    assert len(row["prompt_sha256"]) == 64 and row["image_sha256"] == other["image_sha256"]


def test_judging_again_asks_nothing_and_mends_the_file(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(3)])
    path = tmp_path / "predictions.jsonl"
    rows = ask(Scripted(lambda ask: "The answer is B"), asked, path)
    before = path.stat().st_mtime_ns
    assert sorted(judge_again(path, asked), key=lambda row: row["id"]) == rows
    assert path.stat().st_mtime_ns == before
    wrong = [row | {"robust": {"correct": False, "picked": None, "parsed": False}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert judge_again(path, asked) == rows == read_predictions(path)  # in the order of the file


def test_blank_images_replace_every_image(tmp_path):
    asked = questions(tmp_path, [record(1, images=("x.png", "y.png"))])
    engine = Scripted(lambda ask: "B")
    grey = tmp_path / "grey.png"
    Image.new("RGB", (28, 28)).save(grey)
    ask(engine, asked, tmp_path / "p.jsonl", blank=grey)
    assert engine.asked[0].images == (grey, grey)


def test_majority_never_looks(tmp_path):
    train = [record(i, "C") for i in range(3)] + [record(9, "A")]
    asked = questions(tmp_path, [record(1, "C"), record(2, "B", options={"A": "normal", "B": "fracture"})])
    rows = ask(majority_engine(train, asked.records), asked, tmp_path / "p.jsonl", perspectives="none")
    assert [row["robust"]["picked"] for row in rows] == ["C", "B"]


def prediction(picked: str | None, logp: float | None = None, gold: str = "B", **fields):
    verdict = {"correct": picked == gold, "picked": picked, "parsed": picked is not None}
    plain = {
        "id": "q", "image_group": "g", "specialties": ["all"], "modality": "", "body_system": "", "kind": "choice",
        "groups": {}, "perspective": "intuitive", "gold": gold, "robust": verdict, "medevalkit": verdict, "scores":
        {"robust": {}, "medevalkit": {}}, "adherence": {}, "finish_reason": "stop", "mean_logp": logp,
    }  # fmt: skip
    return plain | fields


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([("A", -9.0), ("B", -0.1), ("A", -9.0), ("C", -0.1)], "A"),
        ([("A", -0.9), ("B", -0.1), ("A", -0.9), ("B", -0.2)], "B"),  # a tie goes to the surer outcome
        ([("A", -0.1), ("B", -0.5), ("A", -2.0), ("B", -0.5)], "B"),  # by the mean of its answers
        ([(None, -0.1), (None, -0.1), (None, -0.1), ("D", -5.0)], "D"),  # what cannot be read has no vote
        ([(None, 0.0)] * 4, None),
        ([("C", None), ("B", None), ("B", None), ("C", None)], "C"),  # the engine tells no probabilities: first stays
    ],
)
def test_the_vote_of_four_perspectives(answers, winner):
    assert vote([prediction(*answer) for answer in answers])["robust"]["picked"] == winner


def test_the_gain_of_voting_is_paired_with_the_mean_of_single_perspectives():
    rng = np.random.default_rng(0)
    records = [record(i, image=f"{i % 20}.png") for i in range(40)]
    rows = [
        prediction("B" if rng.random() < 0.6 else "A", -1.0, id=one.id, image_group=one.image_group, perspective=name)
        for one in records
        for name in PERSPECTIVES
    ]
    found = Summary(num_resamples=200, seed=0).of(rows, records, protocol="robust", specialties=["all"])
    single = found["vote"]["robust"]
    mean = np.mean([single[name]["accuracy"] for name in PERSPECTIVES])
    assert single["gain"]["mean"] == pytest.approx(found["macro_accuracy"] - mean)
    assert single["gain"]["ci_low"] < single["gain"]["mean"] < single["gain"]["ci_high"]
    assert found["n"] == 40 and found["protocols"]["robust"]["n"] == 40


def test_summary_says_what_it_counts():
    records = [
        record(0, groups={"task": "Diagnosis"}, modality="CT"), record(1, groups={"task": "Treatment"}, modality="MR"),
        record(2, "yes", options=None, kind="yes_no"), record(3, "left lung", options=None, kind="open"),
    ]  # fmt: skip
    rows = [
        prediction("B", id="q0", groups={"task": "Diagnosis"}, modality="CT"),
        prediction(None, id="q1", groups={"task": "Treatment"}, modality="MR", finish_reason="length"),
        prediction("yes", id="q2", gold="yes", kind="yes_no"),
        prediction("lung", id="q3", gold="left lung", kind="open",
                   scores={"robust": {"f1": 0.5}, "medevalkit": {"f1": 0.25}}),
    ]  # fmt: skip
    found = Summary(num_resamples=100, seed=0).of(
        rows, records, protocol="medevalkit", specialties=["all"], breakdowns=("task",), clean={"q0", "q3"}
    )
    robust = found["protocols"]["robust"]
    assert robust["accuracy"] == 0.5 and found["parse_failure_rate"] == 0.25 and found["truncation_rate"] == 0.25
    assert {k: v["accuracy"] for k, v in robust["by_kind"].items()} == {"choice": 0.5, "open": 0.0, "yes_no": 1.0}
    assert set(robust["by_task"]) == {"Diagnosis", "Treatment", "not stated"} and set(robust["by_modality"]) >= {"CT"}
    assert robust["clean"]["n"] == 2 and robust["clean"]["accuracy"] == 0.5
    assert robust["open"] == {"f1": 0.5} and found["protocols"]["medevalkit"]["open"] == {"f1": 0.25}
    assert found["baselines"]["random"] == random_accuracy(records) == pytest.approx((0.25 + 0.25 + 0.5 + 0) / 4)
    assert found["baselines"]["majority"] == majority_accuracy(records) == 1.0  # each kind has one gold answer here


def test_engine_answers_as_generate_does_whatever_the_batch(tiny, picture, tmp_path):
    model, encoder = tiny
    sizes = [(56, 56), (84, 56), (28, 84), (56, 56), (112, 28)]
    for seed, size in enumerate(sizes):
        picture(seed, *size).save(tmp_path / f"{seed}.png")
    words = ["heart", "the heart rate is low within high", "two of a child", "rate", "low low low"]
    records = [
        record(i, images=(f"{i}.png",) if i % 2 else (f"{i}.png", f"{(i + 1) % 5}.png"), question=words[i])
        for i in range(5)
    ]
    asked = QuestionSet("t", records, tmp_path, medevalkit.ask, medevalkit.judge)
    texts = []
    for batch_size in (1, 2, 5):
        engine = TransformersEngine(model, encoder, batch_size=batch_size, max_new_tokens=6)
        rows = ask(engine, asked, tmp_path / f"{batch_size}.jsonl", protocol="medevalkit")
        texts.append([row["response"] for row in rows])
        assert all(row["mean_logp"] <= 0 and row["tokens"] <= 6 for row in rows)
    prompt = encoder.prompt(records[1], tmp_path)
    assert texts[0] == texts[1] == texts[2] and len(prompt.images) == 1
