"""From records to token ids and pixel patches, for Qwen-VL models: one prompt layout for training and evaluation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmedexpert.data.images import open_image
from mmedexpert.data.record import Record

IMAGE_TOKEN = "<|image_pad|>"
IGNORE = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: `input_ids` [P] with image tokens expanded, patches of its images and their grids [I, 3]."""

    input_ids: list[int]
    pixel_values: list[Tensor]
    image_grid_thw: list[Tensor]


def prompt_text(record: Record, instruction: str = "") -> str:
    """Question, lettered options and, at the very end, the perspective's instruction (so that prefixes are shared)."""
    parts = [record.question, *(f"{letter}. {text}" for letter, text in (record.options or {}).items())]
    return "\n".join([*parts, instruction] if instruction else parts)


def target_text(record: Record) -> str:
    """The completion trained by SFT; a record without a trace gets its bare conclusion as thought. # ours"""
    answer_text = record.options[record.answer] if record.options else record.answer
    steps = record.trace.steps if record.trace else (f"So {answer_text} {record.answer}.",)
    return f"<think>{' '.join(steps)}</think><answer>{record.answer}</answer>"


class Encoder:
    """Tokenises prompts and completions and patches images, keeping the last `max_images` images in memory."""

    def __init__(
        self, tokenizer: Any, image_processor: Any, *, system_prompt: str | None = None, max_images: int = 1024
    ) -> None:
        self.tokenizer, self.image_processor, self.system_prompt = tokenizer, image_processor, system_prompt
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_ids: list[int] = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        vision = ("<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN, "<|video_pad|>")
        self.banned_ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in vision]
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        self._images: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._max_images = max_images

    def patches(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Patches [patches, channels] and grid [3] of one image."""
        out = self.image_processor(images=[image], return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"][0]

    def image(self, path: Path) -> tuple[Tensor, Tensor]:
        """The patches of an image file, from memory when it was used lately."""
        key = str(path)
        if key not in self._images:
            self._images[key] = self.patches(open_image(path))
            if len(self._images) > self._max_images:
                self._images.popitem(last=False)
        self._images.move_to_end(key)
        return self._images[key]

    def chat(self, text: str, images: Sequence[tuple[Tensor, Tensor]]) -> Prompt:
        """One user turn (images first) and the start of the assistant's, through the model's chat template."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        string = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = string.split(IMAGE_TOKEN)
        merge = self.image_processor.merge_size**2
        for (_, grid), index in zip(images, range(1, len(pieces)), strict=True):
            pieces[index] = IMAGE_TOKEN * (int(grid.prod()) // merge) + pieces[index]
        ids = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        return Prompt(ids, [patches for patches, _ in images], [grid for _, grid in images])

    def prompt(self, record: Record, image_root: Path, instruction: str = "") -> Prompt:
        """The encoded prompt of a record; UserError for an image that cannot be opened."""
        return self.chat(prompt_text(record, instruction), [self.image(image_root / path) for path in record.images])

    def completion(self, text: str) -> list[int]:
        """Token ids of a completion and its end-of-turn token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + self.end_ids[:1]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion; the answer tags stay, end-of-turn and padding go."""
        drop = {*self.end_ids, self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False)

    def _inputs(self, ids: Tensor, mask: Tensor, prompts: Sequence[Prompt]) -> Batch:
        batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self.image_token_id).int()}
        patches = [patch for prompt in prompts for patch in prompt.pixel_values]
        if patches:
            batch["pixel_values"] = torch.cat(patches).float()
            batch["image_grid_thw"] = torch.stack([grid for prompt in prompts for grid in prompt.image_grid_thw])
        return batch

    def collate_prompts(self, prompts: Sequence[Prompt]) -> Batch:
        """Left-padded prompts [B, P] for generation."""
        width = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            mask[row, width - len(prompt.input_ids) :] = 1
        return self._inputs(ids, mask, prompts)

    def collate(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> tuple[Batch, Tensor]:
        """Right-padded prompt + completion [B, L] and labels [B, L] (prompt and padding ignored)."""
        width = max(len(p.input_ids) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = len(prompt.input_ids), len(prompt.input_ids) + len(completion)
            ids[row, :end] = torch.tensor([*prompt.input_ids, *completion])
            mask[row, :end] = 1
            labels[row, start:end] = torch.tensor(completion)
        return self._inputs(ids, mask, prompts), labels
