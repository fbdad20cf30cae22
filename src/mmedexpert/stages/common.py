"""What the stages share: how a config becomes plain arguments, and what a stage hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from mmedexpert.data.record import Record
from mmedexpert.data.records_io import load_records
from mmedexpert.errors import UserError, suggestion
from mmedexpert.modules.backbone import Loading
from mmedexpert.runs import Run, execute
from mmedexpert.schema import Config
from mmedexpert.tracking import group_name, logger_for


@dataclass(frozen=True)
class Base:
    """The model everything starts from: its folder and an identity that changes with its weights."""

    folder: Path
    identity: str


def device_of(config: Config) -> str:
    """`cuda` where the trainer would use it, else `cpu`."""
    wanted = config.trainer.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={wanted}: no CUDA device here; use trainer.accelerator=cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def loading(config: Config) -> Loading:
    """How the config's model is loaded."""
    model = config.model
    return Loading(
        model.dtype,
        model.attn_implementation,
        model.min_pixels,
        model.max_pixels,
        model.system_prompt,
        device_of(config),
    )


def model_key(config: Config) -> dict[str, Any]:
    """What of the model's config changes a result: not its name, path or attention kernel."""
    model = config.model
    return {key: getattr(model, key) for key in ("dtype", "min_pixels", "max_pixels", "system_prompt")}


def stage_run(
    config: Config,
    stage: str,
    name: str,
    key: Mapping[str, Any],
    work: Callable[[Run], Mapping[str, float]],
    inputs: Mapping[str, str] | None = None,
    *,
    seed: int | None = None,
) -> Run:
    """`runs.execute` with the config's output folder and, if no other is given, its seed."""
    seed = config.seed if seed is None else seed
    return execute(stage, name, key, work, outputs=config.paths.outputs, seed=seed, inputs=inputs)


@contextmanager
def stage_logger(config: Config, run: Run) -> Iterator[Logger | None]:
    """The logger of a stage's run; W&B group = model, data and seed of the pipeline."""
    group = group_name(config.model.name, config.data.name, config.seed)
    settings = config.logger
    with logger_for(run, kind=settings.name, project=settings.project, group=group, config=asdict(config)) as logger:
        yield logger


def records_of(data: Run, split: str, specialties: list[str]) -> tuple[list[Record], Path]:
    """The records of a split that belong to any of the specialties, and the image root; UserError without any."""
    records, image_root = load_records(data.folder)
    chosen = [r for r in records if r.split == split and set(r.specialties) & set(specialties)]
    missing = [name for name in specialties if not any(name in r.specialties for r in chosen)]
    if missing:
        known = sorted({name for r in records for name in r.specialties})
        raise UserError(
            f"specialty {missing[0]!r} has no {split} record in data {data.name}{suggestion(missing[0], known)} "
            f"(data set folder {data.folder})"
        )
    return chosen, image_root


def fit_options(config: Config) -> dict[str, Any]:
    """Lightning's part of `modules.fit.fit`."""
    trainer = config.trainer
    return {"accelerator": trainer.accelerator, "devices": trainer.devices, "precision": trainer.precision}
