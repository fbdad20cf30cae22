"""The typed schema at the door: every key a user can set, its type, and the cross-field checks with their fixes."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES


@dataclass
class StageConfig:
    name: str = MISSING
    target: str = MISSING


@dataclass
class SpecialtyConfig:
    names: list[str] = MISSING


@dataclass
class LoraSettings:
    r: int = MISSING
    alpha: int = MISSING
    dropout: float = MISSING
    target_modules: str = MISSING


@dataclass
class ArchitectureConfig:
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    vision_hidden_size: int = MISSING
    vision_depth: int = MISSING
    vision_num_heads: int = MISSING
    image_size: int = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    name_or_path: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str = "auto"
    min_pixels: int = MISSING
    max_pixels: int = MISSING
    gradient_checkpointing: bool = False
    system_prompt: str | None = None
    max_new_tokens: int = MISSING
    lora: LoraSettings = field(default_factory=LoraSettings)
    architecture: ArchitectureConfig | None = None


@dataclass
class PretrainConfig:
    reading_steps: int = MISSING
    looking_steps: int = MISSING
    images: int = MISSING
    batch_size: int = MISSING
    text_batch_size: int = MISSING
    muon_lr: float = MISSING
    lr: float = MISSING
    checkpoint_every: int = MISSING


@dataclass
class DataConfig:
    name: str = MISSING
    root: str | None = None
    on_bad_record: str = "error"
    limit: int | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass
class DsaConfig:
    steps: int = MISSING
    batch_size: int = MISSING
    accumulate_grad_batches: int = 1
    lr: float = MISSING
    warmup_ratio: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    checkpoint_every: int = MISSING


@dataclass
class GbaConfig:
    name: str = MISSING
    weights: list[float] = MISSING
    scale: float = MISSING
    gate: str = MISSING
    conditioning: str = MISSING
    init: str = MISSING
    scale_rewards: str = MISSING
    loss_type: str = MISSING
    steps: int = MISSING
    prompts_per_step: int = MISSING
    num_generations: int = MISSING
    num_iterations: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    epsilon: float = MISSING
    epsilon_high: float | None = None
    beta: float = MISSING
    mask_truncated_completions: bool = MISSING
    lr: float = MISSING
    warmup_ratio: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    checkpoint_every: int = MISSING


@dataclass
class RewardConfig:
    name: str = MISSING
    accuracy: float = MISSING
    format: float = MISSING
    protocol: str = MISSING


@dataclass
class MergeConfig:
    name: str = MISSING
    method: dict[str, Any] | None = None


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server."""

    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 16
    timeout_s: float = 300.0
    retries: int = 5


@dataclass
class EngineConfig:
    name: str = MISSING
    batch_size: int = 64
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class BenchmarkConfig:
    name: str = MISSING
    repo: str | None = None
    revision: str | None = None
    patterns: list[str] = field(default_factory=list)
    root: str | None = None
    load: dict[str, Any] = field(default_factory=dict)
    ask: str = MISSING
    judge: str = MISSING
    breakdowns: list[str] = field(default_factory=list)
    train_split: str | None = None


@dataclass
class EvalConfig:
    split: str = MISSING
    perspectives: str = MISSING
    protocol: str = MISSING
    num_resamples: int = MISSING
    models: list[str] | None = None
    contamination: bool = True
    llm_judge: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class ReportConfig:
    runs: list[str] = field(default_factory=list)
    against: str | None = None
    out: str | None = None
    common: bool = False
    published: str | None = None


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    threads: int | None = None


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str = "mmedexpert"
    log_completions_every: int = 10


@dataclass
class PathsConfig:
    outputs: str = "outputs"


@dataclass
class DebugConfig:
    name: str = "none"
    traceback: bool = False


@dataclass
class Config:
    stage: StageConfig = field(default_factory=StageConfig)
    specialty: SpecialtyConfig = field(default_factory=SpecialtyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dsa: DsaConfig = field(default_factory=DsaConfig)
    gba: GbaConfig = field(default_factory=GbaConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    benchmark: dict[str, BenchmarkConfig] = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    protocol: str = "auto"
    seed: int = 0


CHOICES: dict[str, tuple[str, ...]] = {
    "gba.gate": ("none", "correct"),
    "gba.conditioning": ("prompted", "free"),
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
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
}
POSITIVE = (
    "model.min_pixels", "model.max_pixels", "model.max_new_tokens", "model.lora.r", "model.lora.alpha", "dsa.steps",
    "dsa.batch_size", "dsa.accumulate_grad_batches", "dsa.lr", "dsa.checkpoint_every", "gba.steps",
    "gba.prompts_per_step", "gba.num_iterations", "gba.temperature", "gba.top_p", "gba.epsilon", "gba.lr",
    "gba.checkpoint_every", "engine.batch_size", "eval.num_resamples", "trainer.devices", "pretrain.images",
    "pretrain.batch_size", "pretrain.text_batch_size", "pretrain.looking_steps", "pretrain.lr", "pretrain.muon_lr",
    "pretrain.checkpoint_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "gba.scale", "gba.beta", "gba.top_k", "dsa.weight_decay", "gba.weight_decay", "reward.accuracy", "reward.format",
    "seed", "pretrain.reading_steps", "logger.log_completions_every",
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


def keys() -> list[str]:
    """Every key of the schema, dotted."""

    def walk(kind: Any, prefix: str) -> list[str]:
        found = []
        for name, hint in get_type_hints(kind).items():
            found.append(f"{prefix}{name}")
            inner = next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)
            if inner is not None:
                found += walk(inner, f"{prefix}{name}.")
        return found

    return walk(Config, "")


def suggestion(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean ...?` when something known is close, else the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(known)}"


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
    active = sum(weight > 0 for weight in gba.weights)
    if gba.conditioning == "prompted" and active and gba.num_generations < 2 * active:
        raise UserError(
            f"gba.num_generations={gba.num_generations} is too small for {active} prompted perspectives: "
            f"give at least {2 * active}, or gba.conditioning=free"
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
    judge = config.eval.llm_judge
    if (judge.base_url is None) != (judge.model is None):
        raise UserError("eval.llm_judge needs both base_url and model, or neither")
    if config.data.root is not None and not Path(config.data.root).is_dir():
        raise UserError(f"data.root={config.data.root} is not a folder: give the folder that holds the data set")
