"""The commands of the README, end to end, on the smoke settings: what they leave, reuse, resume and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run, words
from test_benchmark_stage import pmc


def newest(outputs: Path, stage: str, name: str = "") -> Path:
    return max((outputs / stage).glob(f"{name}*-*/DONE"), key=lambda path: path.stat().st_mtime).parent


def test_summary_has_the_documented_shape(outputs):
    summary = json.loads((outputs / "latest" / "summary.json").read_text())
    assert set(summary) == {"models", "benchmarks", "wall_seconds", "run_ids", "missing_specialties"}
    assert summary["missing_specialties"] == [] and summary["benchmarks"] == {}
    assert list(summary["models"])[:2] == ["base", "experts"]
    models = summary["models"]
    assert set(models["experts"]) == {"adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery"}
    for model in (models["base"], models["reasoner"], models["caci"], *models["experts"].values()):
        assert 0 <= model["macro_accuracy"] <= 1 and 0 <= model["parse_failure_rate"] <= 1
        assert set(model["adherence"]) == {"differential", "intuitive", "analytical", "bayesian"}
        for entry in model["per_specialty"].values():
            assert entry["ci_low"] <= entry["accuracy"] <= entry["ci_high"] and entry["n"] == 16


def test_every_run_folder_is_complete(outputs):
    folders = [path.parent for path in outputs.glob("*/*/DONE")]
    assert len(folders) >= 15
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert folder.name.endswith(manifest["run_id"]) and manifest["seed"] == 0
        assert (folder / "config.yaml").exists() and json.loads((folder / "metrics.json").read_text()) is not None
        assert not list(folder.glob("*.ckpt"))


def test_predictions_are_one_line_per_question(outputs):
    folder = newest(outputs, "eval", "caci-phantom")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 64
    assert {"response", "gold", "robust", "medevalkit", "tokens", "finish_reason"} <= set(rows[0])


def test_again_everything_is_reused_without_the_libraries_of_training(outputs):
    before = {path: path.stat().st_mtime_ns for path in outputs.glob("*/*/DONE")}
    command = [sys.executable, "-X", "importtime", "run.py", *words(outputs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert before == {path: path.stat().st_mtime_ns for path in outputs.glob("*/*/DONE")}
    assert "macro accuracy" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    # eight seconds of a command that takes as long
    assert "torch" in imported
    assert not imported & {"transformers", "peft", "lightning", "torch._dynamo", "datasketch", "wandb", "matplotlib"}


def test_sweep_shares_what_does_not_depend_on_the_weights(outputs):
    shared = {path for stage in ("pretrain", "data", "dsa") for path in (outputs / stage).glob("*/DONE")}
    done = run(outputs, "-m", "gba.weights=[1,1,1,1],[1,0,0,0]", "results.id=weights", "results.against=caci")
    assert shared == {path for stage in ("pretrain", "data", "dsa") for path in (outputs / stage).glob("*/DONE")}
    assert len(list((outputs / "gba").glob("*/DONE"))) == 2
    assert "Jobs" in done.stdout and "gba.weights=[1,0,0,0]" in done.stdout
    table = (outputs / "experiments/weights/table.md").read_text()
    assert "| reasoner (gba.weights=[1.0,1.0,1.0,1.0]) | 1 |" in table and "| base | 1 |" in table
    assert "against caci (gba.weights=[1.0,1.0,1.0,1.0])" in table


def test_stages_alone(outputs):
    assert "cardiology" in run(outputs, "stage=dsa", "specialty=cardiology").stdout
    run(outputs, "stage=caci", "merge=linear")
    assert (newest(outputs, "caci", "linear") / "model" / "model.safetensors").exists()
    run(outputs, "stage=gba", "gba=outcome_only")
    done = run(outputs, "stage=eval", "eval.models=[base,majority]")
    assert "majority" in done.stdout and "expert" not in done.stdout


def test_a_failing_job_is_told_and_the_others_run(outputs):
    names = "specialty.names=[pediatrics],[astrology],[adult_medicine]"
    done = run(outputs, "-m", "stage=dsa", names, "dsa.lr=0.005", code=2)
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "failed: specialty.names=[astrology]" in done.stdout
    jobs = done.stdout.partition("Jobs")[2]
    for name in ("pediatrics", "adult_medicine"):  # before the one that fails, and after it
        assert f"specialty.names=[{name}]" in jobs
        assert newest(outputs, "dsa", name).joinpath("adapter", "adapter_model.safetensors").exists()
        config = yaml.safe_load((newest(outputs, "dsa", name) / "config.yaml").read_text())
        assert config["dsa"]["lr"] == 0.005


def test_killed_and_continued(tmp_path):
    overrides = ["stage=pretrain", "pretrain.looking_steps=24", "pretrain.checkpoint_every=4"]
    command = [sys.executable, "run.py", *words(tmp_path, *overrides)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("pretrain/*/last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = next((tmp_path / "pretrain").glob("tiny-*"))
    assert (folder / "last.ckpt").exists() and not (folder / "DONE").exists()
    run(tmp_path, *overrides)
    whole = tmp_path / "whole"
    run(whole, *overrides)
    resumed, plain = (next(path.glob("pretrain/tiny-*/model/model.safetensors")) for path in (tmp_path, whole))
    assert resumed.read_bytes() == plain.read_bytes()  # and so: same seed, same machine, same weights


def test_wandb_is_offline_and_complete(outputs):
    runs = list(outputs.glob("*/*/wandb/offline-run-*/run-*.wandb"))
    stages = {path.parents[3].name for path in runs}
    assert {"pretrain", "dsa", "gba", "pipeline"} <= stages


def test_merged_model_and_adapters_are_ordinary_folders(outputs):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = outputs / "latest" / "model"
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    card = (folder / "README.md").read_text()
    assert "not for clinical use" in card.lower() and "| phantom-test | macro accuracy 0." in card
    base = AutoModelForImageTextToText.from_pretrained(newest(outputs, "pretrain") / "model")
    for path in (newest(outputs, "dsa", "pediatrics") / "adapter", newest(outputs, "gba") / "adapter"):
        PeftModel.from_pretrained(base, path).unload()
        assert "not for clinical use" in (path / "README.md").read_text().lower()


def test_readme_snippet_answers(outputs, tmp_path):
    text = (ROOT / "docs" / "usage.md").read_text()
    snippet = text.split("```python")[1].split("```")[0]
    (tmp_path / "outputs").symlink_to(outputs)
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["gba.wieghts=[1,1,1,1]"], ["gba.weights"]),
        (["data=labelled_images"], ["data.root"]),
        (["data.root=tests"], ["data.root", "data=phantom"]),
        (["benchmark=omnimedvqa_medr1"], ["benchmark.omnimedvqa_medr1.root"]),
        (["data=labelled_images", "data.root=tests"], ["labels.csv"]),
        (["specialty.names=[astrology]", "stage=dsa"], ["astrology", "no train record"]),
        (["model.name_or_path=/no/such/model"], ["model.name_or_path", "/no/such/model"]),
        (["model.name_or_path=tests"], ["config.json"]),
        (["eval.models=[bse]", "stage=eval"], ["bse", "base"]),
    ],
)
def test_mistakes_are_one_line_and_code_2(outputs, overrides, named):
    done = run(outputs, *overrides, code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in named:
        assert word in errors[0]


FEW = ["pretrain.looking_steps=2", "pretrain.reading_steps=1", "dsa.steps=1", "gba.steps=1"]


def test_a_pipeline_with_benchmarks_and_without_a_specialty_that_its_data_lack(tmp_path):
    root = f"benchmark.pmc_vqa.root={pmc(tmp_path / 'pmc', 4)}"
    line = ["specialty.names=[adult_medicine,pediatrics,astrology]", "specialty.on_missing=skip", "benchmark=pmc_vqa"]
    line += [root, "eval.models=[caci,majority]", "model.max_new_tokens=8", "data.limit=2", *FEW]
    done = run(tmp_path, *line)
    assert "left out astrology (no train and no test record)" in done.stderr
    assert "Left out, with too few records in data phantom: astrology." in done.stdout
    assert "Models" in done.stdout and "Benchmarks" in done.stdout and "expert:" not in done.stdout
    told = done.stderr
    assert 0 < told.index("pmc_vqa-") < told.index("pretrain")  # a benchmark is read before anything is trained
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["missing_specialties"] == ["astrology"] and set(summary["models"]) == {"experts", "caci", "majority"}
    assert set(summary["models"]["caci"]["per_specialty"]) == {"adult_medicine", "pediatrics"}
    asked = summary["benchmarks"]["pmc_vqa"]
    assert set(asked) == {"caci"} and asked["caci"]["protocol"] == "medevalkit" and asked["caci"]["robust"]["n"] == 4
    assert "Benchmarks" in run(tmp_path, *line, "-m", "seed=0").stdout  # all of it is reused


def test_options_of_other_stages_are_told_once(tmp_path):
    done = run(tmp_path, "-m", "stage=data", "data.limit=1", "gba.steps=5", "seed=0,1")
    assert done.stderr.count("note: stage=data does not read") == 1 and "gba.steps" in done.stderr


def test_a_sweep_makes_no_folder_named_tilde(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "-m", "stage=data", "logger=none", "paths.outputs='~/x'"]
    command += ["data.source.train=1", "data.source.val=1", "data.source.test=1", "data.seed=0,1"]
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert os.listdir(tmp_path) == ["home"] and len(list((tmp_path / "home" / "x" / "data").glob("*/DONE"))) == 2
