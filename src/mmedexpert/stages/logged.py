"""What people are told of a stage's run: its curves while it works, its end, its inputs; of a reused run the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedexpert.reporting.artifacts import log_lineage
from mmedexpert.reporting.finals import finals, lead, set_of
from mmedexpert.reporting.shown import shown
from mmedexpert.reporting.tables import model_rows
from mmedexpert.reporting.tracking import id_of, keep, kept, log_table, logger_for, no_stop
from mmedexpert.runtime.identity import folder_of, read
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config

# the stages that are logged, and which sections of the config they read beside those that their inputs did
READS: dict[str, tuple[str, ...]] = {
    "pretrain": ("model", "pretrain", "trainer"),
    "dsa": ("model", "data", "specialty", "dsa", "trainer"),
    "start": (),
    "gba": ("model", "data", "specialty", "gba", "reward", "trainer"),
    "caci": ("model", "merge"),
    "distil": ("model", "data", "specialty", "dsa", "merge", "trainer"),
    "eval": ("model", "data", "eval", "engine", "protocol"),
    "pipeline": ("model", "data", "specialty", "eval", "engine", "protocol", "benchmark"),
}
# a line of a reasoner's curve.jsonl under the names that its training logs
CURVE = {
    "reward": "reward", "accuracy": "rewards/accuracy/mean", "adherence": "adherence", "share": "advantages/share",
}  # fmt: skip


@contextmanager
def stage_logger(config: Config, run: Run, *, tags: tuple[str, ...] = ()) -> Iterator[Any]:
    """The logger of a stage's run, on rank 0; None for a stage that has nothing to log."""
    if rank() > 0 or run.stage not in READS:
        yield None
        return
    with logger_for(run, config.logger, shown(config, run, *_read_by(run), tags)) as logger:
        yield logger


def tell_end(config: Config, run: Run, metrics: Mapping[str, float], sources: Mapping[str, Run]) -> None:
    """A run's final numbers, and what it was made from; `sources` are runs that it knows by their content alone."""
    if run.logger is None:
        return
    numbers = finals(run, metrics, _inputs(run), config.eval.split)
    if config.logger.name != "wandb":
        run.logger.finish(numbers)
    else:
        _finish(run, run.logger, numbers)
        used = _stages_of(run, {**_inputs(run), **{name: r.run_id for name, r in sources.items()}})
        told = {"run_id": run.run_id, "stage": run.stage, "name": run.name, "seed": config.seed}
        with no_stop("W&B"):
            log_lineage(run.logger.experiment, run.stage, run.run_id, used, told)


def tell_reused(config: Config, run: Run, sources: Mapping[str, Run]) -> None:
    """A run that is reused where W&B has never seen it (another experiment, or none was logged) is told from its
    folder: the end, tables, and of a reasoner the curve."""
    if config.logger.name != "wandb" or run.stage not in READS or rank() > 0:
        return
    if not run.done or id_of(run, config.logger):
        return
    with no_stop("W&B"), stage_logger(config, run, tags=("reused",)) as run.logger:
        if run.logger is None:
            return
        run.logger.live = False
        for line in read_lines(run.folder / "curve.jsonl", ("rollout",)):
            numbers = {name: line[key] for key, name in CURVE.items() if key in line}
            run.logger.log_metrics(numbers, step=line["rollout"] * config.gba.num_iterations)
        for name, rows in _tables(run):
            log_table(run.logger, name, rows, images=config.logger.log_images)
        tell_end(config, run, run.metrics, sources)


def tell_evaluated(config: Config, model: Run, evaluation: Run) -> None:
    """An evaluation's main numbers also in the summary of the model's own run, whose curves were logged before."""
    if config.logger.name != "wandb" or rank() > 0 or not evaluation.done or config.runs.explain:
        return
    with no_stop("W&B"):
        known, numbers = id_of(model, config.logger), lead(evaluation, config.eval.split)
        place = f"{known}: {set_of(evaluation, config.eval.split)}"
        if known is None or kept(model, "told").get(place) == numbers:
            return
        with stage_logger(config, model) as logger:
            if logger is not None:
                _finish(model, logger, numbers)
                keep(model, "told", place, numbers)


def _finish(run: Run, logger: Any, numbers: Mapping[str, float]) -> None:
    """The summary, with what an earlier try or an evaluation told: `wandb sync` of a run's second file puts that file's
    in the place of the first's. What a curve came to in another experiment it came to here."""
    identity, told = logger.experiment.id, kept(run, "summary")
    other = {k: v for k, v in next(iter(told.values()), {}).items() if isinstance(v, int | float)}
    logger.finish({**told.get(identity, other), **numbers})
    with no_stop("W&B"):
        keep(run, "summary", identity, logger.summary())


def _tables(run: Run) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The tables that a finished run logged, from its folder; of several of completions the last."""
    for path in sorted(run.folder.glob("completions-*.jsonl"))[-1:]:
        yield "completions", read_lines(path, ("step",))
    if (path := run.folder / "conflicts.json").is_file():
        yield "conflicts", json.loads(path.read_text(encoding="utf-8"))["rows"]
    if run.stage == "pipeline":
        yield "models", [dict(row) for row in model_rows(run.summary)]


def _inputs(run: Run) -> dict[str, str]:
    """What a run was made from, by its own note of it."""
    found: dict[str, str] = (read(run.folder) or {}).get("inputs", {})
    return found


def _stages_of(run: Run, inputs: Mapping[str, str]) -> dict[str, str]:
    """Of those inputs that are runs beside this one, run_id -> stage."""
    outputs = run.folder.parents[1]
    folders = [folder_of(outputs, run_id) for run_id in dict.fromkeys(inputs.values())]
    return {folder.name.rpartition("-")[2]: folder.parent.name for folder in folders if folder is not None}


def _read_by(run: Run) -> tuple[set[str], dict[str, str]]:
    """The sections of the config that a run and all before it read, and its inputs."""
    sections: set[str] = set()
    waiting, seen = [run.folder], set[Path]()
    while waiting:
        folder = waiting.pop()
        seen.add(folder)
        sections |= set(READS.get(folder.parent.name, ()))
        inputs = (read(folder) or {}).get("inputs", {})
        found = [folder_of(folder.parents[1], run_id) for run_id in set(inputs.values())]
        waiting += [one for one in found if one is not None and one not in seen]
    return sections, _inputs(run)
