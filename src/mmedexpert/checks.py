"""What the types cannot say: ranges, choices and cross-field rules of the config, each with its fix."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

import mmedexpert.resolvers  # noqa: F401  what conf/ may compute
from mmedexpert.arms import with_arm
from mmedexpert.checks_merge import check_merge
from mmedexpert.checks_sampler import check_sampler
from mmedexpert.curation.settings import MODELS, check_settings
from mmedexpert.errors import UserError, suggestion
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.names import JUDGES, RESERVED, trained_names
from mmedexpert.ranges import (
    ABOVE_0_OR_NULL,
    AT_MOST_1,
    CHOICES,
    ENDPOINTS,
    NOT_NEGATIVE,
    PAIR_PROTOCOLS,
    POSITIVE,
)
from mmedexpert.runtime.typos import no_such_key, options
from mmedexpert.schema import Config, RewardConfig, TrainerConfig
from mmedexpert.schema_data import EndpointConfig


def typed(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """The composed Hydra config as a checked `Config`, with home folders in place of `~`; UserError names the first key
    that is unknown, mistyped or out of range, and what to write instead.

    Specialties that `overrides` (of the command line) name one by one must all be in the data set.
    """
    try:
        # anew, because Hydra lets `+key=` add to what is typed
        merged = OmegaConf.merge(_schema(), OmegaConf.to_container(with_arm(composed)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        if isinstance(error, ConfigKeyError):
            raise UserError(no_such_key(str(key))) from error
        raise UserError(f"config key {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    given = {word.partition("=")[0].lstrip("+") for word in overrides}
    if twice := sorted(given & {str(key) for key in (config.arms or {}).get(config.arm) or {}}):
        raise UserError(f"arm={config.arm} sets {twice[0]}, and so does the command: give one of them")
    if "specialty.names" in given and "specialty.on_missing" not in given:
        config.specialty.on_missing = "error"
    expand_homes(config)
    check(config)
    return config


@cache
def _schema() -> Any:
    """The types as OmegaConf knows them, which `merge` copies: made once, as every arm of an experiment is checked."""
    return OmegaConf.structured(Config)


def expand_homes(config: Config) -> None:
    """Home folders in place of `~` wherever a path is given: no shell does it after `key=`."""
    config.paths.outputs = home(config.paths.outputs)
    for section, key in (
        (config.data, "root"), (config.model, "name_or_path"), (config.report, "against"), (config.report, "out"),
        (config.report, "published"), (config.pairs, "root"), (config.reward.judge, "run"), (config.eval.picker, "run"),
        *((benchmark, "root") for benchmark in config.benchmark.values()),
    ):  # fmt: skip
        if getattr(section, key) is not None:
            setattr(section, key, home(getattr(section, key)))
    config.report.runs = [home(path) for path in config.report.runs]
    if config.data.curate is not None:
        config.data.curate.teacher.statements = [home(path) for path in config.data.curate.teacher.statements]
    if config.eval.models is not None:
        config.eval.models = [home(name) for name in config.eval.models]


def home(path: str) -> str:
    """A path with the folder that `~` or `~user` stands for; `./~` is a folder of that name.

    UserError for a user who is not known here.
    """
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise UserError(f"{path}: no home folder of that user is known here: write the path in full")
    return full


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Ranges and cross-field rules; UserError names the key and the fix."""
    for key, known in CHOICES.items():
        if _value(config, key) not in known:
            raise UserError(f"{key}={_value(config, key)!r} is not known{suggestion(str(_value(config, key)), known)}")
    for key in POSITIVE:
        if not _value(config, key) > 0 or not math.isfinite(_value(config, key)):
            raise UserError(f"{key}={_value(config, key)} must be a finite number above 0")
    for key in NOT_NEGATIVE:
        if not _value(config, key) >= 0 or not math.isfinite(_value(config, key)):
            raise UserError(f"{key}={_value(config, key)} must be a finite number, 0 or more")
    for key in AT_MOST_1:
        if _value(config, key) > 1:
            raise UserError(f"{key}={_value(config, key)} must be at most 1")
    for key in ABOVE_0_OR_NULL:
        if (number := _value(config, key)) is not None and not number > 0:
            raise UserError(f"{key}={number} must be above 0, or null")
    if config.model.min_pixels > config.model.max_pixels:
        raise UserError(
            f"model.min_pixels={config.model.min_pixels} is above model.max_pixels={config.model.max_pixels}"
        )
    if (pixels := config.eval.max_pixels) is not None and pixels < config.model.min_pixels:
        raise UserError(f"eval.max_pixels={pixels} is below model.min_pixels={config.model.min_pixels}")
    _check_passes(config.trainer)
    gba = config.gba
    if len(gba.weights) != len(PERSPECTIVES):
        raise UserError(
            f"gba.weights has {len(gba.weights)} values; give {len(PERSPECTIVES)}, "
            f"in the order {', '.join(PERSPECTIVES)}"
        )
    for name, weight in zip(PERSPECTIVES, gba.weights, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"gba.weights: {name}={weight} must be a finite number, 0 or more")
    for name, weight in config.reward.weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"reward.weights.{name}={weight} must be a finite number, 0 or more")
    if gba.num_generations < 2:
        raise UserError(f"gba.num_generations={gba.num_generations}: a group needs at least 2 completions")
    weights = [1.0] * len(PERSPECTIVES) if gba.weights_from == "validation" else gba.weights
    active = sum(weight > 0 for weight in weights) if gba.scale or gba.grouping == "perspective" else 0
    asked = len(PERSPECTIVES) if gba.conditioning == "prompted" else active
    if active and gba.conditioning != "free" and gba.num_generations < 2 * asked:
        raise UserError(
            f"gba.num_generations={gba.num_generations} is too small for {asked} prompted perspectives, whose "
            f"completions are compared with each other: give at least {2 * asked}, or gba.conditioning=free"
        )
    if gba.weights_from == "validation" and config.eval.split == "val":
        raise UserError(
            "gba.weights_from=validation learns from the split val: measure on another one, eval.split=test"
        )
    if gba.weights_from == "validation" and gba.conditioning == "prompted_weighted":
        raise UserError(
            "gba.conditioning=prompted_weighted asks for perspectives with weight, and gba.weights_from=validation "
            "learns weights from all four: use gba.conditioning=prompted"
        )
    if gba.grouping == "perspective" and (gba.conditioning == "free" or not any(weights)):
        raise UserError(
            "gba.grouping=perspective compares the completions of each perspective: it needs weights, and a "
            "gba.conditioning that asks for perspectives (prompted, prompted_weighted)"
        )
    if gba.keep is not None and not (len(gba.keep) == 2 and 0 <= gba.keep[0] <= gba.keep[1] <= gba.keep_rollouts):
        raise UserError(f"gba.keep={gba.keep} must be two numbers in order, 0 to gba.keep_rollouts={gba.keep_rollouts}")
    if config.eval.specialties == []:
        raise UserError("eval.specialties=[] asks nothing: name specialties, or null for those of specialty")
    if gba.dynamic_sampling and _sharded(config.trainer):
        raise UserError(
            "gba.dynamic_sampling samples again on the devices whose groups need it, and under trainer.strategy=fsdp "
            "all have to sample together: use trainer.strategy=ddp, or gba.dynamic_sampling=0"
        )
    if gba.dynamic_sampling and gba.scale_rewards == "batch":
        raise UserError(
            "gba.dynamic_sampling refills single groups, and gba.scale_rewards=batch would measure these against "
            "another batch: use scale_rewards=group or none"
        )
    if gba.checkpoint_every % gba.num_iterations:
        raise UserError(
            f"gba.checkpoint_every={gba.checkpoint_every} must be a multiple of "
            f"gba.num_iterations={gba.num_iterations}: a run resumes at a rollout boundary"
        )
    if not config.specialty.names or len(set(config.specialty.names)) != len(config.specialty.names):
        raise UserError("specialty.names needs at least one name, each once")
    if config.specialty.missing:
        raise UserError("specialty.missing is found in the data set, not given: name those you want in specialty.names")
    _check_names(config)
    if config.model.name_or_path is None and config.model.architecture is None:
        raise UserError("model.name_or_path is empty: give a hub id or a folder, or use model=tiny")
    trains_judge = config.stage.name == "judge"
    own = config.stage.name == "pipeline" or not (config.benchmark or trains_judge)
    if trains_judge and config.protocol not in ("auto", *PAIR_PROTOCOLS):
        raise UserError(f"protocol={config.protocol} is of questions: stage=judge takes {', '.join(PAIR_PROTOCOLS)}")
    if config.protocol in PAIR_PROTOCOLS and own:
        raise UserError(f"protocol={config.protocol} is of pairs of answers: add stage=eval benchmark=med_rewardbench")
    for name, one in config.benchmark.items():
        wanted = PAIR_PROTOCOLS if one.pairs else ("robust", "medevalkit")
        if config.protocol not in ("auto", *wanted):
            what = "pairs of answers" if one.pairs else "questions"
            raise UserError(
                f"protocol={config.protocol}: benchmark {name} holds {what}; use {', '.join(wanted)} or auto"
            )
        if one.root is not None and not Path(one.root).is_dir():
            raise UserError(f"benchmark.{name}.root={one.root} is not a folder: give the folder of the published files")
    if config.engine.name == "openai" and not (config.engine.endpoint.base_url and config.engine.endpoint.model):
        raise UserError("engine=openai needs engine.endpoint.base_url=<...>/v1 and engine.endpoint.model=<served name>")
    if config.engine.name == "vllm" and config.eval.max_pixels is not None:
        raise UserError(
            "eval.max_pixels: the limit of servers is theirs, model.max_pixels of stage=serve; use engine=transformers"
        )
    if config.engine.name == "openai" and config.stage.name in ("pipeline", "judge"):
        raise UserError("engine=openai asks a served model and trains none: add stage=eval")
    if config.merge.method is None and config.stage.name == "caci":
        raise UserError("stage=caci merge=none has nothing to do: choose a method of conf/merge")
    check_merge(config)
    check_sampler(config)
    _check_results(config)
    for where, judge in (("eval.llm_judge", config.eval.llm_judge), ("eval.picker", config.eval.picker)):
        if (judge.base_url is None) != (judge.model is None):
            raise UserError(f"{where} needs both base_url and model, or neither")
    for where, judge in (("eval.picker", config.eval.picker), ("reward.judge", config.reward.judge)):
        if judge.run and (judge.base_url or judge.model):
            raise UserError(f"{where}: give run, a trained judge, or base_url and model, a server; not both")
    _check_best_of(config)
    _check_grader(config.reward)
    for where in ENDPOINTS:
        _check_prices(where, _value(config, where))
    if (curate := config.data.curate) is not None:
        check_settings(curate)
        for name in MODELS:
            _check_prices(f"data.curate.{name}", getattr(curate, name))
    if config.pairs.root is not None and not Path(config.pairs.root).is_dir():
        raise UserError(f"pairs.root={config.pairs.root} is not a folder: give the folder that holds pairs.jsonl")
    if trains_judge and config.judge.name == "scalar" and config.trainer.strategy == "fsdp":
        raise UserError("judge=scalar trains its head whole on each device: use trainer.strategy=ddp")
    if config.data.root is not None and not Path(config.data.root).is_dir():
        raise UserError(f"data.root={config.data.root} is not a folder: give the folder that holds the data set")


def _sharded(trainer: TrainerConfig) -> bool:
    """Whether devices may have to meet in each layer."""
    return trainer.strategy == "fsdp" and (trainer.devices != 1 or trainer.num_nodes > 1)


def _check_passes(trainer: TrainerConfig) -> None:
    """Tokens of a pass: a number, null or auto, which needs ranks that can wait for each other between passes."""
    tokens = trainer.micro_batch_tokens
    if tokens == "auto" and _sharded(trainer):
        raise UserError(
            "trainer.micro_batch_tokens=auto does not go with trainer.strategy=fsdp, whose devices meet in each layer: "
            "one out of memory would leave the others waiting; give a number (stage=plan tells the largest)"
        )
    if tokens not in (None, "auto") and (isinstance(tokens, str) or tokens < 1):
        raise UserError(f"trainer.micro_batch_tokens={tokens} must be a number above 0, auto, or null")


def _check_results(config: Config) -> None:
    """An experiment's table has a place, and the row that all are compared with is among the models asked."""
    results, asked = config.results, config.eval.models
    if asked is not None:  # of every arm
        asked = [
            *asked,
            *(name for arm in (config.arms or {}).values() for name in (arm or {}).get("eval.models") or ()),
        ]
    if results.id is not None and not re.fullmatch(r"[\w-]+", results.id):
        raise UserError(f"results.id={results.id} is to name a folder: letters, digits, - and _")
    named = {"against": [results.against] if results.against is not None else [], "models": results.models or []}
    for key, names in named.items():
        for name in names:
            if key == "against" and name in (config.arms or {}):
                continue  # each row against the same model's in this arm
            model, _, arm = name.partition(" (")
            if arm and arm.removesuffix(")") not in (config.arms or {}):
                hint = suggestion(arm.removesuffix(")"), list(config.arms or {}))
                raise UserError(f"results.{key}: {name} names no arm{hint}")
            if asked is None:
                continue
            # the reference may be another job's, in a sweep over the merges
            known = [*asked, *(options("merge") if config.merge.name in asked else [])]
            if model not in known:
                raise UserError(f"results.{key}: {model} is none of eval.models{suggestion(model, known)}")


def _check_best_of(config: Config) -> None:
    """Samples differ, and are of questions, of one prompt each."""
    count = config.eval.best_of
    if count == 1:
        return
    temperature = config.eval.temperature
    if not 0 < temperature < math.inf:
        raise UserError(
            f"eval.temperature={temperature} draws no samples that differ: give one above 0, or eval.best_of=1"
        )
    if pairs := next((name for name, one in config.benchmark.items() if one.pairs), None):
        raise UserError(
            f"eval.best_of={count} samples answers to questions, and benchmark {pairs} holds pairs of answers: leave "
            "it out, or eval.best_of=1"
        )
    if config.eval.perspectives == "vote":
        raise UserError(
            f"eval.best_of={count} samples one prompt of each question, and eval.perspectives=vote asks four: use "
            "eval.perspectives=needed, rotate, none or one perspective"
        )


def _check_prices(where: str, endpoint: EndpointConfig) -> None:
    """A price list is whole, and a budget in USD has one."""
    prices = endpoint.prices
    given = [value is not None for value in (prices.input, prices.output, prices.version)]
    if any(given) and not all(given):
        raise UserError(
            f"{where}.prices needs input and output, in USD per million tokens, and version, any name of the price list"
        )
    for name, price in (("input", prices.input), ("output", prices.output)):
        if price is not None and not (price >= 0 and math.isfinite(price)):
            raise UserError(f"{where}.prices.{name}={price} must be a finite number, 0 or more")
    if endpoint.max_cost is not None and not all(given):
        raise UserError(
            f"{where}.max_cost={endpoint.max_cost} needs {where}.prices.input, .output (USD per million tokens) and "
            f".version, or give {where}.max_requests in its place"
        )


def _check_grader(reward: RewardConfig) -> None:
    """A judge has a server; of answers it may be a trained one."""
    if reward.judge_weight and not (reward.judge.run or (reward.judge.base_url and reward.judge.model)):
        raise UserError(
            f"reward.judge_weight={reward.judge_weight} needs a judge: reward.judge.run={JUDGES[-1]} or a folder that "
            "stage=judge made, or reward.judge.base_url=<...>/v1 and reward.judge.model=<served name>"
        )
    if reward.judge.run and reward.grader != "rules":
        raise UserError(
            f"reward.grader={reward.grader} needs a served model (reward.judge.base_url and model): the judge "
            f"{reward.judge.run} was trained to compare answers, not to grade criteria"
        )
    if reward.grader != "rules" and not (reward.judge.base_url and reward.judge.model):
        raise UserError(
            f"reward.grader={reward.grader} needs reward.judge.base_url=<...>/v1 and reward.judge.model=<served name>"
        )


def _check_names(config: Config) -> None:
    """No two models share a row of a table or a folder, nor two benchmarks; names are parts of folder names."""
    benchmarks = [one.name for one in config.benchmark.values()]
    for name in (*trained_names(config), *benchmarks, config.model.name, config.data.name, config.gba.name):
        if not name or "/" in name:
            raise UserError(f"the name {name!r} cannot be part of a folder's name: give one without /")
    rows = Counter([*trained_names(config), *RESERVED])
    for name, count in [*rows.items(), *Counter(benchmarks).items()]:
        if count > 1:
            raise UserError(
                f"{name!r} would name two things in one table: give specialty.names, merge.name and every benchmark's "
                f"name once, and none of {', '.join(RESERVED)}"
            )
