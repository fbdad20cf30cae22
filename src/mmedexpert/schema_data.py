"""The part of the schema that tells servers, and what a data set is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class PricesConfig:
    """USD per million tokens read and written, and the name of the price list."""

    input: float | None = None
    output: float | None = None
    version: str | None = None


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server, and how much may be asked of it."""

    base_url: str | None = None
    model: str | None = None
    revision: str | None = None
    api_key_env: str | None = None
    concurrency: int = 16
    timeout_s: float = 300.0
    retries: int = 5
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    prices: PricesConfig = field(default_factory=PricesConfig)


@dataclass
class AnsweringConfig(EndpointConfig):
    """A server whose model answers, and how long an answer may get."""

    max_new_tokens: int = 1024


@dataclass
class QuestionedConfig(AnsweringConfig):
    """A server whose model answers questions, and what stands before each of them."""

    system_prompt: str | None = None


@dataclass
class AskedConfig(QuestionedConfig):
    """A model that a step of the funnel asks: the one at an address, or with `local` the command's own."""

    local: bool = False


@dataclass
class DuplicatesConfig:
    max_distance: int = MISSING
    min_jaccard: float = MISSING
    min_ratio: float = MISSING


@dataclass
class DecontaminateConfig:
    max_distance: int = MISSING
    min_jaccard: float = MISSING
    min_ratio: float = MISSING
    words: int = MISSING
    min_share: float = MISSING


@dataclass
class StructureConfig:
    blank: float = MISSING
    shuffle_options: bool = MISSING


@dataclass
class LabelsConfig(AskedConfig):
    also: float = MISSING
    drop_disagreement: bool = MISSING


@dataclass
class BlindConfig(AskedConfig):
    tries: int = MISSING
    mode: str = MISSING


@dataclass
class DifficultyConfig(AskedConfig):
    rollouts: int = MISSING
    keep: list[int] = MISSING
    hard: list[int] = MISSING
    mode: str = MISSING


@dataclass
class TeacherConfig(AskedConfig):
    temperature: float = MISSING
    candidates: int = MISSING
    perspectives: list[str] = MISSING
    per_question: int = MISSING
    verify: str = MISSING
    min_adherence: float = MISSING
    copy_ratio: float = MISSING
    statements: list[str] = field(default_factory=list)
    statements_per_question: int = MISSING
    shows_answer: bool = MISSING
    shows_images: bool = MISSING


@dataclass
class BalanceConfig:
    target: int = MISSING
    specialty: Any = None  # names to shares: what has a type takes no new names from a command line
    perspective: Any = None
    modality: float = MISSING
    kind: dict[str, float] = field(default_factory=dict)
    per_image: int = MISSING
    fill: list[str] = field(default_factory=list)
    fractions: list[float] = MISSING


@dataclass
class CurateConfig:
    """The steps of the funnel that makes a data set out of several sources."""

    max_side: int = MISSING
    trusted: list[str] = field(default_factory=list)
    untraced: str = MISSING
    retry_refused: bool = False
    samples: int = MISSING
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    structure: StructureConfig = field(default_factory=StructureConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    blind: BlindConfig = field(default_factory=BlindConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    verifier: AskedConfig = field(default_factory=AskedConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)


@dataclass
class DataConfig:
    name: str = MISSING
    root: str | None = None
    on_bad_record: str = "error"
    limit: int | None = None
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    curate: CurateConfig | None = None
