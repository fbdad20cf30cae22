"""`stage=gba`: guideline-based advantages, GRPO from the experts' merge with four clinical reasoning perspectives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import load_encoder
from mmedexpert.models.checkpoint import fingerprint_base
from mmedexpert.models.encode import Encoder
from mmedexpert.reporting.cards import write_card
from mmedexpert.reporting.finals import ends
from mmedexpert.reporting.tables import print_table
from mmedexpert.reporting.tracking import log_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.ranks import gather, rank
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config, LoggerConfig
from mmedexpert.stages import dsa, merge
from mmedexpert.stages.common import Base, content_of, fit_options, ledger_of, loading, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.distil import distilled
from mmedexpert.stages.measured import DIFFICULTY, difficulty, learned_weights, passed, weights_in, with_weights, within
from mmedexpert.stages.policy import guidance_of, policy_of, sampler_of, servers_of
from mmedexpert.stages.pretrain import base_of
from mmedexpert.stages.reasoner_key import acting, acting_reward, learns_weights, reasoner_key
from mmedexpert.stages.scorers import judge_of, subject_of
from mmedexpert.training import hacking
from mmedexpert.training.grading import grader_of
from mmedexpert.training.losses import Correction, LossType
from mmedexpert.training.rollout_report import completion_rows, repetition, report
from mmedexpert.training.rollouts import Guidance, Rollout, advantages

if TYPE_CHECKING:  # Lightning and PEFT, which take seconds
    from peft import PeftModel

    from mmedexpert.training.gba import GbaModule


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
    merging = config.merge
    exact = merging.exact and merging.distil_steps > 0  # else the adapter, which RL starts from, is the merge as it is
    settings = replace(merging, lora_rank=config.model.lora.r * len(experts), exact=exact)
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
    paying = subject_of(config, config.reward.judge, "reward.judge") if config.reward.judge_weight else None
    if paying:
        inputs["judge"] = paying.identity
    hardness = difficulty(config, name, specialties, start) if settings.keep is not None else None
    if hardness:
        inputs["difficulty"] = hardness.run_id
    learned = learned_weights(config, name, specialties, start) if learns_weights(config) else None
    if learned:
        inputs["weights"] = learned.run_id

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.training.fit import fit
        from mmedexpert.training.gba import rollout_stream

        acts = config if learned is None else with_weights(config, weights_in(learned))
        if config.gba.grouping == "perspective" and not any(acts.gba.weights):
            raise UserError(
                "no perspective pays on validation, and gba.grouping=perspective would multiply every outcome by 0: "
                "use gba.grouping=question, or give gba.weights"
            )
        records, image_root = records_of(data, "train", specialties)
        if hardness and settings.keep is not None:
            records = within(records, passed(hardness.folder / DIFFICULTY), settings.keep)
        starts = [LoraAdapter.load(start.folder / "adapter")] if start else []
        grader = grader_of(acting_reward(acts), ledger_of(config))
        judge = judge_of(config, paying) if paying else None
        encoder, policy = load_encoder(base.folder, loading(config)), policy_of(config, base, starts)
        curve = run.folder / "curve.jsonl"
        sampler = servers_of(config, start, run, encoder, records, image_root)
        sample = sampler_of(acts, policy, encoder, image_root, grader, settings.num_generations, judge, sampler=sampler)
        with closing(sampler), run.phase("train"):
            stream = rollout_stream(
                records, sample,
                prompts_per_step=settings.prompts_per_step, num_iterations=settings.num_iterations, seed=config.seed,
                dynamic_sampling=settings.dynamic_sampling,
                settle=partial(_scale_by_batch, guidance_of(acts)) if settings.scale_rewards == "batch" else None,
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
        _write_cards(acts, run, base, {f"{data.name} ({len(records)} training records)": dsa.licences(records)}, starts)
        gained = _gain(curve)
        _tell_hacking(run, gained)
        weights = {f"weight/{one}": row for one, row in zip(PERSPECTIVES, acts.gba.weights, strict=True)}
        return {"train_records": float(len(records)), **metrics, **gained, **(weights if learned else {})}

    key, sources = reasoner_key(config, specialties, records_of(data, "train", specialties)[0]), {"data": data}
    return stage_run(config, "gba", name, key, work, inputs, sources=sources, every_rank=True)


def _module(config: Config, policy: PeftModel, encoder: Encoder) -> GbaModule:
    from mmedexpert.training.gba import GbaModule, Objective

    settings = config.gba
    objective = Objective(
        cast(LossType, settings.loss_type), settings.epsilon, settings.epsilon_high, settings.beta,
        settings.temperature, config.model.max_new_tokens, settings.mask_truncated_completions,
        cast(Correction, config.sampler.correction), config.sampler.truncate_at, config.sampler.mask_above,
    )  # fmt: skip
    return GbaModule(
        policy, encoder, objective, lr=settings.lr, weight_decay=settings.weight_decay,
        micro_batch_tokens=config.trainer.micro_batch_tokens, seed=config.seed, steps=settings.steps,
        warmup_ratio=settings.warmup_ratio, max_grad_norm=settings.max_grad_norm,
    )  # fmt: skip


def _write_cards(config: Config, run: Run, base: Base, data: Mapping[str, Any], starts: Sequence[LoraAdapter]) -> None:
    told = "GRPO with guideline-based advantages, " + ", ".join(f"{k}={v}" for k, v in acting(config).items())
    if (reward := acting_reward(config)).grader != "rules":
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
            **({"judge": float(rollout.judged.nanmean().nan_to_num())} if rollout.scored else {}),
            "length": float(rollout.mask.sum(1).float().mean()),
            "repetition": sum(map(repetition, rollout.texts)) / len(rollout.texts),
        }
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.every and number % self.every == 0:
            rows = completion_rows(number, records, rollout, self.image_root)
            told = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomic(self.curve.parent / f"completions-{number:05d}.jsonl", told.encode())
            log_table(self.logger, "completions", rows, images=self.images)


def _scale_by_batch(guidance: Guidance, rollout: Rollout) -> None:
    """Advantages by the deviation of the whole batch, of which a rank has a share."""
    correct = torch.tensor(rollout.parts["accuracy"]).view_as(rollout.outcome) == 1.0
    shares = gather((rollout.outcome, rollout.adherence, rollout.judged, correct))
    outcome, adherence, judged, right = (torch.cat(column) for column in zip(*shares, strict=True))
    sizes = [len(one) for one, *_ in shares]
    found = advantages(outcome, adherence, judged, guidance, right)
    rollout.advantages, rollout.terms, rollout.judge_term = (one.split(sizes)[rank()] for one in found)


def _gain(curve: Path) -> dict[str, float]:
    """Reward, accuracy, adherence, the terms' share of the advantage and so on: means of the first and the last fifth,
    the gain between them, the best rollout."""
    rows = read_lines(curve, ("rollout", "reward", "accuracy", "adherence"))
    found: dict[str, float] = {}
    for key in ("reward", "accuracy", "adherence", "share", "judge", "length", "repetition"):
        if any(key in row for row in rows):
            found |= ends(key, [row.get(key, 0.0) for row in rows])
    return found


def _tell_hacking(run: Run, gained: Mapping[str, float]) -> None:
    """What the completions came to, and where they earn more without being right more often."""
    print_table(hacking.rows(gained), f"Completions of {run.name} in training")
    run.notes["hacking"] = hacking.signs(gained)
    for line in run.notes["hacking"]:
        console.print(f"[yellow]{run.name}: {line}: read its completions[/yellow]", highlight=False, soft_wrap=True)
