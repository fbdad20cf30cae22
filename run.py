"""Compose -> check -> seed -> call the stage -> print the table. `python run.py --help` lists the groups."""

import gc
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach main(), which tells them in one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that leaves is reported by us

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import mmedexpert.resolvers
import mmedexpert.schema  # noqa: F401  registers the base of conf/config.yaml
from mmedexpert.errors import UserError
from mmedexpert.runtime import jobs
from mmedexpert.runtime.jobs import Job
from mmedexpert.runtime.privacy import hide_words, redacted
from mmedexpert.runtime.quiet import one_line, silence

gc.set_threshold(10_000, 20, 50)  # ours: 4,000 modules are no garbage, and looking takes a tenth of a start
TRACEBACK = any(word.lower() in ("debug.traceback=true", "debug.traceback=1") for word in sys.argv)
TYPED = list(sys.argv)  # the command, also where a launcher runs a job of it in another process
told: list[Job] = []  # jobs that this process has run, and told of; those of a sweep leave files, too
noted: set[str] = set()


def is_first_process() -> bool:
    """Of several processes rank 0 tells results and errors; of those that have not met yet, a machine's first."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            return distributed.get_rank() == 0
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["LOCAL_RANK"] == "0"


def note(line: str) -> None:
    """A dim line on stderr, once in a command."""
    if line and line not in noted and is_first_process():
        noted.add(line)
        print(f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(composed: DictConfig) -> None:
    """One job of the command; its error is printed in one line."""
    hydra_config = HydraConfig.get()
    given = list(hydra_config.overrides.task)
    ended = Job(redacted(given))  # as they are shown
    swept_by = hydra_config.sweeper.get("params")
    sweeps, folder = hydra_config.mode == RunMode.MULTIRUN, Path(hydra_config.sweep.dir)
    jobs.tidy(folder)
    if sys.argv != TYPED:  # a launcher's script: to manifests and reports the command is this job's own
        sys.argv[:] = [TYPED[0], *given]
    try:
        if not sweeps and "hydra_plugins" in hydra_config.launcher._target_:
            raise UserError("hydra/launcher is for sweeps: give -m behind run.py, too, also for a single job")
        from mmedexpert.checks import typed
        from mmedexpert.unread import READING, notes, swept_keys

        config = typed(composed, given)  # before torch is imported: a mistake is reported within a second
        swept = swept_keys(TYPED[1:], swept_by)
        config = replace(config, logger=replace(config.logger, swept=swept))  # what an arm is called by
        unread = notes(config, given, swept)
        note(f"note: stage={config.stage.name} does not read {', '.join(unread)}" if unread else "")
        if not sweeps and swept_by:
            note(f"note: this is one job of experiment {config.results.id}: -m does all its arms and seeds")
        import numpy
        import torch

        from mmedexpert.reporting import tables as report
        from mmedexpert.runtime.build import build
        from mmedexpert.stages.before import check_inputs, missing_note
        from mmedexpert.stages.common import launch

        silence(traceback=TRACEBACK)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
            seeded(config.seed)
        if config.stage.name not in READING:
            launch(config)
            config = check_inputs(config)
        elif not is_first_process():
            return
        runs = build(config.stage.run, "stage.run")(config)
        if is_first_process():
            if config.runs.explain:
                report.print_explained()
            else:
                report.print_result(runs, missing_note(config))
        ended.runs, ended.config = runs, config
    except Exception as error:
        if TRACEBACK:
            raise
        # reported and kept here, so that the other jobs of a sweep still run
        ended.error = one_line(error)
        if is_first_process():
            print(f"error: {ended.error}", file=sys.stderr)
    told.append(ended)
    if sweeps and is_first_process():
        jobs.leave(folder, hydra_config.job.num, ended)


def _conclude(done: list[Job]) -> None:
    """The table over all jobs of an experiment, where it names one."""
    asked = [
        (job.config, list(job.runs.values()))
        for job in done
        if job.config is not None and job.config.results.id is not None and not job.config.runs.explain
    ]
    if asked:
        from mmedexpert.stages.experiment import conclude

        named = zip(jobs.varied([job.overrides for job in done]), done, strict=True)
        conclude(asked[0][0], asked, [name for name, job in named if job.error is not None])


def main() -> int:
    """Run every job of the command; returns the exit code, which of several processes rank 0's alone is."""
    # a plus adds a group, and Hydra refuses it for one that stands in the defaults list
    sys.argv[1:] = [word[1:] if word.startswith("+experiment=") else word for word in sys.argv[1:]]
    TYPED[:] = sys.argv
    hide_words(sys.argv[1:])
    try:
        job()
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        if TRACEBACK:
            raise
        if is_first_process():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if is_first_process() else 0
    finally:
        if jobs.sweep:
            jobs.tidy(jobs.sweep)
    code = _end() if is_first_process() else 0
    if "torch" in sys.modules:
        from mmedexpert.runtime.ranks import shutdown

        shutdown()
    return code


def _end() -> int:
    """What the jobs have left, as tables; the exit code."""
    done = jobs.left(jobs.sweep) if jobs.sweep else told
    try:
        if len(done) > 1 or len(told) < len(done):
            from mmedexpert.reporting import tables as report

            report.print_jobs(done)
        _conclude(done)
    except Exception as error:
        if TRACEBACK:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 2 if any(job.error is not None for job in done) else 0


if __name__ == "__main__":
    sys.exit(main())
