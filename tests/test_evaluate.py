"""Asking, keeping, judging again and voting: no question lost, none asked twice, no number from nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Reply, refusal
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.errors import UserError
from mmedexpert.evaluation.asked import REFUSED_FIRST
from mmedexpert.evaluation.predict import (
    QuestionSet,
    judge_again,
    majority_engine,
    predict,
    read_predictions,
    vote,
)
from mmedexpert.evaluation.summary import Summary, majority_accuracy, random_accuracy
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import Grades
from mmedexpert.models.encode import prompt_text
from mmedexpert.reporting.tables import unanswered
from mmedexpert.scoring import medevalkit

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
    settings = {"protocol": "robust", "perspectives": "rotate", "style": "small", "title": "t"} | options
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


@pytest.mark.parametrize("keep", range(1, 13))
def test_a_line_cut_inside_a_character_is_dropped_and_asked_again(tmp_path, keep):
    asked = questions(tmp_path, [record(i) for i in range(3)])
    path = tmp_path / "predictions.jsonl"
    rows = ask(Scripted(lambda ask: "\u5de6\u80ba\u6709\u7ed3\u8282"), asked, path)  # 3 bytes each
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind("\u5de6".encode()) + keep])
    assert read_predictions(path) == [rows[2], rows[1]]
    again = Scripted(lambda ask: "\u5de6\u80ba\u6709\u7ed3\u8282")
    assert ask(again, asked, path) == rows and [one.id for one in again.asked] == ["q0"]


def test_a_whole_line_without_its_line_end_is_kept(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(2)])
    path = tmp_path / "predictions.jsonl"
    rows = ask(Scripted(lambda ask: "B"), asked, path)
    path.write_bytes(path.read_bytes()[:-1])
    never = Scripted(lambda ask: "never")
    assert ask(never, asked, path) == rows and never.asked == []


@pytest.mark.parametrize(
    "bad",
    [
        b"{}",
        b"[1]",
        b"7",
        b"null",
        b"",
        b'{"id": "q1", "resp',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"id": "\xff", "perspective": 1, "response": 2}',
    ],
)
def test_damage_in_the_middle_is_told_and_nothing_is_overwritten(tmp_path, bad):
    asked = questions(tmp_path, [record(i) for i in range(3)])
    path = tmp_path / "predictions.jsonl"
    ask(Scripted(lambda ask: "B"), asked, path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]))
    before = path.read_bytes()
    for again in (lambda: ask(Scripted(lambda ask: "B"), asked, path), lambda: judge_again(path, asked)):
        with pytest.raises(UserError, match=r"predictions\.jsonl line 2 is damaged.*delete this line"):
            again()
    assert path.read_bytes() == before


class Refusing(Scripted):
    """Refuses the questions whose id is in `never`."""

    def __init__(self, never, **more) -> None:
        super().__init__(lambda ask: "<answer>A</answer>", **more)
        self.never = set(never)

    def __call__(self, asks):
        for place, reply in super().__call__(asks):
            yield place, refusal("400 too long") if asks[place].id in self.never else reply


@pytest.mark.parametrize("protocol", ["robust", "medevalkit"])
def test_a_refused_question_is_wrong_unparsed_and_named(tmp_path, protocol):
    asked = questions(tmp_path, [record(i, "A") for i in range(5)])  # MedEvalKit reads A out of an empty response
    rows = ask(Refusing({"q1", "q3"}), asked, tmp_path / "p.jsonl", protocol=protocol)
    assert read_predictions(tmp_path / "p.jsonl")[1] == rows[3]
    for row in (rows[1], rows[3]):
        assert (row["finish_reason"], row["refused"], row["response"]) == ("refused", "400 too long", "")
        assert row["robust"] == row["medevalkit"] == {"correct": False, "picked": None, "parsed": False}
        assert row["adherence"] == row["criteria"] == {} and row["gold"] == "A"
    assert "refused" not in rows[0] and rows[0][protocol]["correct"]
    assert judge_again(tmp_path / "p.jsonl", asked)[1] == rows[3]  # and stays so
    found = Summary(num_resamples=50, seed=0).of(rows, asked.records, protocol=protocol, specialties=["all"])
    assert found["unanswered"] == 2 and [row["id"] for row in found["refused"]] == ["q1", "q3"]
    assert found["refused"][0]["refused"] == "400 too long" and found["n"] == 5
    assert {found["protocols"][name]["accuracy"] for name in ("robust", "medevalkit")} == {0.6}
    assert found["parse_failure_rate"] == 0.4
    assert unanswered({"base": found, "clean": found | {"unanswered": 0, "refused": []}}) == [
        "base: 2 unanswered, counted as wrong: q1 and 1 more (400 too long); all in summary.json"
    ]


def test_refused_questions_are_asked_again_while_a_run_is_unfinished(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(6)])
    with pytest.raises(KeyboardInterrupt):
        ask(Refusing({"q5"}, die_after=3), asked, tmp_path / "p.jsonl")
    later = Refusing(())
    rows = ask(later, asked, tmp_path / "p.jsonl")
    assert sorted(one.id for one in later.asked) == ["q0", "q1", "q2", "q5"]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(6)] and not any("refused" in row for row in rows)


def test_most_questions_refused_is_a_setting_told_with_its_reason(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(6)])
    with pytest.raises(UserError, match=r"4 of 6 questions were refused \(first: q5: 400 too long\).*settings"):
        ask(Refusing({"q2", "q3", "q4", "q5"}), asked, tmp_path / "p.jsonl")
    later = Refusing({"q3", "q4", "q5"})  # half: named, and a result
    rows = ask(later, asked, tmp_path / "p.jsonl")
    assert sorted(one.id for one in later.asked) == ["q2", "q3", "q4", "q5"] and len(rows) == 6


def test_a_server_that_refuses_everything_is_not_asked_for_each_of_many_questions(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(3 * REFUSED_FIRST)])
    engine = Refusing({one.id for one in asked.records})
    with pytest.raises(UserError, match=f"{REFUSED_FIRST} of {REFUSED_FIRST} questions were refused"):
        ask(engine, asked, tmp_path / "p.jsonl")
    assert len(engine.asked) == REFUSED_FIRST


def test_the_local_engine_refuses_what_it_cannot_open_and_answers_the_rest(tiny, picture, tmp_path):
    model, encoder = tiny
    records = [record(i, image=f"{i}.png") for i in range(6)]
    asked = questions(tmp_path, records)
    (tmp_path / "1.png").write_bytes(b"no image")
    picture(1, 4000, 2).save(tmp_path / "2.png")  # the image processor refuses this aspect
    (tmp_path / "4.png").unlink()
    rows = ask(TransformersEngine(model, encoder, batch_size=4, max_new_tokens=3), asked, tmp_path / "p.jsonl")
    named = {row["id"]: row["refused"] for row in rows if row["finish_reason"] == "refused"}
    assert {"q1", "q4"} <= set(named) <= {"q1", "q2", "q4"} and "1.png" in named["q1"] and "missing" in named["q4"]
    assert rows[4]["image_sha256"] == [None] and len(rows[1]["image_sha256"][0]) == 64
    assert all(row["tokens"] for row in rows if row["id"] not in named)


def test_protocols_differ_in_prompt_and_both_judge(tmp_path):
    asked = questions(tmp_path, [record(1)])
    ours, theirs = Scripted(lambda ask: "Option B"), Scripted(lambda ask: "Option B")
    (row,) = ask(ours, asked, tmp_path / "a.jsonl", perspectives="bayesian")
    (other,) = ask(theirs, asked, tmp_path / "b.jsonl", protocol="medevalkit")
    assert ours.asked[0].text == prompt_text(asked.records[0], instructions()["bayesian"])
    longer = Scripted(lambda ask: "Option B")
    ask(longer, asked, tmp_path / "c.jsonl", perspectives="bayesian", style="full")
    assert longer.asked[0].text == prompt_text(asked.records[0], instructions("full")["bayesian"])
    assert theirs.asked[0].text == medevalkit.ask(asked.records[0])
    assert row["perspective"] == "bayesian" and set(row["adherence"]) == {"bayesian"}
    assert other["perspective"] is None and other["adherence"] == other["criteria"] == {}
    assert row["robust"] == other["robust"] and row["medevalkit"] == other["medevalkit"]
    assert len(row["prompt_sha256"]) == 64 and row["image_sha256"] == other["image_sha256"]


def test_judging_again_asks_nothing_and_mends_the_file(tmp_path):
    asked = questions(tmp_path, [record(i) for i in range(3)])
    path = tmp_path / "predictions.jsonl"
    rows = ask(Scripted(lambda ask: "The answer is B"), asked, path)
    before = path.stat().st_mtime_ns
    assert sorted(judge_again(path, asked), key=lambda row: row["id"]) == rows
    assert path.stat().st_mtime_ns == before
    unread = {"correct": False, "picked": None, "parsed": False}
    for stale in (
        {"robust": unread}, {"scores": {"robust": {"f1": 1.0}}}, {"adherence": {"intuitive": 0.123}},
        {"criteria": {"brevity": None}},
    ):  # fmt: skip
        path.write_text("".join(json.dumps(row | stale) + "\n" for row in rows))
        assert judge_again(path, asked) == rows == read_predictions(path)  # in the order of the file


CRITERIA = {"size": None}


class Rubrics:
    """Rubrics that say the same of every text, and remember of what they were asked."""

    def __init__(self, monkeypatch) -> None:
        self.seen = []
        place = "mmedexpert.evaluation.predict"
        monkeypatch.setattr(f"{place}.truth_of", lambda record: record.latent.get("truth"))
        monkeypatch.setattr(f"{place}.grades", self.grades)

    def grades(self, *asked) -> Grades:
        self.seen.append(asked)
        scores = {name: (k + 1) / 8 for k, name in enumerate(PERSPECTIVES)}
        return Grades(scores, {name: CRITERIA | {name: 1.0} for name in PERSPECTIVES}, ())


def test_judging_again_follows_the_rubrics(tmp_path, monkeypatch):
    """With the question's own options (None: open) and, of drawn images, what is true of them."""
    records = [record(0), record(1, latent={"truth": "0.57"}), record(2, "lung", options=None, kind="open")]
    asked = questions(tmp_path, records)
    path = tmp_path / "p.jsonl"
    before = {row["id"]: row["perspective"] for row in ask(Scripted(lambda ask: "B"), asked, path)}
    rubrics = Rubrics(monkeypatch)
    rows = judge_again(path, asked)
    for row in rows:
        name = before[row["id"]]
        assert row["adherence"] == {name: (PERSPECTIVES.index(name) + 1) / 8}
        assert row["criteria"] == {"size": None, name: 1.0}
    told = {"q0": (OPTIONS, None), "q1": (OPTIONS, "0.57"), "q2": (None, None)}
    assert rubrics.seen == [("B", *told[row["id"]]) for row in rows] and read_predictions(path) == rows


def test_what_was_kept_of_a_killed_run_is_judged_by_todays_rules(tmp_path, monkeypatch):
    """A run killed under older rules is not a mixture of both."""
    asked = questions(tmp_path, [record(i) for i in range(4)])
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(Scripted(lambda ask: "<answer>B</answer>", die_after=2), asked, path)
    older = [{key: value for key, value in row.items() if key != "criteria"} for row in read_predictions(path)]
    path.write_text("".join(json.dumps(row | {"robust": {"correct": False}}) + "\n" for row in older))
    Rubrics(monkeypatch)
    engine = Scripted(lambda ask: "<answer>B</answer>")
    rows = ask(engine, asked, path)
    assert len(engine.asked) == 2 and all(row["robust"]["correct"] for row in rows)
    assert [row["criteria"] for row in rows] == [{"size": None, row["perspective"]: 1.0} for row in rows]
    assert sorted(read_predictions(path), key=lambda row: row["id"]) == rows


@pytest.mark.parametrize("change", ["lost", "other"])
def test_judging_again_wants_the_very_questions(tmp_path, change):
    asked = questions(tmp_path, [record(i) for i in range(3)])
    rows = ask(Scripted(lambda ask: "B"), asked, tmp_path / "p.jsonl")
    rows = rows[1:] if change == "lost" else [*rows, rows[0] | {"id": "q0x"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"p\.jsonl does not hold the questions of test \(such as q0"):
        judge_again(tmp_path / "p.jsonl", asked)


def test_blank_images_replace_every_image(tmp_path):
    asked = questions(tmp_path, [record(1, images=("x.png", "y.png"))])
    engine = Scripted(lambda ask: "B")
    grey = tmp_path / "grey.png"
    Image.new("RGB", (28, 28)).save(grey)
    ask(engine, asked, tmp_path / "p.jsonl", shown={asked.records[0].id: (grey, grey)})
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
        {"robust": {}, "medevalkit": {}}, "adherence": {}, "criteria": {}, "finish_reason": "stop", "mean_logp": logp,
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
