"""What is part of a run's identity: all that decides its result, and nothing else; and what `runs.explain` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_config import composed

from mmedexpert.runtime import runs, versions
from mmedexpert.runtime.identity import differences, labels_of, why_anew
from mmedexpert.runtime.runs import execute
from mmedexpert.stages import evaluation, pipeline

SMALL = ("data.source.train=8", "data.source.val=4", "data.source.test=4", "eval.contamination=false", "logger=none")
TRAINED = {"dsa/adult_medicine", "gba/default", "caci/caci", "eval/base-phantom-test", "eval/reasoner-phantom-test"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("identity")


def ids(outputs: Path, *overrides: str) -> dict[str, str]:
    """run_id of every run that a pipeline would make or reuse; nothing is trained."""
    runs.explained.clear()
    pipeline.run(composed(*SMALL, "model.shipped=null", f"paths.outputs={outputs}", "runs.explain=true", *overrides))
    return {f"{row['stage']}/{row['name']}": row["run_id"] for row in runs.explained}


@pytest.fixture(scope="module")
def plain(outputs) -> dict[str, str]:
    """The run_ids of the default pipeline."""
    return ids(outputs)


def changed(before: dict[str, str], outputs: Path, *overrides: str) -> set[str]:
    after = ids(outputs, *overrides)
    return {name for name in before if after.get(name) != before[name]}


@pytest.mark.parametrize(
    ("overrides", "anew", "kept"),
    [
        ("gba=uniform", set(), {"gba/uniform"}),
        ("engine.batch_size=3 trainer.threads=1 dsa.checkpoint_every=7 gba.checkpoint_every=5", set(), TRAINED),
        ("trainer.micro_batch_tokens=100", set(), TRAINED),  # without dropout a step is the same however it is cut
        ("eval.num_resamples=50", set(), TRAINED),
        ("trainer.precision=bf16-mixed", {"pretrain/tiny", *TRAINED}, {"data/phantom"}),
        ("model.attn_implementation=eager", TRAINED, {"data/phantom", "pretrain/tiny"}),
        ("model.dtype=bfloat16", TRAINED, {"pretrain/tiny"}),
        ("gba.weights=[1,0,0,0]", {"gba/default", "caci/caci", "eval/reasoner-phantom-test"},
         {"dsa/adult_medicine", "start/merged_experts", "eval/start-phantom-test"}),
        ("gba.conditioning=free", {"gba/default"}, {"dsa/adult_medicine"}),
        ("reward.weights.format=0.3", {"gba/default"}, {"dsa/adult_medicine"}),
        ("merge.method.ridge=0.5", {"caci/caci", "eval/caci-phantom-test"}, {"gba/default"}),
        ("eval.perspectives=none", {"eval/base-phantom-test"}, {"gba/default", "eval/majority-phantom-test"}),
        ("model.system_prompt=Think", {"dsa/adult_medicine", "eval/base-phantom-test"}, {"pretrain/tiny"}),
        ("model.max_new_tokens=20", {"gba/default", "eval/base-phantom-test"}, {"dsa/adult_medicine"}),
        ("eval.max_new_tokens=20", {"eval/base-phantom-test"}, {"gba/default", "distil/caci", "dsa/adult_medicine"}),
        ("eval.max_pixels=9000", {"eval/base-phantom-test"}, {"gba/default", "distil/caci", "dsa/adult_medicine"}),
        ("model.lora.dropout=0.1", {"dsa/adult_medicine", "gba/default"}, {"pretrain/tiny"}),
        # what was trained does not depend on the questions it is tested with
        ("data.source.test=6", {"data/phantom", "eval/base-phantom-test"}, {"dsa/adult_medicine", "caci/caci"}),
        ("data.seed=1", {"data/phantom", *TRAINED}, {"pretrain/tiny"}),
        ("seed=1", {"pretrain/tiny", *TRAINED}, {"data/phantom"}),
    ],
)  # fmt: skip
def test_what_decides_a_result_and_nothing_else(plain, outputs, overrides, anew, kept):
    found = changed(plain, outputs, *overrides.split())
    if overrides == "gba=uniform":
        assert ids(outputs, overrides)["gba/uniform"] == plain["gba/default"] and found == {
            "gba/default"
        }  # its name alone
        return
    assert anew <= found, anew - found
    assert not kept & found, kept & found
    if not anew:
        assert found == set()


def test_micro_batches_count_where_dropout_draws_masks(outputs):
    with_dropout = ids(outputs, "model.lora.dropout=0.1")
    cut = ids(outputs, "model.lora.dropout=0.1", "trainer.micro_batch_tokens=100")
    assert {name for name in cut if cut[name] != with_dropout[name]} >= {"dsa/adult_medicine", "gba/default"}


def test_without_weights_the_scale_and_gate_make_no_other_run(outputs):
    control = ids(outputs, "gba=outcome_only")
    assert ids(outputs, "gba=outcome_only", "gba.scale=3", "gba.gate=none") == control
    assert ids(outputs, "gba.scale=0")["gba/default"] == control["gba/outcome_only"]


@pytest.mark.parametrize(
    ("rule", "anew", "kept"),
    [
        ("losses", {"gba/default"}, {"dsa/adult_medicine", "data/phantom"}),
        ("advantages", {"gba/default"}, {"dsa/adult_medicine"}),
        ("rubrics", {"gba/default"}, {"dsa/adult_medicine", "eval/base-phantom-test"}),  # judged again, not asked again
        ("sft", {"pretrain/tiny", "dsa/adult_medicine"}, {"data/phantom"}),
        ("phantom", {"data/phantom"}, {"pretrain/tiny"}),
        ("regmean", {"caci/caci"}, {"gba/default"}),
        ("distil", {"distil/caci", "eval/caci-phantom-test"}, {"caci/caci"}),
        ("start", {"start/merged_experts", "gba/default"}, {"dsa/adult_medicine"}),
        ("robust", {"gba/default"}, {"eval/base-phantom-test"}),
        ("sampling", {"gba/default", "eval/base-phantom-test"}, {"dsa/adult_medicine"}),
    ],
)  # fmt: skip
def test_a_raised_version_redoes_what_the_rule_made(plain, outputs, monkeypatch, rule, anew, kept):
    monkeypatch.setitem(versions.VERSIONS, rule, versions.VERSIONS[rule] + 1)
    found = changed(plain, outputs)
    assert anew <= found and not kept & found


@pytest.mark.parametrize(
    ("name", "anew"),
    [
        ("perspectives.yaml", {"gba/default"}),
        ("cues.yaml", {"gba/default"}),
        ("weights.yaml", {"gba/default"}),
        ("guidelines.yaml", {"data/phantom", "gba/default"}),
    ],
)
def test_guidelines_and_rubrics_are_part_of_it(plain, outputs, monkeypatch, name, anew):
    text_of = versions.text_of
    for module in ("dsa", "reasoner_key", "merge", "data", "evaluation"):
        monkeypatch.setattr(
            f"mmedexpert.stages.{module}.text_of", lambda n: "edited" if n == name else text_of(n), raising=False
        )
    found = changed(plain, outputs)
    assert anew <= found and "dsa/adult_medicine" not in found  # experts read no rubric


def test_instructions_are_part_of_it(plain, outputs, monkeypatch):
    for module in ("dsa", "reasoner_key", "merge", "grams", "distil"):
        monkeypatch.setattr(f"mmedexpert.stages.{module}.instructions", lambda style: {"differential": f"new {style}"})
    assert {"dsa/adult_medicine", "gba/default"} <= changed(plain, outputs)


def go(folder, key, name="x", seed=0, inputs=None, **options):
    return execute("dsa", name, key, lambda run: {}, outputs=folder, seed=seed, inputs=inputs, **options)


def test_equal_runs_of_two_names_are_one_folder(tmp_path):
    one, other = go(tmp_path, {"lr": 1.0}, "default"), go(tmp_path, {"lr": 1.0}, "uniform")
    assert other.reused and other.folder == one.folder and len(list((tmp_path / "dsa").glob("*/DONE"))) == 1


def test_a_recipe_is_all_but_the_seed_of_training(tmp_path):
    base = [go(tmp_path, {"kind": "base"}, seed=seed) for seed in (0, 1)]
    runs_ = [go(tmp_path, {"lr": 1.0}, seed=seed, inputs={"base": base[seed].run_id}) for seed in (0, 1)]
    recipes = [run.manifest["recipe"] for run in runs_]
    assert recipes[0] == recipes[1] and runs_[0].run_id != runs_[1].run_id
    assert go(tmp_path, {"lr": 2.0}, inputs={"base": base[0].run_id}).manifest["recipe"] != recipes[0]
    asked = [go(tmp_path, {"data": 1}, seed=seed, trains=False).manifest["recipe"] for seed in (0, 1)]
    assert asked[0] != asked[1]  # a seed that draws the questions is no seed of training


def test_explain_says_why_and_makes_nothing(tmp_path):
    runs.explained.clear()
    assert not go(tmp_path, {"lr": 1.0}, explain=True).folder.exists()
    done = go(tmp_path, {"lr": 1.0, "steps": 3}, inputs={"base": "a" * 10})
    assert go(tmp_path, {"lr": 1.0, "steps": 3}, inputs={"base": "a" * 10}, explain=True).reused
    go(tmp_path, {"lr": 2.0, "steps": 3}, inputs={"base": "b" * 10}, explain=True)
    states = [row["state"] for row in runs.explained]
    assert states == ["made", "reused", "made"]
    why = runs.explained[-1]["why"]
    assert done.folder.name in why and "key.lr: 1.0 -> 2.0" in why and "inputs.base: aaaaaaaaaa -> bbbbbbbbbb" in why
    with pytest.raises(RuntimeError):
        execute("dsa", "x", {"lr": 5.0}, lambda run: _fail(), outputs=tmp_path, seed=0)
    go(tmp_path, {"lr": 5.0}, explain=True)
    assert runs.explained[-1]["state"] == "resumed" and "boom" in runs.explained[-1]["why"]
    runs.explained.clear()


def _fail():
    raise RuntimeError("boom")


def test_trees_are_compared_leaf_by_leaf():
    one, other = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 2, "c": [1, 2]}, "e": None}
    assert differences(one, other) == [("a.b", 1, 2), ("d", 1, "(not set)"), ("e", "(not set)", None)]
    assert why_anew(Path("/no/such/folder"), one) == "nothing of this stage is finished here"


def test_labels_look_into_inputs_but_not_at_seeds(tmp_path):
    experts = [go(tmp_path, {"lr": lr}, seed=seed) for lr, seed in ((1.0, 0), (2.0, 1))]
    for number, expert in enumerate(experts):
        folder = tmp_path / "eval" / f"m-{number}"
        folder.mkdir(parents=True)
        tree = {"key": {"asked": "x"}, "seed": number, "inputs": {"model": expert.run_id, "questions": "f" * 64}}
        (folder / "identity.json").write_text(json.dumps(tree))
    folders = {number: tmp_path / "eval" / f"m-{number}" for number in (0, 1)}
    assert labels_of(folders) == {0: "lr=1.0", 1: "lr=2.0"}


def test_a_run_repeats_with_the_limits_of_training(outputs):
    """Those of asking stand under eval in its config.yaml, and under model what experts are known by."""
    limits = ("eval.max_new_tokens=5", "eval.max_pixels=9000", "eval.models=[base]", "stage=eval")
    (done,) = evaluation.run(composed(*SMALL, f"paths.outputs={outputs}", *limits)).values()
    told = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert told["eval"]["max_new_tokens"] == 5 and told["eval"]["max_pixels"] == 9000
    assert told["model"]["max_new_tokens"] == 64 and told["model"]["max_pixels"] == 12544
    rows = [json.loads(line) for line in (done.folder / "predictions.jsonl").read_text().splitlines()]
    assert rows and all(row["tokens"] <= 5 for row in rows)
