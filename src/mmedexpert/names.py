"""What models are called: in `eval.models`, in tables, and so that no two of them share a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mmedexpert.schema import Config

# who never looks; who is shown a grey image; who is shown another question's (asked by name alone)
MAJORITY, BLANK_IMAGE, SWAPPED_IMAGE = BASELINES = ("majority", "blank_image", "swapped_image")
START = "start"  # what the reasoner was trained from
# asked only by name: one LoRA on the data of all specialties, what merging must approach; GRPO from the same start on
# the same prompts without perspectives, what GBA must pass
MULTI_TASK, CONTROL = "sft_all", "grpo"
JUDGES = ("judge_sft", "judge_dpo", "judge_scalar")  # trained by stage=judge; they judge pairs of answers
RESERVED = ("base", "experts", START, MULTI_TASK, CONTROL, *JUDGES, *BASELINES)  # rows and keys that are there already


def reasoner_names(config: Config) -> list[str]:
    """The reasoners of a pipeline: one, or with `gba.init=each` one per specialty."""
    return [f"reasoner-{name}" for name in config.specialty.names] if config.gba.init == "each" else ["reasoner"]


def trained_names(config: Config) -> list[str]:
    """The models that a pipeline trains or merges, in the order of its table."""
    merged = [config.merge.name] if config.merge.method is not None else []
    return [*config.specialty.names, *reasoner_names(config), *merged]


def start_names(config: Config) -> list[str]:
    """What one reasoner for all specialties is trained from, where that is not the base."""
    return [START] if config.gba.init in ("merged_experts", "sft_all", "caci") else []


def known_names(config: Config) -> list[str]:
    """Every name that `eval.models` knows, `sft_all@<steps>` where it gives one."""
    controls = [] if config.gba.init == "each" else [CONTROL]
    longer = [name for name in config.eval.models or [] if multi_task_steps(name)]
    return ["base", *start_names(config), *trained_names(config), MULTI_TASK, *longer, *controls, *JUDGES, *BASELINES]


def multi_task_steps(name: str) -> int | None:
    """The steps that `sft_all@480` is trained for; None for any other name."""
    found = re.fullmatch(rf"{MULTI_TASK}@([1-9]\d*)", name)
    return int(found[1]) if found else None


def distinct_names(names: Sequence[str], paths: Sequence[Path | str], taken: Collection[str] = RESERVED) -> list[str]:
    """`names`; where several are equal, or one is `taken`, each with as much of its path's end as tells it apart.

    `a/model` and `b/model`, both called `model`, become `a.model` and `b.model`: a name is part of a folder's name.
    Equal paths stay equal: they are one model.
    """
    found, counts = list(names), Counter(names)
    for name in counts:
        parts = {place: _parts(paths[place]) for place, other in enumerate(names) if other == name}
        if len(set(parts.values())) == 1 and name not in taken:
            continue
        others = {*taken, *(one for place, one in enumerate(found) if place not in parts)}
        for depth in range(1, max(map(len, parts.values())) + 1):
            ends = {place: ".".join(part[-depth:]) for place, part in parts.items()}
            if len(set(ends.values())) == len(set(parts.values())) and not others & set(ends.values()):
                break
        for place, end in ends.items():
            found[place] = end
    return found


def _parts(path: Path | str) -> tuple[str, ...]:
    return tuple(part for part in Path(path).absolute().parts if part != "/")
