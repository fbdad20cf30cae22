"""Work side by side: as alone, shown once, ended by an error, by an interruption and with its command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import ROOT, Done, _here, run, words
from conftest import long
from test_config import composed
from working import fails, nothing, told

from mmedexpert.errors import UserError
from mmedexpert.runtime import progress, runs, workers
from mmedexpert.runtime.runs import execute
from mmedexpert.stages import common

SMALL = ("dsa.steps=4", "dsa.batch_size=4", "data.limit=8", "specialty.names=[pediatrics,brain_sensory]")


@pytest.fixture(scope="module", autouse=True)
def _ended():
    yield
    workers.stop()


@pytest.fixture
def pool():
    """Two workers: those of the test before, unless it ended them."""
    workers.start(2, 1, nothing)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Done]:
    """Two experts trained side by side: the outputs, and what was told."""
    workers.stop()
    folder = tmp_path_factory.mktemp("side_by_side")
    done = run(folder, "stage=dsa", *SMALL, "trainer.threads=1", "trainer.processes=2")
    workers.stop()
    return folder, done


def test_all_is_done_in_other_processes_and_told_here(pool, tmp_path, capfd):
    paths = [tmp_path / name for name in "abc"]
    workers.side_by_side([partial(told, path, f"work {path.name}", 0.4) for path in paths])
    assert os.getpid() not in {int(path.read_text().split()[1]) for path in paths}
    shown = capfd.readouterr().err
    assert [shown.count(f"work {name}") for name in "abc"] == [1, 1, 1]


def test_an_error_ends_the_others_and_is_the_users_own(pool, tmp_path):
    with pytest.raises(UserError, match=r"data\.root=x is no folder"):
        workers.side_by_side([fails, partial(told, tmp_path / "never", "long", 3600.0)])
    assert not (tmp_path / "never").exists()


def test_a_worker_that_dies_is_told_with_a_way_on(pool):
    with pytest.raises(UserError, match=r"trainer\.processes=1"):
        workers.side_by_side([partial(os._exit, 9)])


def test_its_bars_stand_in_the_first_process(capfd, monkeypatch):
    sent: list = []
    monkeypatch.setattr(progress, "relay", sent.append)
    with progress.Bar("dsa", 2) as bar:
        bar.show(1, {"loss": 0.5})
        bar.show(2, {"loss": 0.25})
    assert sent[-1] == ("dsa", 2, 2, "loss 0.25") and not capfd.readouterr().err
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    bars = progress.Bars()
    bars.show("dsa", 1, 2, "loss 0.5")
    assert "dsa  1/2  loss 0.5" in capfd.readouterr().err


def made(config, name: str, folder: Path):
    """A run that counts how often it is worked on."""

    def work(run) -> dict[str, float]:
        (folder / f"{name}-{os.getpid()}").touch()
        return {"x": 1.0}

    return execute("dsa", name, {"name": name}, work, outputs=folder, seed=0, explain=config.runs.explain)


def test_what_is_done_is_not_done_again_and_one_work_stays_here(tmp_path, monkeypatch):
    config = composed("stage=dsa", "trainer.processes=2", f"paths.outputs={tmp_path}")
    here = os.getpid()
    works = [partial(made, name=name, folder=tmp_path) for name in "ab"]
    made(config, "a", tmp_path)
    monkeypatch.setattr(workers, "start", lambda *_: pytest.fail("nothing is left to share"))
    common.together(config, works)
    assert not list(tmp_path.glob("b-*")) and not runs.explained
    made(config, "b", tmp_path)
    assert (tmp_path / f"a-{here}").exists() and (tmp_path / f"b-{here}").exists()


def test_how_many_at_once(monkeypatch):
    monkeypatch.setattr(common, "_cores", lambda: 64)
    assert common.processes_of(composed()) == common.MOST_PROCESSES
    assert common.processes_of(composed("trainer.processes=3")) == 3
    assert common.processes_of(composed("model=qwen2_5_vl_7b", "data=medr1", "data.root=tests", "gba.init=base")) == 1
    assert common.processes_of(composed("runs.explain=true", "trainer.processes=3")) == 1
    assert common.processes_of(composed("debug=smoke")) == 1
    monkeypatch.setattr(common, "_cores", lambda: 1)
    assert common.processes_of(composed()) == 1


def test_experts_side_by_side_are_those_trained_one_by_one(trained, tmp_path, monkeypatch):
    """The same run folders, with the same weights but for the rounding of sums, and every folder named once."""
    two, side_by_side = trained
    one_by_one = run(tmp_path, "stage=dsa", *SMALL, "trainer.threads=1", "trainer.processes=1")
    for done in (side_by_side, one_by_one):
        assert len(re.findall(r"dsa  \w+  ->", done.stderr)) == 2, done.stderr
        assert "reused" not in done.stderr + done.stdout, done.stdout
    weights = [sorted(folder.rglob("adapter_model.safetensors")) for folder in (two, tmp_path)]
    assert [path.parts[-3] for path in weights[0]] == [path.parts[-3] for path in weights[1]] and len(weights[0]) == 2
    for one, other in zip(*weights, strict=True):
        assert one.read_bytes() == other.read_bytes()
    for name in ("_named", "_made", "by_workers"):  # what a new process has not seen
        monkeypatch.setattr(runs, name, set())
    again = run(two, "stage=dsa", *SMALL, "trainer.threads=1", "trainer.processes=2")
    assert again.stdout.count("reused") == 2, again.stdout


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=long)])
def test_workers_end_with_their_command_and_the_next_goes_on(trained, ending):
    folder = trained[0]  # holds the base and the data set
    long = ["dsa.steps=400", "dsa.checkpoint_every=2", f"dsa.lr=0.00{int(ending)}", "trainer.processes=2"]
    given = words(folder, "stage=dsa", *SMALL[1:], *long)
    before = set(folder.glob("dsa/*"))

    def checkpoints() -> list[Path]:
        return [path for path in folder.glob("dsa/*/last.ckpt") if path.parent not in before]

    process = subprocess.Popen(
        [sys.executable, "run.py", *given], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "WANDB_MODE": "disabled"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(checkpoints()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(ending)
    said = process.communicate(timeout=60)[1]
    assert ending == signal.SIGKILL or (process.returncode == 130 and "run the same command again" in said)
    time.sleep(1)
    steps = [os.path.getmtime(path) for path in checkpoints()]
    time.sleep(2)
    assert steps == [os.path.getmtime(path) for path in checkpoints()]  # nobody goes on
    done = _here([*given, "runs.explain=true"])
    assert done.stdout.count("  resumed  ") == 2, done.stdout + done.stderr


def test_seconds_of_a_worker_are_in_its_manifest(trained):
    done = list(trained[0].glob("dsa/*/DONE"))
    for path in done:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        assert manifest["wall_seconds"] > 0 and "stage=dsa" in " ".join(manifest["command"])
    assert len(done) == 2
