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
from mmedexpert.runtime.privacy import hide_words, redacted
from mmedexpert.runtime.quiet import one_line, silence

gc.set_threshold(10_000, 20, 50)  # ours: 4,000 modules are no garbage, and looking takes a tenth of a start
TRACEBACK = any(word.lower() in ("debug.traceback=true", "debug.traceback=1") for word in sys.argv)
finished: list = []  # (overrides, runs) of each job of this command
experiments: list = []  # the config of each finished job
failed: list[list[str]] = []
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
    given = list(HydraConfig.get().overrides.task)
    overrides = redacted(given)  # as they are shown
    # Hydra's own note of a sweep: every option as it was typed, passwords too
    Path(HydraConfig.get().sweep.dir, "multirun.yaml").unlink(missing_ok=True)
    try:
        from mmedexpert.checks import typed
        from mmedexpert.unread import READING, notes, swept_keys

        config = typed(composed, given)  # before torch is imported: a mistake is reported within a second
        swept = swept_keys(sys.argv[1:], HydraConfig.get().sweeper.get("params"))
        config = replace(config, logger=replace(config.logger, swept=swept))  # what an arm is called by
        unread = notes(config, given, swept)
        note(f"note: stage={config.stage.name} does not read {', '.join(unread)}" if unread else "")
        if HydraConfig.get().mode == RunMode.RUN and HydraConfig.get().sweeper.get("params"):
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
        finished.append((overrides, runs))
        experiments.append(config)
    except Exception as error:
        if TRACEBACK:
            raise
        # reported and kept here, so that the other jobs of a sweep still run
        failed.append(overrides)
        if is_first_process():
            print(f"error: {one_line(error)}", file=sys.stderr)


def _conclude() -> None:
    """The table over all jobs of an experiment, where it names one."""
    jobs = [(config, list(runs.values())) for config, (_, runs) in zip(experiments, finished, strict=True)]
    asked = [job for job in jobs if job[0].results.id is not None and not job[0].runs.explain]
    if asked and is_first_process():
        from mmedexpert.reporting.tables import varied
        from mmedexpert.stages.experiment import conclude

        names = varied([*(overrides for overrides, _ in finished), *failed])[len(finished) :]
        conclude(asked[0][0], asked, names)


def main() -> int:
    """Run every job of the command; returns the exit code, which of several processes rank 0's alone is."""
    # a plus adds a group, and Hydra refuses it for one that stands in the defaults list
    sys.argv[1:] = [word[1:] if word.startswith("+experiment=") else word for word in sys.argv[1:]]
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
    code = 2 if failed and is_first_process() else 0
    if len(finished) + len(failed) > 1 and is_first_process():
        from mmedexpert.reporting import tables as report

        report.print_jobs(finished, failed)
    try:
        _conclude()
    except Exception as error:
        if TRACEBACK:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    if finished or failed:
        from mmedexpert.runtime.ranks import shutdown

        shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
