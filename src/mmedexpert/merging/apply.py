"""Put merged updates into a model, in memory or on disk, and drive a merge of adapters from end to end."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.merging.adapters import LoraAdapter, check_compatible
from mmedexpert.merging.checkpoint import new_folder, read_checkpoint
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.progress import Bar

Method = Callable[..., Tensor]

SIDE_FILES = (  # copied from the base, by how their names start; not its card, adapters or code
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer", "vocab", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE", "NOTICE",
)  # fmt: skip


def add_delta(weight: Tensor, delta: Tensor, name: str) -> Tensor:
    """weight + delta, summed in fp32 and rounded once to the weight's dtype.

    ValueError for unequal shapes; UserError for a quantised weight or a sum its dtype cannot hold.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"{name} is {list(weight.shape)} and its delta {list(delta.shape)}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UserError(f"{name} is stored as {weight.dtype}: merge into the base that is not quantised")
    merged = (weight.float() + delta.to(weight.device, torch.float32)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise UserError(f"{name} is not finite in {weight.dtype} after merging: lower the scaling or use a bf16 base")
    return merged


@torch.no_grad()
def apply_deltas_(model: torch.nn.Module, deltas: Iterable[tuple[str, Tensor]]) -> None:
    """Add each (parameter name, delta) to a model in place; ValueError for a name the model has not."""
    parameters = dict(model.named_parameters())
    for name, delta in deltas:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        parameters[name].copy_(add_delta(parameters[name], delta, name))


def write_merged(base_folder: str | Path, out_folder: str | Path, merged: Callable[[str], Tensor | None]) -> None:
    """Write a copy of a saved model in which each tensor has `merged(in-memory name)` added, where that is not None.

    Same file names, keys, dtypes and side files as the base; one tensor in memory at a time. `out_folder` appears only
    when complete. UserError if it exists, the base is incomplete, or the disk is too small.
    """
    base = Path(base_folder)
    tensors = read_checkpoint(base)
    weights = sorted({tensor.file for tensor in tensors.values()})
    sides = [f for f in sorted(base.iterdir()) if f.is_file() and f.name.startswith(SIDE_FILES) and f.suffix != ".py"]
    with new_folder(out_folder, sum(file.stat().st_size for file in [*weights, *sides])) as folder:
        for file in sides:
            shutil.copyfile(file, folder / file.name)
        for file in weights:
            shutil.copyfile(file, folder / file.name)
            with (folder / file.name).open("r+b") as out:
                for name, tensor in tensors.items():
                    if tensor.file != file or (delta := merged(name)) is None:
                        continue
                    out.seek(tensor.offset)
                    out.write(add_delta(tensor.read(), delta, name).reshape(-1).view(torch.uint8).numpy().data)


def merge_adapters(
    base_folder: str | Path,
    out_folder: str | Path,
    experts: Mapping[str, str | Path],
    reasoners: Mapping[str, str | Path],
    method: Method,
) -> dict[str, float]:
    """Merge LoRA adapters (name -> folder) into a base model, tensor by tensor, and write the merged model.

    CACI of MMedExpert-R1 (arXiv 2601.10949). A reasoner's folder holds the RL update alone, relative to where GBA
    started. An adapter that does not target a weight contributes zeros there: it does not vote. For `method` see
    `call_method`. Returns conflict statistics (`Conflicts.report`), names prefixed by `expert/` and `reasoner/`.
    UserError for adapters that cannot be read, do not fit, or were trained on another base, and for a method's
    complaint about its values.
    """
    folders = {f"expert/{name}": folder for name, folder in experts.items()}
    folders |= {f"reasoner/{name}": folder for name, folder in reasoners.items()}
    if not folders:
        raise UserError("nothing to merge: give at least one expert or reasoner adapter")
    adapters = [LoraAdapter.load(folder) for folder in folders.values()]
    check_compatible(adapters, base_folder)
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    conflicts = Conflicts(list(folders))
    done = 0
    with Bar("merge", len(shapes)) as bar:

        def merged(name: str) -> Tensor | None:
            nonlocal done
            if name not in shapes:
                return None
            deltas = [a.delta(name) if name in a.shapes else torch.zeros(shapes[name]) for a in adapters]
            result = call_method(method, deltas[: len(experts)], deltas[len(experts) :], name)
            conflicts.add(deltas, result)
            done += 1
            bar.show(done)
            return result

        write_merged(base_folder, out_folder, merged)
    return conflicts.report()


def call_method(method: Method, experts: list[Tensor], reasoners: list[Tensor], name: str) -> Tensor:
    """Call a merge rule on the deltas to one tensor, in the form it asks for by its parameters' names.

    A rule with a parameter `deltas` (ties, linear, ..) gets experts and reasoners as one list, experts first; any other
    (caci) gets the two lists. A rule with a parameter `name` (the DARE ones, for their masks) gets the tensor's name.
    """
    parameters = inspect.signature(method).parameters
    if "scope" in parameters and parameters["scope"].default == "global":
        raise UserError("merge.method.scope=global needs whole task vectors, but tensors are merged singly: use tensor")
    extra = {"name": name} if "name" in parameters else {}
    try:
        if "deltas" in parameters:
            return method([*experts, *reasoners], **extra)
        return method(experts, reasoners, **extra)
    except ValueError as error:
        raise UserError(f"the merge method refused {name}: {error}; mend the values under merge.method") from error
