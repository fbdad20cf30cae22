"""What decides a reasoner: the settings of GBA and its reward that act, and the rules that they follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.versions import digest, text_of, versions
from mmedexpert.schema import Config, RewardConfig
from mmedexpert.scoring.robust import own_letters
from mmedexpert.stages.common import model_key, training_key
from mmedexpert.training.judge import VERSION

RULES = ("prompts", "batches", "optimiser", "sampling", "rewards", "advantages", "losses", "gba")


def reasoner_key(config: Config, specialties: list[str], asked: Sequence[Record] = ()) -> dict[str, Any]:
    """The settings and rules that decide a reasoner that is `asked` these questions."""
    return {
        "specialties": specialties,
        "gba": acting(config),
        "lora": {**asdict(config.model.lora), "dropout": 0.0},
        "reward": reward_key(config),
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "trainer": training_key(config, dropout=False),
        "rules": versions(*RULES, *read_by(config, asked), *(("rubrics",) if weighted(config) else ())),
        **sampler_key(config),
        "instructions": instructed(config),
        "guidelines": {name: text_of(name) for name in DATA} if weighted(config) else None,
    }


def read_by(config: Config, asked: Sequence[Record]) -> list[str]:
    """The rules by which completions to these questions are right or wrong."""
    other = any(one.asked_as != "choice" or own_letters(one.options or {}) for one in asked)
    return [config.reward.protocol, *(["open_rewards"] if other else [])]


def instructed(config: Config) -> str:
    """What of the instructions decides a rollout."""
    style = config.model.instructions
    told = instructions(style)
    return digest(told) if style == "small" else digest([2, told])  # 1: rollouts were asked in the small style


def sampler_key(config: Config) -> dict[str, Any]:
    """What of the sampler decides a reasoner, beside which completions servers draw; nothing where the policy samples
    itself."""
    sampler = config.sampler
    if sampler.name != "vllm":
        return {}
    limits = {"truncate": sampler.truncate_at, "sequence_mask": sampler.mask_above}
    return {"sampler": [sampler.name, sampler.correction, limits.get(sampler.correction)]}


def acting(config: Config) -> dict[str, Any]:
    """The settings of GBA that act: where no perspective's term has weight, scale and gate act on nothing, and weights
    on outcomes that are compared by perspective, and on which perspectives `prompted_weighted` asks for, alone."""
    learned = config.gba.weights_from == "validation"  # which weights those are stands among the inputs
    unused = {"name", "checkpoint_every", "keep_rollouts", "weights" if learned else "weights_from"}
    unused |= {"keep"} if config.gba.keep is None else set()
    settings = {k: v for k, v in asdict(config.gba).items() if k not in unused}
    if not weighted(config):
        settings |= {"scale": 0.0, "gate": "none"}
        if config.gba.grouping == "question" and config.gba.conditioning != "prompted_weighted":
            settings.pop("weights_from", None)
            settings["weights"] = [0.0] * len(PERSPECTIVES)
    return settings


def weighted(config: Config) -> bool:
    """Whether any perspective has weight."""
    return bool(config.gba.scale and (config.gba.weights_from == "validation" or any(config.gba.weights)))


def learns_weights(config: Config) -> bool:
    """Whether weights have to be learned before RL: where they act on anything."""
    return config.gba.weights_from == "validation" and bool(config.gba.scale or config.gba.grouping == "perspective")


def acting_reward(config: Config) -> RewardConfig:
    """The reward that acts: where no perspective has weight no judge is paid, and the rules measure adherence."""
    return config.reward if weighted(config) else replace(config.reward, grader="rules")  # ours


def reward_key(config: Config) -> dict[str, Any]:
    """What of the reward decides a reasoner; of a judge's server not its speed, nor how it is logged in to."""
    reward, judge = acting_reward(config), config.reward.judge
    key: dict[str, Any] = {"weights": reward.weights, "protocol": reward.protocol}
    if reward.judge_weight:  # which judge it is stands among the inputs
        key |= {"judge_weight": reward.judge_weight, "rules": versions("pairwise", "judge_scores")}
        if judge.run in ("judge_sft", "judge_dpo"):
            key["judge_tokens"] = config.judge.max_new_tokens
        if judge.run is None:
            key |= {"judge_sees": judge.shows_images, "judge_tokens": judge.max_new_tokens}
    if reward.grader == "rules":
        return key
    address = without_password(judge.base_url or "").rstrip("/")
    sees = {"images": judge.shows_images, "answer": judge.shows_answer}
    told = {"server": [address, judge.model, judge.revision], "prompt": VERSION, "sees": sees}
    return key | {"grader": reward.grader, "judge": {**told, "max_new_tokens": judge.max_new_tokens}}
