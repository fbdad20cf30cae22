"""The merged update of one tensor after another, by blocks of rows: no tensor, and no model, is ever held whole."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.full_weights import FullWeights
from mmedexpert.merging.grams import Grams, Span, interference
from mmedexpert.merging.methods import overlap_counts
from mmedexpert.merging.rule import Method, declared
from mmedexpert.merging.select import RadixSelect
from mmedexpert.merging.sparsify import Threshold, keep, kept_ranks
from mmedexpert.models.adapters import CONFIG, LoraAdapter, Trained
from mmedexpert.models.dense import FILE as DENSE
from mmedexpert.models.dense import update_in

BLOCK = 2**19  # ours: entries of all deltas together in one block of rows, 2 MB in fp32

WORKERS = 8  # ours: blocks in work at the same time at most; each takes some 30 MB

Parts = list[Tensor | None]
Result = TypeVar("Result")


class Update(Trained, Protocol):
    """An expert's or a reasoner's change of the base: a LoRA adapter or the difference of whole models."""

    @property
    def fingerprint(self) -> str: ...
    def touches(self, name: str) -> bool: ...
    def reader(self, name: str) -> Callable[[int, int], Tensor]: ...


def load_update(folder: str | Path, base_folder: str | Path) -> Update:
    """A folder's LoRA adapter, its update row by row, or its whole model; UserError if it has none of them."""
    if any((Path(folder) / file).exists() for file in (CONFIG, DENSE)):
        return update_in(folder)
    return FullWeights.load(folder, base_folder)


class Stream:
    """Runs a merge rule over updates of one base; experts come first, then reasoners.

    Every block of rows is computed from the updates' files when it is needed, in fp32, and again in each pass over it:
    two passes for the thresholds, one for norms or counts, one for the rule. Memory does not depend on the size of a
    tensor or the number of updates. An update that does not touch a tensor gives zeros there: it does not vote.
    Thresholds are exact order statistics (`RadixSelect`); of entries that equal a threshold all are kept. With the
    rule's scope="global" an update has one threshold for all tensors that it has, those of its LoRA factors or all of
    a whole model (TIES-Merging, arXiv 2306.01708).

    Inside `with` the blocks are shared among as many threads as torch has, which computes with one thread in each: on a
    busy machine torch's own threads wait for one another at every operation.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        experts: int,
        method: Method,
        *,
        conflicts: Conflicts | None = None,
        grams: Grams | None = None,
        block: int = BLOCK,
    ) -> None:
        """Tries the rule on one entry: UserError for values it refuses, and for a rule on factors or Gram matrices (of
        the experts' inputs) without these. With `grams` the conflicts tell the interference."""
        self.updates, self.experts, self.method, self.conflicts, self.block = updates, experts, method, conflicts, block
        self.grams, self.rule = grams, declared(method)
        parameters = inspect.signature(method).parameters
        self.options = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        self.low_rank = self.rule.low_rank
        self.factored = self.rule.keeps_adapters and all(isinstance(u, LoraAdapter) for u in updates)
        self.names = list(dict.fromkeys(name for update in updates for name in update.shapes))
        whole = [str(update.folder) for update in updates if not isinstance(update, LoraAdapter)]
        if self.low_rank and whole:
            raise UserError(f"this merge method works on LoRA factors, and {whole[0]} is a whole model: use adapters")
        if "grams" in self.rule.measures and grams is None:
            raise UserError("this merge method needs Gram matrices of the experts' inputs: merge.grams=full or span")
        one = torch.ones(1, 1)
        self._call("the settings", [(one, one) if self.low_rank else one] * len(updates))
        self._pool: ThreadPoolExecutor | None = None
        self._measured: tuple[str, dict[str, Any]] | None = None
        self._shared: list[Threshold] | None = None
        self._touching: dict[str, list[bool]] = {}

    def __enter__(self) -> Stream:
        self._threads = torch.get_num_threads()
        if self._threads > 1:
            torch.set_num_threads(1)  # of new threads too, and of MKL
            self._pool = ThreadPoolExecutor(min(WORKERS, self._threads))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._threads)

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a tensor."""
        return next(update.shapes[name] for update in self.updates if name in update.shapes)

    def touches(self, name: str) -> bool:
        """Whether any update changes a tensor."""
        return any(self._touched(name))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """What a tensor is merged to, as A [r, in] and B [out, r], where the stream is `factored`.

        Of a rule on factors its result, of a sum of adapters theirs side by side. An adapter that does not target the
        tensor has rank 0 there.
        """
        rows, columns = self.shape(name)
        none = (torch.zeros(0, columns), torch.zeros(rows, 0))
        pairs = [
            update.scaled_factors(name) if isinstance(update, LoraAdapter) and name in update.shapes else none
            for update in self.updates
        ]
        if not self.low_rank:
            zero, one = torch.zeros(1, 1), torch.ones(1, 1)
            units = [[one if place == i else zero for place in range(len(pairs))] for i in range(len(pairs))]
            shares = [float(self._call(name, unit)) for unit in units]  # what a sum makes of each update alone
            downs, ups = zip(*pairs, strict=True)
            return torch.cat(downs), torch.cat([share * up for share, up in zip(shares, ups, strict=True)], 1)
        seen = {} if self.grams is None else {"grams": self.grams.of(name), "spanned": self.grams.spanned}
        return self._call(name, pairs, **seen)

    def blocks(self, name: str, *, count: bool = True) -> Iterator[tuple[int, Tensor]]:
        """(first row, merged rows [rows, in] fp32), in order, covering a tensor; `count`: add it to the conflicts."""
        conflicts = self.conflicts if count else None
        if self._measured is None or self._measured[0] != name:
            self._measured = name, self._measure(name)
        measured = self._measured[1]
        if conflicts is not None:
            self._overlap(conflicts, name)
            if self.grams is not None:
                conflicts.interfere(name, list(self._interference(self.grams, name)))

        def work(row: int, parts: Parts) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
            deltas = self._filled(name, row, parts)
            if self.low_rank:
                a, b = measured["merged"]
                return deltas, None, b[row : row + len(deltas[0])] @ a
            merged = self._call(name, deltas, first_row=row, **measured)
            bounds = measured.get("thresholds") if conflicts is not None else None
            trimmed = [keep(d, t) for d, t in zip(deltas, bounds, strict=True)] if bounds else None
            return deltas, trimmed, merged

        for row, (deltas, trimmed, merged) in self._in_blocks(name, work):
            if conflicts is not None:
                conflicts.add(name, deltas, trimmed, merged)
            yield row, merged

    def _call(self, name: str, inputs: list[Any], **measured: Any) -> Any:
        return call_method(self.method, inputs[: self.experts], inputs[self.experts :], name, **measured)

    def _touched(self, name: str) -> list[bool]:
        if name not in self._touching:
            self._touching[name] = [name in u.shapes and u.touches(name) for u in self.updates]
        return self._touching[name]

    def _step(self, name: str) -> int:
        return max(1, self.block // (len(self.updates) * max(1, self.shape(name)[1])))

    def _in_blocks(self, name: str, work: Callable[[int, Parts], Result]) -> Iterator[tuple[int, Result]]:
        """(first row, work(first row, rows of every update, None for one that does not touch the tensor)), in order.

        The same blocks in every pass: a matrix product may round differently in a block of another size.
        """
        touched = self._touched(name)
        readers = [update.reader(name) if there else None for update, there in zip(self.updates, touched, strict=True)]
        rows, step = self.shape(name)[0], self._step(name)

        def one(start: int) -> tuple[int, Result]:
            stop = min(rows, start + step)
            return start, work(start, [None if reader is None else reader(start, stop) for reader in readers])

        waiting: deque[Future[tuple[int, Result]]] = deque()
        for start in range(0, rows, step):
            if self._pool is None:
                yield one(start)
                continue
            waiting.append(self._pool.submit(one, start))
            if len(waiting) > min(WORKERS, self._threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _filled(self, name: str, row: int, parts: Parts) -> list[Tensor]:
        rows, columns = self.shape(name)
        count = min(self._step(name), rows - row)
        return [torch.zeros(count, columns) if part is None else part for part in parts]

    def _measure(self, name: str) -> dict[str, Any]:
        """What the rule wants to know of the whole tensor before it sees blocks of it."""
        if self.low_rank:
            return {"merged": self.factors(name)}
        measured: dict[str, Any] = {}
        if "thresholds" in self.rule.measures:
            if self.options.get("scope") == "global":
                self._shared = self._shared or self._thresholds(self.names)
                measured["thresholds"] = self._shared
            else:
                measured["thresholds"] = self._thresholds([name])
        if "norms" in self.rule.measures:
            bounds = measured.get("thresholds", [0.0] * len(self.updates))

            def squares(_: int, parts: Parts) -> Tensor:
                kept = [None if part is None else keep(part, t) for part, t in zip(parts, bounds, strict=True)]
                return torch.tensor(
                    [0.0 if k is None else float(torch.linalg.vector_norm(k)) ** 2 for k in kept]
                ).double()

            measured["norms"] = torch.stack([s for _, s in self._in_blocks(name, squares)]).sum(0).sqrt().tolist()
        if "counts" in self.rule.measures:

            def counts(row: int, parts: Parts) -> Tensor:
                return overlap_counts(self._filled(name, row, parts), self.options["epsilon"])

            measured["counts"] = torch.stack([c for _, c in self._in_blocks(name, counts)]).sum(0)
        return measured

    def _thresholds(self, names: Sequence[str]) -> list[Threshold]:
        """For each update the smallest kept magnitude over some tensors, or the two bounds of a rule with a gamma."""
        shares = self._per_update("density", "expert_density", "reasoner_density")
        gammas = self._per_update("gamma", "expert_gamma", "reasoner_gamma")
        pairs, scope = self.rule.bands, self.options.get("scope", "tensor")
        searches: list[RadixSelect | None] = []
        known: list[list[float]] = []
        for update, share, gamma in zip(self.updates, shares, gammas, strict=True):
            # ours: a global threshold counts the update's own tensors, not those which it cannot change
            total = sum(math.prod(update.shapes[name]) for name in names if name in update.shapes)
            start, stop = kept_ranks(max(1, total), share, gamma, scope)
            ranks = [stop, start + 1] if pairs else [stop]
            searches.append(None if stop - start in (0, total) else RadixSelect(ranks))
            known.append([math.inf, 0.0] if stop == start else [0.0, math.inf])  # none or all are kept
        for show in (RadixSelect.first, RadixSelect.second) if any(searches) else ():

            def work(_: int, parts: Parts, show: Callable[[RadixSelect, Tensor], None] = show) -> None:
                for search, part in zip(searches, parts, strict=True):
                    if search is not None and part is not None:
                        show(search, part)

            for name in names:
                for _ in self._in_blocks(name, work):
                    pass
        found = [search.result() if search else bounds for search, bounds in zip(searches, known, strict=True)]
        return [(bounds[0], bounds[1]) if pairs else bounds[0] for bounds in found]

    def _per_update(self, both: str, experts: str, reasoners: str) -> list[float]:
        """An option of the rule for each update: given for all or by role, as one number or one per update."""

        def spread(value: Any, count: int) -> list[float]:
            return list(value) if isinstance(value, Sequence) else [float(value)] * count

        if self.rule.apart:
            rest = len(self.updates) - self.experts
            ours, theirs = (self.options.get(name, 0.0) for name in (experts, reasoners))
            return spread(ours, self.experts) + spread(theirs, rest)
        return spread(self.options.get(both, 0.0), len(self.updates))

    def _overlap(self, conflicts: Conflicts, name: str) -> None:
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for update, there in zip(self.updates, self._touched(name), strict=True):
            if there and not isinstance(update, LoraAdapter):
                return
            pairs.append(update.scaled_factors(name) if there and isinstance(update, LoraAdapter) else None)
        conflicts.overlap(name, pairs)

    def _interference(self, grams: Grams, name: str) -> Iterator[float | None]:
        """How far the merge is from each expert on that expert's inputs; None for one that does not act here.

        An expert at a time, so that memory holds one Gram: a dense rule's blocks are computed again for each.
        """
        adapters = [u for u in self.updates if isinstance(u, LoraAdapter) and name in u.shapes]
        space = Span.of(torch.cat([a.factors(name)[0] for a in adapters])) if grams.spanned else None
        for place, gram in enumerate(grams.of(name)):
            yield interference(self._beside(name, place), gram, space) if self._touched(name)[place] else None

    def _beside(self, name: str, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The merge of a tensor beside one update of it, by blocks of rows; of factors after a rotation to few rows."""
        update = self.updates[place]
        if self.low_rank and isinstance(update, LoraAdapter):
            (merged, b), (own, own_b) = self.factors(name), update.scaled_factors(name)
            core = torch.linalg.qr(torch.cat([b, own_b], 1)).R
            yield core[:, : len(merged)] @ merged, core[:, len(merged) :] @ own
            return
        read = update.reader(name)
        for row, block in self.blocks(name, count=False):
            yield block, read(row, row + len(block))


def call_method(method: Method, experts: list[Any], reasoners: list[Any], name: str, **measured: Any) -> Any:
    """Call a merge rule on the deltas to one tensor, or to a block of its rows, in the form that it declares.

    UserError for what the rule refuses.
    """
    rule = declared(method)
    more = {"place": {"name", "first_row"}, "grams": {"spanned"}}
    wanted = {*rule.measures}.union(*(more.get(measure, set()) for measure in rule.measures))
    extra = {key: value for key, value in {"name": name, **measured}.items() if key in wanted}
    try:
        if rule.apart:
            return method(experts, reasoners, **extra)
        return method([*experts, *reasoners], **extra)
    except ValueError as error:
        raise UserError(f"the merge method refused {name}: {error}; mend the values under merge.method") from error
