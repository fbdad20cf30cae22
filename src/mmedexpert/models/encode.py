"""From records to token ids and pixel patches, for Qwen-VL models: one prompt layout for training and evaluation."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmedexpert.data.images import image_size, open_image
from mmedexpert.data.record import Record
from mmedexpert.guidelines import instructions

IMAGE_TOKEN = "<|image_pad|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of the trained format: tokens of the tiny tokenizer
MARKS = range(0xE000, 0x110000)  # characters of private use and beyond
IGNORE = -100
PATCHES = 16384  # ours: in one call of the vision tower, 8 images of 400,000 pixels
CACHE_BYTES = 2 * 2**30  # ours: images an encoder keeps, as patches or, once seen, as features
Batch = dict[str, Any]  # a model's keyword arguments


@dataclass(eq=False)
class EncodedImage:
    """`patches` [patches, channels] and `grid` [3] of one image; once a frozen vision tower has seen it, its output
    takes the place of the patches."""

    grid: Tensor
    patches: Tensor | None
    seen: Any = None
    kept: bool = False  # in an encoder's memory


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: `input_ids` [P] with image tokens expanded, and its images; for a server that encodes it
    anew, the user's `text` and the `paths` of its images (none of images that are no files)."""

    input_ids: list[int]
    images: list[EncodedImage]
    text: str = ""
    paths: tuple[Path, ...] = ()


def prompt_text(record: Record, instruction: str = "") -> str:
    """Question, lettered options and, at the very end, the perspective's instruction (so that prefixes are shared)."""
    parts = [record.question, *(f"{letter}. {text}" for letter, text in (record.options or {}).items())]
    return "\n".join([*parts, instruction] if instruction else parts)


def target_text(record: Record) -> str:
    """The completion trained by SFT; a record without a trace gets its bare conclusion as thought. # ours"""
    answer = (record.trace.answer if record.trace else None) or record.answer
    answer_text = record.options[answer] if record.options else answer
    steps = record.trace.steps if record.trace else (f"So {answer_text} {answer}.",)
    return f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"


class Memory:
    """The last used images by path, at most `free` bytes of them."""

    def __init__(self, free: int) -> None:
        self.images: OrderedDict[str, EncodedImage] = OrderedDict()
        self.free = free


_shared: dict[str, Memory] = {}  # by processor and vision tower, the last one


class Encoder:
    """Tokenises prompts and completions and patches images, keeping `cache_bytes` of the last used images in memory.

    `style` (small, full) is that of the perspectives' instructions, which are `instructions` by perspective.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        system_prompt: str | None = None,
        style: str = "small",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.instructions = instructions(style)
        self.tokenizer, self.image_processor, self.system_prompt = tokenizer, image_processor, system_prompt
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_ids: list[int] = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        vision = ("<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN, "<|video_pad|>")
        self.banned_ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in vision]
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} - {*TAGS}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))
        self._memory = Memory(cache_bytes)

    def share_images(self, core: Any) -> None:
        """Keep images together with those encoders of this process whose image processor and vision tower are the same:
        models that are asked the same questions one after the other. On a CPU, where a tower is quickly told apart."""
        weights = core.model.visual.state_dict()
        if any(weight.device.type != "cpu" for weight in weights.values()):
            return
        told = hashlib.sha256(self.image_processor.to_json_string().encode())
        for name, weight in weights.items():
            told.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
        if (key := told.hexdigest()) not in _shared:
            _shared.clear()
        self._memory = _shared.setdefault(key, self._memory)

    def patches(self, image: Image.Image, dtype: torch.dtype = torch.float32) -> EncodedImage:
        """One image as patches."""
        out = self.image_processor(images=[image], return_tensors="pt")
        return EncodedImage(out["image_grid_thw"][0], out["pixel_values"].to(dtype))

    def image(self, path: Path) -> EncodedImage:
        """An image file, from memory when it was used lately."""
        key, memory = str(path), self._memory
        if key not in memory.images:
            memory.images[key] = self.patches(open_image(path))
            memory.images[key].kept = True
            memory.free -= _bytes(memory.images[key])
            while memory.free < 0 and len(memory.images) > 1:
                _, oldest = memory.images.popitem(last=False)
                memory.free += _bytes(oldest)
                oldest.kept = False
        memory.images.move_to_end(key)
        return memory.images[key]

    def resized(self, path: Path) -> Image.Image:
        """An image file in the size in which the model sees it: a server that resizes in its own way has nothing to do.

        Two libraries' bicubic differs by 3e-3 in the log-probabilities of a tiny model, and by 3e-6 after this.
        """
        processor = self.image_processor
        pixels = processor.resize(
            np.asarray(open_image(path)).transpose(2, 0, 1), size=processor.size, resample=processor.resample,
            factor=processor.patch_size * processor.merge_size,
        )  # fmt: skip
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    @torch.no_grad()
    def encode_images(self, core: Any, prompts: Sequence[Prompt], *, patches_together: int = 0) -> None:
        """Run the vision tower once for every image of the prompts that it has not seen; later batches reuse it.

        One image a call, so that its features do not depend on its company and a resumed training repeats them to the
        bit; with `patches_together` as many as have so many patches. Does nothing where the tower is trained: its
        output then changes and needs a graph.
        """
        tower = core.model.visual
        if any(parameter.requires_grad for parameter in tower.parameters()):
            return
        images = {id(image): image for prompt in prompts for image in prompt.images if image.seen is None}
        group: list[EncodedImage] = []
        for image in images.values():
            if group and sum(int(one.grid.prod()) for one in [*group, image]) > patches_together:
                self._encode(core, group)
                group = []
            group.append(image)
        if group:
            self._encode(core, group)

    def _encode(self, core: Any, images: Sequence[EncodedImage]) -> None:
        device = next(core.model.visual.parameters()).device
        patches = torch.cat([patches for image in images if (patches := image.patches) is not None]).to(device)
        grids = torch.stack([image.grid for image in images]).to(device)
        out = core.model.get_image_features(patches, grids, return_dict=True)
        for place, image in enumerate(images):
            before = _bytes(image)
            image.seen = type(out)(pooler_output=(out.pooler_output[place],))
            if _deep(out):
                image.seen.deepstack_features = [(layer[place],) for layer in _deep(out)]
            image.patches = None
            self._memory.free += (before - _bytes(image)) * image.kept

    def chat(self, text: str, images: Sequence[EncodedImage], paths: Sequence[Path] = ()) -> Prompt:
        """One user turn (images first) and the start of the assistant's, through the model's chat template.

        Several images are announced by their number, one is not. # peers: MedEvalKit
        A special token that the text or the system prompt quotes is read as text; a tag of the answer format is a tag.
        """
        mark = _absent(text + (self.system_prompt or ""))
        content: list[dict[str, str]] = []
        for number, _ in enumerate(images, 1):
            content += [{"type": "text", "text": f"<image_{number}>: "}] if len(images) > 1 else []
            content.append({"type": "image"})
        content.append({"type": "text", "text": self._parted(text, mark)})
        messages = [{"role": "user", "content": content}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self._parted(self.system_prompt, mark)})
        string = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = string.split(IMAGE_TOKEN)
        for image, index in zip(images, range(1, len(pieces)), strict=True):
            pieces[index] = IMAGE_TOKEN * self.image_tokens(image) + pieces[index]
        return Prompt(self._ids("".join(pieces), mark), list(images), text, tuple(paths))

    def _parted(self, text: str, mark: str) -> str:
        """The text with a mark inside each special token that it quotes."""
        return self._special.sub(lambda quoted: f"{quoted[0][0]}{mark}{quoted[0][1:]}", text)

    def _ids(self, text: str, mark: str) -> list[int]:
        """Token ids of what stands between the marks: what they part is no special token any more."""
        parts = text.split(mark)
        return [token for part in parts for token in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def prompt(self, record: Record, image_root: Path, instruction: str = "") -> Prompt:
        """The encoded prompt of a record; UserError for an image that cannot be opened."""
        paths = [image_root / path for path in record.images]
        return self.chat(prompt_text(record, instruction), [self.image(path) for path in paths], paths)

    def length(self, record: Record, image_root: Path, instruction: str = "") -> int:
        """How many tokens `prompt` gives; of an image the header alone is read. UserError where that cannot be."""
        return self.length_of(prompt_text(record, instruction), [image_root / path for path in record.images])

    def length_of(self, text: str, paths: Sequence[Path]) -> int:
        """How many tokens `chat` gives with the images at `paths`; see `length`."""
        sizes = [image_size(path) for path in paths]
        patches = [self.image_processor.get_number_of_image_patches(height, width) for width, height in sizes]
        images = [EncodedImage(torch.tensor([1, 1, count]), None) for count in patches]
        return len(self.chat(text, images).input_ids)

    def save_pretrained(self, folder: Path) -> None:
        """Tokenizer and image processor, as transformers loads them."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def completion(self, text: str) -> list[int]:
        """Token ids of a completion and its end-of-turn token; a special token that it quotes is text."""
        mark = _absent(text)
        return self._ids(self._parted(text, mark), mark) + self.end_ids[:1]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion; the answer tags stay, end-of-turn and padding go."""
        drop = {*self.end_ids, self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False)

    def _inputs(self, ids: Tensor, mask: Tensor, prompts: Sequence[Prompt]) -> Batch:
        batch: Batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_token_id).int(),
        }
        return batch | self.image_inputs([image for prompt in prompts for image in prompt.images])

    def image_inputs(self, images: Sequence[EncodedImage], device: str | torch.device = "cpu") -> Batch:
        """What the model needs of the images: their features once all are seen, else their patches."""
        if not images:
            return {}
        grids = torch.stack([image.grid for image in images]).to(device)
        if all(image.seen is not None for image in images):
            return {"image_grid_thw": grids, "mm_encoder_outputs": {"image": _joined([image.seen for image in images])}}
        patches = torch.cat([p for image in images if (p := image.patches) is not None]).float()
        return {"image_grid_thw": grids, "pixel_values": patches.to(device)}

    def image_tokens(self, image: EncodedImage) -> int:
        """How many tokens of a prompt an image takes."""
        return int(image.grid.prod()) // self.image_processor.merge_size**2

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


def _absent(text: str) -> str:
    """A character that the text does not hold."""
    return next(mark for mark in map(chr, MARKS) if mark not in text)


def _bytes(image: EncodedImage) -> int:
    kept = [image.patches] if image.patches is not None else []
    if image.seen is not None:
        kept += [*image.seen.pooler_output, *(part for layer in _deep(image.seen) for part in layer)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _deep(seen: Any) -> list[Any]:
    """Qwen3-VL's features of inner vision layers: per layer, one tensor an image; none in Qwen2-VL and Qwen2.5-VL."""
    return getattr(seen, "deepstack_features", None) or []


def _joined(seen: Sequence[Any]) -> Any:
    """The vision outputs of several images as those of one call with all of them."""
    joined = type(seen[0])(pooler_output=tuple(part for one in seen for part in one.pooler_output))
    if _deep(seen[0]):
        layers = range(len(_deep(seen[0])))
        joined.deepstack_features = [tuple(p for one in seen for p in _deep(one)[layer]) for layer in layers]
    return joined
