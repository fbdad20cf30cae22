"""The shape of a Qwen-VL as its config.json tells it: which weights it has, and which of them LoRA is put on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from mmedexpert.errors import UserError, suggestion

KNOWN = Path(__file__).with_name("shapes.yaml")


@dataclass(frozen=True)
class Linear:
    """A linear layer: its module's name, features in and out."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Entries of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model and of its vision tower (`v_`)."""

    kind: str  # transformers' model_type
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    v_hidden: int
    v_inner: int
    v_layers: int
    v_heads: int
    v_full: tuple[int, ...]  # layers whose patches see the whole image, the others a window
    v_window: int  # its side in pixels
    v_out: int
    v_deep: int = 0  # layers whose features are given to the language model, too
    v_positions: int = 0  # learned ones
    patch: int = 14
    merge: int = 2  # patches to a token, by side
    temporal: int = 2
    channels: int = 3

    @property
    def q(self) -> int:
        """Width of the queries of a layer."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of a layer, and of its values."""
        return self.kv_heads * self.head_dim

    @cached_property
    def language(self) -> list[Linear]:
        """The linear layers of the language model, without the head."""
        h, bias = self.hidden, self.kind != "qwen3_vl"
        found = []
        for n in range(self.layers):
            at = f"model.language_model.layers.{n}"
            found += [
                Linear(f"{at}.self_attn.q_proj", h, self.q, bias),
                Linear(f"{at}.self_attn.k_proj", h, self.kv, bias),
                Linear(f"{at}.self_attn.v_proj", h, self.kv, bias),
                Linear(f"{at}.self_attn.o_proj", self.q, h),
                Linear(f"{at}.mlp.gate_proj", h, self.inner),
                Linear(f"{at}.mlp.up_proj", h, self.inner),
                Linear(f"{at}.mlp.down_proj", self.inner, h),
            ]
        return found

    @cached_property
    def vision(self) -> list[Linear]:
        """The linear layers of the vision tower, the projection of patches among them."""
        h, wide, pixels = self.v_hidden, self.v_hidden * self.merge**2, self.channels * self.temporal * self.patch**2
        names = {
            "qwen2_5_vl": ("gate_proj", "up_proj", "down_proj"),
            "qwen2_vl": ("fc1", "fc2"),
            "qwen3_vl": ("linear_fc1", "linear_fc2"),
        }[self.kind]
        found = [Linear("model.visual.patch_embed.proj", pixels, h, self.kind == "qwen3_vl")]
        for n in range(self.v_layers):
            at = f"model.visual.blocks.{n}"
            found += [Linear(f"{at}.attn.qkv", h, 3 * h, True), Linear(f"{at}.attn.proj", h, h, True)]
            found += [Linear(f"{at}.mlp.{name}", h, self.v_inner, True) for name in names[:-1]]
            found.append(Linear(f"{at}.mlp.{names[-1]}", self.v_inner, h, True))
        mergers = ["merger", *(f"deepstack_merger_list.{n}" for n in range(self.v_deep))]
        parts = ("linear_fc1", "linear_fc2") if self.kind == "qwen3_vl" else ("mlp.0", "mlp.2")
        for merger in mergers:
            found += [
                Linear(f"model.visual.{merger}.{parts[0]}", wide, wide, True),
                Linear(f"model.visual.{merger}.{parts[1]}", wide, self.v_out, True),
            ]
        return found

    @property
    def embedding(self) -> int:
        """Entries of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def decoder(self) -> int:
        """Parameters of all decoder layers."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.kind == "qwen3_vl" else 0)
        return _parameters(self.language) + self.layers * norms

    @property
    def tower(self) -> int:
        """Parameters of the vision tower."""
        norm = self.v_hidden * (1 if self.kind == "qwen2_5_vl" else 2)  # RMS, or with a bias
        deep = self.v_deep * 2 * self.v_hidden * self.merge**2
        own = (2 * self.v_layers + 1) * norm + deep + self.v_positions * self.v_hidden
        return _parameters(self.vision) + own

    @property
    def parameters(self) -> int:
        """All parameters; a tied head is counted once."""
        return self.decoder + self.tower + self.embedding * (1 if self.tied else 2) + self.hidden

    def lora(self, rank: int, target_modules: str) -> list[tuple[Linear, int]]:
        """The layers that LoRA is put on, as PEFT finds them, and the parameters it adds to each."""
        chosen = [one for one in (*self.language, *self.vision) if re.fullmatch(target_modules, one.name)]
        return [(one, rank * (one.inputs + one.outputs)) for one in chosen]

    def image_tokens(self, pixels: int) -> int:
        """Tokens of an image of so many pixels."""
        return max(1, pixels // (self.patch * self.merge) ** 2)


def _parameters(layers: list[Linear]) -> int:
    return sum(one.weights + one.bias * one.outputs for one in layers)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a config.json, of the hub's older flat form, too; KeyError where it tells none."""
    text, vision, kind = config.get("text_config") or config, config["vision_config"], config["model_type"]
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    older = kind == "qwen2_vl"  # its tower's `hidden_size` is the language model's
    v_hidden = vision["embed_dim"] if older else vision["hidden_size"]
    depth = vision["depth"]
    return Shape(
        kind, hidden, text["intermediate_size"], text["num_hidden_layers"], heads, text["num_key_value_heads"],
        text.get("head_dim") or hidden // heads, text["vocab_size"], config.get("tie_word_embeddings", False), v_hidden,
        round(v_hidden * vision["mlp_ratio"]) if older else vision["intermediate_size"], depth, vision["num_heads"],
        tuple(vision["fullatt_block_indexes"]) if kind == "qwen2_5_vl" else tuple(range(depth)),
        vision.get("window_size", 0), vision["hidden_size"] if older else vision["out_hidden_size"],
        len(vision.get("deepstack_visual_indexes") or ()), vision.get("num_position_embeddings") or 0,
        vision.get("patch_size", 14), vision.get("spatial_merge_size", 2), vision.get("temporal_patch_size", 2),
    )  # fmt: skip


@cache
def known() -> dict[str, Shape]:
    """The shapes that come with the package, by hub id."""
    return {name: shape_of(config) for name, config in yaml.safe_load(KNOWN.read_text(encoding="utf-8")).items()}


def found_shape(name_or_path: str | None, folder: Path) -> Shape:
    """The shape of a model's folder, or of a hub id that is known; without either that of `folder`.

    Nothing is downloaded. UserError for any other, and for a folder without a config.json of a Qwen-VL.
    """
    at = folder if name_or_path is None else Path(name_or_path)
    if at.is_dir():
        try:
            return shape_of(json.loads((at / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{at}/config.json is none of a Qwen-VL ({error!r}): give a model's folder") from error
    if name_or_path not in known():
        raise UserError(
            f"model.name_or_path={name_or_path} is no folder here, and its shape is not known"
            f"{suggestion(str(name_or_path), list(known()))}: download its config.json into a folder and name that"
        )
    return known()[name_or_path]
