"""Nothing is discarded before its successor is on the disk: kills and full disks at every place of a stage."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from safetensors import SafetensorError

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.models.backbone import save_backbone
from mmedexpert.models.checkpoint import new_folder
from mmedexpert.reporting.loggers import CsvLogger, read_rows
from mmedexpert.runtime.runs import execute
from mmedexpert.stages import dsa, gba
from mmedexpert.training import fit as fit_module

CONF = Path(__file__).parents[1] / "conf"


def go(tmp_path, work):
    return execute("dsa", "x", {"lr": 1.0}, work, outputs=tmp_path, seed=0)


# ---------------------------------------------------------------- the run's folder


def test_a_checkpoint_lives_until_the_run_is_done(tmp_path, monkeypatch):
    def work(run):
        (run.folder / "last.ckpt").write_text("all of the training")
        return {}

    from mmedexpert.runtime import runs

    seen = []
    original = runs.write_atomic

    def watched(path, data):
        seen.append((path.name, (path.parent / "last.ckpt").exists()))
        original(path, data)

    monkeypatch.setattr(runs, "write_atomic", watched)
    done = go(tmp_path, work)
    assert seen[-1] == ("DONE", True)
    assert not (done.folder / "last.ckpt").exists() and not (done.folder / "clock.json").exists()


def test_what_a_kill_after_done_left_goes_when_the_run_is_reused(tmp_path):
    folder = go(tmp_path, lambda run: {}).folder
    (folder / "last.ckpt").write_text("")
    assert go(tmp_path, lambda run: {}).reused and not (folder / "last.ckpt").exists()


def test_the_next_try_cleans_what_was_being_written_and_keeps_the_checkpoint(tmp_path):
    def dies(run):
        for name in ("last.ckpt", "last.part", ".curve.jsonl.77.part", "images/.8.part", "model.partial/x"):
            (run.folder / name).parent.mkdir(exist_ok=True)
            (run.folder / name).write_text("")
        (run.folder.parent / f".{run.folder.name}.lock").write_text("a dead process")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, dies)

    def work(run):  # the clock may just be writing its note
        return {"left": float(len([p for p in run.folder.rglob("*") if "part" in p.name and "clock" not in p.name]))}

    done = go(tmp_path, lambda run: work(run) | {"kept": float((run.folder / "last.ckpt").exists())})
    assert done.metrics == {"left": 0.0, "kept": 1.0}


def test_wall_seconds_are_those_of_all_tries(tmp_path):
    def fails(run):
        with run.phase("train"):
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, fails)

    def works(run):
        with run.phase("train"):
            time.sleep(0.2)
        with run.phase("save"):
            pass
        return {}

    manifest = go(tmp_path, works).manifest
    assert 0.5 <= manifest["phase_seconds"]["train"] <= manifest["wall_seconds"] < 5
    assert manifest["tries"] == 2 and set(manifest["phase_seconds"]) == {"train", "save"}


def test_a_kill_loses_no_more_of_the_clock_than_one_note(tmp_path):
    script = f"""
        import os, signal, time
        from mmedexpert.runtime import clock
        from mmedexpert.runtime import runs
        clock.EVERY_SECONDS = 0.05
        def work(run):
            with run.phase("train"):
                time.sleep(1.0)
                os.kill(os.getpid(), signal.SIGKILL)
        runs.execute("dsa", "x", {{"lr": 1.0}}, work, outputs={str(tmp_path)!r}, seed=0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    known = json.loads(next(tmp_path.glob("dsa/*/clock.json")).read_text())
    assert 0.5 <= known["phase_seconds"]["train"] <= known["wall_seconds"] < 10
    assert go(tmp_path, lambda run: {}).manifest["wall_seconds"] >= known["wall_seconds"]


# ---------------------------------------------------------------- folders


def test_a_folder_gives_way_to_a_complete_one_alone(tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "old").write_text("left by a dead try")
    with pytest.raises(UserError, match="exists already"), new_folder(out, 0):
        pass
    with pytest.raises(KeyError), new_folder(out, 0, replace=True) as folder:
        (folder / "new").write_text("half")
        raise KeyError
    assert [path.name for path in out.iterdir()] == ["old"]
    with new_folder(out, 0, replace=True) as folder:
        (folder / "new").write_text("whole")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_users_error_whoever_meets_it(tmp_path, error):
    with pytest.raises(UserError, match="not enough disk space"), new_folder(tmp_path / "model", 7):
        raise error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- metrics.csv


def test_rows_of_steps_done_again_are_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path)
    for step in range(6):
        first.log_metrics({"loss": step / 10}, step)
    assert [row["step"] for row in read_rows(path)] == list("012345")  # without a save: each is there at once
    with path.open("a") as file:
        file.write("6,0.")  # a kill
    second = CsvLogger(path)
    assert [row["step"] for row in read_rows(path)] == list("012345")
    for step in range(4, 8):
        second.log_metrics({"loss": step / 5, "kl": 1.0} if step > 5 else {"loss": step / 5}, step)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list("01234567")
    assert [float(row["loss"]) for row in rows] == [0.0, 0.1, 0.2, 0.3, 0.8, 1.0, 1.2, 1.4]
    assert [row["kl"] for row in rows] == [""] * 6 + ["1.0"] * 2


def test_numbers_without_a_step_are_those_of_this_try(tmp_path):
    path = tmp_path / "metrics.csv"
    for value in (1.0, 2.0):
        CsvLogger(path).log_metrics({"accuracy": value})
    assert [row["accuracy"] for row in read_rows(path)] == ["2.0"]


# ---------------------------------------------------------------- whole stages


@pytest.fixture()
def config(tiny, tmp_path):
    """A config of small stages on a base in a folder, with dropout and csv files."""
    save_backbone(tmp_path / "base", *tiny)

    def make(outputs: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return typed(
                compose(
                    "config",
                    [
                        "specialty=pediatrics", "data.source.train=12", "data.source.val=2", "data.source.test=2",
                        "dsa.steps=4", "dsa.batch_size=4", "dsa.checkpoint_every=3", "gba.steps=3",
                        "gba.checkpoint_every=2", "gba.prompts_per_step=2", "gba.num_generations=8", "gba.init=base",
                        "model.lora.r=2", "model.lora.dropout=0.1", "model.max_new_tokens=6", "logger=csv",
                        "trainer=cpu", f"model.name_or_path={tmp_path / 'base'}", f"paths.outputs={tmp_path / outputs}",
                    ],
                )
            )  # fmt: skip

    return make


STAGES = {"dsa": (dsa, ["adapter"]), "gba": (gba, ["adapter", "update"])}


def bytes_of(outputs: Path, stage: str) -> list[bytes]:
    folder = next(outputs.glob(f"{stage}/*-*/"))
    return [(folder / part / "adapter_model.safetensors").read_bytes() for part in STAGES[stage][1]]


@pytest.mark.parametrize("stage", ["dsa", "gba"])
def test_a_try_that_dies_after_the_last_step_costs_no_step(config, tmp_path, monkeypatch, stage):
    """A full disk at the save, then a kill between adapter and DONE; the third try trains nothing and is the same."""
    run, steps = STAGES[stage][0].run, []
    original = fit_module.TrainingModule.on_train_batch_start

    def counted(self, batch, batch_idx):
        steps.append(self.global_step)
        original(self, batch, batch_idx)

    monkeypatch.setattr(fit_module.TrainingModule, "on_train_batch_start", counted)
    plain = next(iter(run(config("whole")).values()))
    trained, wanted = len(steps), plain.metrics

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk"):
        patch.setattr("mmedexpert.models.encode.Encoder.save_pretrained", full)
        run(config("cut"))
    assert len(steps) == 2 * trained
    folder = next((tmp_path / "cut" / stage).glob("*-*/"))
    assert (folder / "last.ckpt").exists() and not list(folder.glob("adapter*"))
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"mmedexpert.stages.{stage}.write_card", killed)
            run(config("cut"))
        assert (folder / "adapter").is_dir() and (folder / "last.ckpt").exists()
    done = next(iter(run(config("cut")).values()))
    assert len(steps) == 2 * trained, "a step was trained again"
    assert bytes_of(tmp_path / "cut", stage) == bytes_of(tmp_path / "whole", stage)
    timed = ("timing_s/", "perf/", "step_time")
    assert {k: v for k, v in done.metrics.items() if not k.startswith(timed)} == {
        k: v for k, v in wanted.items() if not k.startswith(timed)
    }
    assert [row["step"] for row in read_rows(done.folder / "csv" / "metrics.csv")] == [str(n) for n in range(trained)]
    assert done.manifest["tries"] == 4 and not (done.folder / "last.ckpt").exists()
