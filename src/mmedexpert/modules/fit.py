"""One training loop for all stages: Lightning's Trainer over a stream that can start at any step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import get_cosine_schedule_with_warmup

from mmedexpert.progress import Bar

Stream = Callable[[int], Iterator[Any]]


class TrainingModule(L.LightningModule):
    """What every stage's module shares: the optimiser step, its schedule, checkpoints of the trained weights alone.

    A batch is a whole optimiser step; `training_step` hands its loss in parts to `descend`. A step whose gradient is
    not finite is skipped and counted as `skipped_steps`. Randomness depends on (seed, step) only, so that a resumed
    run repeats what an uninterrupted one does.
    """

    automatic_optimization = False

    def __init__(self, *, seed: int, steps: int, warmup_ratio: float, max_grad_norm: float) -> None:
        super().__init__()
        self.seed, self.steps, self.warmup_ratio, self.max_grad_norm = seed, steps, warmup_ratio, max_grad_norm
        self.strict_loading = False
        self.skipped_steps = 0

    def optimizer(self) -> torch.optim.Optimizer:
        raise ValueError("a training module defines its optimizer")

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        # ours: a cosine to zero after a linear warm-up, for every stage
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup_ratio * self.steps), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, self.global_step))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay where they are: packing moves what it needs, once."""
        return batch

    def descend(self, losses: Iterator[Tensor], parts: int) -> None:
        """One optimiser step on a loss whose `parts` add up, each with a graph of its own."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for _ in range(parts):
            self.manual_backward(next(losses))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if not torch.isfinite(norm):
            self.skipped_steps += 1
            for parameter in parameters:
                parameter.grad = None
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log_dict({"grad_norm": norm, "skipped_steps": float(self.skipped_steps)})

    def over_ranks(self, value: Tensor) -> Tensor:
        """The mean over the devices: a normaliser that gives each its share of the whole batch's loss."""
        return self.trainer.strategy.reduce(value.float(), reduce_op="mean")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint["skipped_steps"]


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_indices(size: int, batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """Endless batches of shuffled indices, epoch after epoch, from batch number `start` on; the same for one seed."""
    position = start * batch_size
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            epoch, offset = divmod(position, size)
            order = np.random.default_rng([seed, epoch]).permutation(size)
            taken = order[offset : offset + batch_size - len(batch)]
            batch += taken.tolist()
            position += len(taken)
        yield batch


class _FromStep(IterableDataset):
    def __init__(self, stream: Stream, start: Callable[[], int]) -> None:
        self.stream, self.start = stream, start

    def __iter__(self) -> Iterator[Any]:
        return self.stream(self.start())


class Checkpoint(Callback):
    """Writes `last.ckpt` every n steps, whole or not at all."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step and step % self.every == 0 and step < trainer.max_steps and step != getattr(self, "written", None):
            part = self.path.with_suffix(".part")
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                os.replace(part, self.path)
            self.written = step


class Steps(Callback):
    """The bar of a training: optimiser steps and the module's `prog_bar` numbers."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar = Bar(self.title, int(trainer.max_steps), hidden=not trainer.is_global_zero)
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.bar.show(trainer.global_step, {k: float(v) for k, v in trainer.progress_bar_metrics.items()})

    def teardown(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def fit(
    module: TrainingModule,
    stream: Stream,
    *,
    folder: Path,
    title: str = "train",
    checkpoint_every: int,
    accelerator: str = "auto",
    devices: int = 1,
    precision: Any = "32-true",
    logger: Any = None,
) -> None:
    """Train `module` for its `steps`, from `folder`/last.ckpt when an earlier try left one.

    `stream(step)` yields a batch for each optimiser step from `step` on.
    """
    path = folder / "last.ckpt"
    trainer = L.Trainer(
        max_steps=module.steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        logger=logger or False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Checkpoint(path, checkpoint_every), Steps(title)],
        default_root_dir=folder,
    )
    steps = _FromStep(stream, lambda: trainer.global_step)
    loader: Iterable[Any] = DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, ckpt_path=str(path) if path.exists() else None, weights_only=True)
    path.unlink(missing_ok=True)
