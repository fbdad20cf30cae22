"""Group rollouts for GBA: prompts by perspective, sampled completions, rewards, advantages (docs/usage.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.scoring import Protocol
from mmedexpert.training import rewards
from mmedexpert.training.advantages import RewardScale, group_relative, guideline_based, perspective_terms
from mmedexpert.training.batches import step_seed
from mmedexpert.training.grading import Case, Criteria, Grader
from mmedexpert.training.sampler import IN_PROCESS, Sampler, Sampling


@dataclass(frozen=True)
class Guidance:
    """GBA's own settings: perspective `weights`, their `scale`, `gate` none|correct, `conditioning` (see
    `assign_perspectives`), and whether outcomes are compared among a question's or a perspective's completions."""

    weights: tuple[float, ...]
    scale: float
    gate: str
    conditioning: str
    scale_rewards: RewardScale
    grouping: str = "question"
    judge_weight: float = 0.0  # of a judge's scores


# scores of each record's completions, [B][G], and what it cost to get them
Judge = Callable[[Sequence[Record], Path, Sequence[Sequence[str]]], tuple[list[list[float]], dict[str, float]]]
PER_GROUP = (
    "outcome",
    "adherence",
    "terms",
    "judged",
    "judge_term",
    "advantages",
)  # fields of a Rollout with a row per group
PADDED = ("sampling_logps", "mask", "old_logps")  # those with a column per token, as many as the longest completion has


@dataclass
class Rollout:
    """B groups of G completions: everything the update needs, and what is logged. Rows are b*G+g."""

    prompts: list[Prompt]
    completions: list[list[int]]
    texts: list[str]
    perspectives: list[str | None]
    sampling_logps: Tensor  # [B*G, T], of the distribution sampled from
    mask: Tensor  # [B*G, T]
    finished: Tensor  # [B*G]
    outcome: Tensor  # [B, G]
    parts: dict[str, list[float]]  # each reward function's values [B*G]
    adherence: Tensor  # [B, G, K], NaN where another perspective was asked for, or a judge's grade is missing
    terms: Tensor  # [B, G, K] each perspective's share of the advantage
    judged: Tensor  # [B, G] a judge's scores, comparable within a group; NaN without a judge or where it failed
    judge_term: Tensor  # [B, G] the judge's share of the advantage
    advantages: Tensor  # [B, G]
    seconds: dict[str, float]  # wall seconds of `gen` and `reward`
    old_logps: Tensor | None = None  # [B*G, T], of the first update, for the later ones
    criteria: list[Criteria] = field(default_factory=list)  # of the perspectives asked [B*G]
    graded: dict[str, float] = field(default_factory=dict)  # `Grading.counts`, of all completions that were graded
    scored: dict[str, float] = field(default_factory=dict)  # `Scores.counts`, of all that a judge scored

    def informative(self) -> list[int]:
        """The groups that move the policy: those in which not every advantage is zero."""
        return self.advantages.bool().any(1).nonzero().flatten().tolist()

    def take(self, groups: Sequence[int]) -> Rollout:
        """Some of the groups."""
        size = self.outcome.shape[1]
        rows = [b * size + g for b in groups for g in range(size)]

        def chosen(name: str, value: Any) -> Any:
            places = list(groups) if name in PER_GROUP else rows
            return value[places] if isinstance(value, Tensor) else [value[place] for place in places if value]

        kept = ("parts", "seconds", "graded", "scored", "old_logps")
        values = {name: value for name, value in vars(self).items() if name not in kept}
        taken = {name: chosen(name, value) for name, value in values.items()}
        parts = {name: chosen(name, value) for name, value in self.parts.items()}
        old = None if self.old_logps is None else self.old_logps[rows]
        return replace(self, **taken, parts=parts, old_logps=old)

    def join(self, other: Rollout) -> Rollout:
        """The groups of both; completions are padded to the longer of the two, seconds and counts add up."""

        def both(name: str, one: Any, more: Any) -> Any:
            if not isinstance(one, Tensor):
                return None if one is None else one + more
            if name in PADDED:
                width = max(one.shape[1], more.shape[1])
                one, more = (F.pad(part, (0, width - part.shape[1])) for part in (one, more))
            return torch.cat([one, more])

        apart = ("parts", "seconds", "graded", "scored")
        values = {name: value for name, value in vars(self).items() if name not in apart}
        joined = {name: both(name, value, getattr(other, name)) for name, value in values.items()}
        parts = {name: values + other.parts[name] for name, values in self.parts.items()}
        seconds = {name: value + other.seconds[name] for name, value in self.seconds.items()}
        return replace(
            self, **joined, parts=parts, seconds=seconds, graded=_sums(self.graded, other.graded),
            scored=_sums(self.scored, other.scored),
        )  # fmt: skip


def _sums(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def assign_perspectives(weights: Sequence[float], num_generations: int, conditioning: str) -> list[str | None]:
    """The perspective each of the G completions is prompted with (None: the prompt stays as it is). # ours

    `prompted` spreads them evenly over all four whatever the weights, so that every arm of an ablation is asked the
    same; `prompted_weighted` over those with weight > 0 alone, without any over none; `free` over none.
    """
    asked = list(PERSPECTIVES) if conditioning == "prompted" else []
    if conditioning == "prompted_weighted":
        asked = [name for name, weight in zip(PERSPECTIVES, weights, strict=True) if weight > 0]
    if not asked:
        return [None] * num_generations
    return [asked[i * len(asked) // num_generations] for i in range(num_generations)]


def advantages(
    outcome: Tensor, adherence: Tensor, judged: Tensor, guidance: Guidance, correct: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """GBA advantages [B, G] by `guideline_based`, each perspective's term [B, G, K] of them, and the judge's [B, G].

    The judge's scores are normalised within their group as the outcome is, and added with their weight. # ours
    """
    options: dict[str, Any] = {
        "scale": guidance.scale,
        "gate": correct if guidance.gate == "correct" else None,
        "reward_scale": guidance.scale_rewards,
    }
    terms = perspective_terms(adherence, guidance.weights, **options)
    if guidance.grouping == "perspective":
        names = assign_perspectives(guidance.weights, outcome.shape[1], guidance.conditioning)
        options["asked"] = [PERSPECTIVES.index(name) for name in names if name]
    total = guideline_based(outcome, adherence, guidance.weights, **options)
    if not guidance.judge_weight:
        return total, terms, torch.zeros_like(total)
    term = guidance.judge_weight * group_relative(judged, guidance.scale_rewards)
    return total + term, terms, term


def roll_out(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    image_root: Path,
    *,
    sampling: Sampling,
    guidance: Guidance,
    reward_weights: dict[str, float],
    protocol: Protocol,
    grader: Grader,
    seeds: Sequence[int],
    judge: Judge | None = None,
    sampler: Sampler = IN_PROCESS,
) -> Rollout:
    """Sample a group per record, each by its own seed, score it and compute its advantages.

    `grader` says how far each completion follows its perspective; a grade that is missing (NaN) counts as not asked.
    `judge` scores the completions of a record (NaN: it failed), which counts with `guidance.judge_weight`.

    Completions of one record that share an instruction share its prefill; images are patched once per record.
    """
    asked = assign_perspectives(guidance.weights, sampling.num_generations, guidance.conditioning)
    distinct = list(dict.fromkeys(asked))
    per_prompt = asked.count(distinct[0]) if len({asked.count(name) for name in distinct}) == 1 else 1
    layout = distinct if per_prompt > 1 else asked
    prompts = [
        encoder.prompt(record, image_root, encoder.instructions[name] if name else "")
        for record in records
        for name in layout
    ]
    start = time.perf_counter()
    encoder.encode_images(core_of(model), prompts)
    each_seed = [step_seed(seed, place) for seed in seeds for place in range(len(layout))]
    sampled = sampler(model, encoder, prompts, sampling, per_prompt, each_seed)
    rows = sampled.rows()
    sampling_ended = time.perf_counter()
    texts = [encoder.decode(row) for row in rows]
    group = sampling.num_generations
    repeated = [record for record in records for _ in range(group)]
    perspectives = asked * len(records)
    outcome, parts = rewards.outcome(texts, record=repeated, weights=reward_weights, protocol=protocol)
    grading = grader(
        [
            Case(record, text, name, tuple(image_root / image for image in record.images))
            for record, text, name in zip(repeated, texts, perspectives, strict=True)
        ]
    )
    scores = torch.tensor(outcome).view(-1, group)
    followed = torch.tensor(grading.scores).view(-1, group, len(PERSPECTIVES))
    correct = torch.tensor(parts["accuracy"]).view(-1, group) == 1.0
    judged, scored = torch.full_like(scores, math.nan), dict[str, float]()
    if judge is not None:
        groups = [texts[first : first + group] for first in range(0, len(texts), group)]
        values, scored = judge(records, image_root, groups)
        judged = torch.tensor(values)
    total, terms, judge_term = advantages(scores, followed, judged, guidance, correct)
    seconds = {"gen": sampling_ended - start, "reward": time.perf_counter() - sampling_ended}
    return Rollout(
        [prompt for prompt in prompts for _ in range(per_prompt)], rows, texts, perspectives,
        sampled.logps, sampled.mask, sampled.finished, scores, parts, followed, terms, judged, judge_term,
        total, seconds, criteria=grading.criteria, graded=grading.counts, scored=scored,
    )  # fmt: skip
