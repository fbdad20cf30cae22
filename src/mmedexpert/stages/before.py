"""What a later stage would stop at, looked for before the first step is trained."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmedexpert import checks
from mmedexpert.curation.settings import MODELS
from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.data.record import Record
from mmedexpert.data.records import load_records
from mmedexpert.errors import UserError, suggestion
from mmedexpert.merging.rule import declared
from mmedexpert.merging.search import grid_points
from mmedexpert.merging.stream import call_method
from mmedexpert.models.adapters import CONFIG
from mmedexpert.models.checkpoint import weight_files
from mmedexpert.models.dense import FILE as DENSE
from mmedexpert.models.reward_head import RewardHead
from mmedexpert.names import JUDGES, known_names, reasoner_names
from mmedexpert.runtime.build import build, check
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, console
from mmedexpert.schema import Config
from mmedexpert.schema_data import EndpointConfig
from mmedexpert.stages import benchmark, measured, train_judge
from mmedexpert.stages.answering import JUDGE, PARTS, judge_in
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import found
from mmedexpert.stages.reasoner_key import learns_weights
from mmedexpert.training import rewards
from mmedexpert.unread import parts


def check_inputs(config: Config) -> Config:
    """Builds the data set, reads every benchmark, tries the merge rule, looks for models and keys; the config with the
    specialties that the data set has.

    Raises:
        UserError: what of these would stop the command later.
    """
    work = parts(config)
    for where, call, given in _calls(config, work):
        check(call, where, given)
    if "gba" in work:
        rewards.outcome([], record=[], weights=config.reward.weights)  # are they rewards?
    if "caci" in work:
        _try_merge(config)
    _check_keys(config, work)
    if "eval" in work:
        _check_models(config)
    if "data" in work:
        data = dataset(config)
        if work & {"dsa", "gba", "caci", "own"}:
            config = _with_data(config, data, work)
    if "benchmark" in work:
        for one in config.benchmark.values():
            benchmark.prepared(config, one)
    if "judge" in work:
        for part in ("train", *(["val"] if config.stage.name == "judge" else [])):
            train_judge.pairs_of(config, part)
    if "gba" in work and config.reward.judge_weight and config.reward.judge.run:
        _check_judge("reward.judge.run", config.reward.judge.run)
    if "eval" in work and config.eval.best_of > 1 and config.eval.picker.run:
        _check_judge("eval.picker.run", config.eval.picker.run)
    if "base" in work and "pretrain" not in work:
        base = found(config.model)
        if "caci" in work:
            _check_space(config, base)
    return config


def missing_note(config: Config) -> str:
    """Which specialties were left out; empty where none was."""
    missing = ", ".join(config.specialty.missing)
    return f"Left out, with too few records in data {config.data.name}: {missing}." if missing else ""


def _calls(config: Config, work: set[str]) -> Iterator[tuple[str, Mapping[str, Any], tuple[str, ...]]]:
    """What the config has built: its key, the `_target_` and its values, and what the program gives beside them."""
    if "data" in work and not config.data.sources:
        yield "data.source", config.data.source, ("root", "out_dir", "seed")
    if "data" in work:
        for kind, told in (("sources", config.data.sources), ("benchmarks", config.data.benchmarks)):
            for name, call in told.items():
                if "_target_" in call:  # else stages/sources.py says what it needs
                    yield f"data.{kind}.{name}", call, ("root", "out_dir", "seed")
    if "judge" in work:
        for part in ("train", "val"):
            yield f"pairs.{part}", {**config.pairs.load, **getattr(config.pairs, part)}, ("root", "out_dir")
    if "caci" in work:
        yield "merge.method", config.merge.method or {}, ()
    if "benchmark" in work:
        for name, one in config.benchmark.items():
            yield f"benchmark.{name}.load", one.load, ("root", "out_dir")
            called = {"ask": one.ask, "judge": one.judge}
            for part, call in called.items():
                if call or not one.pairs:  # pairs are asked by the protocol, and their judge is optional
                    yield f"benchmark.{name}.{part}", {**call, "_partial_": True}, ()


def _try_merge(config: Config) -> None:
    """The rule on one entry, with the values of `merge.method` and of every point of `merge.search`."""
    rule = build(config.merge.method or {}, "merge.method")
    if "grams" in declared(rule).measures and config.merge.grams is None:
        raise UserError(
            f"merge={config.merge.name} needs Gram matrices of the experts' inputs: merge.grams=full or span"
        )
    first = config.gba.init == "caci"  # the experts alone are merged, before RL
    if first and not declared(rule).low_rank:
        raise UserError(
            f"gba.init=caci starts from an adapter, and merge={config.merge.name} gives none: use a rule on LoRA "
            "factors (regmean, core_space, knots, wudi)"
        )
    one = torch.ones(1, 1)
    given = (one, one) if declared(rule).low_rank else one
    names = config.specialty.names, [] if first else reasoner_names(config)
    experts, reasoners = ([given] * len(role) for role in names)
    for point in grid_points(config.merge.search or {}) or [{}]:
        call_method(functools.partial(rule, **point), list(experts), list(reasoners), "the settings")


def _check_keys(config: Config, work: set[str]) -> None:
    """Addresses and keys of the servers that this command asks."""
    graded = config.reward.grader != "rules"
    asked: dict[str, tuple[EndpointConfig, bool]] = {
        "engine.endpoint": (config.engine.endpoint, "eval" in work and config.engine.name == "openai"),
        "eval.llm_judge": (config.eval.llm_judge, "eval" in work),
        "eval.picker": (config.eval.picker, "eval" in work and config.eval.best_of > 1),
        "reward.judge": (config.reward.judge, "gba" in work and (graded or config.reward.judge_weight > 0)),
    }
    if "data" in work and config.data.curate is not None:
        for name in MODELS:
            asked[f"data.curate.{name}"] = getattr(config.data.curate, name), True
    for where, (endpoint, needed) in asked.items():
        if not needed or endpoint.base_url is None:
            continue
        if not endpoint.base_url.startswith(("http://", "https://")):
            shown = endpoint.base_url.rpartition("@")[2]  # before it stands a user and password
            raise UserError(f"{where}.base_url={shown} is no web address: write http://localhost:8000/v1")
        _check_key(where, endpoint.api_key_env)
    if "eval" in work and config.engine.name == "vllm":
        _check_key("engine.endpoint", config.engine.endpoint.api_key_env)
    if "gba" in work and config.sampler.name == "vllm":
        _check_key("sampler", config.sampler.api_key_env)


def _check_key(where: str, variable: str | None) -> None:
    if variable is not None and not os.environ.get(variable):
        raise UserError(
            f"the environment variable {variable} ({where}.api_key_env) is empty: export it, or set "
            f"{where}.api_key_env=null"
        )


def _check_models(config: Config) -> None:
    """`eval.models`: names of this pipeline, or folders with a model or an adapter."""
    known = known_names(config)
    questions = not config.benchmark or not all(one.pairs for one in config.benchmark.values())
    if questions and (judge := next((name for name in config.eval.models or [] if name in JUDGES), None)):
        raise UserError(f"eval.models: {judge} judges pairs of answers: ask it alone, benchmark=phantom_pairs")
    for name in config.eval.models or []:
        if name in known:
            continue
        if not Path(name).is_dir():
            raise UserError(
                f"eval.models: {name!r} is neither a folder nor a model of this pipeline{suggestion(name, known)}"
            )
        places = [Path(name), *(Path(name) / part for part in PARTS)]
        if not any((place / file).is_file() for place in places for file in ("config.json", CONFIG, DENSE)):
            raise UserError(
                f"eval.models: {name} holds neither a model (config.json) nor an adapter (adapter_config.json)"
            )


def _check_judge(where: str, run: str) -> None:
    """A judge by name, or the folder of a trained one."""
    if run in JUDGES:
        return
    if not Path(run).is_dir():
        raise UserError(f"{where}={run} is neither a folder nor a judge that is trained here{suggestion(run, JUDGES)}")
    place = next((place for place in (Path(run), Path(run) / "adapter") if (place / JUDGE).is_file()), None)
    if place is None:
        raise UserError(f"{where}={run} holds no {JUDGE}: give a folder that stage=judge made")
    if (judge_in(place) or {})["kind"] == "scalar":
        RewardHead.load(place, DIMENSIONS)


def _with_data(config: Config, data: Run, work: set[str]) -> Config:
    """The config with the specialties that have records to train on and to be asked.

    `specialty.on_missing=skip` leaves the others out, of every stage alike, and tells them; error refuses them where
    this command would stop at them.
    """
    records, _ = load_records(data.folder)
    names, asked = config.specialty.names, config.eval.split
    for name in (config.eval.specialties or []) if "own" in work else []:
        if _lacking(records, name, [asked]):
            known = sorted({other for record in records if record.split == asked for other in record.specialties})
            raise UserError(
                f"eval.specialties: {name!r} has no {asked} record in data {data.name}{suggestion(name, known)}"
            )
    searched = ["val"] if config.merge.search is not None else []
    learned = [measured.SPLIT] if learns_weights(config) else []
    lacks = {name: _lacking(records, name, ["train", asked, *searched, *learned]) for name in names}
    if config.specialty.on_missing == "error":
        needed = ["train"] * bool(work & {"dsa", "gba", "own"}) + [asked] * ("own" in work)
        needed += searched if "search" in work else []
        needed += learned if "gba" in work and config.stage.name != "serve" else []
        for name in names:
            if splits := [split for split in lacks[name] if split in needed]:
                known = sorted({other for record in records for other in record.specialties} - {name})
                raise UserError(
                    f"specialty {name!r} has no {splits[0]} record in data {data.name}"
                    f"{suggestion(name, known)} (data set folder {data.folder})"
                )
        kept, missing = names, []
    else:
        kept, missing = [n for n in names if not lacks[n]], [n for n in names if lacks[n]]
        if not kept:
            known = sorted({name for record in records for name in record.specialties})
            parts_needed = " and ".join(dict.fromkeys(["train", asked, *searched, *learned]))
            raise UserError(
                f"data {data.name} has {parts_needed} records of none of the specialties "
                f"{', '.join(names)}, but records of {', '.join(known)}: give specialty.names (data set folder "
                f"{data.folder})"
            )
    if not missing:
        return config
    if rank() == 0:
        told = ", ".join(f"{name} (no {' and no '.join(lacks[name])} record)" for name in missing)
        line = f"[yellow]data {data.name}: left out {told}; going on with {', '.join(kept)}[/yellow]"
        console.print(line, highlight=False, soft_wrap=True)
    found = replace(config, specialty=replace(config.specialty, names=kept, on_missing="error"))
    checks.check(found)  # lists with one value per specialty
    found.specialty.missing = missing
    return found


def _lacking(records: list[Record], name: str, splits: list[str]) -> list[str]:
    """The splits without a record of a specialty."""
    there = {record.split for record in records if name in record.specialties}
    return [split for split in dict.fromkeys(splits) if split not in there]


def _check_space(config: Config, base: Path) -> None:
    """A warning, because a merge that is finished already needs no space."""
    outputs = Path(config.paths.outputs)
    outputs.mkdir(parents=True, exist_ok=True)
    rule = declared(build(config.merge.method or {}, "merge.method")) if config.merge.method else None
    rows = config.merge.exact and rule is not None and not rule.keeps_adapters  # else an adapter, a tenth
    copies = (2 if rows else 1) * (2 if config.merge.distil_steps else 1)
    needed = copies * sum(file.stat().st_size for file in weight_files(base))
    free = shutil.disk_usage(outputs).free
    if free < needed and rank() == 0:
        console.print(
            f"[yellow]the merged model takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {outputs}: "
            "free space or set paths.outputs=<folder>[/yellow]"
        )
