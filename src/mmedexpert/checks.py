"""What the types cannot say: ranges, choices and cross-field rules of the config, each with its fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmedexpert.errors import UserError, suggestion
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.schema import Config

CHOICES: dict[str, tuple[str, ...]] = {
    "gba.gate": ("none", "correct"),
    "gba.conditioning": ("prompted", "prompted_weighted", "free"),
    "gba.init": ("merged_experts", "base", "sft_all", "each"),
    "gba.scale_rewards": ("group", "batch", "none"),
    "gba.loss_type": ("grpo", "dr_grpo", "dapo", "gspo"),
    "reward.protocol": ("robust", "medevalkit"),
    "eval.protocol": ("auto", "robust", "medevalkit"),
    "engine.name": ("transformers", "openai"),
    "eval.split": ("val", "test"),
    "eval.perspectives": ("rotate", "vote", "none", *PERSPECTIVES),
    "data.on_bad_record": ("error", "skip"),
    "logger.name": ("wandb", "csv", "none"),
    "trainer.strategy": ("ddp", "fsdp"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
}
POSITIVE = (
    "model.min_pixels", "model.max_pixels", "model.max_new_tokens", "model.lora.r", "model.lora.alpha", "dsa.steps",
    "dsa.batch_size", "dsa.lr", "dsa.checkpoint_every", "gba.steps",
    "gba.prompts_per_step", "gba.num_iterations", "gba.temperature", "gba.top_p", "gba.epsilon", "gba.lr",
    "gba.checkpoint_every", "engine.batch_size", "eval.num_resamples", "trainer.num_nodes", "pretrain.images",
    "pretrain.batch_size", "pretrain.text_batch_size", "pretrain.looking_steps", "pretrain.lr", "pretrain.muon_lr",
    "pretrain.checkpoint_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "gba.scale", "gba.beta", "gba.top_k", "gba.dynamic_sampling", "dsa.weight_decay", "gba.weight_decay",
    "reward.accuracy", "reward.format", "seed", "data.seed", "pretrain.reading_steps", "logger.log_completions_every",
)  # fmt: skip


def typed(composed: DictConfig) -> Config:
    """The composed Hydra config as a checked `Config`; UserError names the first key that is unknown, mistyped or
    out of range, and what to write instead."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        raise UserError(f"config key {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check(config)
    return config


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
    gba = config.gba
    if len(gba.weights) != len(PERSPECTIVES):
        raise UserError(
            f"gba.weights has {len(gba.weights)} values; give {len(PERSPECTIVES)}, "
            f"in the order {', '.join(PERSPECTIVES)}"
        )
    for name, weight in zip(PERSPECTIVES, gba.weights, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"gba.weights: {name}={weight} must be a finite number, 0 or more")
    if gba.num_generations < 2:
        raise UserError(f"gba.num_generations={gba.num_generations}: a group needs at least 2 completions")
    active = sum(weight > 0 for weight in gba.weights) if gba.scale else 0
    asked = len(PERSPECTIVES) if gba.conditioning == "prompted" else active
    if active and gba.conditioning != "free" and gba.num_generations < 2 * asked:
        raise UserError(
            f"gba.num_generations={gba.num_generations} is too small for {asked} prompted perspectives, whose "
            f"completions are compared with each other: give at least {2 * asked}, or gba.conditioning=free"
        )
    if config.trainer.micro_batch_tokens is not None and config.trainer.micro_batch_tokens < 1:
        raise UserError(f"trainer.micro_batch_tokens={config.trainer.micro_batch_tokens} must be above 0, or null")
    if gba.dynamic_sampling and gba.scale_rewards == "batch":
        raise UserError(
            "gba.dynamic_sampling refills single groups, and gba.scale_rewards=batch would measure these against "
            "another batch: use scale_rewards=group or none"
        )
    if gba.top_p > 1:
        raise UserError(f"gba.top_p={gba.top_p} must lie in (0, 1]")
    if gba.checkpoint_every % gba.num_iterations:
        raise UserError(
            f"gba.checkpoint_every={gba.checkpoint_every} must be a multiple of "
            f"gba.num_iterations={gba.num_iterations}: a run resumes at a rollout boundary"
        )
    if not config.specialty.names or len(set(config.specialty.names)) != len(config.specialty.names):
        raise UserError("specialty.names needs at least one name, each once")
    if config.model.name_or_path is None and config.model.architecture is None:
        raise UserError("model.name_or_path is empty: give a hub id or a folder, or use model=tiny")
    for name, one in config.benchmark.items():
        if one.root is not None and not Path(one.root).is_dir():
            raise UserError(f"benchmark.{name}.root={one.root} is not a folder: give the folder of the published files")
    if config.engine.name == "openai" and not (config.engine.endpoint.base_url and config.engine.endpoint.model):
        raise UserError("engine=openai needs engine.endpoint.base_url=<...>/v1 and engine.endpoint.model=<served name>")
    _check_merge(config)
    judge = config.eval.llm_judge
    if (judge.base_url is None) != (judge.model is None):
        raise UserError("eval.llm_judge needs both base_url and model, or neither")
    if config.data.root is not None and not Path(config.data.root).is_dir():
        raise UserError(f"data.root={config.data.root} is not a folder: give the folder that holds the data set")


def _check_merge(config: Config) -> None:
    """The values of `merge.method`, and those that `merge.search` would try in their place."""
    method = {key: value for key, value in (config.merge.method or {}).items() if not key.startswith("_")}
    experts = len(config.specialty.names)
    reasoners = experts if config.gba.init == "each" else 1
    sizes = {"expert": experts, "reasoner": reasoners}
    for key, value in method.items():
        _check_merge_value(f"merge.method.{key}", value, sizes.get(key.partition("_")[0], experts + reasoners))
    if config.merge.lora_rank is not None and (config.merge.lora_rank < 1 or not method):
        raise UserError(f"merge.lora_rank={config.merge.lora_rank} must be at least 1, and merge a method")
    search = config.merge.search
    if search is None:
        return
    if not method:
        raise UserError(
            "merge.search has nothing to search: merge=none has no method; choose one, or merge.search=null"
        )
    example = next((key for key in method if key.endswith(("density", "scaling"))), next(iter(method)))
    if not search:
        raise UserError(f"merge.search is empty: give values to try, merge.search.{example}='[..,..]', or null")
    if config.eval.split == "val":
        raise UserError("merge.search chooses on the split val: measure on another one, eval.split=test")
    for key, values in search.items():
        if key not in method:
            raise UserError(
                f"merge.search.{key}: merge={config.merge.name} has no such value{suggestion(key, list(method))}"
            )
        if not isinstance(values, list) or not values:
            raise UserError(f"merge.search.{key}={values!r} must be a list of the values to try")
        for value in values:
            _check_merge_value(f"merge.search.{key}", value, sizes.get(key.partition("_")[0], experts + reasoners))


def _check_merge_value(where: str, value: Any, size: int) -> None:
    """`size`: of how many updates it speaks, where it is a list; what a rule alone can judge is left to the rule."""
    name = where.rpartition(".")[2]
    several, numbers = isinstance(value, list), value if isinstance(value, list) else [value]
    if value is None or isinstance(value, str | bool):
        if name.endswith(("density", "scaling")) or (name.endswith("weights") and value is not None):
            raise UserError(f"{where}={value!r} must be a number{' for each update' * name.endswith('weights')}")
        return
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise UserError(f"{where}={value} must be made of finite numbers")
    if several and len(numbers) != size:
        raise UserError(f"{where}={value} has {len(numbers)} numbers for {size} updates: give one for each")
    if name.endswith("weights") and not several:
        raise UserError(f"{where}={value} must be a list of {size} numbers, one for each update, or null")
    if name.endswith("density") and not all(0 < n <= 1 for n in numbers):
        raise UserError(f"{where}={value} must lie in (0, 1]: it is the share of entries that are kept")
