"""What a run's result depends on, as a tree: its short name (`run_id`), and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 3  # of the trees themselves; a changed rule raises its own number in versions.py
FILE = "identity.json"
MISSING = "(not set)"

# run_id of what this process made or found -> its recipe: the same tree without any seed of training
_recipes: dict[str, str] = {}


def run_id(stage: str, key: Mapping[str, Any]) -> str:
    """Ten hex digits over the stage name and its key (config part, seed, identities of the inputs, rule versions)."""
    text = json.dumps({"stage": stage, "format": FORMAT, **key}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def recipe_of(identity: str) -> str:
    """The recipe of a run by its run_id; what is no run of this process (weights, data) is its own recipe."""
    return _recipes.get(identity, identity)


def remember(identity: str, recipe: str) -> None:
    """Note the recipe of a run, for the runs that take it as an input."""
    _recipes[identity] = recipe


def read(folder: Path) -> dict[str, Any] | None:
    """The identity written in a run folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings under dotted names; a list is a leaf."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value in one, value in other) of the leaves that differ."""
    left, right = flat(one), flat(other)
    names = [name for name in {**left, **right} if left.get(name, MISSING) != right.get(name, MISSING)]
    return [(name, left.get(name, MISSING), right.get(name, MISSING)) for name in names]


def why_anew(folder: Path, tree: Mapping[str, Any]) -> str:
    """Why a stage has no result to reuse: how its tree differs from the nearest finished one in `folder`."""
    found = [(path.parent, read(path.parent)) for path in sorted(folder.glob("*/DONE"))]
    told = [(differences(known, tree), path) for path, known in found if known is not None]
    if not told:
        return "nothing of this stage is finished here"
    told = [([one for one in changed if one[0] != "recipe"], path) for changed, path in told]  # not part of the key
    changed, path = min(told, key=lambda item: (len(item[0]), item[1].name))
    shown = [f"{name}: {_short(before)} -> {_short(after)}" for name, before, after in changed[:4]]
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return f"differs from {path.name} in {'; '.join(shown)}{more}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}..{text[-18:]}"


def labels_of(folders: Mapping[Any, Path], *, limit: int = 2) -> dict[Any, str]:
    """What tells runs of one name apart, by the settings in which they and their inputs differ; empty where unknown.

    Inputs are looked up beside them (`<outputs>/<stage>/<name>-<run_id>`).
    """
    trees = {name: _whole(path) for name, path in folders.items()}
    if any(tree is None for tree in trees.values()):
        return dict.fromkeys(folders, "")
    leaves = {name: flat(tree) for name, tree in trees.items()}
    every = dict.fromkeys(key for one in leaves.values() for key in one)
    differing = [key for key in every if len({json.dumps(one.get(key, MISSING)) for one in leaves.values()}) > 1]
    short: dict[str, list[str]] = {}  # setting -> where it differs, the experts' twins of one setting once
    for key in differing:
        word = ".".join([part for part in key.split(".") if not part.endswith("/")][-2:])
        if word:  # an input that is no run (weights, data) has no settings to tell
            short.setdefault(word, []).append(key)
    told = {}
    for name, one in leaves.items():
        parts = {f"{word}={one[keys[0]]}".replace(" ", "") for word, keys in short.items() if keys[0] in one}
        told[name] = ", ".join(sorted(parts)[:limit])
    return told


def _whole(folder: Path, depth: int = 0) -> dict[str, Any] | None:
    """A run's tree with the trees of its inputs in place of their ids, without seeds of training."""
    tree = read(folder)
    if tree is None or depth > 8:
        return None
    outputs = folder.parent.parent
    whole = dict(tree.get("key", {}))
    for name, identity in tree.get("inputs", {}).items():
        inner = folder_of(outputs, identity)
        known = _whole(inner, depth + 1) if inner is not None else None
        whole[f"{name}/"] = identity if known is None else known
    return whole


def folder_of(outputs: Path, identity: str) -> Path | None:
    """The folder of a run in this outputs folder; None for what is no run_id, and where it is not there."""
    return next(iter(outputs.glob(f"*/*-{identity}")), None) if _is_run_id(identity) else None


def _is_run_id(text: str) -> bool:
    return len(text) == 10 and all(letter in "0123456789abcdef" for letter in text)
