"""`stage=judge` as a user runs it: each kind is trained, measured beside the controls, asked by name and by folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run
from safetensors.torch import load_file
from test_openai_engine import Server, completion

from mmedexpert.runtime.inventory import runs_in

DRAWN = ["pairs.train.count=5", "pairs.val.count=5", "judge.batch_size=4", "eval.num_resamples=50",
         "trainer.processes=1"]  # fmt: skip
WRITES = "judge.max_new_tokens=8"
STEPS = {"scalar": ["judge.scalar_steps=3"], "sft": ["judge.steps=3", WRITES]}
KINDS = {**STEPS, "dpo": [*STEPS["sft"], "judge.dpo_steps=2"]}
AGAIN = ["pairs.train.count=5", "judge.batch_size=4"]  # of commands that find these judges
ASK = ["stage=eval", "benchmark=phantom_pairs", "benchmark.phantom_pairs.load.count=5", "eval.num_resamples=50"]
ASK += [*AGAIN, "trainer.processes=1", *STEPS["sft"], *STEPS["scalar"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One of each kind, in one outputs folder, and what its command said."""
    outputs = tmp_path_factory.mktemp("judges")
    return outputs, {kind: run(outputs, "stage=judge", f"judge={kind}", *DRAWN, *more) for kind, more in KINDS.items()}


def folder(outputs: Path, kind: str) -> Path:
    (found,) = outputs.glob(f"judge/{kind}-*")
    return found


@pytest.mark.parametrize("kind", ["scalar", "sft", "dpo"])
def test_a_judge_is_trained_and_stands_beside_the_controls(trained, kind):
    outputs, said = trained
    adapter = folder(outputs, kind) / "adapter"
    told = json.loads((adapter / "judge.json").read_text())
    assert told["kind"] == kind and told["ties"] is False and len(told["trained_groups"]) == 20
    assert (adapter / "reward_head.safetensors").exists() == (kind == "scalar")
    assert "clinical use" in (adapter / "README.md").read_text()
    for word in (f"judge_{kind}", "always_first", "rubrics", "Judges on phantom_pairs-val"):
        assert word in said[kind].stdout
    (numbers,) = outputs.glob(f"verdicts/judge_{kind}-phantom_pairs-val-*/metrics.json")
    found = json.loads(numbers.read_text())
    assert {"acc_strict/accuracy", "acc_avg/overall", "consistency", "position_bias"} <= set(found)
    if kind == "scalar":  # whatever it has learnt, the place of an answer cannot matter to it
        assert found["consistency"] == 1 and found["position_bias"] == 0 == found["invalid_rate"]


def test_dpo_goes_on_from_the_judge_of_sft(trained):
    outputs, _ = trained
    sft, dpo = (load_file(folder(outputs, kind) / "adapter/adapter_model.safetensors") for kind in ("sft", "dpo"))
    manifest = json.loads((folder(outputs, "dpo") / "manifest.json").read_text())
    assert manifest["inputs"]["start"] == folder(outputs, "sft").name.rpartition("-")[2]
    name = next(one for one in sft if "lora_A" in one)
    assert len(dpo[name]) == 2 * len(sft[name])  # the start's factors and those of DPO


def test_judges_are_asked_by_name_and_by_folder(trained):
    outputs, _ = trained
    there = folder(outputs, "scalar")
    before = {one.run_id for one in runs_in(outputs) if one.stage == "judge"}
    done = run(outputs, *ASK, f"eval.models=[judge_scalar,judge_sft,{there}]")
    assert {one.run_id for one in runs_in(outputs) if one.stage == "judge"} == before  # trained already
    names = {path.name.partition("-")[0] for path in (outputs / "verdicts").glob("*-phantom_pairs-??????????")}
    assert {"judge_scalar", "judge_sft", "random"} <= names and "judge_scalar" in done.stdout
    rows = [json.loads(line) for path in outputs.glob("verdicts/judge_scalar-phantom_pairs-??????????/judgements.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    assert len(rows) in (40, 80) and all(set(row["scores"]) == {"A", "B"} for row in rows)
    for row in rows:
        first, second = ("A", "B") if row["order"] == "ab" else ("B", "A")
        for name, said in json.loads(row["response"]).items():
            a, b = row["scores"][first][name], row["scores"][second][name]
            assert said == ("tie" if a == b else "A" if a > b else "B")


def test_a_judge_pays_for_answers_in_rl(trained):
    """Its scores move the advantage, their share is logged, the run tells what its reward bought."""
    outputs, _ = trained
    words = ["stage=gba", "gba.init=base", "gba.steps=1", "gba.prompts_per_step=2", "gba.num_generations=8"]
    words += [*AGAIN, "judge.scalar_steps=3"]
    done = run(outputs, *words, "reward.judge_weight=0.5", "reward.judge.run=judge_scalar")
    (numbers,) = outputs.glob("gba/*/metrics.json")
    metrics = json.loads(numbers.read_text())
    assert metrics["advantages/judge/share"] > 0 and metrics["judge/missing"] == 0 and metrics["judge/calls"] > 0
    inputs = json.loads((numbers.parent / "manifest.json").read_text())["inputs"]
    assert inputs["judge"] == folder(outputs, "scalar").name.rpartition("-")[2]
    assert "judge's score" in done.stdout and "repeated runs of words" in done.stdout
    # one that has learnt nothing yet writes nothing that can be read: no reward, rather than a reward of nothing
    failed = run(outputs, *words, "reward.judge_weight=0.5", "reward.judge.run=judge_sft", *STEPS["sft"], code=2)
    assert "judge_sft compared none of" in failed.stderr and "cannot be read" in failed.stderr


def test_a_served_judge_pays(tmp_path):
    """Every third reply cannot be read: it costs, and is no score."""
    server = Server()
    try:
        server.answer = lambda prompt, before, body: completion(
            "hm" if sum(server.asked.values()) % 3 == 0 else '{"accuracy": "A", "overall": "A"}'
        )
        words = ["stage=gba", "gba.init=base", "gba.steps=1", "gba.prompts_per_step=2", "gba.num_generations=8"]
        words += ["reward.judge_weight=1", f"reward.judge.base_url={server.base_url}", "reward.judge.model=m"]
        run(tmp_path, *words)
        (numbers,) = tmp_path.glob("gba/*/metrics.json")
        metrics = json.loads(numbers.read_text())
        assert metrics["judge/calls"] > 0 and metrics["judge/missing"] < 1 and metrics["judge/tokens"] > 0
        prompts = [prompt for prompt, _ in server.asked.items()]
        assert prompts and all('"accuracy"' in prompt and "Answer A" in prompt for prompt in prompts)
    finally:
        server.quit.set()
        server.http.shutdown()
        server.http.server_close()


def test_a_judge_picks_the_best_of_samples(trained):
    outputs, _ = trained
    words = [
        "stage=eval",
        "eval.models=[base]",
        "data.source.test=1",
        "eval.best_of=2",
        f"eval.picker.run={folder(outputs, 'scalar')}",
    ]
    done = run(outputs, *words)
    (numbers,) = outputs.glob("best_of/*/metrics.json")
    found = json.loads(numbers.read_text())
    assert {"best_of/pick@2", "best_of/vote@2", "best_of/pass@2"} <= set(found) and found["best_of/missing"] == 0
    assert found["best_of/cost/judge/judged"] > 0 and "Best of 2" in done.stdout


def test_a_judge_asked_about_what_it_was_trained_on_is_told(trained):
    outputs, said = trained
    assert "was trained on" not in said["scalar"].stderr
    there = folder(outputs, "scalar")
    mine = ["benchmark.phantom_pairs.load.split=train", "+benchmark.phantom_pairs.load.form=both"]
    done = run(outputs, *ASK[:4], *mine, f"eval.models=[{there}]")
    assert "judge_scalar was trained on images or patients of 20 of these 20 pairs" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage=judge", "pairs=own"], ["pairs.root=<folder>"]),
        (["stage=judge", "judge=scalar", "trainer.strategy=fsdp", "trainer.devices=2"], ["trainer.strategy=ddp"]),
        (["stage=judge", "protocol=robust"], ["protocol=robust", "pairwise"]),
        (["stage=judge", "pairs.train.split=dev"], ["pairs", "split must be one of"]),
        (["stage=judge", "judge=sft", "judge.beta=1"], ["judge.beta", "judge=dpo"]),
        (["stage=eval", "eval.models=[judge_sft]"], ["judge_sft", "benchmark=phantom_pairs"]),
        (["stage=eval", "eval.best_of=2", "eval.picker.run=tests"], ["eval.picker.run=tests", "judge.json"]),
        (["stage=gba", "reward.judge_weight=1"], ["reward.judge_weight", "reward.judge.run"]),
        (["stage=gba", "reward.judge_weight=1", "reward.judge.run=judge_scaler"], ["judge_scaler", "judge_scalar"]),
        (["stage=gba", "reward.judge_weight=1", "reward.judge.run=tests"], ["tests", "judge.json"]),
        (["stage=gba", "reward.judge.run=judge_sft", "reward.grader=judge"], ["grader", "compare answers"]),
    ],
)
def test_a_mistake_is_told_before_any_long_work(tmp_path, words, told):
    done = run(tmp_path, *words, code=2)
    assert all(word in done.stderr for word in told), done.stderr
    assert not (tmp_path / "judge").exists() and not (tmp_path / "gba").exists()
