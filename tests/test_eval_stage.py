"""stage=eval on a model that answers: who is asked what, with which weights and pictures, how answers are counted."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import OPTIONS
from PIL import Image
from plain import Plain, deltas, user_turn

from mmedexpert.data.record import Record
from mmedexpert.data.records import load_records
from mmedexpert.evaluation import summary as numbers
from mmedexpert.evaluation.predict import QuestionSet
from mmedexpert.guidelines import PERSPECTIVES, perspectives
from mmedexpert.guidelines.rubrics import grades
from mmedexpert.guidelines.truth import truth_of
from mmedexpert.models import generate as generating
from mmedexpert.reporting.tables import print_result
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.scoring import medevalkit
from mmedexpert.stages import dsa, evaluation
from mmedexpert.stages.data import dataset

NAMES = ["pediatrics", "oncology_surgery"]


@dataclass
class Asked:
    config: Config
    runs: dict[str, Run]
    records: list[Record]  # of the test split of the specialties
    plain: Plain
    updates: dict[str, dict[str, Any]]  # of the base, by model
    image_root: Path
    generated: list[dict[str, Any]]  # what the sampler was given, window by window

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.runs[name].folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(answering) -> Asked:
    """The base, an expert with dropout, and both baselines, on the test questions of two of four specialties."""
    config = answering(
        "stage=eval", f"specialty.names=[{','.join(NAMES)}]", "data.source.test=12", "data.source.train=16",
        "eval.models=[base,oncology_surgery,majority,blank_image,swapped_image]", "engine.batch_size=5", "dsa.steps=6",
        "dsa.lr=0.02", "model.lora.dropout=0.5", "model.max_new_tokens=15",
    )  # fmt: skip
    generated: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = generating.decode

        def watched(model: Any, encoder: Any, prompts: Any, **options: Any) -> Any:
            generated.append({"prompts": len(prompts), **options})
            return decode(model, encoder, prompts, **options)

        patch.setattr(generating, "decode", watched)
        runs = evaluation.run(config)
    records, image_root = load_records(dataset(config).folder)
    chosen = [r for r in records if r.split == "test" and r.specialties[0] in NAMES]
    expert = deltas(dsa.run(config)["oncology_surgery"].folder / "adapter")
    plain = Plain(config.model.name_or_path, image_root)
    return Asked(config, runs, chosen, plain, {"base": {}, "oncology_surgery": expert}, image_root, generated)


def told(record: Record) -> str:
    return PERSPECTIVES[zlib.crc32(record.id.encode()) % 4]


def test_the_test_questions_of_the_specialties_are_asked_each_once(asked):
    assert list(asked.runs) == ["base", "oncology_surgery", "majority", "blank_image", "swapped_image"]
    wanted = sorted(f"{name}-test-{i:03d}" for name in NAMES for i in range(12))
    for name in asked.runs:
        assert sorted(row["id"] for row in asked.rows(name)) == wanted


def test_batches_and_limits_are_those_of_the_config(asked):
    """Greedy, at most 15 new tokens, 5 questions at once, and no image placeholder in an answer."""
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    banned = sorted(asked.plain.tokenizer.convert_tokens_to_ids(vision))
    assert [(one["prompts"], one["rows"]) for one in asked.generated] == [(24, 5)] * 4
    for one in asked.generated:
        assert (one["max_new_tokens"], sorted(one["banned_ids"])) == (15, banned)
        assert not one.get("temperature") and one.get("num_generations", 1) == 1


def test_another_split_when_asked_for(answering, asked):
    config = answering("stage=eval", "specialty.names=[pediatrics]", "eval.split=val", "eval.models=[base]")
    (run,) = evaluation.run(config).values()
    rows = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == [f"pediatrics-val-{i:03d}" for i in range(4)]


def test_each_question_is_asked_under_the_perspective_of_its_hash(asked):
    assert len({told(record) for record in asked.records}) == 4
    record_of = {record.id: record for record in asked.records}
    for name in ("base", "oncology_surgery", "blank_image"):
        for row in asked.rows(name):
            record = record_of[row["id"]]
            text = user_turn(record, told(record))
            assert row["perspective"] == told(record) and set(row["adherence"]) == {told(record)}
            assert row["prompt_sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", ["base", "oncology_surgery"])
def test_answers_are_the_greedy_ones_of_the_base_with_the_adapter(asked, name):
    """Stock generate on weights summed by hand: scaling alpha / r, no dropout, whatever the batch."""
    questions = [(record, told(record)) for record in asked.records]
    wanted = asked.plain.greedy(asked.updates[name], questions, 15)
    found = {row["id"]: row["response"] for row in asked.rows(name)}
    same = [found[record.id] == text for (record, _), text in zip(questions, wanted, strict=True)]
    assert sum(same) >= len(same) - 1  # a tie of two tokens may fall either way
    said = {n: [row["response"] for row in asked.rows(n)] for n in ("base", "oncology_surgery")}
    assert sum(a != b for a, b in zip(*said.values(), strict=True)) >= 3


def test_the_pictures_are_the_questions_own_and_blank_ones_are_grey(asked):
    record_of = {record.id: record for record in asked.records}
    for row in asked.rows("base"):
        picture = (asked.image_root / record_of[row["id"]].images[0]).read_bytes()
        assert row["image_sha256"] == [hashlib.sha256(picture).hexdigest()]
    grey = asked.runs["blank_image"].folder / "blank.png"
    assert (np.array(Image.open(grey)) == 128).all()
    sent = {tuple(row["image_sha256"]) for row in asked.rows("blank_image")}
    assert sent == {(hashlib.sha256(grey.read_bytes()).hexdigest(),)}
    # the last model of the list, and it really sees grey
    wanted = asked.plain.greedy(asked.updates["oncology_surgery"], [(r, told(r)) for r in asked.records], 15, grey)
    found = {row["id"]: row["response"] for row in asked.rows("blank_image")}
    same = [found[record.id] == text for record, text in zip(asked.records, wanted, strict=True)]
    assert sum(same) >= len(same) - 1


def test_a_swapped_image_is_another_questions_and_the_model_sees_it(asked):
    own = {row["id"]: row["image_sha256"] for row in asked.rows("base")}
    shown = {row["id"]: row["image_sha256"] for row in asked.rows("swapped_image")}
    assert all(shown[name] != own[name] and shown[name] in own.values() for name in own)
    modality = {tuple(own[record.id]): record.modality for record in asked.records}
    assert all(modality[tuple(shown[record.id])] == record.modality for record in asked.records)
    said = [{row["id"]: row["response"] for row in asked.rows(name)} for name in ("oncology_surgery", "swapped_image")]
    assert said[0] != said[1]


def test_the_places_of_an_image_are_counted(asked):
    """One for each square of two patches of 14 pixels a side, of the image as the model gets it."""
    for row in asked.rows("base"):
        record = next(one for one in asked.records if one.id == row["id"])
        width, height = Image.open(asked.image_root / record.images[0]).size
        assert row["image_tokens"] == round(width / 28) * round(height / 28)


def by_hand(asked: Asked, name: str) -> dict[str, bool]:
    """Whether each answer is right, read from the file with one regular expression."""
    gold = {record.id: record.answer for record in asked.records}
    answers = {row["id"]: re.search(r"<answer>([A-D])</answer>$", row["response"]) for row in asked.rows(name)}
    return {i: bool(match) and match[1] == gold[i] for i, match in answers.items()}


@pytest.mark.parametrize("name", ["base", "oncology_surgery", "majority", "blank_image", "swapped_image"])
def test_accuracies_are_those_counted_by_hand(asked, name):
    right, summary = by_hand(asked, name), asked.runs[name].summary
    assert all(row["robust"]["correct"] == right[row["id"]] for row in asked.rows(name))
    each = {}
    for specialty in NAMES:
        answers = [right[record.id] for record in asked.records if specialty in record.specialties]
        each[specialty] = np.mean(answers)
        found = summary["per_specialty"][specialty]
        assert found["accuracy"] == pytest.approx(each[specialty]) and found["n"] == 12
    assert summary["macro_accuracy"] == pytest.approx(np.mean(list(each.values())))
    assert summary["n"] == 24 and summary["protocol"] == "robust"


@pytest.mark.parametrize("name", ["base", "oncology_surgery", "blank_image"])
def test_adherence_and_lengths_are_means_of_the_answers(asked, name):
    rows, summary = asked.rows(name), asked.runs[name].summary
    for perspective, value in summary["adherence"].items():
        scores = [row["adherence"][perspective] for row in rows if row["perspective"] == perspective]
        assert value == pytest.approx(np.mean(scores))
    assert len({row["adherence"][row["perspective"]] for row in rows}) >= 2
    ended = [row["finish_reason"] == "stop" for row in rows]
    assert summary["truncation_rate"] == pytest.approx(1 - np.mean(ended))
    assert max(row["tokens"] for row in rows) <= 15


def test_criteria_are_in_the_predictions_and_their_means_in_the_summary(asked):
    """In `rotate`: of each perspective over its own questions; the majority is asked under none."""
    rows, summary, records = asked.rows("base"), asked.runs["base"].summary, {r.id: r for r in asked.records}
    for row in rows:
        record = records[row["id"]]
        found = grades(row["response"], record.options, truth_of(record))
        assert row["criteria"] == found.criteria[row["perspective"]] and len(row["criteria"]) >= 3
    assert summary["perspectives"]["together"] == {}
    for name, one in summary["perspectives"]["each"].items():
        own = [row for row in rows if row["perspective"] == name]
        assert one["n"] == len(own) and one["adherence"] == summary["adherence"][name]
        assert one["robust"]["accuracy"] == pytest.approx(np.mean([row["robust"]["correct"] for row in own]))
        for criterion, found in one["criteria"].items():
            values = [v for row in own if (v := row["criteria"][criterion]) is not None]
            assert found["n"] == len(values) and found["mean"] == (pytest.approx(np.mean(values)) if values else None)
    assert asked.runs["majority"].summary["perspectives"] == {"each": {}, "together": {}, "groups": {}}
    assert {str(row["criteria"]) for row in asked.rows("majority")} == {"{}"}


def test_every_file_that_adherence_follows_from_has_answers_judged_again(asked, monkeypatch):
    questions = QuestionSet("q", asked.records, asked.image_root, medevalkit.ask, medevalkit.judge)
    told = []
    names = sorted(path.name for path in Path(perspectives.__file__).parent.glob("*.yaml"))
    for changed in ["none", *names]:
        monkeypatch.setattr(evaluation, "text_of", lambda name, changed=changed: f"{name} {name == changed}")
        told.append(evaluation._rules(asked.config, questions, None))
    assert len(set(told)) == len(names) + 1 >= 3


def test_majority_answers_what_was_most_often_right_in_training(asked):
    """Another letter is most frequent in each split, so that a baseline that looks at test is seen."""
    records, _ = load_records(dataset(asked.config).folder)
    counts = {
        split: Counter(r.answer for r in records if r.split == split and r.specialties[0] in NAMES)
        for split in ("train", "test")
    }
    most = max(OPTIONS, key=lambda letter: counts["train"][letter])
    assert counts["test"].most_common(1)[0][0] != most
    assert {row["response"] for row in asked.rows("majority")} == {f"<answer>{most}</answer>"}


@pytest.mark.parametrize(
    ("setting", "expected"), [("vote", set(PERSPECTIVES)), ("none", {None}), ("bayesian", {"bayesian"})]
)
def test_other_settings_of_perspectives_are_followed(answering, capsys, setting, expected):
    config = answering(
        "stage=eval", "specialty.names=[pediatrics]", "eval.models=[base]", f"eval.perspectives={setting}",
        "eval.contamination=false",
    )  # fmt: skip
    (run,) = evaluation.run(config).values()
    rows = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert {row["perspective"] for row in rows} == expected and len(rows) == 6 * len(expected)
    assert run.summary["contamination"] is None
    found = run.summary["perspectives"]
    assert set(found["each"]) == expected - {None} and bool(found["together"]) == (setting == "vote")
    if setting == "vote":
        right = {
            p: {row["id"]: row["robust"]["correct"] for row in rows if row["perspective"] == p} for p in PERSPECTIVES
        }
        counts = [sum(right[p][i] for p in PERSPECTIVES) for i in right[PERSPECTIVES[0]]]
        one = found["together"]["robust"]
        assert one["oracle"]["accuracy"] == pytest.approx(np.mean([count > 0 for count in counts]))
        assert one["mean"]["accuracy"] == pytest.approx(np.mean(counts) / 4)
        assert one["best"]["accuracy"] == pytest.approx(max(np.mean([*of.values()]) for of in right.values()))
        assert sum(one["alone"].values()) == counts.count(1) and one["oracle"]["n"] == 6
        assert one["vote"]["accuracy"] == run.summary["protocols"]["robust"]["accuracy"]
        assert run.metrics["perspectives/together/robust/agreement/mean"] == one["agreement"]["mean"]
    print_result({"base": run})
    assert ("any of them (oracle)" in capsys.readouterr().out) == (setting == "vote")
    prompts = {row["prompt_sha256"] for row in rows}
    assert prompts == {
        hashlib.sha256(user_turn(record, perspective).encode()).hexdigest()
        for record in load_records(dataset(config).folder)[0]
        if record.split == "test" and record.specialties == ("pediatrics",)
        for perspective in expected
    }


def test_protocol_and_resamples_are_the_configs(answering):
    config = answering(
        "stage=eval", "specialty.names=[pediatrics]", "eval.models=[base]", "protocol=medevalkit",
        "eval.num_resamples=7",
    )  # fmt: skip
    drawn: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = numbers.cluster_bootstrap_ci

        def watched(*args: Any, num_resamples: int, **rest: Any) -> Any:
            drawn.append(num_resamples)
            return real(*args, num_resamples=num_resamples, **rest)

        patch.setattr(numbers, "cluster_bootstrap_ci", watched)
        (run,) = evaluation.run(config).values()
    rows = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert set(drawn) == {7} and run.summary["protocol"] == "medevalkit"
    assert {row["perspective"] for row in rows} == {None}
