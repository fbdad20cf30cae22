"""The policy that RL trains, and what samples and scores its completions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mmedexpert.checks_sampler import NO_ADDRESS
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import add_lora, load_model
from mmedexpert.models.encode import Encoder
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.scoring import Protocol
from mmedexpert.stages.common import Base, loading
from mmedexpert.stages.serve import served_name
from mmedexpert.training.advantages import RewardScale
from mmedexpert.training.grading import Grader
from mmedexpert.training.rollouts import Guidance, Judge, Rollout, assign_perspectives, roll_out
from mmedexpert.training.sampler import IN_PROCESS, Sampler, Sampling

if TYPE_CHECKING:
    from peft import PeftModel


def policy_of(config: Config, base: Base, starts: Sequence[LoraAdapter], *, dropout: float = 0.0) -> PeftModel:
    """The base with the start inside it, frozen, and a fresh LoRA on top.

    Without dropout, whatever `model.lora.dropout` says of SFT: an update compares log-probabilities with the sampler's,
    the reference's or those of an update before, which dropped nothing, or something else.  # ours; TRL's DPO
    """
    from mmedexpert.models.lean import start_from_  # lazily, as models/backbone.py says

    model, lora = load_model(base.folder, loading(config, trained=True)), config.model.lora
    for adapter in starts:
        start_from_(model, adapter)
    return add_lora(
        model, r=lora.r, alpha=lora.alpha, dropout=dropout, target_modules=lora.target_modules,
        gradient_checkpointing=config.model.gradient_checkpointing,
        seed=config.seed,
    )  # fmt: skip


def guidance_of(config: Config) -> Guidance:
    """What of GBA's settings decides prompts and advantages."""
    settings = config.gba
    scale_rewards = cast(RewardScale, settings.scale_rewards)
    return Guidance(
        tuple(settings.weights), settings.scale, settings.gate, settings.conditioning, scale_rewards,
        settings.grouping, config.reward.judge_weight,
    )  # fmt: skip


def sampler_of(
    config: Config,
    policy: PeftModel,
    encoder: Encoder,
    image_root: Path,
    grader: Grader,
    completions: int,
    judge: Judge | None = None,
    *,
    sampler: Sampler = IN_PROCESS,
) -> Callable[[list[Record], list[int]], Rollout]:
    """What samples and scores a group for each record, by the record's seed."""
    settings, guidance = config.gba, guidance_of(config)
    sampling = Sampling(completions, config.model.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)

    def sample(records: list[Record], seeds: list[int]) -> Rollout:
        return roll_out(
            policy, encoder, records, image_root, sampling=sampling, guidance=guidance,
            reward_weights=config.reward.weights, protocol=cast(Protocol, config.reward.protocol),
            grader=grader, seeds=seeds, judge=judge, sampler=sampler,
        )  # fmt: skip

    return sample


def servers_of(
    config: Config, start: Run | None, run: Run, encoder: Encoder, records: Sequence[Record], image_root: Path
) -> Sampler:
    """What samples: the policy in this process, or servers of the model it starts from, which have room for every one
    of these records."""
    settings = config.sampler
    if settings.name != "vllm":
        return IN_PROCESS
    if not settings.base_urls:
        raise UserError(NO_ADDRESS)
    from mmedexpert.engines.vllm import Servers  # its library takes a second to import
    from mmedexpert.training.sampler import Served

    servers = Servers(
        settings.base_urls, served_name(config, start), api_key=os.environ.get(settings.api_key_env or ""),
        concurrency=settings.concurrency, timeout_s=settings.timeout_s, patience_s=settings.patience_s,
    )  # fmt: skip
    folder = Path(settings.adapters) if settings.adapters else run.folder / "served"

    def longest() -> int:
        gba = config.gba
        asked = assign_perspectives(gba.weights, gba.num_generations, gba.conditioning)
        told = [encoder.instructions[name] if name else "" for name in asked]
        instruction = max(told, key=lambda text: len(encoder.tokenizer(text)["input_ids"]))
        return max(encoder.length(record, image_root, instruction) for record in records)

    return Served(servers, folder.resolve(), run.run_id, longest)
