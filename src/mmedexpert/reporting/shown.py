"""What W&B shows of a run: its name, its arm, its tags, and the settings it depends on, each under a key that sorts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config

TAG = 64  # characters, W&B's limit
# what the label of the weights and the merge's name tell already, and what an arm is averaged over
TOLD = ("seed", "gba", "gba.name", "gba.weights", "gba.weights_from", "merge", "merge.name")


@dataclass(frozen=True)
class Shown:
    """How a run is shown in W&B."""

    name: str
    group: str
    tags: Sequence[str]
    config: Mapping[str, Any]


def shown(
    config: Config, run: Run, sections: Collection[str], inputs: Mapping[str, str], tags: Sequence[str] = ()
) -> Shown:
    """A run as W&B shows it. `sections` of the config are what it and its inputs read; of the others nothing is told,
    since a run that several arms share is of none."""
    arm, experiment = arm_of(config, sections), config.logger.experiment
    named = "" if arm and run.name in (config.gba.name, config.merge.name) else run.name  # called by its arm
    parts = [run.stage, named, arm if arm != run.name else "", f"s{config.seed}"]
    settings = {
        **settings_of(config, sections), "seed": config.seed, "stage": run.stage, "name": run.name,
        "run_id": run.run_id, "folder": f"{run.stage}/{run.folder.name}", "inputs": dict(inputs),
    }  # fmt: skip
    settings |= {"arm": arm} if arm else {}
    settings |= {"experiment": experiment} if experiment else {}
    tags = [run.stage, arm, experiment or "", *tags]
    return Shown(
        name="-".join(part for part in parts if part),
        group=f"{config.model.name}-{config.data.name}-s{config.seed}",
        tags=[tag[:TAG] for tag in tags if tag],
        config=settings,
    )


def settings_of(config: Config, sections: Collection[str]) -> dict[str, Any]:
    """These sections of the config; weights by perspective, so that each is a number that can be plotted."""
    settings = {name: value for name, value in asdict(config).items() if name in sections}
    if "gba" in settings:
        settings["gba"]["weights"] = dict(zip(PERSPECTIVES, config.gba.weights, strict=True))
        if config.gba.weights_from == "validation":  # they are among the run's numbers
            del settings["gba"]["weights"]
    return settings


def arm_of(config: Config, sections: Collection[str]) -> str:
    """What tells a run from the others of its sweep, whatever the seed: `uniform`, `differential-gba.scale=1.0`,
    `uniform-ties`; empty for what all arms share."""
    parts = []
    if "gba" in sections:
        learned = config.gba.weights_from == "validation" and config.gba.scale
        parts.append("learned" if learned else weights_label(config.gba.weights if config.gba.scale else []))
    if "merge" in sections and config.merge.method is not None:
        parts.append(config.merge.name)
    varied = [key for key in config.logger.swept if key not in TOLD and key.partition(".")[0] in sections]
    return "-".join([*parts, *(f"{key}={_value(config, key)}" for key in dict.fromkeys(varied))])


def weights_label(weights: Sequence[float]) -> str:
    """`uniform`, `outcome_only`, a perspective alone, else each that has weight with its weight."""
    if not any(weights):
        return "outcome_only"
    if set(weights) == {1.0}:
        return "uniform"
    weighted = [(name, weight) for name, weight in zip(PERSPECTIVES, weights, strict=True) if weight]
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    return "-".join(f"{name}{weight:g}" for name, weight in weighted)


def _value(config: Config, key: str) -> str:
    """A key's value; of a group the name of the option that was chosen."""
    value: Any = asdict(config)
    for part in key.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    if isinstance(value, Mapping):
        value = value.get("name", value.get("names", ""))
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
