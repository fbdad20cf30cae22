"""The launchers `submitit_local` and `submitit_slurm`: each job of a sweep in processes of its own (docs/clusters.md).

Hydra takes launchers from the package hydra_plugins alone, and imports this file at every start: it imports little.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

import mmedexpert.resolvers  # noqa: F401  a job's process resolves its config before anything else is imported
from mmedexpert.errors import UserError
from mmedexpert.runtime import jobs
from mmedexpert.runtime.jobs import Job
from mmedexpert.runtime.privacy import redacted, without_password
from mmedexpert.runtime.quiet import one_line

Call = tuple[list[str], int, Any, str | None]  # a job's overrides and number, Hydra's state, its GPUs


class _Submitit(Launcher):
    """Submits the jobs, waits until all have ended, and tells of each; what it did stands in its file (`jobs`).

    hydra-submitit-launcher raises the first job's failure and leaves the others alone: hence one of our own.
    """

    name: str
    lag_seconds = 0  # in which a job's file may not be seen here yet

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's own: what `launch` is about."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    @abstractmethod
    def executor(self, folder: Path) -> Any:
        """submitit's executor with the options; UserError where they, or this machine, do not allow it."""

    def places(self, count: int) -> int:
        """How many of so many jobs are handed over before one has ended."""
        return count

    def devices(self, slot: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of the job in one of the places; None: its scheduler has set it."""
        return None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs to their ends. Nothing is returned: a job's result is its file.

        UserError before any is begun: submitit is missing, or the configuration cannot work with it.
        """
        config, sweep = self.config, Path(self.config.hydra.sweep.dir).absolute()
        jobs.tidy(sweep)
        if config.trainer.devices is None:
            raise UserError(f"trainer.devices=null: {self.name} starts a process for each, so say how many")
        if config.runs.explain:
            raise UserError(f"runs.explain=true begins nothing: leave {self.name} away")
        logs = sweep / "logs"
        executor = self.executor(logs)
        logs.mkdir(exist_ok=True, parents=True)
        logs.chmod(0o700)  # until the jobs have ended, options lie here as they were typed, passwords too
        words = dict(enumerate(map(list, job_overrides), initial_job_idx))
        names = jobs.varied([redacted(one) for one in words.values()]) if len(words) > 1 else [""]
        self.labels = {number: f"job {number}  {name}".strip() for number, name in zip(words, names, strict=True)}
        _say(f"{self.name}: {len(words)} jobs, {self.options['array_parallelism']} at once, output in {logs}")
        for number, overrides in list(words.items()):
            if error := self._mistake(overrides):
                jobs.leave(sweep, number, Job(words.pop(number), error=error))
                _say(f"{self.labels[number]}  not begun: {error}")
            else:
                jobs.leave(sweep, number, Job(overrides, error=jobs.NOT_ENDED))
        self._run(executor, words, sweep)
        for path in logs.glob("*.pkl"):
            path.unlink()
        return []

    def _mistake(self, overrides: list[str]) -> str | None:
        """What is wrong with a job's options: told before it waits for its turn."""
        from mmedexpert.checks import typed

        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            del config["hydra"]
        try:
            typed(config, overrides)
        except UserError as error:
            return one_line(error)
        return None

    def _run(self, executor: Any, words: Mapping[int, list[str]], sweep: Path) -> None:
        waiting, running, places = list(words), dict[int, tuple[Any, int]](), list(range(self.places(len(words))))
        try:
            while waiting or running:
                begun, waiting = waiting[: len(places)], waiting[len(places) :]
                if begun:
                    taken, places = places[: len(begun)], places[len(begun) :]
                    calls: list[Call] = [
                        (words[number], number, Singleton.get_state(), self.devices(place))
                        for number, place in zip(begun, taken, strict=True)
                    ]
                    submitted = executor.map_array(self, *zip(*calls, strict=True))
                    running |= {n: (job, place) for n, job, place in zip(begun, submitted, taken, strict=True)}
                for number, (job, place) in list(running.items()):
                    if job.done():
                        del running[number]
                        places.append(place)
                        self._tell(sweep, number, words[number], job)
                time.sleep(0.5)
        except KeyboardInterrupt:
            ids = ", ".join(str(job.job_id) for job, _ in running.values())
            _say(f"not waiting any more for {ids} of {self.name}")
            raise

    def _tell(self, sweep: Path, number: int, overrides: list[str], job: Any) -> None:
        """One line on a job that has ended; of one that left no word of it, the scheduler's."""
        until = time.monotonic() + self.lag_seconds
        while (ended := jobs.read(sweep, number)).error == jobs.NOT_ENDED and time.monotonic() < until:
            time.sleep(1.0)
        if ended.error == jobs.NOT_ENDED:
            lines = job.paths.stderr.read_text(errors="replace").splitlines() if job.paths.stderr.exists() else []
            last = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
            state = "" if job.state == "FINISHED" else f"{job.state}, "  # a local job's, however it ended
            ended = Job(overrides, error=f"{last or jobs.NOT_ENDED} ({state}see {job.paths.stderr})")
            jobs.leave(sweep, number, ended)
        how = "finished" if ended.error is None else f"failed: {without_password(ended.error)}"
        _say(f"{self.labels[number]}  {how}")

    def __call__(self, overrides: list[str], number: int, state: Any, devices: str | None) -> None:
        """A job, in a process that submitit has started."""
        import submitit

        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        as_torchrun(submitit.JobEnvironment())
        Singleton.set_state(state)
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = submitit.JobEnvironment().job_id, number
        ended = run_job(
            hydra_context=self.hydra_context, task_function=self.task_function, config=config,
            job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip
        if ended.status != JobStatus.COMPLETED:
            raise ended._return_value
        if "torch" in sys.modules:
            from mmedexpert.runtime.ranks import shutdown

            shutdown()

    def checkpoint(self, *call: Any) -> Any:
        """What a job that is preempted, or out of time, is begun anew with: the same, which goes on where it stood."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *call)


class SubmititLocal(_Submitit):
    """Processes of this machine."""

    name = "hydra/launcher=submitit_local"

    def executor(self, folder: Path) -> Any:
        """One node, whose tasks submitit starts; each job is told its GPUs by `devices`."""
        submitit = _imported(self.name)
        if self.config.trainer.num_nodes != 1:
            raise UserError(f"trainer.num_nodes={self.config.trainer.num_nodes}: {self.name} has this machine alone")
        at_once, each = self.options["array_parallelism"], self.options["gpus_per_node"] or 0
        self.gpus = _gpus() if each else []
        if self.gpus and at_once * each > len(self.gpus):
            raise UserError(
                f"hydra.launcher.array_parallelism={at_once} jobs at once with {each} GPUs each: {len(self.gpus)} "
                "here; give fewer of one or the other"
            )
        executor = submitit.LocalExecutor(folder, max_num_timeout=self.options["max_num_timeout"])
        executor.update_parameters(
            timeout_min=self.options["timeout_min"], tasks_per_node=self.options["tasks_per_node"]
        )
        return executor

    def places(self, count: int) -> int:
        """`array_parallelism`: submitit itself would start all."""
        return int(self.options["array_parallelism"])

    def devices(self, slot: int) -> str | None:
        """Its share of the GPUs that this command sees; of a machine without any, none."""
        each = self.options["gpus_per_node"] or 0
        return ",".join(self.gpus[slot * each : (slot + 1) * each])


class SubmititSlurm(_Submitit):
    """Jobs of SLURM."""

    name = "hydra/launcher=submitit_slurm"
    lag_seconds = 60  # ours: a network file system may show a node's file so late

    def executor(self, folder: Path) -> Any:
        """Its options are sbatch's, by submitit's names."""
        submitit = _imported(self.name)
        if shutil.which("srun") is None:
            raise UserError(f"{self.name}: no srun here; call it on a machine of the cluster that may submit jobs")
        shared = ("timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
        options = dict(self.options)
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=options.pop("max_num_timeout"))
        executor.update_parameters(
            name="mmedexpert",
            **{key if key in shared else f"slurm_{key}": value for key, value in options.items() if value is not None},
        )
        return executor


def as_torchrun(task: Any) -> None:
    """Tell this process, one of the tasks that submitit or srun has started, who it is, as torchrun does.

    So Lightning and `stages.common.launch` start no others, which would be submitit's script again.
    """
    here = task.num_tasks // task.num_nodes
    os.environ |= {
        "TORCHELASTIC_RUN_ID": task.job_id, "RANK": str(task.global_rank), "LOCAL_RANK": str(task.local_rank),
        "GROUP_RANK": str(task.node), "WORLD_SIZE": str(task.num_tasks), "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20_000 + sum(int(part) for part in re.findall(r"\d+", task.job_id)) % 20_000),
    }  # fmt: skip


def _imported(name: str) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"{name} needs submitit: pip install -r requirements-cluster.txt") from error
    return submitit


def _gpus() -> list[str]:
    """The GPUs that this command may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one for one in given.split(",") if one not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
