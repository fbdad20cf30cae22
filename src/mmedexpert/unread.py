"""Every option given on the command line is used, told or refused: what reads which key, and when nothing does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from mmedexpert.errors import UserError
from mmedexpert.names import BASELINES, JUDGES, known_names
from mmedexpert.read_by import READ_BY, RULES, not_from_the_hub, pairs_alone
from mmedexpert.runtime.privacy import redacted
from mmedexpert.schema import Config

READING = ("report", "list", "clean", "plan")  # stages that read what is there, and load neither model nor data
WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p")  # of Hydra


def parts(config: Config) -> set[str]:
    """What a command does: one of READING, or pretrain, data, dsa, gba, caci, search, judge, eval; `base`: it needs the
    base model, `own` and `benchmark`: which questions are asked."""
    stage, wanted = config.stage.name, config.eval.models
    if stage in READING:
        return {stage}
    asks, served = stage in ("eval", "pipeline"), config.engine.name == "openai"
    found = {"eval"} if asks else set()
    if asks and config.benchmark:
        found.add("benchmark")
    if stage == "pipeline" or (asks and not config.benchmark):
        found.add("own")
    by_name = set(wanted or []) & ({*known_names(config)} - {"base", *JUDGES, *BASELINES})
    everything = stage in ("caci", "pipeline") or (
        stage == "eval" and not served and (bool(by_name) or (wanted is None and not config.benchmark))
    )
    if everything or stage in ("gba", "serve"):
        found.add("gba")
    if everything or stage == "dsa" or (stage in ("gba", "serve") and config.gba.init != "base"):
        found.add("dsa")
    pays = "gba" in found and config.reward.judge_weight and config.reward.judge.run in JUDGES
    picks = asks and config.eval.best_of > 1 and config.eval.picker.run in JUDGES
    if stage == "judge" or set(wanted or []) & set(JUDGES) or pays or picks:
        found.add("judge")
    if "gba" in found and config.gba.init == "caci":  # starts from the experts' merge
        found.add("caci")
    if everything and config.merge.method is not None:
        found |= {"caci"} if config.merge.search is None else {"caci", "search"}
    if stage == "pretrain" or found & {"dsa", "gba", "judge"} or (asks and not served):
        found.add("base")
    if "base" in found and (config.model.taught_here or (stage == "pretrain" and config.model.name_or_path is None)):
        found.add("pretrain")
    if (
        stage == "data"
        or found & {"dsa", "gba", "own"}
        or (asks and config.eval.contamination and not pairs_alone(config, set()))
    ):
        found.add("data")
    return found


def notes(config: Config, overrides: Sequence[str], swept: Sequence[str] = ()) -> list[str]:
    """The given keys that no part of this command reads, because they belong to other stages: to be told.

    `swept` are keys that have several values in a sweep: what another job of it reads is told, too.

    Raises:
        UserError: an option that nothing reads beside the other options, or that is given twice with two values.
    """
    given: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_delete():
            continue
        for key, value in leaves(override.key_or_group, override.value()):
            if given.setdefault(key, value) != value:
                one, other = redacted([f"{key}={given[key]}", f"{key}={value}"])
                raise UserError(f"{one} and {other}: give {key} once")
    work, told = parts(config), []
    local = [name for name, one in config.benchmark.items() if one.root is not None]
    rules = [*RULES, *(not_from_the_hub(name) for name in local)]
    for key in given:
        rule = next((r for r in rules if any(below(key, k) for k in r.keys) and r.unread(config, work)), None)
        if rule is not None:
            if not any(below(decisive, s) or below(s, decisive) for decisive in rule.by for s in swept):
                raise UserError(f"{key} is not read here: {rule.why.format(config=config)}")
            told.append(key)
        elif (readers := readers_of(key)) and not work & set(readers):
            told.append(key)
    return told


def readers_of(key: str) -> tuple[str, ...]:
    """The parts that read a key; () for every command."""
    known = [prefix for prefix in READ_BY if below(key, prefix)]
    return READ_BY[max(known, key=len)] if known else ()


def below(key: str, prefix: str) -> bool:
    """Whether a dotted key is `prefix` or lies under it."""
    return f"{key}.".startswith(f"{prefix}.")


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`gba={lr: 1, steps: 2}` as its keys and values."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def swept_keys(arguments: Sequence[str], params: Mapping[str, Any] | None) -> list[str]:
    """The keys with several values: of the command's arguments, and of `hydra.sweeper.params`."""
    pairs = zip(["", *arguments], arguments, strict=False)
    words = [word for before, word in pairs if not word.startswith("-") and before not in WITH_VALUE]
    several = [o.key_or_group for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    return several + list(params or {})
