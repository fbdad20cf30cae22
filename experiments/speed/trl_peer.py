"""TRL's GRPO, SFT and DPO trainers as the peers of a speed comparison; importing this needs trl and datasets."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl.trainer.utils
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from tiny_vl import LR, MAX_GRAD_NORM, Question, Row, Stopwatch, lora_config, reward
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")
NAME = f"trl {trl.__version__}"
MESSAGES = [{"role": Value("string"), "content": Value("string")}]


class CountingGRPO(GRPOTrainer):
    """GRPOTrainer that keeps what each micro-batch was trained on."""

    trained: list[Any]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.trained.append((inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_mask"]))
        return super()._compute_loss(model, inputs)


class CountingSFT(SFTTrainer):
    """SFTTrainer that keeps what each batch was trained on."""

    trained: list[Any]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.trained.append((inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100))
        return super().compute_loss(model, inputs, *args, **kwargs)


class CountingDPO(DPOTrainer):
    """DPOTrainer that keeps what each batch was trained on: the better replies, then the worse ones."""

    trained: list[Any]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self.trained.append((inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]))
        return super()._compute_loss(model, inputs, return_outputs)


class Turns(TrainerCallback):
    """Stops the clock after each of the trainer's steps, data loading included, and gives the other side its turn."""

    def __init__(self, watch: Stopwatch, trained: list[Any], turn: Callable[[list[Row]], None]) -> None:
        self.watch, self.trained, self.turn = watch, trained, turn

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.stop()
        self.turn([row for batch in self.trained for row in rows(*batch)])
        self.trained.clear()
        self.watch.start()


def rows(ids: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor) -> list[Row]:
    """Each row's ids without padding, and the number of tokens it is trained on."""
    each = zip(ids, mask, counted, strict=True)
    return [(tuple(row[kept.bool()].tolist()), int(scored.sum())) for row, kept, scored in each]


def score_labels_only() -> None:
    """On CPU too only labelled positions pass through TRL's head, as they do on CUDA."""
    trl.trainer.utils._use_triton = lambda device: True  # the switch in utils alone; the kernels keep their torch path


def common(folder: str, steps: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that both trainers get."""
    return {
        "output_dir": folder, "max_steps": steps, "learning_rate": LR, "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": False, "bf16": dtype == torch.bfloat16, "use_cpu": device == "cpu", "seed": 0,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }  # fmt: skip


def grpo(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[Question],
    *,
    num_generations: int,
    prompts_per_step: int,
    max_new_tokens: int,
    micro_batch: int,
    banned_ids: Sequence[int],
    watch: Stopwatch,
    turn: Callable[[list[Row]], None],
) -> None:
    """Optimiser steps of GRPOTrainer over all questions in order; after each, `turn` gets the rows it trained on.

    A row's ids are its prompt's. Every completion has exactly `max_new_tokens` tokens. `banned_ids` are never sampled:
    an image placeholder in a completion makes the update fail.
    """
    score_labels_only()
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question.text}] for question in questions],
            "image": [str(question.image) for question in questions],
        },
        features=Features({"prompt": MESSAGES, "image": ImageColumn()}),
    )
    trained: list[Any] = []
    completions = num_generations * prompts_per_step
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingGRPO(
            model=model,
            reward_funcs=lambda completions, **_: reward([completion[0]["content"] for completion in completions]),
            args=GRPOConfig(
                **common(folder, len(questions) // prompts_per_step, watch.device, model.dtype),
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=completions // micro_batch,
                num_generations=num_generations,
                max_completion_length=max_new_tokens,
                beta=0.0,
                loss_type="dapo",
                shuffle_dataset=False,
                generation_kwargs={"min_new_tokens": max_new_tokens, "suppress_tokens": list(banned_ids)},
            ),
            train_dataset=data,
            processing_class=processor,
            peft_config=lora_config(),
            callbacks=[Turns(watch, trained, turn)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.trained = trained
        trainer.train()


def sft(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Question],
    *,
    batch_size: int,
    watch: Stopwatch,
    turn: Callable[[list[Row]], None],
) -> None:
    """Optimiser steps of SFTTrainer over all samples in order; after each, `turn` gets the rows it trained on."""
    score_labels_only()
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": sample.text}] for sample in samples],
            "completion": [[{"role": "assistant", "content": sample.answer}] for sample in samples],
            "image": [str(sample.image) for sample in samples],
        },
        features=Features({"prompt": MESSAGES, "completion": MESSAGES, "image": ImageColumn()}),
    )
    trained: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingSFT(
            model=model,
            args=SFTConfig(
                **common(folder, len(samples) // batch_size, watch.device, model.dtype),
                per_device_train_batch_size=batch_size,
                max_length=None,  # its default of 1024 would cut image tokens off
                train_sampling_strategy="sequential",
            ),
            train_dataset=data,
            processing_class=processor,
            peft_config=lora_config(),
            callbacks=[Turns(watch, trained, turn)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.trained = trained
        trainer.train()


def dpo(
    model: PreTrainedModel,
    processor: Any,
    pairs: Sequence[tuple[Question, str]],
    *,
    batch_size: int,
    beta: float,
    watch: Stopwatch,
    turn: Callable[[list[Row]], None],
) -> None:
    """Optimiser steps of DPOTrainer over all pairs in order, a question with its better answer and the worse one;
    after each, `turn` gets the rows it trained on. The reference is the model without its adapter."""
    score_labels_only()
    said = {"chosen": [one.answer for one, _ in pairs], "rejected": [worse for _, worse in pairs]}
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": one.text}] for one, _ in pairs],
            **{name: [[{"role": "assistant", "content": text}] for text in texts] for name, texts in said.items()},
            "image": [str(one.image) for one, _ in pairs],
        },
        features=Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "image": ImageColumn()}),
    )
    trained: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingDPO(
            model=model,
            args=DPOConfig(
                **common(folder, len(pairs) // batch_size, watch.device, model.dtype),
                per_device_train_batch_size=batch_size,
                beta=beta,
                max_length=None,
                train_sampling_strategy="sequential",
            ),
            train_dataset=data,
            processing_class=processor,
            peft_config=lora_config(),
            callbacks=[Turns(watch, trained, turn)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.trained = trained
        trainer.train()
