"""`stage=gba`: guideline-based advantages, GRPO from the experts' merge with four clinical reasoning perspectives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import add_lora, load_encoder, load_model, start_from_
from mmedexpert.models.checkpoint import fingerprint_base
from mmedexpert.models.encode import Encoder
from mmedexpert.reporting.cards import write_card
from mmedexpert.reporting.finals import ends
from mmedexpert.reporting.tracking import log_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.ranks import gather, rank
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.versions import digest, text_of, versions
from mmedexpert.schema import Config, LoggerConfig, RewardConfig
from mmedexpert.scoring import Protocol
from mmedexpert.stages import dsa, merge
from mmedexpert.stages.common import (
    Base,
    content_of,
    fit_options,
    ledger_of,
    loading,
    model_key,
    records_of,
    stage_run,
    training_key,
)
from mmedexpert.stages.data import dataset
from mmedexpert.stages.distil import distilled
from mmedexpert.stages.pretrain import base_of
from mmedexpert.training.advantages import RewardScale
from mmedexpert.training.grading import Grader, grader_of
from mmedexpert.training.judge import VERSION
from mmedexpert.training.losses import LossType
from mmedexpert.training.rollouts import Guidance, Rollout, Sampling, advantages, completion_rows, report, roll_out

if TYPE_CHECKING:  # Lightning, which takes seconds
    from mmedexpert.training.gba import GbaModule

RULES = ("prompts", "batches", "optimiser", "sampling", "rewards", "advantages", "losses", "gba")


def run(config: Config) -> dict[str, Run]:
    """The reasoner; with `gba.init=each` one per expert, each on its own specialty."""
    names = config.specialty.names
    if config.gba.init == "each":
        dsa.ready(config, names)
        return {f"reasoner-{name}": reasoner(config, name, [name], dsa.expert(config, name, [name])) for name in names}
    return {"reasoner": reasoner(config, config.gba.name, names, start(config))}


def control(config: Config) -> Run:
    """The control of the perspectives: the reasoner of this config with `gba.scale=0`, plain GRPO on the same
    prompts from the same start. UserError for `gba.init=each`, which has no single one."""
    if config.gba.init == "each":
        raise UserError("the control grpo is one reasoner: use gba.init=merged_experts, caci, sft_all or base")
    plain = replace(config, gba=replace(config.gba, name="grpo", scale=0.0))
    return run(plain)["reasoner"]


def start(config: Config) -> Run | None:
    """The adapter that one reasoner for all specialties starts from; None where that is the base itself.

    merged_experts: the experts' mean (# ours), as one LoRA; sft_all: one LoRA trained on all data; caci: the experts
    merged by `merge.method`, and taught for `merge.distil_steps`, as one LoRA.
    """
    names = config.specialty.names
    if config.gba.init == "sft_all":
        return dsa.expert(config, "all", names)
    if config.gba.init == "caci":
        return _merge_of_experts(config)
    if config.gba.init != "merged_experts":
        return None
    experts = dsa.run(config)
    base = base_of(config)

    def work(run: Run) -> dict[str, float]:
        adapters = [LoraAdapter.load(expert.folder / "adapter") for expert in experts.values()]
        dsa.save_sum(run.folder / "adapter", adapters, [1.0 / len(adapters)] * len(adapters), base.folder, config)
        return {"experts": float(len(adapters))}

    inputs = {"base": base.identity, **{name: expert.run_id for name, expert in experts.items()}}
    return stage_run(config, "start", "merged_experts", {"rules": versions("start")}, work, inputs)


def _merge_of_experts(config: Config) -> Run:
    """The merge of the experts alone, whose `<folder>/adapter` is it as a LoRA on the base: exact, since `before.py`
    asks for a rule on factors."""
    merge.ready(config)
    experts = dsa.run(config)
    settings = replace(config.merge, lora_rank=config.model.lora.r * len(experts))
    made = merge.merged(replace(config, merge=settings), experts, {})
    return distilled(config, made, experts) if settings.distil_steps else made


def reasoner(config: Config, name: str, specialties: list[str], start: Run | None) -> Run:
    """Train a reasoner from the adapter of `start` (the base when None).

    `<folder>/update` is the RL update alone, relative to its start; `<folder>/adapter` is start and update as one LoRA
    on the base: the policy that was trained.
    """
    base, data, settings = base_of(config), dataset(config), config.gba
    inputs = {"base": base.identity, "data": content_of(data, "train", specialties)}
    if start:
        inputs["start"] = start.run_id

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.training.fit import fit
        from mmedexpert.training.gba import rollout_stream

        records, image_root = records_of(data, "train", specialties)
        starts = [LoraAdapter.load(start.folder / "adapter")] if start else []
        grader = grader_of(_reward(config), ledger_of(config))
        encoder, policy = load_encoder(base.folder, loading(config)), _policy(config, base, starts)
        curve = run.folder / "curve.jsonl"
        with run.phase("train"):
            stream = rollout_stream(
                records, _sampler(config, policy, encoder, image_root, grader),
                prompts_per_step=settings.prompts_per_step, num_iterations=settings.num_iterations, seed=config.seed,
                dynamic_sampling=settings.dynamic_sampling,
                settle=partial(_scale_by_batch, _guidance(config)) if settings.scale_rewards == "batch" else None,
                watch=_Watch(curve, image_root, run.logger, config.logger),
            )  # fmt: skip
            metrics = fit(
                _module(config, policy, encoder), stream, folder=run.folder, title=f"gba {name}",
                checkpoint_every=settings.checkpoint_every, logger=run.logger, **fit_options(config),
            )  # fmt: skip
        dsa.save_adapter(run.folder / "update", policy, encoder, base.folder)
        if rank() > 0:
            return metrics
        parts = [*starts, LoraAdapter.load(run.folder / "update")]
        dsa.save_sum(run.folder / "adapter", parts, [1.0] * len(parts), base.folder, config)
        _write_cards(
            config, run, base, {f"{data.name} ({len(records)} training records)": dsa.licences(records)}, starts
        )
        return {**metrics, **_gain(curve)}

    key, sources = _key(config, specialties), {"data": data}
    return stage_run(config, "gba", name, key, work, inputs, sources=sources, every_rank=True)


def _key(config: Config, specialties: list[str]) -> dict[str, Any]:
    """The settings and rules that decide a reasoner."""
    return {
        "specialties": specialties,
        "gba": _settings(config),
        "lora": asdict(config.model.lora),
        "reward": _reward_key(config),
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "trainer": training_key(config),
        "rules": versions(*RULES, config.reward.protocol, *(("rubrics",) if _weighted(config) else ())),
        "instructions": digest(instructions(config.model.instructions)),
        "guidelines": {name: text_of(name) for name in DATA} if _weighted(config) else None,
    }


def _settings(config: Config) -> dict[str, Any]:
    """The settings of GBA that act: where no perspective's term has weight, scale and gate act on nothing, and weights
    on the outcomes alone that are compared by perspective."""
    settings = {k: v for k, v in asdict(config.gba).items() if k not in ("name", "checkpoint_every")}
    if not _weighted(config):
        settings |= {"scale": 0.0, "gate": "none"}
        if config.gba.grouping == "question":
            settings["weights"] = [0.0] * len(PERSPECTIVES)
    return settings


def _weighted(config: Config) -> bool:
    """Whether any perspective has weight."""
    return bool(config.gba.scale and any(config.gba.weights))


def _reward(config: Config) -> RewardConfig:
    """The reward that acts: where no perspective has weight no judge is paid, and the rules measure adherence."""
    return config.reward if _weighted(config) else replace(config.reward, grader="rules")  # ours


def _reward_key(config: Config) -> dict[str, Any]:
    """What of the reward decides a reasoner; of a judge's server not its speed, nor how it is logged in to."""
    reward, judge = _reward(config), config.reward.judge
    key: dict[str, Any] = {"weights": reward.weights, "protocol": reward.protocol}
    if reward.grader == "rules":
        return key
    address = without_password(judge.base_url or "").rstrip("/")
    sees = {"images": judge.shows_images, "answer": judge.shows_answer}
    told = {"server": [address, judge.model, judge.revision], "prompt": VERSION, "sees": sees}
    return key | {"grader": reward.grader, "judge": {**told, "max_new_tokens": judge.max_new_tokens}}


def _policy(config: Config, base: Base, starts: Sequence[LoraAdapter]) -> PeftModel:
    """The base with the start inside it, frozen, and a fresh LoRA on top."""
    model, lora = load_model(base.folder, loading(config)), config.model.lora
    for adapter in starts:
        start_from_(model, adapter)
    return add_lora(
        model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules,
        gradient_checkpointing=config.model.gradient_checkpointing,
        seed=config.seed,
    )  # fmt: skip


def _module(config: Config, policy: PeftModel, encoder: Encoder) -> GbaModule:
    from mmedexpert.training.gba import GbaModule, Objective

    settings = config.gba
    objective = Objective(
        cast(LossType, settings.loss_type), settings.epsilon, settings.epsilon_high, settings.beta,
        settings.temperature, config.model.max_new_tokens, settings.mask_truncated_completions,
    )  # fmt: skip
    return GbaModule(
        policy, encoder, objective, lr=settings.lr, weight_decay=settings.weight_decay,
        micro_batch_tokens=config.trainer.micro_batch_tokens, seed=config.seed, steps=settings.steps,
        warmup_ratio=settings.warmup_ratio, max_grad_norm=settings.max_grad_norm,
    )  # fmt: skip


def _guidance(config: Config) -> Guidance:
    settings = config.gba
    scale_rewards = cast(RewardScale, settings.scale_rewards)
    return Guidance(
        tuple(settings.weights), settings.scale, settings.gate, settings.conditioning, scale_rewards, settings.grouping
    )


def _sampler(
    config: Config, policy: PeftModel, encoder: Encoder, image_root: Path, grader: Grader
) -> Callable[[list[Record], list[int]], Rollout]:
    """What samples and scores a group for each record, by the record's seed."""
    from mmedexpert.training.fit import gathered

    settings, guidance = config.gba, _guidance(config)
    sampling = Sampling(
        settings.num_generations, config.model.max_new_tokens, settings.temperature, settings.top_p, settings.top_k
    )

    def sample(records: list[Record], seeds: list[int]) -> Rollout:
        with gathered(policy):
            return roll_out(
                policy, encoder, records, image_root, sampling=sampling, guidance=guidance,
                reward_weights=config.reward.weights, protocol=cast(Protocol, config.reward.protocol),
                grader=grader, seeds=seeds,
            )  # fmt: skip

    return sample


def _write_cards(config: Config, run: Run, base: Base, data: Mapping[str, Any], starts: Sequence[LoraAdapter]) -> None:
    told = "GRPO with guideline-based advantages, " + ", ".join(f"{k}={v}" for k, v in _settings(config).items())
    if (reward := _reward(config)).grader != "rules":
        told += f", graded by {reward.grader} ({reward.judge.model})"
    titles = {"adapter": "reasoner (GBA)", "update": "reasoner's RL update alone (GBA)"}
    for part, title in titles.items():
        write_card(
            run.folder / part, kind="adapter", title=title, base_model=config.model.name_or_path,
            base_fingerprint=fingerprint_base(base.folder), specialty=None,
            method=told + ("; relative to its start" if part == "update" else ""), data=data,
            ingredients={f"start ({config.gba.init})": adapter.fingerprint for adapter in starts},
            metrics=None, library_name="peft",
        )  # fmt: skip


class _Watch:
    """Keeps the curve on disk (a line per rollout, rewritten from where a resumed run starts) and sends completions."""

    def __init__(self, curve: Path, image_root: Path, logger: Any, settings: LoggerConfig) -> None:
        self.curve, self.image_root, self.logger = curve, image_root, logger
        self.every, self.images = settings.log_completions_every, settings.log_images
        self.started = False

    def __call__(self, number: int, records: list[Record], rollout: Rollout) -> None:
        if rank() > 0:
            return
        if not self.started:
            kept = read_lines(self.curve, ("rollout",))[:number]
            write_atomic(self.curve, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.started = True
        line = {
            "rollout": number,
            "reward": float(rollout.outcome.mean()),
            "accuracy": sum(rollout.parts["accuracy"]) / len(rollout.texts),
            "adherence": float(rollout.adherence.nanmean().nan_to_num()),
            "share": report(rollout)["advantages/share"],
        }
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.every and number % self.every == 0:
            rows = completion_rows(number, records, rollout, self.image_root)
            with (self.curve.parent / f"completions-{number:05d}.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            log_table(self.logger, "completions", rows, images=self.images)


def _scale_by_batch(guidance: Guidance, rollout: Rollout) -> None:
    """Advantages by the deviation of the whole batch, of which a rank has a share."""
    correct = torch.tensor(rollout.parts["accuracy"]).view_as(rollout.outcome) == 1.0
    shares = gather((rollout.outcome, rollout.adherence, correct))
    outcome, adherence, right = (torch.cat(column) for column in zip(*shares, strict=True))
    total, terms = advantages(outcome, adherence, guidance, right)
    sizes = [len(one) for one, _, _ in shares]
    rollout.advantages, rollout.terms = total.split(sizes)[rank()], terms.split(sizes)[rank()]


def _gain(curve: Path) -> dict[str, float]:
    """Reward, accuracy, adherence and the terms' share of the advantage: means of the first and the last fifth, the
    gain between them, the best rollout."""
    rows = read_lines(curve, ("rollout", "reward", "accuracy", "adherence"))
    found: dict[str, float] = {}
    for key in ("reward", "accuracy", "adherence", "share"):
        found |= ends(key, [row.get(key, 0.0) for row in rows])
    return found
