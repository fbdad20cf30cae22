"""Who is asked in `stage=eval`: models of the pipeline, references by name, folders, a served model, baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmedexpert.engines.asking import Engine
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.errors import UserError
from mmedexpert.models.adapters import LoraAdapter, check_compatible
from mmedexpert.models.backbone import load_encoder, load_model, streamline
from mmedexpert.models.checkpoint import fingerprint_model
from mmedexpert.names import (
    BASELINES,
    BLANK_IMAGE,
    CONTROL,
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
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config
from mmedexpert.stages import caci, dsa, gba
from mmedexpert.stages.common import Base, loading, model_key
from mmedexpert.stages.pretrain import base_of


@dataclass(frozen=True)
class Subject:
    """What is asked: a model folder with or without an adapter, a served model, or a baseline of `names.BASELINES`."""

    name: str
    identity: str
    folder: Path | None = None
    adapter: Path | None = None
    baseline: str | None = None
    made_by: Run | None = None  # the run that made it; none of a base or a folder

    @property
    def served(self) -> bool:
        """Whether a server answers, whose model may change behind its name."""
        return self.folder is None and self.baseline is None


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
    found = [_from_folder(Path(folder), base) for folder in folders]
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
        known |= {name: Subject(name, r.run_id, r.folder / "model", made_by=r) for name, r in caci.run(config).items()}
    for name in wanted or []:
        if steps := config.dsa.steps if name == MULTI_TASK else multi_task_steps(name):
            trained = replace(config, dsa=replace(config.dsa, steps=steps))
            known[name] = _adapted(name, dsa.expert(trained, "all", config.specialty.names), base)
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
    return set(known_names(config)) - {"base", *BASELINES}


def _start(config: Config) -> dict[str, Run]:
    start = gba.start(config)
    return {START: start} if start else {}


def _adapted(name: str, run: Run, base: Base) -> Subject:
    return Subject(name, run.run_id, base.folder, run.folder / "adapter", made_by=run)


def _served(config: Config) -> Subject:
    """A model at an address: another server under the same served name is another model."""
    endpoint = config.engine.endpoint
    assert endpoint.model is not None and endpoint.base_url is not None  # checks.check
    address = without_password(endpoint.base_url).rstrip("/")
    return Subject(Path(endpoint.model).name, f"served:{endpoint.model}@{address}#{endpoint.revision or ''}")


def _from_folder(folder: Path, base: Base) -> Subject:
    """A merged or adapter run, a PEFT folder or a model folder."""
    inner = next((folder / part for part in ("model", "adapter") if (folder / part).is_dir()), folder)
    name = folder.name if inner == folder else folder.name.rpartition("-")[0]
    if not (inner / "adapter_config.json").is_file():
        return Subject(name, fingerprint_model(inner), inner)
    adapter = LoraAdapter.load(inner)
    check_compatible([adapter], base.folder)
    return Subject(name, f"{adapter.fingerprint}@{base.identity}", base.folder, inner)


def answering_key(config: Config, subject: Subject, system_prompt: str | None) -> dict[str, Any]:
    """What decides a model's answers beside its weights and what it is asked, for a run's key."""
    told: dict[str, Any] = {"system_prompt": system_prompt, "max_new_tokens": config.model.max_new_tokens}
    if subject.served:
        return {"model": told}
    return {"model": {**model_key(config), **told}, "rules": versions("prompts", "sampling", "images")}


def engine_of(
    config: Config, subject: Subject, system_prompt: str | None, *, temperature: float = 0.0, top_p: float = 1.0
) -> Engine:
    """What answers for a subject: its server, or the model loaded here; greedily, or above temperature 0 by `seed`."""
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": config.seed} if temperature else {}
    if subject.served:
        from mmedexpert.engines.openai import engine_of as server  # its library takes two seconds to import

        return server(
            config.engine.endpoint, "engine.endpoint", system_prompt=system_prompt or "",
            max_new_tokens=config.model.max_new_tokens, **drawn,
        )  # fmt: skip
    assert subject.folder is not None
    encoder, model = load_encoder(subject.folder, loading(config)), load_model(subject.folder, loading(config))
    encoder.system_prompt = system_prompt
    answering = PeftModel.from_pretrained(model, subject.adapter) if subject.adapter else model
    streamline(answering)
    return TransformersEngine(
        answering.requires_grad_(False), encoder, batch_size=config.engine.batch_size,
        max_new_tokens=config.model.max_new_tokens, **drawn,
    )  # fmt: skip


def tell_kept(subject: Subject, run: Run) -> None:
    """A line where a served model's answers are those of an earlier command."""
    if run.reused and subject.served:
        console.print(
            f"[yellow]{subject.name}: the server was not asked, its answers are kept from {run.manifest['finished']}; "
            "if it has another model by now, engine.endpoint.revision=<any new name> asks again[/yellow]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
