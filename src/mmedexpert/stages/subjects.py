"""Who is asked in `stage=eval`: models of the pipeline, references by name, folders, a served model, baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmedexpert.errors import UserError
from mmedexpert.names import (
    BASELINES,
    BLANK_IMAGE,
    CONTROL,
    JUDGES,
    MAJORITY,
    MULTI_TASK,
    START,
    SWAPPED_IMAGE,
    distinct_names,
    known_names,
    multi_task_steps,
    reasoner_names,
    start_names,
)
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import caci, dsa, gba, train_judge
from mmedexpert.stages.answering import Subject, from_folder, judge_subject
from mmedexpert.stages.common import Base
from mmedexpert.stages.pretrain import base_of


def subjects_of(config: Config) -> list[Subject]:
    """The models to ask, by name or folder; those of the pipeline are trained first where they are not there yet."""
    if config.engine.name == "openai":
        return [_served(config)]
    wanted = config.eval.models
    if wanted is None and config.benchmark:
        wanted = ["base"]
    if config.benchmark and MAJORITY in (wanted or []):
        raise UserError("eval.models: majority is a column of every benchmark table; leave it out")
    names = known_names(config)
    folders = [name for name in wanted or [] if name not in names]  # `before.py` has seen that they are
    if wanted is None or set(wanted) & _needing_experts(config):
        dsa.ready(config, config.specialty.names)  # before a base is downloaded or taught
    base = base_of(config)
    known: dict[str, Subject] = {"base": Subject("base", base.identity, base.folder)}
    found = [from_folder(Path(folder), base) for folder in folders]
    taken = {"base", *BASELINES, *(name for name in wanted or [] if name in names)}
    for folder, subject, name in zip(
        folders, found, distinct_names([s.name for s in found], folders, taken), strict=True
    ):
        known[folder] = replace(subject, name=name)
    makers: list[tuple[list[str], Callable[[], dict[str, Run]]]] = [
        (config.specialty.names, lambda: dsa.run(config)),
        (start_names(config), lambda: _start(config)),
        (reasoner_names(config), lambda: gba.run(config)),
    ]
    for group, make in makers:
        if wanted is None or set(wanted) & set(group):
            known |= {name: _adapted(name, r, base) for name, r in make().items()}
    if wanted is None or config.merge.name in wanted:
        known |= {name: _merged(config, name, r, base) for name, r in caci.run(config).items()}
    for name in wanted or []:
        if steps := config.dsa.steps if name == MULTI_TASK else multi_task_steps(name):
            longer = replace(config, dsa=replace(config.dsa, steps=steps))
            known[name] = _adapted(name, dsa.expert(longer, "all", config.specialty.names), base)
    for name in [name for name in wanted or [] if name in JUDGES]:
        kind = replace(config.judge, name=name.removeprefix("judge_"))
        known[name] = judge_subject(config, train_judge.trained(replace(config, judge=kind)), base)
    if CONTROL in (wanted or []):
        known[CONTROL] = _adapted(CONTROL, gba.control(config), base)
    subjects = [known[name] for name in wanted or known if name not in BASELINES]
    last = (subjects or [known["base"]])[-1]
    if wanted is None or MAJORITY in wanted:
        subjects.append(Subject(MAJORITY, MAJORITY, baseline=MAJORITY))
    for name in (BLANK_IMAGE, SWAPPED_IMAGE):
        if name in (wanted if wanted is not None else (BLANK_IMAGE,)):
            subjects.append(replace(last, name=name, baseline=name))
    return subjects


def _needing_experts(config: Config) -> set[str]:
    """The names of the models for which experts are trained."""
    if config.gba.init == "base":
        longer = [name for name in config.eval.models or [] if multi_task_steps(name)]
        return {*config.specialty.names, config.merge.name, MULTI_TASK, *longer}
    return set(known_names(config)) - {"base", *JUDGES, *BASELINES}


def _start(config: Config) -> dict[str, Run]:
    start = gba.start(config)
    return {START: start} if start else {}


def _adapted(name: str, run: Run, base: Base) -> Subject:
    return Subject(name, run.run_id, base.folder, run.folder / "adapter", made_by=run)


def _merged(config: Config, name: str, run: Run, base: Base) -> Subject:
    if config.merge.exact:
        return Subject(name, run.run_id, base.folder, run.folder / "exact", made_by=run)
    return Subject(name, run.run_id, run.folder / "model", made_by=run)


def _served(config: Config) -> Subject:
    """A model at an address: another server under the same served name is another model."""
    endpoint = config.engine.endpoint
    assert endpoint.model is not None and endpoint.base_url is not None  # checks.check
    address = without_password(endpoint.base_url).rstrip("/")
    return Subject(Path(endpoint.model).name, f"served:{endpoint.model}@{address}#{endpoint.revision or ''}")
