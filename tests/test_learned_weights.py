"""`gba.weights_from=validation`: weights from how following a perspective goes with being right, on validation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_config import composed
from test_unread import told

from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.shown import arm_of
from mmedexpert.stages import gba, measured
from mmedexpert.stages import policy as policies
from mmedexpert.stages.measured import weights_of
from mmedexpert.stages.reasoner_key import reasoner_key
from mmedexpert.training.advantages import followed_and_right

NAN = math.nan


def test_what_a_perspective_pays_by_hand():
    """Four completions, two of each of two perspectives: the first's follower is right, the second's is wrong."""
    adherence = torch.tensor([[[1.0, NAN], [0.0, NAN], [NAN, 0.2], [NAN, 0.8]]])
    right = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    pays = followed_and_right(adherence, right)
    # two scores lie 1/sqrt(2) of their deviation from their mean each
    assert pays == pytest.approx(torch.tensor([[0.5**0.5 / 2, -(0.5**0.5) / 2]]), abs=1e-3)


def test_nothing_is_learned_where_all_follow_alike_or_all_are_right():
    adherence = torch.tensor([[[0.3, 0.1], [0.3, 0.9]], [[0.0, 1.0], [1.0, 0.0]]])
    right = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    pays = followed_and_right(adherence, right)
    assert pays[0, 0] == 0 and pays[0, 1] > 0.3 and not pays[1].any()
    scores = torch.randint(5, (9, 7, 4), generator=torch.Generator().manual_seed(0)) / 4.0
    for verdict in (0.0, 1.0):  # exactly: whatever is left of rounding would be scaled up to weights
        assert weights_of(followed_and_right(scores, torch.full((9, 7), verdict)).mean(0).tolist()) == [0.0] * 4
    with pytest.raises(ValueError, match=r"right .* must match"):
        followed_and_right(adherence, right[:1])


def test_weights_sum_as_ones_do_and_none_is_below_zero():
    assert weights_of([0.1, -0.2, 0.3, 0.0]) == pytest.approx([1.0, 0.0, 3.0, 0.0])
    assert weights_of([-0.1, -0.2, 0.0, -1.0]) == [0.0] * 4


SMALL = (
    "gba.init=base", "gba.steps=2", "gba.prompts_per_step=4", "gba.num_generations=16", "model.max_new_tokens=24",
)  # fmt: skip


def test_a_reasoner_with_learned_weights_is_that_with_the_same_weights_given(answering):
    learning, asked = answering(*SMALL, "gba=learned"), []
    roll_out = policies.roll_out
    with pytest.MonkeyPatch.context() as patch:

        def sample(policy, encoder, records, image_root, *, guidance, **options):
            asked.append((records[0].split, guidance.weights))
            return roll_out(policy, encoder, records, image_root, guidance=guidance, **options)

        patch.setattr(policies, "roll_out", sample)
        (made,) = gba.run(learning).values()
    outputs = made.folder.parents[1]
    (folder,) = outputs.glob("weights/learned-*")
    told = json.loads((folder / "weights.json").read_text())
    weights = [told[name]["weight"] for name in PERSPECTIVES]
    assert sum(weights) == pytest.approx(4) and len({*weights}) > 1
    assert all(row["low"] <= row["pays"] <= row["high"] for row in told.values())
    lines = [json.loads(line) for line in (folder / "followed.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) and all("-val-" in line["id"] for line in lines)
    # by plain arithmetic from what is on disk
    for place, name in enumerate(PERSPECTIVES):
        found = []
        for line in lines:
            pairs = [(row[place], r) for row, r in zip(line["adherence"], line["right"], strict=True)]
            pairs = [pair for pair in pairs if pair[0] is not None]
            assert len(pairs) == 4
            mean, often = (sum(column) / 4 for column in zip(*pairs, strict=True))
            deviation = (sum((s - mean) ** 2 for s, _ in pairs) / 3) ** 0.5 + 1e-4
            found.append(sum((s - mean) / deviation * (r - often) for s, r in pairs) / 4)
        assert told[name]["pays"] == pytest.approx(sum(found) / len(found), abs=1e-9)
    # sampled from validation under all perspectives, trained on training questions with the weights that were found
    assert {split for split, _ in asked} == {"val", "train"}
    assert all(given == ((1.0,) * 4 if split == "val" else tuple(weights)) for split, given in asked)

    (given,) = gba.run(answering(*SMALL, f"gba.weights=[{','.join(map(repr, weights))}]")).values()
    assert given.folder != made.folder
    one, other = (load_file(run.folder / "update" / "adapter_model.safetensors") for run in (made, given))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.any() for value in one.values())
    assert made.metrics["weight/intuitive"] == weights[1] and "weight/intuitive" not in given.metrics
    card = (made.folder / "adapter" / "README.md").read_text()
    assert f"weights={weights}" in card


def test_what_decides_such_a_reasoner():
    plain, learned = composed(), composed("gba=learned")
    assert "weights_from" not in reasoner_key(plain, ["x"])["gba"]
    key = reasoner_key(learned, ["x"])
    assert key["gba"]["weights_from"] == "validation" and "weights" not in key["gba"]
    # the control has no terms: it is the one of every other arm
    control = replace(learned, gba=replace(learned.gba, scale=0.0))
    assert reasoner_key(control, ["x"]) == reasoner_key(replace(plain, gba=replace(plain.gba, scale=0.0)), ["x"])
    assert arm_of(learned, ["gba"]) == "learned" and arm_of(control, ["gba"]) == "outcome_only"


SETTINGS = {
    "gba.num_generations=24": True, "gba.temperature=1.1": True, "reward.grader=hybrid": True, "seed=3": True,
    "gba.steps=3": False, "reward.judge_weight=0.5": False, "reward.weights.format=0.3": False, "gba.lr=0.5": False,
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_decides_learned_weights(answering, setting):
    """Under another value they are learned anew, and so is the reasoner; what does not act leaves them."""
    judge = ("reward.judge.base_url=http://127.0.0.1:9/v1", "reward.judge.model=m") if "reward.g" in setting else ()
    if "judge_weight" in setting:
        judge = ("reward.judge.base_url=http://127.0.0.1:9/v1", "reward.judge.model=m")
    found = []
    for more in ((), (setting, *judge)):
        config = answering("gba=learned", "gba.init=base", "runs.explain=true", *more)
        weights = measured.learned_weights(config, "learned", config.specialty.names, None)
        found.append((weights.run_id, gba.run(config)["reasoner"].run_id))
    assert (found[0][0] != found[1][0]) == SETTINGS[setting] and found[0][1] != found[1][1]


def test_other_weights_are_another_reasoner(answering, monkeypatch):
    config = answering("gba=learned", "gba.init=base", "runs.explain=true")
    before, learned = gba.run(config)["reasoner"].run_id, gba.learned_weights
    monkeypatch.setattr(gba, "learned_weights", lambda *given: replace(learned(*given), run_id="other"))
    assert gba.run(config)["reasoner"].run_id != before


def test_questions_whose_grades_are_missing_are_asked_again(tmp_path):
    """Those that a killed run has written without one, as of a judge that was lost."""
    records = [SimpleNamespace(id=name) for name in "abc"]
    path, asked = tmp_path / "followed.jsonl", []
    scores = torch.full((1, 2, 4), NAN)
    scores[0, 0, 1], scores[0, 1, 2] = 0.5, 0.25
    whole = {"right": [1.0, 0.0], "adherence": [[None, 0.5, None, None], [None, None, 0.25, None]]}
    rows = [{"id": "a", **whole}, {"id": "b", **whole, "adherence": [[None] * 4, whole["adherence"][1]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sample(part, seeds):
        asked.extend(record.id for record in part)
        return SimpleNamespace(parts={"accuracy": [1.0, 0.0]}, adherence=scores)

    columns = ("id", "right", "adherence")
    found = measured._measured(path, columns, records, sample, 1, 0, measured._followed, measured._graded)
    assert asked == ["b", "c"] and found == [{"id": name, **whole} for name in "abc"]


def test_no_weight_leaves_nothing_to_train_by_perspective(answering, monkeypatch):
    monkeypatch.setattr(gba, "weights_in", lambda run: [0.0] * 4)
    with pytest.raises(UserError, match=r"no perspective pays on validation, .*use gba\.grouping=question"):
        gba.run(answering(*SMALL, "gba=learned", "gba.grouping=perspective"))


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"gba\.weights is not read here: gba\.weights_from=validation learns them"):
        told("gba=learned", "gba.weights=[1,0,0,0]")
    with pytest.raises(UserError, match="too small for 4 prompted perspectives"):
        composed("gba=learned", "gba.num_generations=4")
    with pytest.raises(
        UserError, match=r"prompted_weighted asks for perspectives with weight.*use gba\.conditioning=prompted"
    ):
        composed("gba=learned", "gba.conditioning=prompted_weighted")
    with pytest.raises(UserError, match=r"gba\.weights_from='valid' is not known"):
        composed("gba.weights_from=valid")
