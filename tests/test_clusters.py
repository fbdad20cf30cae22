"""Sweeps through submitit itself: on this machine, and what SLURM would be given. Skipped where it is not installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, words
from conftest import long
from test_distributed import SMALL
from test_jobs import LOCAL, SLURM, launcher

from hydra_plugins.mmedexpert_launchers import SubmititSlurm
from mmedexpert.runtime import jobs

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install -r requirements-cluster.txt")


def begin(outputs: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run.py", *words(outputs, "-m", *overrides)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == code and "Traceback" not in out + err, out + err
    return out, err


def sweep_of(outputs: Path) -> Path:
    (sweep,) = (outputs / "multirun").iterdir()
    return sweep


def tasks(outputs: Path, count: int, process: subprocess.Popen[str]) -> list[int]:
    """The processes that do the jobs, in the order of their beginning."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        ids = sorted(int(path.name.partition("_")[0]) for path in outputs.glob("multirun/*/logs/*_0_log.out"))
        found = [Path(f"/proc/{one}/task/{one}/children").read_text().split() for one in ids]
        if len(found) == count and all(found):
            return [int(children[0]) for children in found]
        time.sleep(0.02)
    raise AssertionError("the jobs were over before they were seen")


def test_jobs_that_fail_and_are_killed_are_named_and_the_others_stand_in_the_table(tmp_path):
    process = begin(
        tmp_path, LOCAL, "hydra.launcher.array_parallelism=2", "stage=data", "data.limit=1", "gba.beta=0.1,-1,0.2"
    )
    os.kill(tasks(tmp_path, 2, process)[1], signal.SIGKILL)  # as for want of memory
    out, err = ended(process, code=2)
    assert "gba.beta=0.1   data" in out
    assert "failed: gba.beta=-1: gba.beta=-1.0 must be" in out and f"failed: gba.beta=0.2: {jobs.NOT_ENDED} (see" in out
    assert "job 1  gba.beta=-1  not begun: " in err and "job 0  gba.beta=0.1  finished" in err
    sweep = sweep_of(tmp_path)
    assert [job.error is None for job in jobs.left(sweep)] == [True, False, False]
    # what was typed, passwords too, stands in submitit's files and Hydra's note
    assert not list(sweep.rglob("*.pkl")) and not (sweep / "multirun.yaml").exists()
    (manifest,) = tmp_path.glob("data/*/manifest.json")
    command = json.loads(manifest.read_text())["command"]
    assert command[0] == "run.py" and "gba.beta=0.1" in command and not {"-m", LOCAL} & set(command)


@long
def test_several_devices_of_a_job_are_its_tasks(tmp_path):
    out, _ = ended(begin(tmp_path, LOCAL, "stage=dsa", *SMALL, "trainer=ddp", "trainer.devices=2"), code=0)
    assert "Jobs" in out and "cardiology" in out
    (folder,) = tmp_path.glob("dsa/cardiology-*")
    assert (folder / "DONE").exists() and len(list(sweep_of(tmp_path).glob("*.json"))) == 1
    second = next(sweep_of(tmp_path).glob("logs/*_1_log.err")).read_text()
    assert "MEMBER: 2/2" in second and "->" not in second  # Lightning's word for who it is; rank 0 alone tells


@long
def test_a_preempted_job_goes_on_and_one_out_of_time_is_told(tmp_path):
    """USR2, as SLURM sends it: a time-out, with less than ten minutes left, which is queued again once."""
    process = begin(
        tmp_path, LOCAL, "hydra.launcher.timeout_min=9", "hydra.launcher.max_num_timeout=1", "stage=pretrain",
        "pretrain.reading_steps=1", "pretrain.looking_steps=200", "pretrain.checkpoint_every=2",
    )  # fmt: skip
    for _ in range(2):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pretrain/*/last.ckpt")}
        deadline = time.monotonic() + 300
        while before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("pretrain/*/last.ckpt")}:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (task,) = tasks(tmp_path, 1, process)
        os.kill(task, signal.SIGUSR2)
        while Path(f"/proc/{task}").exists() and Path(f"/proc/{task}/stat").read_text().split()[2] != "Z":
            time.sleep(0.02)
    out, _ = ended(process, code=2)
    assert "timed-out too many times. (hydra.launcher.timeout_min" in out
    (clock,) = tmp_path.glob("pretrain/*/clock.json")
    assert json.loads(clock.read_text())["tries"] == 2
    steps = [json.loads(line)["step"] for line in (clock.parent / "steps.jsonl").read_text().splitlines()]
    assert len(steps) > 2 and steps == sorted(set(steps))


def script(folder: Path, name: str, *lines: str) -> None:
    (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
    (folder / name).chmod(0o755)


def test_what_sbatch_is_given(tmp_path, monkeypatch):
    script(tmp_path, "srun")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    given = launcher(
        SLURM, "trainer=ddp", "trainer.devices=4", "hydra.launcher.partition=long", "hydra.launcher.mem_gb=64",
        "hydra.launcher.setup=[module load cuda]",
    )  # fmt: skip
    executor = SubmititSlurm(**{key: value for key, value in given.items() if key != "_target_"}).executor(tmp_path)
    assert executor._executor.max_num_timeout == given["max_num_timeout"]
    text = executor._executor._make_submission_file_text("python", "x")
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        "job-name=mmedexpert", "time=1440", "requeue", "nodes=1", "ntasks-per-node=4", "gpus-per-node=4",
        "cpus-per-task=8", "mem=64GB", "partition=long", "signal=USR2@120", "open-mode=append",
    } <= set(asked)  # fmt: skip
    assert "\nmodule load cuda\n" in text and not [line for line in asked if "null" in line or "None" in line]


@long
def test_jobs_run_through_sbatch_and_srun(tmp_path):
    """With scripts in their place: what is submitted is an array whose tasks find their jobs by SLURM's variables."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script(
        tools, "sbatch", "export SLURM_ARRAY_JOB_ID=42 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0",
        "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $1)",
        "for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=$i bash $1 >/dev/null 2>&1 & done",
        "echo Submitted batch job 42",
    )  # fmt: skip
    script(tools, "srun", 'while [[ $1 != *python* ]]; do shift; done; exec "$@"')
    script(tools, "sacct", "echo 'JobID|State|NodeList'; for i in 0 1; do echo \"42_$i|RUNNING|here\"; done")
    process = begin(
        tmp_path / "out", SLURM, "stage=data", "data.limit=1", "gba.beta=0.1,0.2",
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    out, err = ended(process, code=0)
    assert "gba.beta=0.1" in out and "gba.beta=0.2" in out and err.count("finished") == 2
