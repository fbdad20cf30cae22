"""What a config's `_target_` describes, made by Hydra, without the errors of the target being renamed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from mmedexpert.errors import UserError, suggestion

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def build(config: Mapping[str, Any], where: str, **more: Any) -> Any:
    """Call the `_target_` of `config` (a partial with `_partial_`) with its values and with `more`, or build it.

    `where` is the config key, such as `data.source`. Raises UserError naming it for a target that is not there, a value
    that the target does not take, that has another type or is lacking, and a ValueError of the target; all its other
    errors (UserError, a full disk's OSError) as they are, not as Hydra's InstantiationException.
    """
    check(config, where, more)
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


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a config gives its `_target_`, without Hydra's words and ours (`_partial_`, `_needs_root_`)."""
    return {key: value for key, value in config.items() if not (key.startswith("_") and key.endswith("_"))}


def check(config: Mapping[str, Any], where: str, more: Collection[str] = ()) -> None:
    """What `build` would refuse before it calls anything; `more` names what is given beside the config."""
    target = method(config.get("_target_"), f"{where}._target_")
    parameters, given = inspect.signature(target).parameters, values_of(config)
    if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        known = [name for name in parameters if name not in more]
        if unknown := [key for key in given if key not in known]:  # also what is given from elsewhere
            fix = suggestion(unknown[0], known) if known else ": leave it out"
            raise UserError(f"{where}.{unknown[0]}: {config['_target_']} takes no such value{fix}")
    hints = get_type_hints(target)
    for key, value in given.items():  # a dictionary of the config has no schema: what the function says is checked here
        kind = hints.get(key)
        if kind in KINDS and (isinstance(value, bool) != (kind is bool) or not isinstance(value, _also(kind))):
            raise UserError(f"{where}.{key}={value!r} must be {KINDS[kind]} ({config['_target_']})")
    needed = [n for n, one in parameters.items() if one.default is one.empty and one.kind.name == "KEYWORD_ONLY"]
    lacking = [name for name in needed if name not in given and name not in more]
    if lacking and not config.get("_partial_"):
        raise UserError(f"{where}.{lacking[0]} is missing: {config['_target_']} needs it")


def _also(kind: type) -> tuple[type, ...]:
    return (int, float) if kind is float else (kind,)
