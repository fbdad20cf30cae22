"""`stage=pretrain`: the base. Real ones are looked up (hub id or folder); the tiny one comes with the package.

It was taught here once, as `experiments/base` tells; `stage=pretrain` teaches another, and so does every stage with
`model.shipped=null`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmedexpert import models
from mmedexpert.errors import UserError
from mmedexpert.models.backbone import resolve, save_backbone
from mmedexpert.models.checkpoint import fingerprint_model, new_folder
from mmedexpert.models.encode import TAGS, Encoder, Prompt
from mmedexpert.reporting.cards import write_card
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import ArchitectureConfig, Config, ModelConfig, PretrainConfig
from mmedexpert.sources.phantom import lessons
from mmedexpert.stages.common import Base, fit_options, stage_run
from mmedexpert.training.batches import Stream

SHIPPED = Path(models.__file__).parent / "shipped"  # what `experiments/base/ship.py` wrote


def base_of(config: Config) -> Base:
    """The base of the pipeline, pretrained here first when the model is built in code."""
    if not config.model.taught_here:
        folder = found(config.model)
        return Base(folder, fingerprint_model(folder))
    run_ = _pretrain(config)
    return Base(run_.folder / "model", run_.run_id)


def run(config: Config) -> dict[str, Run]:
    """Pretrain the tiny base where it is asked for; one that has weights already needs nothing."""
    if config.model.name_or_path is not None or not (config.model.taught_here or config.stage.name == "pretrain"):
        base_of(config)
        return {}
    return {"base": _pretrain(config)}


def found(model: ModelConfig) -> Path:
    """The folder of a base that has weights: a model's, or the one that comes with the package; UserError if none."""
    if model.name_or_path is not None:
        return resolve(model.name_or_path, model.revision)
    weights = SHIPPED / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != model.shipped:
        raise UserError(
            f"{weights} is not the file that model.shipped={model.shipped} names (its sha256): install mmedexpert "
            "again, or let the base be taught here with model.shipped=null"
        )
    return SHIPPED


def _pretrain(config: Config) -> Run:
    architecture, settings = config.model.architecture, config.pretrain
    assert architecture is not None  # checks.check
    key = {
        "architecture": asdict(architecture),
        "pretrain": {**asdict(settings), "checkpoint_every": None},
        "trainer": {"precision": config.trainer.precision},
        "rules": versions("lessons", "prompts", "batches", "optimiser", "sft"),
    }

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.models import tiny  # transformers and Lightning, which take seconds
        from mmedexpert.training.fit import fit
        from mmedexpert.training.sft import PretrainModule

        with run.phase("prepare"):
            tokenizer = tiny.build_tokenizer(corpus(config.seed), architecture.vocab_size)
            encoder = Encoder(tokenizer, tiny.build_image_processor(architecture.image_size))
            model = tiny.build_model(tokenizer, seed=config.seed, **_sizes(architecture))
            stream = lesson_stream(encoder, settings, config.seed)
            steps = settings.reading_steps + settings.looking_steps
        module = PretrainModule(
            model, encoder, muon_lr=settings.muon_lr, lr=settings.lr, weight_decay=0.01, seed=config.seed, steps=steps,
            warmup_ratio=0.05, max_grad_norm=1.0,  # ours
        )  # fmt: skip
        with run.phase("train"):
            metrics = fit(
                module, stream, folder=run.folder, title=f"pretrain {run.name}",
                checkpoint_every=settings.checkpoint_every, logger=run.logger, **fit_options(config),
            )  # fmt: skip
        with new_folder(run.folder / "model", sum(p.nbytes for p in model.parameters()), replace=True) as folder:
            save_backbone(folder, model, encoder)
        write_card(
            run.folder / "model", kind="base", title="mmedexpert tiny base", base_model=None, base_fingerprint=None,
            method="lessons on phantom drawings: reading options, measuring, following a stated criterion",
            data={"phantom lessons": "Apache-2.0"}, specialty=None, ingredients={}, metrics=None,
            library_name="transformers",
        )  # fmt: skip
        return {"parameters": float(sum(p.numel() for p in model.parameters())), **metrics}

    return stage_run(config, "pretrain", config.model.name, key, work)


def _sizes(architecture: ArchitectureConfig) -> dict[str, Any]:
    return {k: v for k, v in asdict(architecture).items() if k not in ("vocab_size", "image_size")}


@cache
def corpus(seed: int) -> tuple[str, ...]:
    """The text the tokenizer is trained on: the lessons, cut where a conversation has a special token.

    Kept: drawing the images of its lessons, from the same random numbers, takes seconds in each job of a sweep.
    """
    rng = np.random.default_rng([seed, 7])
    texts = []
    for teach, count in ((lessons.reading, 1000), (lessons.copying, 500), (lessons.looking, 2500)):
        for _ in range(count):
            lesson = teach(rng)
            texts += ["user\n", lesson.prompt, "assistant\n", *re.split("|".join(TAGS), lesson.completion)]
    return tuple(texts)


def lesson_stream(encoder: Encoder, settings: PretrainConfig, seed: int) -> Stream:
    """Reading and copying, then looking; any step can be made again from the seed."""
    from mmedexpert.training.batches import Samples

    def image_batch(step: int) -> Samples:
        rng = np.random.default_rng([seed, 0, step])
        taught = [lessons.looking(rng) for _ in range(settings.batch_size)]
        prompts = [encoder.chat(lesson.prompt, [encoder.patches(lesson.image)]) for lesson in taught if lesson.image]
        return Samples(prompts, [encoder.completion(lesson.completion) for lesson in taught])

    def text_batch(step: int) -> Samples:
        rng = np.random.default_rng([seed, 1, step])
        taught = [(lessons.copying if row % 2 else lessons.reading)(rng) for row in range(settings.text_batch_size)]
        prompts = [Prompt(encoder.tokenizer(lesson.prompt)["input_ids"], []) for lesson in taught]
        answers = [encoder.tokenizer(lesson.completion)["input_ids"] for lesson in taught]
        scored = []
        for lesson, answer in zip(taught, answers, strict=True):
            words = {encoder.tokenizer(f" {word}")["input_ids"][0] for word in lesson.scored or ()}
            scored.append([lesson.scored is None or token in words for token in answer])
        return Samples(prompts, answers, scored)

    def stream(step: int) -> Iterator[Samples]:
        for number in range(step, settings.reading_steps + settings.looking_steps):
            yield text_batch(number) if number < settings.reading_steps else image_batch(number)

    return stream
