"""One training loop for all stages: Lightning's Trainer over a stream that can start at any step."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset

from mmedexpert.runtime.files import sync
from mmedexpert.runtime.progress import Bar
from mmedexpert.runtime.ranks import gather, rank
from mmedexpert.runtime.runs import console
from mmedexpert.training.batches import Stream
from mmedexpert.training.curve import Curve
from mmedexpert.training.module import TrainingModule, whole


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, gathered from all ranks where they are sharded."""
    return {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def gathered(model: nn.Module | None) -> Iterator[None]:
    """Sharded weights are whole for a while: sampling reads all of them for every token, and ranks do not keep step."""
    sharded = [module for module in (model.modules() if model else ()) if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


class _FromStep(IterableDataset):
    """With a length: Lightning fetches a batch of unknown length ahead, and a rollout would be an update too old.

    `between` is called where a step has ended and been logged, and the next batch is not made yet.
    """

    def __init__(self, stream: Stream, start: Callable[[], int], steps: int, between: Callable[[], None]) -> None:
        self.stream, self.start, self.steps, self.between = stream, start, steps, between

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for batch in self.stream(self.start()):
            yield batch
            self.between()


class Checkpoint(Callback):
    """Writes `last.ckpt` every n steps and after the last, whole or not at all.

    It stays until the run is DONE: what comes of the training may still fail to be saved.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.written = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """A checkpoint where one is due, with the numbers of its step."""
        step, module = trainer.global_step, trainer.lightning_module
        if step == self.written or (step % self.every and step < trainer.max_steps):
            return
        assert isinstance(module, TrainingModule)
        module.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        part = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                sync(part)
                os.replace(part, self.path)
                sync(self.path.parent)
        finally:
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)  # where it could not be written: a full disk needs the room
        self.written = step


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file: torch reads over a flipped bit, so the sums in its archive are checked."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return f"{broken} is not what was written" if broken else None


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


class Warned(Callback):
    """Leaves SIGTERM to who has taken it before: a scheduler's warning of a preemption, which submitit passes over, so
    that the job is queued again. Lightning ends the training by it, and the job would count as ended."""

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if callable(self.handler):
            signal.signal(signal.SIGTERM, self.handler)


def fit(
    module: TrainingModule,
    stream: Stream,
    *,
    folder: Path,
    title: str = "train",
    checkpoint_every: int,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "ddp",
    precision: Any = "32-true",
    logger: Any = None,
) -> dict[str, float]:
    """Train `module` for its `steps`, from `folder`/last.ckpt when an earlier try left one; the last step's metrics.

    The last step is in that file, too, which is the caller's to remove: once it has saved what it trained. A damaged
    file is told, and training starts again. `stream(step)` yields a batch for each optimiser step from `step` on, on
    several devices each one's share of it.
    `strategy` of several: ddp, or fsdp (FSDP2).
    """
    path, size = folder / "last.ckpt", devices * num_nodes
    wrong = gather(damage(path) if rank() == 0 and path.exists() else None)[0]
    if wrong and rank() == 0:
        console.print(f"[yellow]{path} is damaged ({wrong}): {title} starts again at step 0[/yellow]", soft_wrap=True)
    checkpoint = Checkpoint(path, checkpoint_every)
    sharded = ModelParallelStrategy(size, 1, save_distributed_checkpoint=False) if strategy == "fsdp" else strategy
    trainer = L.Trainer(
        max_steps=module.steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=sharded if size > 1 else "auto",
        precision=precision,
        logger=logger or False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[checkpoint, Steps(title), Curve(folder), Warned()],
        default_root_dir=folder,
    )
    steps = _FromStep(stream, lambda: trainer.global_step, module.steps, between=lambda: checkpoint.save(trainer))
    loader: Iterable[Any] = DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)
    try:
        start = str(path) if path.exists() and not wrong else None
        trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    except SystemExit as exit_:
        if isinstance(exit_, SIGTERMException) or isinstance(exit_.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from exit_  # of which Lightning makes an exit
        raise  # submitit's, which begins this job anew
    return module.metrics
