"""The method again, in plain torch and stock transformers: what the stages' numbers are compared with.

Nothing here packs, shares prefixes, caches, merges in place or uses PEFT: one padded row for each completion, weights
summed as matrices, formulas as in the papers. Texts of prompts are written out, not built by the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmedexpert.data.record import Record

INSTRUCTIONS = {
    "differential": "Reason by differential diagnosis.",
    "intuitive": "Reason by intuition.",
    "analytical": "Reason by analysis.",
    "bayesian": "Reason by Bayesian update.",
}
Weights = dict[str, Tensor]  # of the base model, by their names there


def user_turn(record: Record, perspective: str | None) -> str:
    """Question, options, and at the very end the instruction."""
    options = "\n".join(f"{letter}. {text}" for letter, text in (record.options or {}).items())
    return f"{record.question}\n{options}" + (f"\n{INSTRUCTIONS[perspective]}" if perspective else "")


def conversation(record: Record, perspective: str | None) -> str:
    """The prompt of a record with one image, in the words of the model's chat template."""
    seen = "<|vision_start|><|image_pad|><|vision_end|>"  # an image of 28 x 28 pixels is one token
    return f"<|im_start|>user\n{seen}{user_turn(record, perspective)}<|im_end|>\n<|im_start|>assistant\n"


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and alpha / r of every weight that a PEFT folder targets (all of one rank)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    scaling = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.") + ".weight": (
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scaling
        )
        for name in names
    }  # fmt: skip


def deltas(adapter: Path) -> Weights:
    """The update of every weight that a PEFT folder targets: alpha / r * B A."""
    return {name: scaling * b @ a for name, (a, b, scaling) in factors(adapter).items()}


def mean(updates: Sequence[Weights]) -> Weights:
    return {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}  # type: ignore[misc]


def added(*parts: Weights) -> Weights:
    """The sum of updates, each of which may leave weights alone."""
    names = {name for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}  # type: ignore[misc]


class Plain:
    """A model folder as stock transformers runs it, asked about records of one data set."""

    def __init__(self, folder: Path, image_root: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").float().eval()
        self.model.requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=784, max_pixels=784)
        self.image_root = image_root
        self.weights: Weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def changed(self, update: Weights) -> Weights:
        """The base's weights and an update of some of them."""
        return self.weights | {name: self.weights[name] + delta for name, delta in update.items()}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batch(self, rows: Sequence[list[int]], images: Sequence[Path], left: bool) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
            ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        seen = self.images(images=[Image.open(path).convert("RGB") for path in images], return_tensors="pt")
        kinds = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **seen}

    def logps(
        self, weights: Weights, asked: Sequence[tuple[Record, str | None]], completions: Sequence[list[int]],
        temperature: float = 1.0, banned: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        """[N, T] log-probabilities of the completions' tokens under `weights`, 0 where there is none; `banned` tokens
        have no chance."""
        prompts = [self.ids(conversation(*one)) for one in asked]
        rows = [[*prompt, *said] for prompt, said in zip(prompts, completions, strict=True)]
        batch = self._batch(rows, [self.image_root / record.images[0] for record, _ in asked], left=False)
        logits = functional_call(self.model, weights, kwargs={**batch, "use_cache": False}).logits.float()
        all_logps = (logits.index_fill(2, torch.tensor(banned).long(), -torch.inf) / temperature).log_softmax(-1)
        found = torch.zeros(len(rows), max(map(len, completions)))
        for row, (prompt, said) in enumerate(zip(prompts, completions, strict=True)):
            places = torch.arange(len(prompt) - 1, len(prompt) + len(said) - 1)
            found[row, : len(said)] = all_logps[row, places, torch.tensor(said)]
        return found

    @torch.no_grad()
    def greedy(
        self, update: Weights, asked: Sequence[tuple[Record, str | None]], max_new_tokens: int,
        image: Path | None = None,
    ) -> list[str]:  # fmt: skip
        """The greedy answers of the base with an update; `image` stands in place of every record's."""
        paths = [image or self.image_root / record.images[0] for record, _ in asked]
        batch = self._batch([self.ids(conversation(*one)) for one in asked], paths, left=True)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for name, weight in self.changed(update).items():
            self.model.get_parameter(name).copy_(weight)
        out = self.model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        for name, weight in self.weights.items():
            self.model.get_parameter(name).copy_(weight)
        texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
        return [text.split("<|im_end|>")[0] for text in texts]


def cosine_schedule(step: int, *, steps: int, warmup: int, lr: float) -> float:
    """The learning rate of a step: linear from 0 over the warm-up, then half a cosine down to 0 at the last."""
    if step < warmup:
        return lr * step / warmup
    angle = torch.pi * (step - warmup) / (steps - warmup)
    return lr * 0.5 * (1 + float(torch.cos(torch.tensor(angle))))


def scaled(values: np.ndarray, whole: bool) -> np.ndarray:
    """(x - mean of the group) / (deviation + 1e-4) over those that have a value: [B, G]."""
    out = np.zeros_like(values)
    for b, group in enumerate(values):
        known = ~np.isnan(group)
        spread = values[~np.isnan(values)] if whole else group[known]
        out[b, known] = (group[known] - group[known].mean()) / (np.std(spread, ddof=1) + 1e-4)
    return out
