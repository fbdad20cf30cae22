"""Which settings of a merge are possible: what the types of `schema.MergeConfig` cannot say."""

from __future__ import annotations

import math
from typing import Any

from mmedexpert.errors import UserError, suggestion
from mmedexpert.schema import Config


def check_merge(config: Config) -> None:
    """UserError for a value of `merge.method`, or of `merge.search` in its place, that no rule takes."""
    method = {key: value for key, value in (config.merge.method or {}).items() if not key.startswith("_")}
    experts = len(config.specialty.names)
    reasoners = experts if config.gba.init == "each" else 1
    sizes = {"expert": experts, "reasoner": reasoners}
    for key, value in method.items():
        _check_merge_value(f"merge.method.{key}", value, sizes.get(key.partition("_")[0], experts + reasoners))
    if config.merge.lora_rank is not None and (config.merge.lora_rank < 1 or not method):
        raise UserError(f"merge.lora_rank={config.merge.lora_rank} must be at least 1, and merge a method")
    if (space := config.merge.grams) not in (None, "full", "span"):
        raise UserError(f"merge.grams={space!r} is not known{suggestion(str(space), ('full', 'span'))}")
    search = config.merge.search
    if config.gba.init == "caci" and (not method or search is not None):
        raise UserError(
            "gba.init=caci starts from the experts' merge with the values of merge.method as they are: give a merge "
            "other than none, and merge.search=null"
        )
    if search is None:
        return
    if not method:
        raise UserError(
            "merge.search has nothing to search: merge=none has no method; choose one, or merge.search=null"
        )
    if not isinstance(search, dict):
        raise UserError(f"merge.search={search!r} must name what it searches: merge.search='{{scaling: [0.7, 1.0]}}'")
    example = next((key for key in method if key.endswith(("density", "scaling"))), next(iter(method)))
    if not search:
        raise UserError(f"merge.search is empty: give values to try, merge.search.{example}='[..,..]', or null")
    if config.eval.split == "val":
        raise UserError("merge.search chooses on the split val: measure on another one, eval.split=test")
    for key, values in search.items():
        if key not in method:
            raise UserError(
                f"merge.search.{key}: merge={config.merge.name} has no such value{suggestion(key, list(method))}"
            )
        if not isinstance(values, list) or not values:
            raise UserError(f"merge.search.{key}={values!r} must be a list of the values to try")
        for value in values:
            _check_merge_value(f"merge.search.{key}", value, sizes.get(key.partition("_")[0], experts + reasoners))


def _check_merge_value(where: str, value: Any, size: int) -> None:
    """`size`: of how many updates it speaks, where it is a list; what a rule alone can judge is left to the rule."""
    name = where.rpartition(".")[2]
    several, numbers = isinstance(value, list), value if isinstance(value, list) else [value]
    if value is None or isinstance(value, str | bool):
        if name.endswith(("density", "scaling")) or (name.endswith("weights") and value is not None):
            raise UserError(f"{where}={value!r} must be a number{' for each update' * name.endswith('weights')}")
        return
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise UserError(f"{where}={value} must be made of finite numbers")
    if several and len(numbers) != size:
        raise UserError(f"{where}={value} has {len(numbers)} numbers for {size} updates: give one for each")
    if name.endswith("weights") and not several:
        raise UserError(f"{where}={value} must be a list of {size} numbers, one for each update, or null")
    if name.endswith("density") and not all(0 < n <= 1 for n in numbers):
        raise UserError(f"{where}={value} must lie in (0, 1]: it is the share of entries that are kept")
