"""What every stage's module shares: one optimiser step on a batch, whatever its loss."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from mmedexpert.errors import UserError
from mmedexpert.models.backbone import core_of
from mmedexpert.runtime.runs import console
from mmedexpert.training.batches import Item, step_seed
from mmedexpert.training.memory import MicroBatches, NoRoom, fitting


class TrainingModule(L.LightningModule):
    """The optimiser step, its schedule, checkpoints of the trained weights alone.

    A batch is a whole optimiser step; `update` hands its loss in parts to `descend`. A step whose gradient is not
    finite is skipped and counted as `skipped_steps`. Randomness depends on (seed, step) and the rank only, so that a
    resumed run repeats what an uninterrupted one does. Of several devices each has its share of a batch.

    With micro_batch_tokens AUTO a step that runs out of memory is done again from its beginning, in smaller passes, and
    counted as `memory/halved`; UserError where a single row does not fit. A checkpoint keeps the passes' size.
    """

    automatic_optimization = False
    model: Any
    lr: float
    weight_decay: float

    def __init__(
        self, *, seed: int, steps: int, warmup_ratio: float, max_grad_norm: float,
        micro_batch_tokens: int | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.passes = MicroBatches(micro_batch_tokens)
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

    def on_train_start(self) -> None:
        if not self.passes.auto or self.passes.found:
            return
        computed = 2 if self.trainer.precision in ("bf16-mixed", "bf16") else None
        begun, devices = self.global_step > 0, self.trainer.world_size
        tokens = fitting(self.model, self.device, computed=computed, begun=begun, devices=devices)
        if tokens is not None:  # all ranks take the smallest
            tokens = int(self.over_ranks(torch.tensor(tokens, device=self.device), "min"))
        self.passes.take(tokens)
        size = "a step is one pass, on a CPU" if tokens is None else f"passes of at most {tokens:,} tokens"
        self._say(f"trainer.micro_batch_tokens=auto: {size}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed()

    def _seed(self) -> None:
        torch.manual_seed(step_seed(self.seed, self.global_step) + self.global_rank)

    def _say(self, line: str) -> None:
        if self.global_rank == 0:
            console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        while True:
            self.passes.step.clear()
            try:
                self.update(batch)
                break
            except NoRoom as full:
                self._halve(full.here)
        if self.passes.auto:
            self.log("memory/halved", float(self.passes.halved))
            self.log("memory/micro_batch_tokens", float(self.passes.tokens or 0))  # 0: a step is one pass

    def update(self, batch: Any) -> None:
        """One optimiser step, and its numbers."""
        raise NotImplementedError

    def _halve(self, here: bool) -> None:
        """Smaller passes, on all ranks those of the one that needs the smallest; the step's random numbers begin
        again."""
        wanted = torch.tensor(self.passes.smaller() if here else 2**24, device=self.device)
        if not (tokens := int(self.over_ranks(wanted, "min"))):
            raise UserError(
                f"step {self.global_step + 1}: a sequence of {self.passes.longest():,} tokens alone does not fit in "
                "the memory of this device: lower model.max_pixels or model.max_new_tokens, set "
                "model.gradient_checkpointing=true, or use a card of more memory (stage=plan says what fits)"
            )
        self.passes.take(tokens, halved=True)
        self._say(f"step {self.global_step + 1} ran out of memory: again in passes of at most {tokens:,} tokens")
        self._seed()

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
        """One optimiser step on a loss whose `parts` add up, each with a graph of its own; NoRoom before anything is
        changed."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.passes.auto:
            self._try(losses, parts, parameters)
        else:
            try:
                self._backward(losses, parts)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"step {self.global_step + 1} ran out of memory: give trainer.micro_batch_tokens a smaller number "
                    f"than {self.passes.tokens}, or auto, which goes on in smaller passes (stage=plan says what fits)"
                ) from error
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

    def _backward(self, losses: Iterator[Tensor], parts: int, together: bool = True) -> None:
        """The gradients of all parts; of `together`, DDP averages them over the ranks in the last backward pass."""
        strategy = self.trainer.strategy
        for left in reversed(range(parts)):
            apart = left > 0 or not together
            with strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) and apart else nullcontext():
                self.manual_backward(next(losses))

    def _try(self, losses: Iterator[Tensor], parts: int, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients, where all ranks have room for theirs: they average them once all of them say so, since one
        that is out of memory in the middle of an average would leave the others waiting."""
        failed = False
        try:
            self._backward(losses, parts, together=False)
        except torch.OutOfMemoryError:
            failed = True  # what follows waits until the error is gone: its traceback holds the pass
        if failed:
            _forget(losses, parameters)
        if self.over_ranks(torch.tensor(failed, device=self.device), "max"):
            _forget(losses, parameters)
            raise NoRoom(failed)
        for parameter in parameters if self.trainer.world_size > 1 else ():
            given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.over_ranks(given).to(parameter.dtype)

    def over_ranks(self, value: Tensor, how: str = "mean") -> Tensor:
        """The mean over the devices: a normaliser that gives each its share of the whole batch's loss; or min, max."""
        return self.trainer.strategy.reduce(value.float(), reduce_op=how)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["metrics"] = self.metrics
        if self.passes.auto:
            checkpoint["passes"] = {"tokens": self.passes.tokens, "halved": self.passes.halved}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps, self.metrics = checkpoint["skipped_steps"], checkpoint["metrics"]
        if self.passes.auto and (kept := checkpoint.get("passes")):
            self.passes.take(kept["tokens"])
            self.passes.halved = kept["halved"]


def _forget(losses: Iterator[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Give back what a step holds that is not done: the pass of its generator, and gradients."""
    if isinstance(losses, Generator):
        losses.close()
    for parameter in parameters:
        parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
