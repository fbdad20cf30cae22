"""What a user of W&B sees of a pipeline and a sweep, read back from the files of offline runs; no panel is empty."""

from __future__ import annotations

import json

import pytest
import wandb_files
from commands import run

from mmedexpert.errors import UserError
from mmedexpert.reporting import sync, workspace
from mmedexpert.reporting.finals import LEAD, ends
from mmedexpert.reporting.shown import arm_of, settings_of, shown, weights_label
from mmedexpert.reporting.workspace import STAGES, panels
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config, GbaConfig, MergeConfig

PERSPECTIVES = ("differential", "intuitive", "analytical", "bayesian")
ONLY_ON_A_GPU = {"perf/max_memory_allocated_gb"}
LEADING = {f"test/{name}" for name in LEAD}


def config(weights=(1.0, 1.0, 1.0, 1.0), *, swept=(), scale=0.5, seed=0, experiment=None) -> Config:
    found = Config(gba=GbaConfig(name="default", weights=list(weights), scale=scale), seed=seed)
    found.merge = MergeConfig(name="ties", method={"_target_": "x"})
    found.model.name, found.data.name = "tiny", "phantom"
    found.logger.swept, found.logger.experiment = list(swept), experiment
    return found


@pytest.mark.parametrize(
    ("weights", "label"),
    [
        ([1.0, 1.0, 1.0, 1.0], "uniform"),
        ([1.0, 0.0, 0.0, 0.0], "differential"),
        ([0.0, 0.0, 2.0, 0.0], "analytical2"),
        ([1.0, 0.5, 0.0, 0.0], "differential1-intuitive0.5"),
        ([0.0, 0.0, 0.0, 0.0], "outcome_only"),
        ([], "outcome_only"),
    ],
)
def test_an_arm_is_called_by_its_weights(weights, label):
    assert weights_label(weights) == label


def test_an_arm_tells_what_is_varied_and_of_what_all_share_nothing():
    swept = ["seed", "gba.weights", "gba.scale", "dsa.lr"]
    assert arm_of(config(swept=swept), {"gba"}) == "uniform-gba.scale=0.5"
    assert arm_of(config(scale=0.0), {"gba", "merge"}) == "outcome_only-ties"
    assert arm_of(config(swept=["gba.weights"]), {"dsa", "model"}) == "" and arm_of(config(swept=["model"]), {"model"})
    assert "gba" not in settings_of(config(), {"dsa"})
    weights = {"differential": 1, "intuitive": 0, "analytical": 0, "bayesian": 2}
    assert settings_of(config([1, 0, 0, 2]), {"gba"})["gba"]["weights"] == weights


def test_name_tags_and_config_of_a_run_sort_and_group_by_arm_over_seeds(tmp_path):
    def told(seed):
        one = Run("gba", "default", f"{seed}" * 10, tmp_path / "gba" / "default-x")
        return shown(config([0.0, 1.0, 0.0, 0.0], seed=seed, experiment="mine"), one, {"gba"}, {"start": "a" * 10})

    assert [told(seed).name for seed in (0, 1)] == ["gba-intuitive-s0", "gba-intuitive-s1"]
    assert told(0).tags == ["gba", "intuitive", "mine"]
    assert told(0).config["arm"] == told(1).config["arm"] == "intuitive" and told(1).config["seed"] == 1
    assert told(0).config["inputs"] == {"start": "a" * 10} and told(0).config["experiment"] == "mine"
    assert str(tmp_path) not in json.dumps(told(0).config)


def test_ends_of_a_curve():
    found = ends("loss", [5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 2.5, 1.5])
    assert found == {"loss/start": 4.5, "loss/end": 2.0, "loss/gain": -2.5, "loss/best": 1.0}
    assert ends("reward", [0.1])["reward/gain"] == 0.0 and ends("reward", [0.1, 0.9, 0.2])["reward/best"] == 0.9


@pytest.fixture(scope="module")
def of_pipeline(outputs):
    """The W&B runs of the pipeline, by name."""
    return {one.name: one for one in wandb_files.told(outputs) if "experiment" not in one.config}


def of_stage(runs, stage):
    return [one for one in runs.values() if one.config["stage"] == stage]


@pytest.mark.parametrize("stage", STAGES)
def test_no_panel_of_a_dashboard_is_empty(of_pipeline, stage):
    runs = of_stage(of_pipeline, stage)
    assert runs
    for one in runs:
        curves = {name for row in one.history for name in row}
        for panel in (panel for listed in panels(stage).values() for panel in listed):
            known = (
                curves
                if panel.kind == "curve"
                else set(one.summary) | (one.keys if panel.kind == "parallel" else set())
            )
            assert set(panel.names) - ONLY_ON_A_GPU <= known, (one.name, panel.title, set(panel.names) - known)
        if stage != "dsa":
            assert one.config[workspace.ARM]
        assert one.config[workspace.STAGE] == stage


def test_every_run_has_an_arm_if_it_is_of_one_and_the_settings_that_it_read_alone(of_pipeline):
    for one in of_pipeline.values():
        assert one.config["run_id"] and one.config["seed"] == 0 and one.tags[0] == one.config["stage"]
    for one in [*of_stage(of_pipeline, "dsa"), *of_stage(of_pipeline, "start"), *of_stage(of_pipeline, "pretrain")]:
        assert "arm" not in one.config and not any(key.startswith(("gba.", "merge.", "reward.")) for key in one.keys)
    reasoner = of_pipeline["gba-uniform-s0"]
    assert {f"gba.weights.{name}" for name in PERSPECTIVES} <= reasoner.keys and reasoner.config["arm"] == "uniform"
    assert of_pipeline["caci-uniform-caci-s0"].tags == ["caci", "uniform-caci"]
    assert "eval-base-phantom-test-s0" in of_pipeline and "eval-reasoner-phantom-test-uniform-s0" in of_pipeline


def test_the_final_numbers_reach_the_model_and_the_pipeline_with_their_interval(of_pipeline, outputs):
    summary = json.loads((outputs / "latest" / "summary.json").read_text())["models"]
    for name, model in (("gba-uniform-s0", "reasoner"), ("caci-uniform-caci-s0", "caci")):
        one = of_pipeline[name]
        assert {key: one.summary[f"test/{key}"] for key in LEAD} == {key: summary[model][key] for key in LEAD}
    whole = of_pipeline["pipeline-tiny-phantom-uniform-caci-s0"].summary
    assert whole["test/macro_accuracy"] == summary["caci"]["macro_accuracy"]
    assert whole["test/reasoner/macro_ci_high"] == summary["reasoner"]["macro_ci_high"]
    assert {f"gba/reasoner/reward/{end}" for end in ("start", "end", "gain", "best")} <= set(whole)
    assert "reward" not in of_pipeline["gba-uniform-s0"].summary


def test_the_graph_from_data_to_predictions_is_whole_and_sends_no_file(of_pipeline):
    made = {name: one for one in of_pipeline.values() for name in one.made}
    (answers,) = of_pipeline["eval-caci-phantom-test-uniform-caci-s0"].made
    found, waiting = set(), [answers]
    while waiting:
        found.add(name := waiting.pop())
        waiting += [other for other in (made[name].used if name in made else []) if other not in found]
    assert {name.partition("-")[0] for name in found} == {"eval", "caci", "gba", "start", "dsa", "pretrain", "data"}
    assert sum(name.startswith("dsa-") for name in found) == 4
    assert not [path for one in of_pipeline.values() for path in one.uploads]


def test_of_records_and_this_machine_nothing_is_in_the_files(of_pipeline, outputs):
    records = [json.loads(line) for line in next(outputs.glob("data/*/records.jsonl")).read_text().splitlines()]
    content = b"".join(path.read_bytes() for path in outputs.glob("*/*/wandb/offline-run-*/**/*") if path.is_file()
                       and path.suffix != ".log")  # fmt: skip
    assert b"gba.weights" not in content and b"uniform-caci" in content
    for word in (str(outputs), records[0]["id"], records[0]["question"]):
        assert word.encode() not in content, word


def test_a_reused_run_is_in_another_experiments_dashboard_once(outputs):
    varied = "gba.checkpoint_every=choice(7)"  # a key of no result: everything is reused
    again = ["-m", "stage=gba", "gba.weights=[1,1,1,1],[1,0,0,0]", varied, "results.id=again"]
    for _ in range(2):
        run(outputs, *again, logger="wandb")
    found = [one for one in wandb_files.told(outputs) if one.config.get("experiment") == "again"]
    reasoners = {one.config["arm"]: one for one in found if one.config["stage"] == "gba"}
    arms = {f"{name}-gba.checkpoint_every=7" for name in ("uniform", "differential")}
    assert set(reasoners) == arms and len(reasoners) == sum(one.name[:3] == "gba" for one in found)
    one = reasoners["uniform-gba.checkpoint_every=7"]
    curve = [json.loads(line) for line in next(outputs.glob("gba/*-" + one.config["run_id"])).joinpath(
        "curve.jsonl").read_text().splitlines()]  # fmt: skip
    rows = [(row["trainer/global_step"], row["reward"]) for row in one.history if "reward" in row]
    assert rows == [(line["rollout"], line["reward"]) for line in curve]
    assert "completions" in one.summary
    assert "loss/end" in next(one for one in found if one.config["stage"] == "dsa").summary
    assert not [name for row in one.history for name in row if name.startswith("perf/")]  # of that process, long gone
    assert "reused" in one.tags and "reward/gain" in one.summary and one.files == 1
    assert len([one for one in found if one.config["stage"] == "dsa"]) == 4
    assert all(one.used for one in found if one.config["stage"] != "pretrain")


def test_offline_runs_are_uploaded_in_the_order_of_their_making(outputs, tmp_path, monkeypatch, capsys):
    order = [path.parents[1].name for path in sync.offline_runs(outputs)]
    made = {one.made[0].partition("-")[2]: one.used for one in wandb_files.told(outputs) if one.made}
    first = {run_id: next(i for i, name in enumerate(order) if name.endswith(run_id)) for run_id in made}
    for run_id, used in made.items():
        assert all(first.get(name.partition("-")[2], -1) < first[run_id] for name in used), run_id
    for stage, time in (("dsa", "20260101_000001"), ("caci", "20260101_000001"), ("gba", "20260101_000000")):
        folder = tmp_path / stage / "x-1" / "wandb" / f"offline-run-{time}-{stage}"
        folder.mkdir(parents=True)
        (folder / f"run-{stage}.wandb").touch()
    (folder / "run-gba.wandb.synced").touch()
    assert [path.name.rpartition("-")[2] for path in sync.offline_runs(tmp_path)] == ["dsa", "caci"]
    with pytest.raises(UserError, match=r"paths\.outputs"):
        sync.offline_runs(tmp_path / "caci")
    monkeypatch.setattr(sync, "logged_in", lambda server: False)
    assert sync.main([str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_without_a_login_or_the_library_a_workspace_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(workspace, "logged_in", lambda server: False)
    monkeypatch.setattr(workspace, "_library", lambda: (None, None, None))
    assert workspace.main([]) == 2
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.expr", None)
    assert workspace.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "wandb login" in first and "pip install wandb-workspaces" in second


def test_a_workspace_has_the_panels_the_axis_the_filter_and_groups_by_arm():
    pytest.importorskip("wandb_workspaces")
    spec = workspace.workspace("me", "p", "ablation_gba_weights", "gba")._to_model().model_dump_json()
    for panel in (panel for listed in panels("gba").values() for panel in listed):
        names = [name.replace("gba.weights", "gba.value.weights") for name in panel.names]  # as W&B keeps a config
        assert all(f'"{name}"' in spec or f':{name}"' in spec for name in names), panel.title
    assert spec.count('"x_axis":"trainer/global_step"') > 20 and '"name":"experiment"' in spec
    assert '"grouping":[{"section":"config","name":"arm.value"}]' in spec and "ablation_gba_weights" in spec
    drawn = workspace.report("me", "p", "ablation_gba_weights")
    assert drawn.title == "ablation_gba_weights: report" and len(drawn.blocks) == 1 + 2 * len(STAGES)
