"""A model's safetensors files: which file holds which tensor, the identity of the whole, and folders written safely."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.runtime.files import sync
from mmedexpert.runtime.fingerprints import file_digest

# what `load_encoder` reads, by how the names start
READ_BESIDE_WEIGHTS = (
    "tokenizer", "vocab", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its key there, its shape, its bytes and safetensors' name of its dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    offset: int
    size: int
    dtype: str

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is merged: [out, all the rest], and one row for a vector or a scalar."""
        return (1, math.prod(self.shape)) if len(self.shape) < 2 else (self.shape[0], math.prod(self.shape[1:]))

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the matrix in the file's dtype, read by bytes: a map of the file would stay in memory.

        UserError for a dtype that is not a float of 16, 32 or 64 bits, and for a file cut short since it was opened.
        """
        count, columns = self.matrix
        stop = count if stop is None else stop
        if self.dtype not in DTYPES:
            raise UserError(f"{self.key} in {self.file} is stored as {self.dtype}: merge a model that is not quantised")
        row = columns * DTYPES[self.dtype].itemsize
        data = bytearray((stop - start) * row)
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.offset + start * row)
            view = memoryview(data)
            while view:
                read = opened.readinto(view)
                if not read:
                    raise UserError(f"{self.file} ends within {self.key}: copy it again")
                view = view[read:]
        flat = torch.frombuffer(data, dtype=DTYPES[self.dtype]) if data else torch.empty(0, dtype=DTYPES[self.dtype])
        return flat.view(stop - start, columns)


def open_safetensors(file: Path) -> Any:
    """`safe_open(file)`, whose opening checks the header; UserError for a missing, truncated or foreign file."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or no complete safetensors file ({error}): save it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or not valid JSON ({error}): copy or save the folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object: copy or save the folder again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, sorted; UserError if the folder has none."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):  # an index is data: it must not point outside its folder
            raise UserError(f"{index} names a file outside its folder: do not use this model")
        return [folder / name for name in names]
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} has no model.safetensors or index of shards: give a folder saved by save_pretrained")
    return [folder / "model.safetensors"]


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of its bytes; UserError for a truncated or foreign one."""
    with open_safetensors(file):  # checks offsets against the file's length
        header, start = _header(file)
    stored = []
    for key, entry in header.items():
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            stored.append(StoredTensor(file, key, tuple(entry["shape"]), start + first, last - first, entry["dtype"]))
    return sorted(stored, key=lambda tensor: tensor.offset)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a saved model by their transformers-5 in-memory name, in the order of the files' bytes.

    Qwen2-VL and Qwen2.5-VL are stored under other names (`visual.*`, `model.layers.*`) than they have in memory
    (`model.visual.*`, `model.language_model.layers.*`); text models and newer VLMs keep one name.
    """
    stored = [tensor for file in weight_files(folder) for tensor in stored_tensors(file)]
    vision = any(re.match(r"(model\.)?visual\.", tensor.key) for tensor in stored)
    return {_memory_name(tensor.key) if vision else tensor.key: tensor for tensor in stored}


def fingerprint_base(folder: str | Path) -> str:
    """The identity of a saved model's weights: sha256 over its config.json and every byte of its safetensors files.

    What an adapter belongs to; tokenizer and image processor are no part of it (`fingerprint_model`).
    """
    digest = hashlib.sha256(json.dumps(read_json(Path(folder) / "config.json"), sort_keys=True).encode())
    for file in weight_files(Path(folder)):
        with open_safetensors(file):  # whole, and with a sound header
            digest.update(f"{file.name}:{file_digest(file)}\n".encode())
    return digest.hexdigest()


def fingerprint_model(folder: str | Path) -> str:
    """The identity of all that a saved model answers by: its weights, tokenizer, chat template and image processor."""
    digest = hashlib.sha256(fingerprint_base(folder).encode())
    for file in sorted(Path(folder).iterdir()):
        if file.name.startswith(READ_BESIDE_WEIGHTS) and file.is_file():
            digest.update(f"{file.name}:{file_digest(file)}\n".encode())
    return digest.hexdigest()


def check_room(out_folder: str | Path, bytes_needed: int = 0, *, replace: bool = False) -> None:
    """UserError if `out_folder` exists and is not to be replaced, or its disk is too small."""
    out = Path(out_folder)
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: delete it or choose another output folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < bytes_needed:
        raise UserError(_full(out, bytes_needed))


@contextmanager
def new_folder(out_folder: str | Path, bytes_needed: int, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to write in, on the disk and renamed to `out_folder` at the end, gone after any error.

    With `replace` an existing `out_folder`, left by a try that died before its run was DONE, gives way to the new one
    once that is complete. UserError if it exists otherwise, or the disk is too small or runs full.
    """
    out = Path(out_folder)
    check_room(out, bytes_needed, replace=replace)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if replace:
            shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's error in words alone
        if any(getattr(error, "errno", None) == code or f"os error {code}" in str(error) for code in FULL):
            raise UserError(_full(out, bytes_needed)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _full(out: Path, bytes_needed: int) -> str:
    return f"not enough disk space for {out}, which needs {bytes_needed} bytes: free some or choose another folder"


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset at which its data begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def _memory_name(key: str) -> str:
    """The name in memory of a key of a Qwen VLM's file (the renaming rules of transformers' conversion mapping)."""
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)
