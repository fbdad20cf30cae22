"""What the jobs of a sweep leave to their command, and how the launchers for clusters are composed and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import ROOT, run
from hydra import compose, initialize_config_dir
from test_config import composed

from hydra_plugins.mmedexpert_launchers import SubmititLocal, as_torchrun
from mmedexpert.errors import UserError
from mmedexpert.runtime import jobs
from mmedexpert.runtime.jobs import Job
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.typos import told_of_hydra

LOCAL, SLURM = "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"


def test_a_jobs_file_gives_back_what_the_tables_need(tmp_path):
    config = composed("results.id=x", "arms={few: {gba.steps: 2}}", "arm=few", "seed=3", "benchmark=slake")
    runs = {"base": Run("pretrain", "tiny", "abc", tmp_path / "out", reused=True)}
    jobs.leave(tmp_path / "sweep", 10, Job(["seed=3"], runs, config))
    jobs.leave(tmp_path / "sweep", 9, Job(["seed=2"], error="no"))
    failed, done = jobs.left(tmp_path / "sweep")
    assert failed == Job(["seed=2"], error="no") and done.config == config and done.error is None
    (name, run_), *more = done.runs.items()
    assert name == "base" and run_ == runs["base"] and not more
    assert [job.overrides for job in jobs.left(tmp_path / "sweep")] == [["seed=2"], ["seed=3"]]  # by number


def test_a_jobs_file_holds_no_password(tmp_path):
    served = "engine.endpoint.base_url=http://me:hunter2@host/v1"
    jobs.leave(tmp_path, 0, Job([served, "api_key=hunter2"], {}, composed(served), "not at http://me:hunter2@host/v1"))
    text = (tmp_path / "0.json").read_text()
    assert "hunter2" not in text and text.count("***@host") == 3


@pytest.mark.parametrize("text", ["", "[]", '{"overrides": ["a"]}'])
def test_a_file_that_is_not_whole_is_a_failed_job(tmp_path, text):
    (tmp_path / "0.json").write_text(text)
    assert "0.json cannot be read" in jobs.left(tmp_path)[0].error


def test_a_sweep_in_one_process_leaves_files_too(tmp_path):
    done = run(tmp_path, "-m", "stage=data", "data.limit=1", "gba.beta=0.1,-1,0.2", code=2)
    assert done.stderr.count("error: ") == 1 and "failed: gba.beta=-1: gba.beta=-1.0 must be" in done.stdout
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert sorted(path.name for path in sweep.iterdir()) == ["0.json", "1.json", "2.json"]
    errors = [json.loads((sweep / f"{number}.json").read_text())["error"] for number in range(3)]
    assert errors[0] is None and errors[2] is None and errors[1].startswith("gba.beta=-1.0 must be")
    run(tmp_path, "stage=data", "data.limit=1")  # no sweep: neither a file, nor a look at those of the one before
    assert len(list((tmp_path / "multirun").iterdir())) == 1
    run(tmp_path, "-m", "stage=data", "gba.btea=1", code=2)  # Hydra's own note of it goes, too
    assert len(list((tmp_path / "multirun").iterdir())) == 1


def test_an_experiments_table_is_made_of_what_jobs_have_left(tmp_path, monkeypatch):
    """A launcher whose jobs ran elsewhere has nothing but their files."""
    import runpy

    monkeypatch.chdir(ROOT)
    script = runpy.run_path("run.py")
    config = composed("results.id=x", f"paths.outputs={tmp_path}")
    runs = {"eval/base": Run("eval", "base", "abc", tmp_path)}
    for number, job in enumerate([Job(["a", "s=0"], runs, config), Job(["a", "s=1"], error=jobs.NOT_ENDED)]):
        jobs.leave(tmp_path, number, job)
    seen = []
    monkeypatch.setattr(jobs, "sweep", tmp_path)
    monkeypatch.setattr("mmedexpert.stages.experiment.conclude", lambda *given: seen.append(given))
    monkeypatch.setattr("mmedexpert.reporting.tables.print_jobs", lambda given: seen.append(given))
    assert script["_end"]() == 2
    told, (first, arms, failed) = seen
    assert [job.error for job in told] == [None, jobs.NOT_ENDED] and first == config
    assert [(one, list(made)) for one, made in arms] == [(config, list(runs.values()))] and failed == ["s=1"]


def launcher(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        found = compose("config", ["hydra.mode=MULTIRUN", *overrides], return_hydra_config=True)
        return dict(found.hydra.launcher)


def test_the_launchers_ask_for_what_the_trainer_needs():
    one = launcher(SLURM)
    assert (one["nodes"], one["tasks_per_node"], one["gpus_per_node"]) == (1, 1, 1)
    assert one["additional_parameters"] == {"requeue": True} and one["max_num_timeout"] > 0
    several = launcher(SLURM, "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2")
    assert (several["nodes"], several["tasks_per_node"], several["gpus_per_node"]) == (2, 4, 4)
    for name in (SLURM, LOCAL):
        cpu = launcher(name, "trainer=cpu", "trainer.devices=2")
        assert cpu["tasks_per_node"] == 2 and cpu["gpus_per_node"] is None
    assert launcher(LOCAL)["array_parallelism"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-m", LOCAL], "pip install -r requirements-cluster.txt"),
        (["-m", SLURM], "pip install -r requirements-cluster.txt"),
        ([SLURM], "give -m behind run.py"),
        (["-m", LOCAL, "trainer.devices=null"], "trainer.devices=null: hydra/launcher=submitit_local starts a process"),
        (["-m", LOCAL, "runs.explain=true"], "runs.explain=true begins nothing"),
        (["-m", LOCAL, "hydra.launcher.partition=a"], "no such config key 'hydra.launcher.partition'"),
    ],
)
def test_what_cannot_be_launched_is_told_in_one_line(tmp_path, monkeypatch, words, told):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as where it is not installed
    done = run(tmp_path, *words, "stage=data", code=2)
    (line,) = [line for line in done.stderr.splitlines() if "note:" not in line]
    assert line.startswith("error: ") and told in line
    assert not list(tmp_path.rglob("*.*"))


def local(at_once: int, gpus: int, monkeypatch, nodes: int = 1):
    updated = SimpleNamespace(update_parameters=lambda **_: None)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(LocalExecutor=lambda *_, **__: updated))
    found = SubmititLocal(
        array_parallelism=at_once, gpus_per_node=gpus, tasks_per_node=gpus, timeout_min=1, max_num_timeout=0
    )
    found.config = SimpleNamespace(trainer=SimpleNamespace(num_nodes=nodes))
    return found


def test_jobs_at_once_on_one_machine_have_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    two = local(2, 2, monkeypatch)
    two.executor(tmp_path)
    assert [two.devices(place) for place in range(two.places(9))] == ["2,3", "5,7"]
    with pytest.raises(UserError, match=r"array_parallelism=3 jobs at once with 2 GPUs each: 4 here"):
        local(3, 2, monkeypatch).executor(tmp_path)
    with pytest.raises(UserError, match=r"trainer.num_nodes=2"):
        local(1, 1, monkeypatch, nodes=2).executor(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    none = local(3, 1, monkeypatch)
    none.executor(tmp_path)  # trainer.accelerator=auto on a machine without any
    assert none.devices(0) == ""


def task(**given):
    told = dict(job_id="42_3", num_tasks=8, num_nodes=2, node=1, global_rank=6, local_rank=2, hostnames=["a", "b"])
    return SimpleNamespace(**told | given)


def test_tasks_of_a_scheduler_are_taken_as_torchruns(monkeypatch):
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from torch import distributed

    monkeypatch.setattr(os, "environ", {"SLURM_NTASKS": "8"})
    as_torchrun(task())
    assert distributed.is_torchelastic_launched() and TorchElasticEnvironment.detect()
    found = TorchElasticEnvironment()
    assert (found.global_rank(), found.local_rank(), found.node_rank(), found.world_size()) == (6, 2, 1, 8)
    assert found.main_address == "a" and os.environ["LOCAL_WORLD_SIZE"] == "4"
    port = found.main_port
    as_torchrun(task(global_rank=0, local_rank=0, node=0))
    assert TorchElasticEnvironment().main_port == port  # the job's, whatever the task
    as_torchrun(task(job_id="42_4", num_nodes=1))
    assert TorchElasticEnvironment().main_port != port and TorchElasticEnvironment().main_address == "127.0.0.1"


def test_a_worker_leaves_the_end_of_a_jobs_time_to_its_parent():
    """SLURM sends USR2 to all processes of a job: one that dies of it would fail what is to be queued again."""
    code = "import os, signal; from mmedexpert.runtime.orphans import follow; follow(os.getppid()); "
    code += "os.kill(os.getpid(), signal.SIGUSR2); print('here')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "here\n"


def test_the_plugin_of_the_same_names_is_told():
    error = "In 'hydra/config': Error merging 'hydra/launcher/submitit_local' with schema"
    assert "pip uninstall it" in told_of_hydra(error, "Key 'array_parallelism' not in 'LocalQueueConf'")
