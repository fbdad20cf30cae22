"""Try many merges on one loaded model: the values of a rule on a grid, and the weights overwritten in place."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmedexpert.merging.grams import Grams
from mmedexpert.merging.rule import Method, declared
from mmedexpert.merging.sparsify import Threshold
from mmedexpert.merging.stream import Stream, Update
from mmedexpert.models.deltas import add_delta

Point = dict[str, Any]  # parameter of a rule to its value
Found = dict[tuple[Any, ...], Threshold]


def grid_points(grid: Mapping[str, Sequence[Any]], scalings: Sequence[str] = ()) -> list[Point]:
    """Every combination of the values; those that differ in `scalings` alone follow one another."""
    names = sorted(grid, key=lambda name: name in scalings)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]


def best_of(scores: Sequence[float]) -> int:
    """Place of the highest score; among equal ones the first, so that the order of the grid decides.  # ours"""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


@torch.no_grad()
def merged_in_place(
    model: torch.nn.Module,
    updates: Sequence[Update],
    experts: int,
    method: functools.partial[Any],
    points: Sequence[Point],
    grams: Grams | None = None,
    *,
    exact: bool = False,
) -> Iterator[Point]:
    """Give a loaded base the merge of each point in turn, and yield the point; at the end the base is as it was.

    With `exact`, weights in 16 bits keep the merge beside them (`lean.shift_`); summed in, it would be rounded away.

    Rules are linear in their scalings, so a merge is sum_j scaling_j * part_j. The parts (fp32, beside the model in
    memory, as many as the rule has scalings) are computed once for all points that follow one another and share the
    other values; thresholds once for each update and density. Updates are read as in `Stream`: experts first, then
    reasoners. ValueError for a tensor which the model has not; UserError for values that the rule refuses.
    """
    from mmedexpert.models.lean import shift_, unshift_  # lazily, as models/backbone.py says

    found: Found = {}
    for point in points:  # every point is tried on one entry before the first is merged
        _CachedStream(updates, experts, functools.partial(method, **point), found=found, grams=grams)
    scalings = [name for name in declared(method).scalings if name in method.keywords]
    parameters = dict(model.named_parameters())
    before: dict[str, Tensor] = {}
    try:
        for _, group in itertools.groupby(points, lambda p: [(k, v) for k, v in p.items() if k not in scalings]):
            same = list(group)
            fixed = functools.partial(method, **same[0])
            stream = _CachedStream(updates, experts, _in_parts(fixed, scalings), found=found, grams=grams)
            with stream:
                touched = [name for name in stream.names if stream.touches(name)]
                parts = {name: _whole(stream, name, max(1, len(scalings))) for name in touched}
            if unknown := parts.keys() - parameters.keys():
                raise ValueError(f"the model has no parameter {min(unknown)}")
            beside = {name for name in parts if exact and parameters[name].element_size() == 2}
            before = before or {name: parameters[name].detach().to("cpu", copy=True) for name in parts.keys() - beside}
            for point in same:
                factors = [float((method.keywords | point)[name]) for name in scalings] or [1.0]
                for name, part in parts.items():
                    delta = sum(factor * piece for factor, piece in zip(factors, part, strict=True))
                    assert isinstance(delta, Tensor)
                    delta = delta.view(parameters[name].shape)
                    if name in beside:
                        shift_(model.get_submodule(name.removesuffix(".weight")), delta)
                    else:
                        parameters[name].copy_(add_delta(before[name], delta, name))
                yield point
    finally:
        for name, weight in before.items():
            parameters[name].copy_(weight)
        for module in model.modules():
            unshift_(module)


class _CachedStream(Stream):
    """A stream that shares its thresholds with others over the same updates."""

    def __init__(
        self, updates: Sequence[Update], experts: int, method: Method, *, found: Found, grams: Grams | None
    ) -> None:
        self.found = found
        super().__init__(updates, experts, method, grams=grams)

    def _thresholds(self, names: Sequence[str]) -> list[Threshold]:
        shares = self._per_update("density", "expert_density", "reasoner_density")
        gammas = self._per_update("gamma", "expert_gamma", "reasoner_gamma")
        place = tuple(names), self.options.get("scope")
        keys = [(*place, *key) for key in zip(range(len(self.updates)), shares, gammas, strict=True)]
        if not all(key in self.found for key in keys):
            self.found |= zip(keys, super()._thresholds(names), strict=True)
        return [self.found[key] for key in keys]


def _in_parts(method: functools.partial[Any], scalings: Sequence[str]) -> Method:
    """The rule with one scaling at 1 and the others at 0, for each in turn, stacked along a new first dimension."""

    @functools.wraps(method)
    def parts(*args: Any, **options: Any) -> Any:
        chosen = [{name: float(name == one) for name in scalings} for one in scalings] or [{}]
        found = [method(*args, **options, **values) for values in chosen]
        return found[0] if len(found) == 1 else torch.stack(found)

    return parts


def _whole(stream: Stream, name: str, parts: int) -> Tensor:
    """A whole tensor's parts, [parts, out, in]."""
    blocks = [block.view(parts, *block.shape[-2:]) for _, block in stream.blocks(name, count=False)]
    return torch.cat(blocks, 1)
