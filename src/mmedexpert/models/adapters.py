"""LoRA adapters in PEFT's folder format: read lazily, checked against a base, concatenated into one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.models.checkpoint import (
    StoredTensor,
    fingerprint_base,
    new_folder,
    read_checkpoint,
    read_json,
    stored_tensors,
)
from mmedexpert.runtime.fingerprints import file_digest

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "mmedexpert.json"
PREFIX = "base_model.model."  # PEFT's, before every name of the base model

# What changes the update beyond scaling * B @ A, or the base itself; none of it may be dropped silently.
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "target_parameters", "layer_replication",
)  # fmt: skip
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraAdapter:
    """One LoRA adapter on disk; tensors are read when asked for.

    `shapes` maps the name of each targeted weight, as in the base model's state dict (for example
    `model.language_model.layers.0.self_attn.q_proj.weight`), to its shape [out, in].
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int]]
    base_fingerprint: str | None
    stored: Mapping[str, StoredTensor]

    @classmethod
    def load(cls, folder: str | Path) -> LoraAdapter:
        """Open an adapter saved by PEFT; UserError for a missing, truncated or unsupported one."""
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        _check_config(folder, config)
        stored = stored_tensors(folder / WEIGHTS)
        shapes = _target_shapes(folder / WEIGHTS, stored)
        return cls(folder, config, shapes, recorded_base(folder), {tensor.key: tensor for tensor in stored})

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the targeted weights."""
        return tuple(self.shapes)

    @property
    def base(self) -> str:
        """The base model's name or path as PEFT recorded it."""
        return str(self.config.get("base_model_name_or_path") or "")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that makes the update: the factors' file, and rank, alpha and the like of the config."""
        about = {key: value for key, value in self.config.items() if key != "base_model_name_or_path"}
        text = json.dumps(about, sort_keys=True) + file_digest(self.folder / WEIGHTS)
        return hashlib.sha256(text.encode()).hexdigest()

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A [r, in] and B [out, r] in fp32, and the scaling: alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732)."""
        module = name.removesuffix(".weight")
        a, b = (self.stored[f"{PREFIX}{module}.lora_{letter}.weight"].rows().float() for letter in "AB")
        for letter, factor in (("A", a), ("B", b)):
            if not torch.isfinite(factor).all():
                raise UserError(f"lora_{letter} of {name} in {self.folder} has NaN or Inf: train this adapter again")
        rank = len(a)
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))  # as PEFT does
        alpha = next(matching, self.config["lora_alpha"])
        return a, b, alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def scaled_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and scaling * B [out, r] in fp32."""
        a, b, scaling = self.factors(name)
        return a, b * scaling

    def touches(self, name: str) -> bool:
        """Whether the adapter targets a weight."""
        return name in self.shapes

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """A function (i, j) -> rows i:j of the update, [j - i, in] fp32, from factors read once."""
        a, b = self.scaled_factors(name)
        return lambda i, j: b[i:j] @ a

    def delta(self, name: str) -> Tensor:
        """The update of one weight, [out, in] fp32: scaling * B @ A (LoRA, arXiv 2106.09685)."""
        return self.reader(name)(0, self.shapes[name][0])


def recorded_base(folder: Path) -> str | None:
    """The fingerprint of the base that `record_base` noted beside an adapter, if it did."""
    sidecar = folder / SIDECAR
    return read_json(sidecar).get("base_fingerprint") if sidecar.exists() else None


def record_base(adapter_folder: str | Path, fingerprint: str) -> None:
    """Note beside an adapter which base it was trained on; `check_compatible` refuses other bases."""
    text = json.dumps({"base_fingerprint": fingerprint}, indent=2)
    (Path(adapter_folder) / SIDECAR).write_text(text + "\n", encoding="utf-8")


class Trained(Protocol):
    """What was trained on a base: an adapter or a whole model."""

    @property
    def folder(self) -> Path: ...
    @property
    def shapes(self) -> dict[str, tuple[int, int]]: ...
    @property
    def base_fingerprint(self) -> str | None: ...


def check_compatible(adapters: Sequence[Trained], base_folder: str | Path) -> None:
    """UserError unless every adapter was trained on this base and fits its shapes.

    What we trained has its base's fingerprint beside it; of others the base's name, as PEFT recorded it, must be one
    of this base's names.
    """
    base = Path(base_folder)
    tensors = read_checkpoint(base)
    for adapter in adapters:
        named = adapter.base if isinstance(adapter, LoraAdapter) else ""
        if not adapter.base_fingerprint and named and not _is_named(base, named):
            raise UserError(
                f"adapter {adapter.folder} says it was trained on {named}, and this base is {base}: give its own base "
                f"as model.name_or_path, in a folder of its name; or, if this is it, write its place as "
                f"base_model_name_or_path into {adapter.folder / CONFIG}"
            )
    recorded = [adapter for adapter in adapters if adapter.base_fingerprint]
    actual = fingerprint_base(base) if recorded else None
    for adapter in recorded:
        if adapter.base_fingerprint != actual:
            raise UserError(f"adapter {adapter.folder} was trained on another base than {base}: merge it into its own")
    for adapter in adapters:
        for name, shape in adapter.shapes.items():
            if name not in tensors:
                raise UserError(f"adapter {adapter.folder} targets {name}, which base {base} has not: use its own base")
            if tensors[name].matrix != shape:
                raise UserError(
                    f"adapter {adapter.folder} does not fit base {base}: {name} is {list(shape)} in the adapter and "
                    f"{list(tensors[name].shape)} in the base; use its own base"
                )


def _is_named(base: Path, named: str) -> bool:
    """Whether a base's folder, or the hub's name in its path, is what an adapter calls its base."""
    if Path(named).is_dir():
        return Path(named).resolve() == base.resolve() or fingerprint_base(named) == fingerprint_base(base)
    hub = [part.removeprefix("models--").replace("--", "/") for part in base.parts if part.startswith("models--")]
    names = {hub[-1] if hub else base.resolve().name, str(read_json(base / "config.json").get("_name_or_path") or "")}
    last = named.rstrip("/").rpartition("/")[2].casefold()  # a place on another machine still tells the name
    return any(name and last == name.rstrip("/").rpartition("/")[2].casefold() for name in names)


def concatenate_lora(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], out_folder: str | Path, *, replace: bool = False
) -> None:
    """Write one PEFT adapter whose update is exactly sum_i w_i dW_i: A stacked, w_i * scaling_i * B side by side.

    The rank of a weight is the sum of its parts' ranks and the scaling 1. Weights [1, -1] give a difference: an adapter
    relative to the one its training started from. ValueError for no adapters or not one weight each; UserError for
    adapters of different bases, shapes that differ, an existing `out_folder` (but to `replace` it) or a full disk.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"need one finite weight for each adapter: {len(adapters)} adapters, weights {list(weights)}")
    fingerprints = {adapter.base_fingerprint for adapter in adapters if adapter.base_fingerprint}
    if len(fingerprints) > 1:
        folders = ", ".join(str(adapter.folder) for adapter in adapters)
        raise UserError(f"adapters {folders} were trained on different bases: use adapters of one base")
    tensors = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.shapes):
        owners = [(a, weight) for a, weight in zip(adapters, weights, strict=True) if name in a.shapes]
        if len({a.shapes[name] for a, _ in owners}) > 1:
            shapes = {str(a.folder): list(a.shapes[name]) for a, _ in owners}
            raise UserError(f"adapters differ in the shape of {name}: {shapes}; use adapters of one base")
        parts = [(*adapter.factors(name), weight) for adapter, weight in owners]
        module = name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([a for a, _, _, _ in parts], 0)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.cat([weight * scale * b for _, b, scale, weight in parts], 1)
    save_lora(tensors, next((a for a in adapters if a.base_fingerprint), adapters[0]), out_folder, replace=replace)


def save_lora(
    tensors: Mapping[str, Tensor], like: LoraAdapter, out_folder: str | Path, *, replace: bool = False
) -> None:
    """Write PEFT's folder of a LoRA adapter with scaling 1 and the ranks of its factors, for the base of `like`.

    `tensors`: lora_A and lora_B by PEFT's keys. UserError for an existing `out_folder`, unless it is to `replace`, or a
    full disk.
    """
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(factor)
        for key, factor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    rank = max(ranks.values())
    lower = {module: r for module, r in ranks.items() if r < rank}
    config = {
        "peft_type": "LORA",
        "task_type": like.config.get("task_type"),
        "base_model_name_or_path": like.base,
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(out_folder, sum(t.nbytes for t in tensors.values()), replace=replace) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        if like.base_fingerprint:
            record_base(folder, like.base_fingerprint)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}: only LORA can be merged")
    used = [key for key in UNSUPPORTED if config.get(key)]
    if used:
        raise UserError(f"{folder / CONFIG}: {', '.join(used)} cannot be merged as a LoRA update: train without it")
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights={config['init_lora_weights']} changes the base weights: "
            "convert the adapter to plain LoRA with PEFT first"
        )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{folder / CONFIG}: lora_alpha is not a number: save the adapter again")


def _target_shapes(file: Path, stored: Sequence[StoredTensor]) -> dict[str, tuple[int, int]]:
    """Name and shape of each targeted weight; UserError for anything that is not a pair of LoRA factors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in stored:
        key, shape = tensor.key, tensor.shape
        module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or kind not in ("A.weight", "B.weight") or len(shape) != 2:
            raise UserError(
                f"{file}: {key} {list(shape)} is no LoRA factor of a linear layer and cannot be merged: train "
                "without it, or save with save_embedding_layers=False if it is a copy of the base's embedding"
            )
        found.setdefault(module, {})[kind[0]] = shape
    if not found:
        raise UserError(f"{file} holds no LoRA factors: train or copy the adapter again")
    for module, pair in found.items():
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise UserError(f"{file}: lora_A and lora_B of {module} do not match ({pair}): copy it again")
    return {f"{module}.weight": (pair["B"][0], pair["A"][1]) for module, pair in found.items()}
