"""Nothing is lost: faults at single file operations of whole stages, full disks, two processes, clocks that jump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import wandb_files
from conftest import long

from mmedexpert.reporting.shown import Shown
from mmedexpert.reporting.tracking import logger_for
from mmedexpert.runtime.curve import STEPS
from mmedexpert.runtime.runs import Run, execute
from mmedexpert.schema import LoggerConfig

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "experiments" / "faults"
sys.path.append(str(FAULTS))


def script(text: str, *words: str) -> subprocess.Popen[str]:
    """Python text as a process in a group of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(FAULTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), *words], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def go(outputs, work=lambda run: {}, key=None):
    return execute("dsa", "x", key or {"lr": 1.0}, work, outputs=outputs, seed=0)


# ---------------------------------------------------------------- W&B: each step once

LOGGING = """
    import json, os, signal, sys, time
    from pathlib import Path
    from mmedexpert.reporting.shown import Shown
    from mmedexpert.reporting.tracking import logger_for
    from mmedexpert.runtime.runs import Run
    from mmedexpert.schema import LoggerConfig

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    run, settings = Run("dsa", "x", "1", folder), LoggerConfig("wandb", project="p")
    with logger_for(run, settings, Shown("n", "g", [], {})) as logger:
        for step in range(steps):
            logger.log_metrics({"loss": 1.0 / (1 + step)}, step)
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": 1.0 / (1 + step)}) + "\\n")
        print("told", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("cut", [pytest.param(0, marks=long), 40, pytest.param(400, marks=long)])
def test_a_killed_and_resumed_curve_is_told_to_wandb_once(tmp_path, cut):
    """From a checkpoint before the kill, and also where the file of the killed run lost its end."""
    import wandb

    folder = tmp_path / "outputs" / "dsa" / "x-1"
    folder.mkdir(parents=True)
    process = script(LOGGING, str(folder), "7")
    assert process.stdout.readline() == "told\n", process.stderr.read()
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    os.truncate(path, max(7, path.stat().st_size - cut))
    (folder / STEPS).write_text("".join((folder / STEPS).read_text().splitlines(keepends=True)[:5]))  # as Curve does
    time.sleep(1.1)  # W&B names its folders by the second
    with logger_for(Run("dsa", "x", "1", folder), LoggerConfig("wandb", project="p"), Shown("n", "g", [], {})) as one:
        for step in range(5, 10):
            one.log_metrics({"loss": 1.0 / (1 + step)}, step)
    wandb.teardown()
    (told,) = wandb_files.told(tmp_path / "outputs")
    assert told.files == 2
    steps = [(row["trainer/global_step"], row["loss"]) for row in told.history if "loss" in row]
    assert steps == [(step, 1.0 / (1 + step)) for step in range(10)]


# ---------------------------------------------------------------- faults at file operations

# a whole stage at a place where each of its kinds of files is being written; all of them: experiments/faults/writes.py
OPERATIONS = """
    import json, sys
    from pathlib import Path
    import writes

    folder = Path(sys.argv[1])
    (folder / "before").mkdir()
    few = ["data.source.train=1", "data.source.val=1", "data.source.test=1"]
    settings = [word for word in writes.SETTINGS if not word.startswith("data.source")] + few
    if sys.argv[2] == "dsa":
        writes.imported()
        settings += ["specialty.names=[pediatrics]"]
        for stage in ("data", "pretrain"):
            config = writes.composed(stage, folder / "before", settings)
            assert writes.forked(lambda: writes.run(config, folder / "before"))[0] == 0
    (folder / "trial").mkdir()
    trial = writes.Trial(sys.argv[2], folder / "before", folder / "trial", settings)
    wanted = json.loads(sys.argv[3])
    for mode, words in wanted:
        place = max(n for n, told in enumerate(trial.operations) if all(word in told for word in words))
        print(json.dumps([mode, trial.operations[place], trial.at(mode, place, 7)]), flush=True)
"""


def faults(folder: Path, stage: str, wanted: list[tuple[str, list[str]]]) -> None:
    process = script(OPERATIONS, str(folder), stage, json.dumps(wanted))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    told = [json.loads(line) for line in out.splitlines()]
    assert len(told) == len(wanted)
    assert not [one for one in told if one[2]], told


@pytest.mark.parametrize("wanted", [
    [("torn", ["open", ".records.jsonl."]), ("full", ["open", ".lock"])],
    pytest.param([
        ("die", ["rename", ".records.jsonl."]), ("full", ["open", ".png"]), ("once", ["open", ".manifest.json."]),
        ("die", ["rename", ".DONE."]),
    ], marks=long),
])  # fmt: skip
def test_a_data_set_survives_faults_at_its_files(tmp_path, wanted):
    faults(tmp_path, "data", wanted)


@long
def test_training_survives_faults_at_its_files(tmp_path):
    faults(tmp_path, "dsa", [
        ("die", ["rename", "last.part"]), ("torn", ["mkdir", "adapter.partial"]),
        ("die", ["rename", "adapter.partial"]),
        ("full", ["fsync", "last.part"]), ("once", ["open", "steps.jsonl"]), ("once", ["open", "metrics.csv"]),
        ("die", ["remove", "last.ckpt"]), ("torn", ["open", "csv/.metrics.csv"]),
    ])  # fmt: skip


# ---------------------------------------------------------------- an evaluation that is judged again


def test_a_kill_while_an_evaluation_is_judged_again_leaves_no_stale_numbers(tmp_path, monkeypatch, answering):
    """summary.json, which says by what all was judged, is the last file of it."""
    from mmedexpert.stages import evaluation

    config = answering("stage=eval", "eval.models=[majority]", "data.source.test=2", f"paths.outputs={tmp_path}")
    (done,) = evaluation.run(config).values()
    wanted = done.metrics
    summary = json.loads((done.folder / "summary.json").read_text()) | {"judged_by": "older rules"}
    for name, content in (("metrics.json", {"accuracy": 7.0}), ("summary.json", summary)):
        (done.folder / name).write_text(json.dumps(content))
    written, write = [], evaluation.write_json

    def dies(path, value):
        write(path, value)
        written.append(path.name)
        raise KeyboardInterrupt

    for files in (["metrics.json"], ["metrics.json"]):  # a second kill finds the same work to do
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluation, "write_json", dies)
            evaluation.run(config)
        assert written == files
        written.clear()
    (again,) = evaluation.run(config).values()
    assert again.metrics == wanted and again.summary["judged_by"] != "older rules"


# ---------------------------------------------------------------- two processes, and clocks


TWO = """
    import json, sys, time
    from mmedexpert.runtime.runs import execute

    def work(run):
        with open(sys.argv[1] + "/worked", "a") as file:
            file.write("x")
        time.sleep(0.5)
        return {"loss": 1.0}

    print(json.dumps(execute("dsa", "x", {"lr": 1.0}, work, outputs=sys.argv[1], seed=0).reused))
"""


def test_two_processes_of_one_command_do_its_work_once(tmp_path):
    both = [script(TWO, str(tmp_path)) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(json.loads(line) for line in told) == [False, True] and (tmp_path / "worked").read_text() == "x"


@pytest.mark.parametrize("jump", [-4e8, 4e8])
def test_a_clock_that_jumps_changes_no_result_and_no_seconds(tmp_path, monkeypatch, jump):
    """Twelve years in the middle of a phase, and between the tries of a run."""
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])

    def work(run):
        with run.phase("train"):
            shift[0] += jump
        return {"kept": float((run.folder / "last.ckpt").exists())}

    def dies(run):
        (run.folder / "last.ckpt").write_text("")
        work(run)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, dies)
    for path in (tmp_path / "dsa").rglob("*"):  # what was written before the jump has times of the future, or of old
        os.utime(path, (real() + jump, real() + jump))
    done = go(tmp_path, work)
    assert done.metrics == {"kept": 1.0} and done.manifest["tries"] == 2
    assert 0 <= done.manifest["phase_seconds"]["train"] <= done.manifest["wall_seconds"] < 60
    assert go(tmp_path, work).reused


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENOSPC"])
@pytest.mark.parametrize("name", [".lock", "config.yaml"])
def test_a_folder_that_takes_no_file_is_told_before_any_work(tmp_path, number, name):
    text = """
        import errno, os, sys
        from mmedexpert.errors import UserError
        from mmedexpert.runtime.runs import execute

        def closed(event, given):
            if event == "open" and sys.argv[3] in str(given[0]) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(getattr(errno, sys.argv[2]), "told by the system", given[0])

        sys.addaudithook(closed)
        try:
            execute("dsa", "x", {}, lambda run: print("worked"), outputs=sys.argv[1], seed=0, config=lambda: "a: 1")
        except UserError as error:
            print(error)
    """
    process = script(text, str(tmp_path), number, name)
    out, err = process.communicate(timeout=60)
    assert out.count("\n") == 1 and str(tmp_path) in out and "paths.outputs=" in out, out + err
    assert ("the disk is full" if number == "ENOSPC" else "cannot write to") in out
