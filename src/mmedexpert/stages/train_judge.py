"""The judges of `stage=judge`: a LoRA trained on preferences by SFT, by DPO or with a reward head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mmedexpert.data.pairs import DIMENSIONS, TIE, group_mark, pair_of
from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint, load_records
from mmedexpert.errors import UserError
from mmedexpert.judging import lessons
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import core_of, load_encoder
from mmedexpert.models.checkpoint import fingerprint_base
from mmedexpert.models.encode import Encoder
from mmedexpert.models.reward_head import RewardHead
from mmedexpert.reporting.cards import write_card
from mmedexpert.runtime.ranks import rank, ranks
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import BenchmarkConfig, Config, TrainedJudgeConfig
from mmedexpert.stages import benchmark, dsa
from mmedexpert.stages.answering import JUDGE
from mmedexpert.stages.common import Base, fit_options, loading, model_key, stage_run, training_key
from mmedexpert.stages.policy import policy_of
from mmedexpert.stages.pretrain import base_of

if TYPE_CHECKING:  # Lightning and PEFT, which take seconds
    from peft import PeftModel

    from mmedexpert.training.module import TrainingModule

TOLD = {
    "sft": "LoRA SFT on right verdicts with a short reason",
    "dpo": "LoRA DPO on right against wrong verdicts, from SFT",
    "scalar": "LoRA and a reward head, Bradley-Terry",
}


def pairs_of(config: Config, part: str) -> tuple[BenchmarkConfig, Run]:
    """The pairs of `pairs.train` or `pairs.val`, as a prepared set of their own. UserError where there are none."""
    told = config.pairs
    load = {**told.load, **getattr(told, part)}
    if told.root is None and load.get("_needs_root_") is not False:
        raise UserError(f"pairs={told.name} needs the folder that holds its files: pairs.root=<folder>")
    one = BenchmarkConfig(name=f"{told.name}-{part}", root=told.root, load=load, pairs=True, breakdowns=[told.part])
    return one, benchmark.prepared(config, one, where="pairs")


def trained(config: Config) -> Run:
    """The judge of `judge`; its adapter, and of `scalar` its head, are in `<folder>/adapter`."""
    settings, base = config.judge, base_of(config)
    _, source = pairs_of(config, "train")
    records, image_root = load_records(source.folder)
    pairs = [pair_of(record) for record in records]
    start = trained(replace(config, judge=replace(settings, name="sft"))) if settings.name == "dpo" else None
    steps, lr = _length(settings)
    dropout = 0.0 if settings.name == "dpo" else config.model.lora.dropout
    acting = ["batch_size", "warmup_ratio", "weight_decay", "max_grad_norm"]
    acting += ["beta", "sft_weight"] if start else []
    key = {
        "judge": {"steps": steps, "lr": lr, **{name: getattr(settings, name) for name in acting}},
        "lora": {**asdict(config.model.lora), "dropout": dropout},
        "model": model_key(config),
        "trainer": training_key(config, dropout=dropout > 0),
        "rules": versions("prompts", "batches", "optimiser", "pairwise", f"judge_{settings.name}"),
        "style": None if settings.name == "scalar" else config.model.instructions,
    }

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.training.fit import fit

        if rank() == 0 and (left := len(source.manifest["left_out"])):
            line = f"{config.pairs.name}: {left} pairs left out, see manifest.json in {source.folder}"
            console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)
        starts = [LoraAdapter.load(start.folder / "adapter")] if start else []
        encoder, model = load_encoder(base.folder, loading(config)), policy_of(config, base, starts, dropout=dropout)
        head = RewardHead(core_of(model).config.get_text_config().hidden_size, DIMENSIONS)
        module = _module(config, model, encoder, head)
        common: dict[str, Any] = {
            "batch_size": settings.batch_size, "seed": config.seed, "rank": rank(), "ranks": ranks(),
        }  # fmt: skip
        if settings.name == "scalar":
            stream = lessons.score_stream(pairs, encoder, image_root, **common)
        else:
            of = lessons.reply_stream if settings.name == "dpo" else lessons.verdict_stream
            stream = of(pairs, encoder, image_root, style=config.model.instructions, **common)
        with run.phase("train"):
            metrics = fit(
                module, stream, folder=run.folder, title=f"judge {settings.name}",
                checkpoint_every=settings.checkpoint_every, logger=run.logger, **fit_options(config),
            )  # fmt: skip
        _save(config, run, base, encoder, model, head, starts)
        if rank() == 0:
            _describe(config, run, base, records)
        return {"train_pairs": float(len(pairs)), **metrics}

    inputs = {"base": base.identity, "pairs": fingerprint(records, image_root)}
    if start:
        inputs["start"] = start.run_id
    return stage_run(config, "judge", settings.name, key, work, inputs, sources={"pairs": source}, every_rank=True)


def _length(settings: TrainedJudgeConfig) -> tuple[int, float]:
    """Optimiser steps and rate of this kind."""
    if settings.name == "dpo":
        return settings.dpo_steps, settings.dpo_lr
    return (settings.scalar_steps if settings.name == "scalar" else settings.steps), settings.lr


def _module(config: Config, model: PeftModel, encoder: Encoder, head: RewardHead) -> TrainingModule:
    from mmedexpert.training.preferences import DpoModule, RewardModule
    from mmedexpert.training.sft import SftModule

    settings = config.judge
    steps, lr = _length(settings)
    common: dict[str, Any] = {
        "lr": lr, "steps": steps,
        "weight_decay": settings.weight_decay, "warmup_ratio": settings.warmup_ratio, "seed": config.seed,
        "max_grad_norm": settings.max_grad_norm, "micro_batch_tokens": config.trainer.micro_batch_tokens,
    }  # fmt: skip
    if settings.name == "scalar":
        return RewardModule(model, encoder, head, **common)
    if settings.name == "dpo":
        return DpoModule(model, encoder, beta=settings.beta, sft_weight=settings.sft_weight, **common)
    return SftModule(model, encoder, **common)


def _save(
    config: Config, run: Run, base: Base, encoder: Encoder, model: PeftModel, head: RewardHead,
    starts: Sequence[LoraAdapter],
) -> None:  # fmt: skip
    """`<folder>/adapter`: one LoRA on the base, what it started from included; and the head of a reward model."""
    folder = run.folder / "adapter"
    dsa.save_adapter(run.folder / "update" if starts else folder, model, encoder, base.folder)
    if rank() > 0:
        return
    if starts:
        parts = [*starts, LoraAdapter.load(run.folder / "update")]
        dsa.save_sum(folder, parts, [1.0] * len(parts), base.folder, config)
    if config.judge.name == "scalar":
        head.save(folder)


def _describe(config: Config, run: Run, base: Base, records: Sequence[Record]) -> None:
    """Card and `judge.json`."""
    settings = config.judge
    pairs = [pair_of(record) for record in records]
    style = config.model.instructions
    ties = any(TIE in pair.labels.values() for pair in pairs)
    write_json(run.folder / "adapter" / JUDGE, {
        "kind": settings.name, "ties": ties, "style": style, "max_new_tokens": settings.max_new_tokens,
        "trained_groups": sorted({group_mark(pair) for pair in pairs}),
    })  # fmt: skip
    write_card(
        run.folder / "adapter", kind="adapter", title=f"judge of pairs of answers ({settings.name})",
        base_model=config.model.name_or_path, base_fingerprint=fingerprint_base(base.folder),
        method=TOLD[settings.name], data={f"{config.pairs.name} ({len(records)} pairs)": dsa.licences(list(records))},
        specialty=None, ingredients={}, metrics=None, library_name="peft",
    )  # fmt: skip
