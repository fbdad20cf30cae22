"""Merge adapters from end to end: into a model on disk, a block of rows at a time, or into one update of its base."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
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
from mmedexpert.models.checkpoint import StoredTensor, check_room, fingerprint_base, new_folder, read_checkpoint
from mmedexpert.models.deltas import add_delta, rounded, share, squared_norm
from mmedexpert.models.dense import Blocks, save_dense
from mmedexpert.runtime.progress import Bar, track

OVERSAMPLING, ITERATIONS = 8, 2  # ours: directions beyond the rank, and passes, of the randomised SVD
COPIED = 8 * 2**20  # bytes copied at a time

SIDE_FILES = (  # copied from the base, by how their names start; not its card, adapters or code
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer", "vocab", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE", "NOTICE",
)  # fmt: skip


def write_merged(
    base_folder: str | Path, out_folder: str | Path, names: Collection[str], blocks: Callable[[str], Blocks]
) -> float | None:
    """Write a copy of a saved model in which the tensors `names` (as in memory) have their merged update added.

    `blocks(name)` yields (first row, rows of the update) in order, from the first row to the last. Same file names,
    keys, dtypes and side files as the base; all other bytes are copied. One block in memory at a time. `out_folder`
    appears only when complete. Returns what rounding to 16 bits changes, as a share of the update's squared norm; None
    where no tensor is stored in 16 bits. UserError if the folder exists, the base is incomplete, or the disk is too
    small.
    """
    base = Path(base_folder)
    tensors = read_checkpoint(base)
    weights = sorted({tensor.file for tensor in tensors.values()})
    sides = [f for f in sorted(base.iterdir()) if f.is_file() and f.name.startswith(SIDE_FILES) and f.suffix != ".py"]
    lost: list[tuple[float, float]] = []
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
                    lost += _write(tensor, name, blocks(name), out)
                _copy(source, out, file.stat().st_size)
    return share(lost)


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
    exact: bool = False,
) -> dict[str, float]:
    """Merge LoRA adapters or fine-tuned models (name -> folder) into a base model and write the merged model.

    CACI of MMedExpert-R1 (arXiv 2601.10949). A reasoner's folder holds the RL update alone, relative to where GBA
    started. What an update does not touch is zero there: it does not vote. `method` is a rule of `methods` or
    `low_rank` with its settings bound; see `stream.call_method`. `conflicts`, of the updates' number, is filled;
    `grams`, of the experts' number, are for rules that ask for them and for the conflicts' interference.

    A model in 16 bits is rounded: returns {"rounding_lost": share of the update's squared norm}, see `write_merged`.
    With `lora_rank` (from 1) `out_folder` is a PEFT adapter of at most that rank in place of a model, the best one: see
    `low_rank_update`; returns {"energy_lost": share of the squared norm}. With `exact` it is the update as it is: an
    adapter of rules on factors and of sums of adapters, a `DenseUpdate` of all others.

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
        if lora_rank is not None or (exact and stream.factored):
            like = next((adapter for adapter in adapters if adapter.base_fingerprint), adapters[0])
            lost = _write_lora(stream, lora_rank, like, out_folder)
            return {} if exact else {"energy_lost": lost}
        names = [name for name in stream.names if stream.touches(name)]
        with Bar("merge", len(names)) as bar:

            def blocks(name: str) -> Blocks:
                bar.show(names.index(name))
                return stream.blocks(name)

            if exact:
                shapes = {name: stream.shape(name) for name in names}
                save_dense(out_folder, shapes, blocks, fingerprint_base(base_folder))
                return {}
            changed = write_merged(base_folder, out_folder, names, blocks)
            return {} if changed is None else {"rounding_lost": changed}


def _write_lora(stream: Stream, rank: int | None, like: LoraAdapter, out_folder: str | Path) -> float:
    """Write the merged updates as one adapter for the base of `like`, of their own rank where none is told; returns the
    share of the squared norm lost."""
    factors: dict[str, Tensor] = {}
    total = kept = 0.0
    for name in track(stream.names, "merge", size=sum(math.prod(stream.shape(n)) for n in stream.names)):
        a, b, before, after = low_rank_update(stream, name, rank)
        module = PREFIX + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
        total, kept = total + before, kept + after
    save_lora(factors, like, out_folder)
    return max(0.0, 1 - kept / total) if total else 0.0


def low_rank_update(stream: Stream, name: str, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """The merged update of a tensor as A [r, in], B [out, r] with r <= rank; its squared norm, and that of B A.

    Of a stream that is `factored` its own factors, cut by an exact SVD where their rank is higher; with None as they
    are. Else a randomised SVD (Halko et
    al., arXiv 0909.4061) of the streamed rows M: the row space from subspace iteration, V <- qr(M^T M V), one pass over
    the blocks each, then the SVD of M V. The best rank r but for directions whose singular values hardly differ.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    rows, columns = stream.shape(name)
    if stream.factored:
        a, b = stream.factors(name)
        if stream.conflicts is not None:
            for _ in stream.blocks(name):
                pass
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        core = r_b @ r_a.T
        total = squared_norm(core)
        if rank is None or len(a) <= rank:
            return a, b, total, total
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        u, vh = q_b @ u, vh @ q_a.T
    else:
        assert rank is not None
        width = min(rank + OVERSAMPLING, rows, columns)
        v = torch.randn(columns, width, generator=torch.Generator().manual_seed(0))
        for _ in range(ITERATIONS):
            square = torch.zeros(columns, width)
            for _, block in stream.blocks(name, count=False):
                square.addmm_(block.T, block @ v)
            v = torch.linalg.qr(square).Q
        projected, total = torch.empty(rows, width), 0.0
        for row, block in stream.blocks(name):
            projected[row : row + len(block)] = block @ v
            total += squared_norm(block)
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


def _write(tensor: StoredTensor, name: str, blocks: Blocks, out: IO[bytes]) -> Iterator[tuple[float, float]]:
    """Write a stored tensor with its merged update; rows without a change keep their bytes (a sum would lose -0).

    Yields of each block in 16 bits what `rounded` tells.
    """
    for row, delta in blocks:
        rows = tensor.rows(row, row + len(delta))
        merged = add_delta(rows, delta, name) if delta.any() else rows
        if rows.element_size() == 2:
            yield rounded(rows, delta, merged)
        _write_all(out, merged.view(-1).view(torch.uint8).numpy().data)
    if out.tell() != tensor.offset + tensor.size:
        raise ValueError(f"the blocks of {name} do not cover it")


def _write_all(out: IO[bytes], data: memoryview) -> None:
    while data:  # an unbuffered write may write less
        data = data[out.write(data) :]
