"""Run folders: content-named, reused, resumed, honest about failures."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import threading
import time
from dataclasses import replace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_config import composed

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.runtime import runs
from mmedexpert.runtime.quiet import one_line
from mmedexpert.runtime.runs import execute, run_id
from mmedexpert.schema import SpecialtyConfig
from mmedexpert.stages.common import repeatable
from mmedexpert.stages.data import dataset

OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)  # as run.py does


def go(tmp_path, work, key=None, seed=0, inputs=None):
    return execute("dsa", "x", key or {"lr": 1.0}, work, outputs=tmp_path, seed=seed, inputs=inputs)


def test_a_finished_run_is_not_run_again(tmp_path):
    calls = []
    first = go(tmp_path, lambda run: calls.append(run.folder) or {"loss": 0.5})
    again = go(tmp_path, lambda run: calls.append(run.folder) or {"loss": 0.9})
    assert len(calls) == 1 and again.reused and not first.reused
    assert again.folder == first.folder and again.metrics == {"loss": 0.5}
    assert {"git_sha", "versions", "seed", "inputs", "phase_seconds", "peak_memory_bytes"} <= set(again.manifest)


def test_what_a_result_depends_on_names_its_folder(tmp_path):
    folders = {
        go(tmp_path, lambda run: {}, key, seed, inputs).folder
        for key, seed, inputs in [
            ({"lr": 1.0}, 0, None), ({"lr": 2.0}, 0, None), ({"lr": 1.0}, 1, None), ({"lr": 1.0}, 0, {"base": "a"}),
            ({"lr": 1.0}, 0, {"base": "b"}),
        ]
    }  # fmt: skip
    assert len(folders) == 5
    assert run_id("dsa", {"a": 1, "b": 2}) == run_id("dsa", {"b": 2, "a": 1}) != run_id("gba", {"a": 1, "b": 2})


def test_an_error_leaves_a_marker_and_the_next_try_clears_it(tmp_path):
    def broken(run):
        (run.folder / "last.ckpt").write_text("half")
        raise ValueError("boom")

    with pytest.raises(ValueError):
        go(tmp_path, broken)
    folder = next((tmp_path / "dsa").glob("x-*"))
    assert (folder / "FAILED").read_text() == "boom" and "ValueError" in (folder / "traceback.txt").read_text()
    assert not (folder / "DONE").exists()
    done = go(tmp_path, lambda run: {"kept": float((run.folder / "last.ckpt").exists())})
    assert done.metrics == {"kept": 1.0} and not (folder / "FAILED").exists()


def test_an_interruption_keeps_what_is_there(tmp_path):
    def interrupted(run):
        (run.folder / "last.ckpt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, interrupted)
    assert go(tmp_path, lambda run: {"kept": float((run.folder / "last.ckpt").exists())}).metrics == {"kept": 1.0}


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"disk is full.*paths\.outputs"):
        go(tmp_path, full)
    monkeypatch.setattr("mmedexpert.runtime.runs.FREE_BYTES", 10**18)
    with pytest.raises(UserError, match=r"MB are free.*paths\.outputs"):
        go(tmp_path, lambda run: {}, {"lr": 3.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write"):
        execute("dsa", "x", {}, lambda run: {}, outputs=tmp_path / "file", seed=0)


def test_a_runs_config_repeats_its_command(tmp_path):
    """As `python run.py --config-path <run folder> --config-name config` composes it: without conf/."""
    words = ["stage=data", "data.source.train=2", "data.source.val=1", "data.source.test=1", "benchmark=slake"]
    config = composed(*words, "merge=ties", "merge.search={density: [1.0]}", f"paths.outputs={tmp_path}")
    run = dataset(config)
    with initialize_config_dir(str(run.folder), version_base="1.3"):
        again = compose("config", return_hydra_config=True)
        repeated = typed(compose("config"))
        changed = typed(compose("config", ["data.source.train=3", "gba.weights=[1,0,0,0]"]))
    assert repeated == config and not run.reused and dataset(repeated).reused
    assert changed.gba.weights == [1.0, 0.0, 0.0, 0.0] and dataset(changed).run_id != run.run_id
    # Hydra itself writes nothing, and finds no word of its own on the screen
    assert again.hydra.output_subdir is None and again.hydra.run.dir == "." and again.hydra.job_logging.root is None
    assert again.hydra.sweep.dir.startswith(f"{tmp_path}/multirun/20")
    with initialize_config_dir(str(run.folder), version_base="1.3"), pytest.raises(Exception) as caught:
        compose("config", ["gba.wieghts=[1,0,0,0]"])
    assert "did you mean 'gba.weights'" in one_line(caught.value)


def test_specialties_that_were_missing_are_looked_for_anew_in_a_repeat():
    config = composed()
    short = replace(
        config,
        specialty=SpecialtyConfig(config.specialty.names[:2], on_missing="error", missing=config.specialty.names[2:]),
    )
    assert yaml.safe_load(repeatable(short)) == yaml.safe_load(repeatable(config))


def test_a_runs_config_holds_no_password():
    text = repeatable(composed("engine.endpoint.base_url=http://me:hunter2@host/v1"))
    assert "hunter2" not in text and "http://***@host/v1" in text


def test_phases_are_timed(tmp_path):
    def work(run):
        with run.phase("train"):
            time.sleep(0.05)
        with run.phase("rest"):
            pass
        run.notes["extra"] = 3
        return {"x": 1.0}

    manifest = go(tmp_path, work).manifest
    seconds = manifest["phase_seconds"]
    assert seconds["rest"] < 0.05 <= seconds["train"] <= manifest["wall_seconds"] and manifest["extra"] == 3
    (path,) = (tmp_path / "dsa").glob("*/manifest.json")
    assert json.loads(path.read_text()) == manifest


def test_who_waits_for_another_process_says_for_whom(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(runs, "_named", set())
    begun, over = threading.Event(), threading.Event()

    def work(run):
        begun.set()
        assert over.wait(60)
        return {"loss": 0.5}

    first = threading.Thread(target=go, args=(tmp_path, work))
    first.start()
    assert begun.wait(60)
    threading.Timer(0.5, over.set).start()
    assert go(tmp_path, work).reused
    first.join()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "waits for" in line]
    assert re.search(rf"dsa +x +waits for process {os.getpid()} on {platform.node()}, at work on it since 20", line)
    assert not list(tmp_path.rglob(".*.holder"))


def test_nobody_is_told_who_does_not_wait(tmp_path, capsys):
    go(tmp_path, lambda run: {})
    go(tmp_path, lambda run: {})
    assert "waits for" not in capsys.readouterr().err
