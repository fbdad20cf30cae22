"""What a config's `_target_` describes, made by Hydra, without the errors of the target being renamed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from mmedexpert.errors import UserError, suggestion


def build(config: Mapping[str, Any], where: str, **more: Any) -> Any:
    """Call the `_target_` of `config` (a partial with `_partial_`) with its values and with `more`, or build it.

    `where` is the config key, such as `data.source`. Raises UserError naming it for a target that is not there, a value
    that the target does not take, that has another type or is lacking, and a ValueError of the target; all its other
    errors (UserError, a full disk's OSError) as they are, not as Hydra's InstantiationException.
    """
    target = method(config.get("_target_"), f"{where}._target_")
    _check(target, config, where, more)
    try:
        return instantiate(dict(config), _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, InstantiationException):
            raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
        if isinstance(cause, ValueError):
            raise UserError(f"{where}: {cause} ({config['_target_']})") from cause
        raise cause from cause.__cause__


def function(config: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """The `_target_` of `config`, bound to its values, without Hydra's checks: they cost 0.4 ms a call."""
    made = build({**config, "_partial_": True}, where)
    return partial(made.func, *made.args, **made.keywords) if made.args or made.keywords else made.func


def method(path: Any, where: str) -> Callable[..., Any]:
    """The function or class at a dotted path; UserError naming the config key `where` for one that is not there."""
    try:
        found = pkgutil.resolve_name(path)
        if not callable(found):
            raise TypeError("it is no function")
        return found
    except Exception as error:  # a module that is imported may raise anything
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{where}={path!r} is not found: give the dotted path of a function ({told})") from error


def _check(target: Callable[..., Any], config: Mapping[str, Any], where: str, more: Mapping[str, Any]) -> None:
    parameters = inspect.signature(target).parameters
    given = [key for key in config if not (key.startswith("_") and key.endswith("_"))]
    if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        known = [name for name in parameters if name not in more]
        if unknown := [key for key in given if key not in known]:  # also what is given from elsewhere
            fix = suggestion(unknown[0], known) if known else ": leave it out"
            raise UserError(f"{where}.{unknown[0]}: {config['_target_']} takes no such value{fix}")
    hints = get_type_hints(target)
    for key in given:  # a dictionary of the config has no schema: what the function says is checked here
        kind, value = hints.get(key), config[key]
        numbers = kind in (int, float) and not isinstance(value, bool) and isinstance(value, kind | int)
        if kind in (int, float, str, bool) and not (numbers or (kind in (str, bool) and isinstance(value, kind))):
            raise UserError(f"{where}.{key}={value!r} must be of type {kind.__name__} ({config['_target_']})")
    needed = [n for n, one in parameters.items() if one.default is one.empty and one.kind.name == "KEYWORD_ONLY"]
    lacking = [name for name in needed if name not in given and name not in more]
    if lacking and not config.get("_partial_"):
        raise UserError(f"{where}.{lacking[0]} is missing: {config['_target_']} needs it")
