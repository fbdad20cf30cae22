"""The policy that RL trains, and what samples and scores its completions; how hard questions are for it before RL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mmedexpert.checks_sampler import NO_ADDRESS
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.guidelines import instructions
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import add_lora, load_encoder, load_model
from mmedexpert.models.encode import Encoder
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.progress import Bar
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.versions import digest, versions
from mmedexpert.schema import Config, RewardConfig
from mmedexpert.scoring import Protocol
from mmedexpert.stages.common import Base, content_of, device_of, ledger_of, loading, model_key, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import base_of
from mmedexpert.stages.serve import served_name
from mmedexpert.training.advantages import RewardScale
from mmedexpert.training.batches import step_seed
from mmedexpert.training.grading import Grader, grader_of
from mmedexpert.training.rollouts import Guidance, Judge, Rollout, roll_out
from mmedexpert.training.sampler import IN_PROCESS, Sampler, Sampling

if TYPE_CHECKING:
    from peft import PeftModel

DIFFICULTY, COLUMNS = "difficulty.jsonl", ("id", "passed", "of")


def policy_of(config: Config, base: Base, starts: Sequence[LoraAdapter]) -> PeftModel:
    """The base with the start inside it, frozen, and a fresh LoRA on top."""
    from mmedexpert.models.lean import start_from_  # lazily, as models/backbone.py says

    model, lora = load_model(base.folder, loading(config, trained=True)), config.model.lora
    for adapter in starts:
        start_from_(model, adapter)
    return add_lora(
        model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules,
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


def servers_of(config: Config, start: Run | None, run: Run) -> Sampler:
    """What samples: the policy in this process, or servers of the model it starts from."""
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
    return Served(servers, folder.resolve(), run.run_id)


def difficulty(config: Config, name: str, specialties: list[str], start: Run | None) -> Run:
    """How many of `gba.keep_rollouts` completions of each training question are right, sampled from the start under
    RL's prompts: a line each in `<folder>/difficulty.jsonl`.

    MedVLThinker filters its RL data so (UCSC-VLAA/MedVLThinker@a3163b1), by a base model without perspectives: ours is
    the policy itself.  # ours
    Questions that a killed run has written are not sampled again.
    """
    base, data, settings = base_of(config), dataset(config), config.gba
    inputs = {"base": base.identity, "data": content_of(data, "train", specialties)}
    if start:
        inputs["start"] = start.run_id
    asked = ("conditioning", "temperature", "top_p", "top_k", "keep_rollouts", *_weights_asked(config))
    key = {
        "specialties": specialties,
        "sampled": {name: getattr(settings, name) for name in asked},
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "rules": versions("prompts", "sampling", "rewards", "difficulty", config.reward.protocol),
        "instructions": digest(instructions(config.model.instructions)),
        **({"sampler": "vllm"} if config.sampler.name == "vllm" else {}),
    }

    def work(run: Run) -> dict[str, float]:
        records, image_root = records_of(data, "train", specialties)
        starts = [LoraAdapter.load(start.folder / "adapter")] if start else []
        encoder = load_encoder(base.folder, loading(config))
        policy = policy_of(config, base, starts).to(device_of(config))  # it is not trained here
        grader = grader_of(RewardConfig(grader="rules"), ledger_of(config))
        sampler = servers_of(config, start, run)
        sample = sampler_of(config, policy, encoder, image_root, grader, settings.keep_rollouts, sampler=sampler)
        with run.phase("sample"):
            counts = _measured(run.folder / DIFFICULTY, records, sample, settings.prompts_per_step, config.seed)
        sampler.close()
        return {
            "questions": float(len(records)),
            "solved": sum(counts.values()) / len(records) / settings.keep_rollouts,
        }

    return stage_run(config, "difficulty", name, key, work, inputs, sources={"data": data})


def _weights_asked(config: Config) -> tuple[str, ...]:
    """Weights decide which perspectives are asked for with `prompted_weighted` alone."""
    return ("weights",) if config.gba.conditioning == "prompted_weighted" else ()


def _measured(
    path: Path, records: Sequence[Record], sample: Callable[[list[Record], list[int]], Rollout], batch: int, seed: int
) -> dict[str, int]:
    """Question to how many of its completions are right; each batch is on disk before the next is sampled."""
    kept = read_lines(path, COLUMNS)
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())  # without a line that a kill has cut
    counts = {line["id"]: line["passed"] for line in kept}
    parts = [list(records[first : first + batch]) for first in range(0, len(records), batch)]
    with Bar("difficulty", len(records)) as bar, path.open("a", encoding="utf-8") as file:
        for number, part in enumerate(parts):
            if all(record.id in counts for record in part):
                continue
            seeds = [step_seed(seed, number * batch + place) for place in range(len(part))]
            right = sample(part, seeds).parts["accuracy"]
            of = len(right) // len(part)
            for place, record in enumerate(part):
                counts[record.id] = int(sum(right[place * of : (place + 1) * of]))
                file.write(json.dumps({"id": record.id, "passed": counts[record.id], "of": of}) + "\n")
            file.flush()
            bar.show(min((number + 1) * batch, len(records)), {"solved": sum(counts.values()) / len(counts) / of})
    return counts


def passed(path: Path) -> dict[str, int]:
    """Question to how many of its completions were right, from the file of a run of `difficulty`."""
    return {row["id"]: row["passed"] for row in read_lines(path, COLUMNS)}


def within(records: Sequence[Record], counts: Mapping[str, int], keep: Sequence[int]) -> list[Record]:
    """The questions solved `keep[0]` to `keep[1]` times, both included; UserError where that leaves none."""
    kept = [record for record in records if keep[0] <= counts[record.id] <= keep[1]]
    if not kept:
        found = ", ".join(f"{n} times: {list(counts.values()).count(n)}" for n in sorted(set(counts.values())))
        raise UserError(f"gba.keep={list(keep)} leaves no training question; solved {found}: give a wider range")
    return kept
