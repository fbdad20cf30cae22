"""What Hydra and OmegaConf say of a mistake in a config, in one line: the file, the key and the name that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mmedexpert.schema import keys

CONF = Path(__file__).parents[3] / "conf"  # the files that run.py composes; an installed package has none


def told_of_hydra(error: str, cause: str) -> str:
    """An error of composing, and the error that it was raised from, in one line."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    file = re.search(r"In '([\w/.@-]+)'", error)  # what is typed in a command stands in no file
    where = f"conf/{file[1]}.yaml: " if file and file[1] not in ("config", "hydra/config") else ""
    option = re.search(r"Could not (?:find|load) '([\w/-]+)/([\w.-]+)'", error)
    if option:
        group, name = option.groups()
        if not options(group):
            groups = sorted({path.parent.name for path in CONF.glob("*/*.yaml")})
            return f"{where}{group}={name}: no such config group{_suggest(group, groups)}"
        return f"{where}{group}={name}: no such option{_suggest(name, options(group))}"
    if "hydra/launcher/submitit" in error and "with schema" in error:
        return "hydra-submitit-launcher has options of the same names: pip uninstall it (submitit alone is needed)"
    if "LexerNoViableAlt" in error:  # such as an unquoted ~
        return f"{lines[0].partition(': ')[2]}: this is not readable; quote its value twice, \"key='value'\""
    if merged := re.match(r"Error merging override (.*)", lines[0]):
        return f"{merged[1]}: {cause.partition(chr(10))[0]}"
    names = re.findall(r"Could not override '([\w.@/-]+)'|full_key: ([\w.-]+)", f"{error}\n{cause}")
    if names and re.search(r"Could not override|not in|in struct", error):
        return where + no_such_key(max((one or other for one, other in names), key=len))
    if where:
        lines = [line for line in lines if "raised while composing" not in line]
        at = next((other for _, other in names if other), None)
        return f"{where}{f'{at}: ' if at else ''}{' '.join(lines[:1])[:300]}"
    return " ".join(lines[:2])[:300]


def no_such_key(word: str) -> str:
    """A key that is unknown, or known to another option of its group alone."""
    group = word.partition(".")[0]
    told = f"no such config key {word!r}"
    if group == "hydra":
        return f"{told}; see python run.py --cfg hydra"
    holders = keys_of_files(group)
    if word in holders:
        names = ", ".join(holders[word])
        return f"{told} with this choice of {group}; add {group}={f'<one of {names}>' if ',' in names else names}"
    known = [key for key in keys() if not key.startswith("benchmark.")]  # a benchmark's stand below its name
    return f"{told}{_suggest(word, [*known, *holders])}"


def options(group: str) -> list[str]:
    """The options of a config group; files that others are made of begin with an underscore."""
    return [path.stem for path in sorted((CONF / group).glob("*.yaml")) if not path.stem.startswith("_")]


def keys_of_files(group: str) -> dict[str, list[str]]:
    """Every dotted key that a file of a config group sets in its own section, and the options that do."""
    found: dict[str, list[str]] = {}
    for name in options(group):
        text = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")
        package = re.match(r"# @package ([\w.]+)", text)
        for key in _dotted(yaml.safe_load(text), package[1] if package else group):
            if key.startswith(f"{group}."):
                found.setdefault(key, []).append(name)
    return found


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    yield prefix
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "defaults":
                continue
            yield from _dotted(inner, f"{prefix}.{key}")


def _suggest(word: str, known: Iterable[str]) -> str:
    """The nearest known name: of the same section, of nearly the same whole, of another section; else the section."""
    known = list(dict.fromkeys(known))
    section, _, name = word.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    alike = sorted((key for key in known if key.rpartition(".")[2] == name), key=lambda key: key.count("."))
    near = [beside[close] for close in difflib.get_close_matches(name, beside, n=1)]
    found = near or difflib.get_close_matches(word, known, n=1, cutoff=0.85) or alike[:3]
    if found := found or difflib.get_close_matches(word, set(known) - {section}, n=1, cutoff=0.7):
        return f"; did you mean {' or '.join(map(repr, found))}?"
    return f"; use one of {', '.join(beside.values())}" if 0 < len(beside) < 16 else "; see python run.py --cfg job"
