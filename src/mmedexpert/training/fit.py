"""One training loop for all stages: Lightning's Trainer over a stream that can start at any step."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import get_cosine_schedule_with_warmup

from mmedexpert.models.backbone import core_of
from mmedexpert.runtime.files import sync
from mmedexpert.runtime.progress import Bar
from mmedexpert.runtime.ranks import gather, rank
from mmedexpert.runtime.runs import console
from mmedexpert.training.batches import Item, Stream, step_seed
from mmedexpert.training.curve import Curve


class TrainingModule(L.LightningModule):
    """What every stage's module shares: the optimiser step, its schedule, checkpoints of the trained weights alone.

    A batch is a whole optimiser step; `training_step` hands its loss in parts to `descend`. A step whose gradient is
    not finite is skipped and counted as `skipped_steps`. Randomness depends on (seed, step) and the rank only, so that
    a resumed run repeats what an uninterrupted one does. Of several devices each has its share of a batch.
    """

    automatic_optimization = False
    model: Any
    lr: float
    weight_decay: float

    def __init__(self, *, seed: int, steps: int, warmup_ratio: float, max_grad_norm: float) -> None:
        super().__init__()
        self.seed, self.steps, self.warmup_ratio, self.max_grad_norm = seed, steps, warmup_ratio, max_grad_norm
        self.strict_loading = False
        self.skipped_steps = 0
        self.metrics: dict[str, float] = {}  # of the last step; a run that a kill ended after it still knows them

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the trained parameters."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        # ours: a cosine to zero after a linear warm-up, for every stage
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup_ratio * self.steps), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, self.global_step) + self.global_rank)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay where they are: packing moves what it needs, once."""
        return batch

    def configure_model(self) -> None:
        """FSDP2: decoder layers are sharded, one after the other, so that a device never holds more than its shards and
        one layer; embedding, head and vision tower are frozen, and whole on each device."""
        if self.device_mesh is None:
            return
        language, mesh = core_of(self.model).model.language_model, self.device_mesh["data_parallel"]
        for layer in language.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        embedding = set(language.embed_tokens.parameters())
        fully_shard(language, mesh=mesh, reshard_after_forward=True, ignored_params=embedding)

    def weighted(self, parts: Sequence[Item]) -> list[tuple[Item, float]]:
        """Micro-batches with weight 1; under FSDP2 all ranks run as many, so the first is repeated with weight 0."""
        weighted = [(part, 1.0) for part in parts]
        if self.device_mesh is not None:
            most = self.over_ranks(torch.tensor(len(parts), device=self.device), "max")
            weighted += [(parts[0], 0.0)] * (int(most) - len(parts))
        return weighted

    def descend(self, losses: Iterator[Tensor], parts: int) -> None:
        """One optimiser step on a loss whose `parts` add up, each with a graph of its own."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        strategy = self.trainer.strategy
        for left in reversed(range(parts)):
            # DDP averages the gradients over the ranks in the last backward pass
            alone = strategy.block_backward_sync() if left and isinstance(strategy, DDPStrategy) else nullcontext()
            with alone:
                self.manual_backward(next(losses))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if not torch.isfinite(norm):
            self.skipped_steps += 1
            for parameter in parameters:
                parameter.grad = None
        optimizer.step()
        self.log("learning_rate", optimizer.param_groups[0]["lr"])
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log_dict({"grad_norm": norm, "skipped_steps": float(self.skipped_steps)})

    def over_ranks(self, value: Tensor, how: str = "mean") -> Tensor:
        """The mean over the devices: a normaliser that gives each its share of the whole batch's loss; or min, max."""
        return self.trainer.strategy.reduce(value.float(), reduce_op=how)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["metrics"] = self.metrics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps, self.metrics = checkpoint["skipped_steps"], checkpoint["metrics"]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
        callbacks=[checkpoint, Steps(title), Curve(folder)],
        default_root_dir=folder,
    )
    steps = _FromStep(stream, lambda: trainer.global_step, module.steps, between=lambda: checkpoint.save(trainer))
    loader: Iterable[Any] = DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)
    try:
        start = str(path) if path.exists() and not wrong else None
        trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    except SystemExit as exit_:  # what Lightning makes of an interruption
        raise KeyboardInterrupt from exit_
    return module.metrics
