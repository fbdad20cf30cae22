"""The typed schema, the base of conf/config.yaml: every key a user can set and its type (`checks.py`: which values).

Those of servers and of data stand in `schema_data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mmedexpert.schema_data import AnsweringConfig, DataConfig, EndpointConfig, QuestionedConfig


@dataclass
class StageConfig:
    name: str = MISSING
    run: dict[str, Any] = MISSING


@dataclass
class SpecialtyConfig:
    names: list[str] = MISSING
    on_missing: str = "error"
    missing: list[str] = field(default_factory=list)


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
    instructions: str = "full"
    max_new_tokens: int = MISSING
    eval_batch_size: int = MISSING
    dsa_lr: float = MISSING
    dsa_steps: int = MISSING
    gba_lr: float = MISSING
    gba_steps: int = MISSING
    grams: str = "span"
    exact_merge: bool = True
    lora: LoraSettings = field(default_factory=LoraSettings)
    architecture: ArchitectureConfig | None = None
    shipped: str | None = None

    @property
    def taught_here(self) -> bool:
        """Whether the base is built and taught by `stage=pretrain` rather than found as weights."""
        return self.name_or_path is None and self.shipped is None


@dataclass
class PretrainConfig:
    reading_steps: int = MISSING
    looking_steps: int = MISSING
    batch_size: int = MISSING
    text_batch_size: int = MISSING
    muon_lr: float = MISSING
    lr: float = MISSING
    checkpoint_every: int = MISSING


@dataclass
class DsaConfig:
    steps: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    warmup_ratio: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    checkpoint_every: int = MISSING
    allow_untraced: bool | None = None


@dataclass
class GbaConfig:
    name: str = MISSING
    weights: list[float] = MISSING
    weights_from: str = "given"
    scale: float = MISSING
    gate: str = MISSING
    conditioning: str = MISSING
    grouping: str = MISSING
    init: str = MISSING
    scale_rewards: str = MISSING
    loss_type: str = MISSING
    steps: int = MISSING
    prompts_per_step: int = MISSING
    num_generations: int = MISSING
    num_iterations: int = MISSING
    dynamic_sampling: int = 0
    keep: list[int] | None = None
    keep_rollouts: int = 16
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
class JudgeConfig(AnsweringConfig):
    """A server whose model grades completions, or a judge that `stage=judge` trained, and what it is shown of them."""

    run: str | None = None
    shows_images: bool = True
    shows_answer: bool = False


@dataclass
class RewardConfig:
    name: str = MISSING
    weights: dict[str, float] = MISSING
    protocol: str = MISSING
    grader: str = "rules"
    judge_weight: float = 0.0
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class MergeConfig:
    name: str = MISSING
    method: dict[str, Any] | None = None
    search: Any = None  # a dictionary or null: Hydra merges none of a command into a null that is typed as one
    lora_rank: int | None = None
    exact: bool = MISSING
    grams: str | None = None
    gram_records: int = MISSING
    distil_steps: int = MISSING
    distil_on_policy: bool = MISSING


@dataclass
class PairsConfig:
    """Where pairs of answers come from; `train` and `val` are what `load` is told beside the rest."""

    name: str = MISSING
    root: str | None = None
    load: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] = field(default_factory=dict)
    part: str = MISSING


@dataclass
class TrainedJudgeConfig:
    name: str = MISSING
    steps: int = MISSING
    scalar_steps: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    warmup_ratio: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    checkpoint_every: int = MISSING
    max_new_tokens: int = MISSING
    dpo_steps: int = MISSING
    dpo_lr: float = MISSING
    beta: float = MISSING
    sft_weight: float = MISSING


@dataclass
class EngineConfig:
    name: str = MISSING
    batch_size: int = 64
    base_urls: list[str] = field(default_factory=list)
    endpoint: QuestionedConfig = field(default_factory=QuestionedConfig)


@dataclass
class SamplerConfig:
    """Who samples GBA's completions, and how what a server sampled is weighed."""

    name: str = MISSING
    base_urls: list[str] = field(default_factory=list)
    api_key_env: str | None = None
    adapters: str | None = None
    correction: str = "none"
    truncate_at: float = 2.0
    mask_above: float = 3.0
    concurrency: int = 64
    timeout_s: float = 600.0
    patience_s: float = 600.0


@dataclass
class BenchmarkConfig:
    name: str = MISSING
    repo: str | None = None
    revision: str | None = None
    patterns: list[str] = field(default_factory=list)
    root: str | None = None
    load: dict[str, Any] = field(default_factory=dict)
    pairs: bool = False
    ask: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    breakdowns: list[str] = field(default_factory=list)
    train_split: str | None = None


@dataclass
class EvalConfig:
    split: str = MISSING
    perspectives: str = MISSING
    max_pixels: int | None = None
    max_new_tokens: int | None = None
    num_resamples: int = MISSING
    models: list[str] | None = None
    specialties: list[str] | None = None
    contamination: bool = True
    image_blind: bool = False
    llm_judge: EndpointConfig = field(default_factory=EndpointConfig)
    best_of: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    picker: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class ReportConfig:
    runs: list[str] = field(default_factory=list)
    against: str | None = None
    out: str | None = None
    common: bool = False
    published: str | None = None
    image_mb: float = 16.0


@dataclass
class PlanConfig:
    card: str | None = None
    memory_gib: float | None = None
    images: int = MISSING
    text_tokens: int = MISSING
    completion_tokens: int | None = None
    answer_tokens: int | None = None
    questions: int = MISSING


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    strategy: str = "ddp"
    devices: int | None = 1
    num_nodes: int = 1
    precision: str = "32-true"
    micro_batch_tokens: int | str | None = None  # or auto
    threads: int | None = None
    processes: int | None = None


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str = "mmedexpert"
    log_completions_every: int = 10
    log_images: bool = False
    experiment: str | None = None
    swept: list[str] = field(default_factory=list)  # the keys that the command varies: run.py fills it in


@dataclass
class PathsConfig:
    outputs: str = "outputs"


@dataclass
class ResultsConfig:
    id: str | None = None
    claim: str = ""
    against: str | None = None
    models: list[str] | None = None


@dataclass
class RunsConfig:
    explain: bool = False
    delete: bool = False
    keep: list[str] = field(default_factory=list)


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
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    judge: TrainedJudgeConfig = field(default_factory=TrainedJudgeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    benchmark: dict[str, BenchmarkConfig] = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    runs: RunsConfig = field(default_factory=RunsConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)
    arm: str | None = None
    arms: Any = None  # a dictionary or null, as merge.search
    protocol: str = "auto"
    seed: int = 0


BASE = "base_schema"  # its name in a defaults list
ConfigStore.instance().store(name=BASE, node=Config)


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
