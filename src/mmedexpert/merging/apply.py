"""Merge adapters from end to end: into a model on disk, a block of rows at a time, or into one adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.grams import Grams
from mmedexpert.merging.rule import Method
from mmedexpert.merging.stream import Stream, load_update
from mmedexpert.models.adapters import PREFIX, LoraAdapter, check_compatible, save_lora
from mmedexpert.models.checkpoint import StoredTensor, check_room, new_folder, read_checkpoint
from mmedexpert.models.deltas import add_delta
from mmedexpert.runtime.progress import Bar, track

OVERSAMPLING, ITERATIONS = 8, 2  # ours: directions beyond the rank, and passes, of the randomised SVD
COPIED = 8 * 2**20  # bytes copied at a time

Blocks = Iterable[tuple[int, Tensor]]

SIDE_FILES = (  # copied from the base, by how their names start; not its card, adapters or code
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer", "vocab", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE", "NOTICE",
)  # fmt: skip


def write_merged(
    base_folder: str | Path, out_folder: str | Path, names: Collection[str], blocks: Callable[[str], Blocks]
) -> None:
    """Write a copy of a saved model in which the tensors `names` (as in memory) have their merged update added.

    `blocks(name)` yields (first row, rows of the update) in order, from the first row to the last. Same file names,
    keys, dtypes and side files as the base; all other bytes are copied. One block in memory at a time. `out_folder`
    appears only when complete. UserError if it exists, the base is incomplete, or the disk is too small.
    """
    base = Path(base_folder)
    tensors = read_checkpoint(base)
    weights = sorted({tensor.file for tensor in tensors.values()})
    sides = [f for f in sorted(base.iterdir()) if f.is_file() and f.name.startswith(SIDE_FILES) and f.suffix != ".py"]
    with new_folder(out_folder, sum(file.stat().st_size for file in [*weights, *sides])) as folder:
        for file in sides:
            shutil.copyfile(file, folder / file.name)
        for file in weights:
            changed = [(name, t) for name, t in tensors.items() if t.file == file and name in names]
            if not changed:
                shutil.copyfile(file, folder / file.name)
                continue
            with file.open("rb", buffering=0) as source, (folder / file.name).open("wb", buffering=0) as out:
                for name, tensor in changed:
                    _copy(source, out, tensor.offset)
                    _write(tensor, name, blocks(name), out)
                _copy(source, out, file.stat().st_size)


def merge_adapters(
    base_folder: str | Path,
    out_folder: str | Path,
    experts: Mapping[str, str | Path],
    reasoners: Mapping[str, str | Path],
    method: Method,
    *,
    conflicts: Conflicts | None = None,
    grams: Grams | None = None,
    lora_rank: int | None = None,
) -> dict[str, float]:
    """Merge LoRA adapters or fine-tuned models (name -> folder) into a base model and write the merged model.

    CACI of MMedExpert-R1 (arXiv 2601.10949). A reasoner's folder holds the RL update alone, relative to where GBA
    started. What an update does not touch is zero there: it does not vote. `method` is a rule of `methods` or
    `low_rank` with its settings bound; see `stream.call_method`. `conflicts`, of the updates' number, is filled;
    `grams`, of the experts' number, are for rules that ask for them and for the conflicts' interference.

    With `lora_rank` (from 1) `out_folder` is a PEFT adapter of at most that rank in place of a model: exact where the
    merged update has no higher rank (rules on factors; linear and task_arithmetic with the summed ranks), else its
    best approximation, see `low_rank_update`. Returns {"energy_lost": share of the squared norm lost} then, else {}.

    UserError before anything is written for updates that cannot be read, do not fit, hold NaN or were trained on
    another base, for values which the method refuses, an existing `out_folder` and a disk too small.
    """
    folders = [*experts.values(), *reasoners.values()]
    check_room(out_folder)
    if not folders:
        raise UserError("nothing to merge: give at least one expert or reasoner adapter")
    updates = [load_update(folder, base_folder) for folder in folders]
    check_compatible(updates, base_folder)
    adapters = [update for update in updates if isinstance(update, LoraAdapter)]
    if lora_rank is not None and len(adapters) < len(updates):
        raise UserError("lora_rank needs LoRA adapters to merge: leave it out to write a whole model")
    with Stream(updates, len(experts), method, conflicts=conflicts, grams=grams) as stream:
        for adapter in adapters:
            for name in adapter.shapes:
                adapter.factors(name)  # refuses NaN
        if lora_rank is None:
            _write_model(stream, base_folder, out_folder)
            return {}
        like = next((adapter for adapter in adapters if adapter.base_fingerprint), adapters[0])
        return {"energy_lost": _write_lora(stream, lora_rank, like, out_folder)}


def _write_model(stream: Stream, base_folder: str | Path, out_folder: str | Path) -> None:
    names = [name for name in stream.names if stream.touches(name)]
    with Bar("merge", len(names)) as bar:

        def blocks(name: str) -> Blocks:
            bar.show(names.index(name))
            return stream.blocks(name)

        write_merged(base_folder, out_folder, names, blocks)


def _write_lora(stream: Stream, rank: int, like: LoraAdapter, out_folder: str | Path) -> float:
    """Write the merged updates as one adapter for the base of `like`; returns the share of the squared norm lost."""
    factors: dict[str, Tensor] = {}
    total = kept = 0.0
    for name in track(stream.names, "merge", size=sum(math.prod(stream.shape(n)) for n in stream.names)):
        a, b, before, after = low_rank_update(stream, name, rank)
        module = PREFIX + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
        total, kept = total + before, kept + after
    save_lora(factors, like, out_folder)
    return max(0.0, 1 - kept / total) if total else 0.0


def low_rank_update(stream: Stream, name: str, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The merged update of a tensor as A [r, in], B [out, r] with r <= rank; its squared norm, and that of B A.

    Of a rule on factors its own result, cut by an exact SVD where its rank is higher. Else a randomised SVD (Halko et
    al., arXiv 0909.4061) of the streamed rows M: the row space from subspace iteration, V <- qr(M^T M V), one pass over
    the blocks each, then the SVD of M V. The best rank r but for directions whose singular values hardly differ.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    rows, columns = stream.shape(name)
    width = min(rank + OVERSAMPLING, rows, columns)
    if stream.low_rank:
        a, b = stream.factors(name)
        if stream.conflicts is not None:
            for _ in stream.blocks(name):
                pass
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u, vh, total = q_b @ u, vh @ q_a.T, float(s.double().square().sum())
        if len(a) <= rank:
            return a, b, total, total
    else:
        v = torch.randn(columns, width, generator=torch.Generator().manual_seed(0))
        for _ in range(ITERATIONS):
            square = torch.zeros(columns, width)
            for _, block in stream.blocks(name, count=False):
                square.addmm_(block.T, block @ v)
            v = torch.linalg.qr(square).Q
        projected, total = torch.empty(rows, width), 0.0
        for row, block in stream.blocks(name):
            projected[row : row + len(block)] = block @ v
            total += float(torch.linalg.vector_norm(block)) ** 2
        u, s, vh = torch.linalg.svd(projected, full_matrices=False)
        vh = vh @ v.T
    root = s[:rank].sqrt()
    kept = float(s[:rank].double().square().sum())
    return root[:, None] * vh[:rank], u[:, :rank] * root, total, kept


def _copy(source: IO[bytes], out: IO[bytes], stop: int) -> None:
    """Copy the bytes from where `out` ends up to `stop`."""
    source.seek(out.tell())
    while (left := stop - out.tell()) > 0:
        _write_all(out, memoryview(source.read(min(left, COPIED))))


def _write(tensor: StoredTensor, name: str, blocks: Blocks, out: IO[bytes]) -> None:
    """Write a stored tensor with its merged update; rows without a change keep their bytes (a sum would lose -0)."""
    for row, delta in blocks:
        rows = tensor.rows(row, row + len(delta))
        merged = add_delta(rows, delta, name) if delta.any() else rows
        _write_all(out, merged.view(-1).view(torch.uint8).numpy().data)
    if out.tell() != tensor.offset + tensor.size:
        raise ValueError(f"the blocks of {name} do not cover it")


def _write_all(out: IO[bytes], data: memoryview) -> None:
    while data:  # an unbuffered write may write less
        data = data[out.write(data) :]
