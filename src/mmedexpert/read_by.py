"""Which parts of the work read a key, and when nothing does: the tables behind `unread.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from mmedexpert.names import BASELINES
from mmedexpert.schema import Config, SamplerConfig
from mmedexpert.schema_data import QuestionedConfig

TRAINED = ("pretrain", "dsa", "gba", "judge")
# what stage=plan does not read of dsa and gba
_OF_A_STEP = ("lr", "warmup_ratio", "weight_decay", "max_grad_norm", "checkpoint_every")
_OF_ROLLOUTS = (
    "weights_from", "scale", "gate", "grouping", "scale_rewards", "loss_type", "dynamic_sampling", "keep",
    "keep_rollouts", "temperature", "top_p", "top_k", "epsilon", "epsilon_high", "mask_truncated_completions",
)  # fmt: skip
# the longest prefix counts, () is read by every command; the parts are those of `unread.parts`
READ_BY: dict[str, tuple[str, ...]] = {
    "stage": (),
    "specialty": ("dsa", "gba", "caci", "own", "plan"),
    "model": ("base", "eval", "plan"),
    "model.name_or_path": ("base", "plan"),
    "model.revision": ("base",),
    "model.architecture": ("base",),
    "model.shipped": ("base", "plan"),
    "model.dtype": ("dsa", "gba", "judge", "search", "eval", "plan"),
    "model.attn_implementation": ("dsa", "gba", "judge", "search", "eval"),
    "model.min_pixels": ("dsa", "gba", "judge", "search", "eval"),
    "model.max_pixels": ("dsa", "gba", "judge", "search", "eval", "plan"),
    "model.system_prompt": ("dsa", "gba", "judge", "search", "eval"),
    "model.instructions": ("dsa", "gba", "judge", "search", "eval"),
    "model.max_new_tokens": ("gba", "search", "eval", "plan"),
    "model.eval_batch_size": ("search", "eval", "judge", "plan"),
    "model.gradient_checkpointing": ("dsa", "gba", "judge", "plan"),
    "model.lora": ("dsa", "gba", "judge", "plan"),
    "model.dsa_lr": ("dsa", "judge"),
    "model.dsa_steps": ("dsa", "plan"),
    "model.gba_lr": ("gba",),
    "model.gba_steps": ("gba", "plan"),
    "model.grams": ("caci",),
    "model.exact_merge": ("caci", "plan"),
    "pretrain": ("pretrain",),
    "data": ("data",),
    "dsa": ("dsa", "plan"),
    **{f"dsa.{key}": ("dsa",) for key in _OF_A_STEP},
    "dsa.allow_untraced": ("dsa",),
    "gba": ("gba", "plan"),
    **{f"gba.{key}": ("gba",) for key in (*_OF_A_STEP, *_OF_ROLLOUTS)},
    "sampler": ("gba",),
    "reward": ("gba",),
    "merge": ("caci", "plan"),
    **{f"merge.{key}": ("caci",) for key in ("search", "lora_rank", "grams", "gram_records", "distil_on_policy")},
    "pairs": ("judge",),
    "judge": ("judge",),
    "protocol": ("eval", "search", "judge"),
    "eval": ("eval",),
    "eval.perspectives": ("eval", "search"),
    "eval.specialties": ("own",),
    "eval.num_resamples": ("eval", "search", "judge", "report"),
    "eval.max_pixels": ("eval", "judge", "plan"),
    "eval.max_new_tokens": ("eval", "judge", "plan"),
    "eval.image_blind": ("eval", "judge"),
    "engine": ("eval", "search", "judge"),
    "engine.batch_size": ("eval", "search", "judge", "plan"),
    "benchmark": ("eval",),
    "report": ("report",),
    "plan": ("plan",),
    "trainer": ("base", "data", "eval", "plan"),
    "trainer.accelerator": ("base", "data", "eval"),
    "trainer.threads": (),
    "trainer.processes": (),
    "trainer.precision": (*TRAINED, "plan"),
    "trainer.strategy": (*TRAINED, "plan"),
    "trainer.micro_batch_tokens": ("dsa", "gba", "judge", "plan"),
    "logger": (),  # logger=none is kept by a stage that logs nothing
    "logger.project": (*TRAINED, "caci", "eval"),
    "logger.log_completions_every": ("gba",),
    "logger.log_images": ("gba",),
    "runs": (),
    "arm": (),
    "arms": (),
    "results": ("eval",),
    "results.id": (),
    "runs.delete": ("clean",),
    "runs.keep": ("clean",),
    "paths": (),
    "debug": (),
    "seed": (*TRAINED, "caci", "eval", "report"),
}


@dataclass(frozen=True)
class Rule:
    """`keys` (or prefixes of keys) are read by nothing where `unread`; `by` are the keys that decide it."""

    keys: tuple[str, ...]
    unread: Callable[[Config, set[str]], bool]
    why: str  # with fields of the config in braces
    by: tuple[str, ...]


def _served(config: Config, work: set[str]) -> bool:
    return config.engine.name == "openai" and "eval" in work


def _without_weight(config: Config, _: set[str]) -> bool:
    return config.gba.weights_from == "given" and not any(config.gba.weights)


def _only_medevalkit(config: Config, work: set[str]) -> bool:
    """Questions are asked, all of them in MedEvalKit's words."""
    lead = config.protocol
    asked = {"robust" if lead == "auto" else lead for part in ("own", "search") if part in work}
    if "benchmark" in work:
        auto = {"pairwise" if one.pairs else "medevalkit" for one in config.benchmark.values()}
        asked |= auto if lead == "auto" else {lead}
    return bool(asked) and asked <= {"medevalkit", "med_rewardbench"}


def pairs_alone(config: Config, _: set[str]) -> bool:
    """Benchmarks are asked, and all of them hold pairs of answers."""
    return bool(config.benchmark) and all(one.pairs for one in config.benchmark.values())


def _baselines_alone(config: Config, _: set[str]) -> bool:
    return config.engine.name != "openai" and bool(config.eval.models) and set(config.eval.models or []) <= {*BASELINES}


# of a judge's server, beside its address and model
OF_A_SERVER = (
    "api_key_env", "revision", "concurrency", "timeout_s", "retries", "requests_per_minute", "tokens_per_minute",
    "max_requests", "max_cost", "prices",
)  # fmt: skip
OF_VLLM = ("api_key_env", "concurrency", "timeout_s")  # of the endpoint, beside the addresses
# what is asked of which model and data
ASKING = (
    "specialty", "model", "pretrain", "data", "dsa", "gba", "sampler", "reward", "merge", "engine", "benchmark",
    "protocol", "eval.split", "eval.perspectives", "eval.models", "eval.contamination", "eval.llm_judge",
    "eval.best_of", "eval.temperature", "eval.top_p", "eval.picker",
)  # fmt: skip
RULES = (
    Rule(
        ("runs.delete", "runs.keep"), lambda c, _: c.stage.name != "clean", "only stage=clean reads it", ("stage",),
    ),
    Rule(("report",), lambda c, _: c.stage.name != "report", "only stage=report reads it", ("stage",)),
    Rule(("plan",), lambda c, _: c.stage.name != "plan", "only stage=plan reads it", ("stage",)),
    Rule(
        ASKING,
        lambda c, _: c.stage.name == "report",
        "stage=report reads finished runs alone: name those you mean in report.runs", ("stage",),
    ),
    Rule(
        (*ASKING, "eval.num_resamples"), lambda c, _: c.stage.name in ("list", "clean"),
        "stage={config.stage.name} reads the outputs folder alone", ("stage",),
    ),
    Rule(
        ("data.root",), lambda c, _: not (c.data.source.get("_needs_root_") or c.data.sources),
        "data={config.data.name} reads no folder: add data=labelled_images (folders with labels.csv), data=medr1 or "
        "data=mmedexpert",
        ("data",),
    ),
    Rule(
        ("pretrain", "model.architecture"), lambda c, work: "base" in work and "pretrain" not in work,
        "model={config.model.name} has its weights already; model=tiny is taught by stage=pretrain, or in every stage "
        "with model.shipped=null", ("model", "stage"),
    ),
    Rule(
        ("model.shipped",), lambda c, _: c.model.name_or_path is not None,
        "model.name_or_path={config.model.name_or_path} is the base", ("model",),
    ),
    Rule(
        ("pretrain.text_batch_size",), lambda c, _: c.pretrain.reading_steps == 0,
        "pretrain.reading_steps=0 reads no text", ("pretrain.reading_steps",),
    ),
    Rule(
        ("model.revision",), lambda c, _: c.model.name_or_path is None or Path(c.model.name_or_path).is_dir(),
        "it belongs to a model of the hub, and model.name_or_path={config.model.name_or_path} is none",
        ("model",),
    ),
    Rule(
        ("eval.models", "engine.batch_size", "model.name_or_path", "model.revision", "model.dtype",
         "model.attn_implementation", "model.min_pixels", "model.max_pixels", "model.max_new_tokens",
         "model.instructions", "model.system_prompt", "eval.max_pixels"), _served,
        "engine=openai asks the one model of the server, engine.endpoint.model={config.engine.endpoint.model}",
        ("engine",),
    ),
    Rule(
        ("engine.endpoint",), lambda c, _: c.engine.name == "transformers",
        "engine={config.engine.name} runs the model here: add engine=openai to ask a server", ("engine",),
    ),
    Rule(
        ("engine.base_urls",), lambda c, _: c.engine.name != "vllm",
        "engine={config.engine.name} asks no vLLM servers: add engine=vllm", ("engine",),
    ),
    Rule(
        tuple(f"engine.endpoint.{one.name}" for one in fields(QuestionedConfig) if one.name not in OF_VLLM),
        lambda c, _: c.engine.name == "vllm", "engine=vllm asks engine.base_urls: only " + ", ".join(OF_VLLM),
        ("engine",),
    ),
    Rule(
        ("engine.batch_size",), lambda c, _: c.engine.name == "vllm",
        "engine=vllm sends as many at once as engine.endpoint.concurrency says", ("engine",),
    ),
    Rule(
        tuple(f"sampler.{one.name}" for one in fields(SamplerConfig) if one.name != "name"),
        lambda c, _: c.sampler.name != "vllm",
        "sampler={config.sampler.name} samples from the policy in this process: add sampler=vllm", ("sampler",),
    ),
    Rule(
        ("sampler.truncate_at",), lambda c, _: c.sampler.correction != "truncate",
        "sampler.correction={config.sampler.correction} does not truncate", ("sampler",),
    ),
    Rule(
        ("sampler.mask_above",), lambda c, _: c.sampler.correction != "sequence_mask",
        "sampler.correction={config.sampler.correction} masks nothing: add sampler.correction=sequence_mask",
        ("sampler",),
    ),
    Rule(
        ("eval.split",), lambda c, work: "eval" in work and "own" not in work,
        "a benchmark has its own test part; eval.split chooses of the own data set", ("benchmark",),
    ),
    Rule(
        ("eval.perspectives",), lambda c, work: _only_medevalkit(c, work),
        "protocol medevalkit asks in MedEvalKit's words, without perspectives: add protocol=robust",
        ("protocol", "benchmark"),
    ),
    Rule(
        ("model.system_prompt",), lambda c, work: not work & {"dsa", "gba"} and _only_medevalkit(c, work),
        "protocol medevalkit asks without a system prompt: add protocol=robust",
        ("protocol", "benchmark"),
    ),
    Rule(
        ("engine.endpoint.system_prompt",),
        lambda c, work: _only_medevalkit(c, work) or ("eval" in work and pairs_alone(c, work)),
        "protocol medevalkit, and pairs of answers, are asked without a system prompt", ("protocol", "benchmark"),
    ),
    Rule(
        ("model.system_prompt",),
        lambda c, work: "eval" in work and pairs_alone(c, work) and not work & {"dsa", "gba", "own", "judge"},
        "a judge of pairs that was not trained here is asked without a system prompt", ("benchmark",),
    ),
    Rule(
        tuple(f"eval.llm_judge.{key}" for key in OF_A_SERVER), lambda c, _: c.eval.llm_judge.base_url is None,
        "no judge is asked: give eval.llm_judge.base_url and eval.llm_judge.model", ("eval.llm_judge",),
    ),
    Rule(
        ("eval.temperature", "eval.top_p", "eval.picker"), lambda c, _: c.eval.best_of == 1,
        "eval.best_of=1 draws no samples: give their number, eval.best_of=8", ("eval.best_of",),
    ),
    Rule(
        ("eval.best_of", "eval.temperature", "eval.top_p", "eval.picker"), _baselines_alone,
        "baselines are not sampled: name a model in eval.models", ("eval.models",),
    ),
    Rule(
        ("eval.picker.shows_answer",), lambda c, _: True,
        "a judge that is told the right answer would pick by it", (),
    ),
    Rule(
        (*(f"eval.picker.{key}" for key in OF_A_SERVER), "eval.picker.max_new_tokens", "eval.picker.shows_images"),
        lambda c, _: c.eval.picker.base_url is None,
        "no judge is asked at a server: give eval.picker.base_url and eval.picker.model", ("eval.picker",),
    ),
    Rule(
        ("reward.judge",), lambda c, _: c.reward.grader == "rules" and not c.reward.judge_weight,
        "no judge is asked: add reward.judge_weight=1, of whole answers, or reward.grader=judge or hybrid",
        ("reward.grader", "reward.judge_weight", "reward"),
    ),
    Rule(
        ("reward.judge.shows_answer",), lambda c, _: c.reward.grader == "rules",
        "only a grader is shown the gold answer: add reward.grader=judge", ("reward.grader", "reward"),
    ),
    Rule(
        ("judge.dpo_steps", "judge.dpo_lr", "judge.beta", "judge.sft_weight"),
        lambda c, work: "judge" in work and c.stage.name == "judge" and c.judge.name != "dpo",
        "judge={config.judge.name} needs none: add judge=dpo", ("judge",),
    ),
    Rule(
        ("judge.max_new_tokens", "judge.steps"), lambda c, _: c.stage.name == "judge" and c.judge.name == "scalar",
        "judge=scalar writes nothing, and takes judge.scalar_steps", ("judge",),
    ),
    Rule(
        ("judge.scalar_steps",), lambda c, _: c.stage.name == "judge" and c.judge.name != "scalar",
        "judge={config.judge.name} takes judge.steps", ("judge",),
    ),
    Rule(
        ("judge.name",), lambda c, _: c.stage.name != "judge", "the judges asked are named: judge_sft, judge_scalar",
        ("stage",),
    ),
    Rule(
        ("pairs.root",), lambda c, _: c.pairs.load.get("_needs_root_") is False,
        "pairs={config.pairs.name} are drawn here: add pairs=own", ("pairs",),
    ),
    Rule(
        ("gba.weights",), lambda c, _: c.gba.weights_from == "validation",
        "gba.weights_from=validation learns them: add gba.weights_from=given", ("gba.weights_from", "gba"),
    ),
    Rule(
        ("gba.scale", "gba.gate"), _without_weight,
        "gba.weights={config.gba.weights} give no perspective any weight", ("gba.weights", "gba"),
    ),
    Rule(("gba.gate",), lambda c, _: c.gba.scale == 0, "gba.scale=0 leaves nothing to gate", ("gba.scale", "gba")),
    Rule(
        ("eval.image_blind",),
        lambda c, _: c.stage.name != "judge" and not any(one.pairs for one in c.benchmark.values()),
        "only judges of pairs of answers are asked so: add benchmark=med_rewardbench, or eval.models=[blank_image]",
        ("benchmark",),
    ),
    Rule(
        ("eval.contamination", "eval.perspectives"),
        lambda c, work: pairs_alone(c, work) and not work & {"dsa", "gba", "own"},
        "pairs of answers are judged without it", ("benchmark",),
    ),
    Rule(
        ("gba.keep_rollouts",), lambda c, _: c.gba.keep is None,
        "gba.keep=null keeps every question: give a range, gba.keep=[1,15]", ("gba.keep",),
    ),
    Rule(
        ("merge.gram_records",), lambda c, _: c.merge.grams is None,
        "merge.grams=null measures no inputs: add merge.grams=full or span", ("merge.grams", "merge"),
    ),
    Rule(
        ("merge.distil_on_policy",), lambda c, _: c.merge.distil_steps == 0,
        "merge.distil_steps=0 teaches nothing: give a number of steps", ("merge.distil_steps",),
    ),
    Rule(
        ("merge.name", "merge.method"), lambda c, _: c.merge.method is None, "merge=none merges nothing", ("merge",)
    ),
    Rule(
        ("trainer.strategy",), lambda c, _: c.trainer.devices == 1 and c.trainer.num_nodes == 1,
        "one device needs none: add trainer.devices=<number>", ("trainer",),
    ),
    Rule(
        ("logger.project", "logger.log_images"), lambda c, _: c.logger.name != "wandb",
        "it is an option of Weights & Biases, and logger={config.logger.name}", ("logger",),
    ),
    Rule(("reward.name", "debug.name"), lambda c, _: True, "it is the option's own name, which nothing reads", ()),
)  # fmt: skip


def not_from_the_hub(name: str) -> Rule:
    """Of a benchmark that is read from a folder."""
    keys = tuple(f"benchmark.{name}.{key}" for key in ("repo", "revision", "patterns"))
    return Rule(keys, lambda _, __: True, f"benchmark.{name}.root is read in place of the hub", ())
