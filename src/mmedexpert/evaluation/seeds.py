"""The arms of an experiment over training seeds: mean, spread, and each arm paired against one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedexpert.errors import UserError
from mmedexpert.evaluation.comparison import PAIRED_RESAMPLES
from mmedexpert.evaluation.finished import EvalRun
from mmedexpert.evaluation.stats import half_width, macro_bootstrap_ci, paired_cluster_bootstrap

KIND = "needs"  # the breakdown of drawn questions by the perspective that decides them


@dataclass(frozen=True)
class Arm:
    """One model with one set of settings, evaluated under several training seeds on the same questions."""

    label: str
    runs: dict[int, EvalRun]
    summaries: dict[int, Mapping[str, Any]]

    def scores(self) -> dict[int, float]:
        """Percent right by seed, over the questions that all arms have: on a set of ours the mean over specialties, on
        a public one over questions."""
        found = {}
        for seed, run in self.runs.items():
            protocol, names = self.summaries[seed]["protocol"], self.specialties(seed)
            rows: dict[str, list[bool]] = {}
            for question in run.questions.values():
                for name in [value for group, value in question.breakdowns if group == "specialty" and value in names]:
                    rows.setdefault(name, []).append(question.correct[protocol])
            if _public(self.summaries[seed]):
                rows = {"": [question.correct[protocol] for question in run.questions.values()]}
            found[seed] = 100 * float(np.mean([np.mean(right) for right in rows.values()]))
        return found

    def specialties(self, seed: int) -> set[str]:
        """Those whose mean a set of ours is scored by; a finer one beside them is part of one of them."""
        return set(self.summaries[seed].get("per_specialty") or ())

    def parts(self) -> dict[tuple[str, str], float]:
        """Percent right in each (breakdown, value) of specialties and kinds, as mean over seeds."""
        found: dict[tuple[str, str], list[float]] = {}
        for seed, run in self.runs.items():
            protocol = self.summaries[seed]["protocol"]
            rows: dict[tuple[str, str], list[bool]] = {}
            for question in run.questions.values():
                for part in set(question.breakdowns):
                    if part[0] == KIND or (part[0] == "specialty" and part[1] in self.specialties(seed)):
                        rows.setdefault(part, []).append(question.correct[protocol])
            for part, right in rows.items():
                found.setdefault(part, []).append(100 * float(np.mean(right)))
        order = [name for one in self.summaries.values() for name in one.get("per_specialty") or ()]
        place = {("specialty", name): (number, "") for number, name in reversed([*enumerate(order)])}
        return {
            part: float(np.mean(values))
            for part, values in sorted(found.items(), key=lambda item: place.get(item[0], (len(order), item[0][1])))
        }


@dataclass(frozen=True)
class Paired:
    """An arm minus the reference, percentage points, over the seeds that both have.

    `half`: half the 95% interval by Student's t over seeds, what training does; None for one seed. `low`, `high`: 95%
    by bootstrap over images of each question's mean over seeds, what questions do.
    """

    seeds: tuple[int, ...]
    difference: float
    half: float | None
    low: float
    high: float


def arms_of(runs: Sequence[EvalRun]) -> list[Arm]:
    """The arms among aligned runs of one set of questions, as they come.

    Runs of one recipe are one arm. Raises UserError where two runs of an arm have one seed.
    """
    families: dict[str, list[EvalRun]] = {}
    for run in runs:
        families.setdefault(run.family, []).append(run)
    arms = []
    for label, members in families.items():
        by_seed = {run.seed if run.seed is not None else -1: run for run in members}
        if len(by_seed) < len(members):
            raise UserError(f"{label}: two of its {len(members)} evaluations have one seed, so they are no seeds of it")
        ordered = {seed: by_seed[seed] for seed in sorted(by_seed)}
        texts = {s: (run.path.parent / "summary.json").read_text(encoding="utf-8") for s, run in ordered.items()}
        arms.append(Arm(label, ordered, {seed: json.loads(text) for seed, text in texts.items()}))
    return arms


def best_first(arms: Sequence[Arm]) -> list[Arm]:
    """By the mean over seeds."""
    return sorted(arms, key=lambda arm: -float(np.mean(list(arm.scores().values()))))


def named(arms: Sequence[Arm], name: str | None) -> Arm | None:
    """The arm with this label, else the first one of a model so called; None where there is none.

    `start (plain)` is also a `start` that all arms share, whose label says no arm.
    """
    model, _, said = (name or "").partition(" (")
    by_model = [arm for arm in arms if next(iter(arm.runs.values())).model == model]
    found = [arm for arm in arms if arm.label == name] or [a for a in by_model if not said or a.label == model]
    return next(iter(found), None)


def paired(arm: Arm, reference: Arm, *, seed: int = 0) -> Paired | None:
    """The arm against the reference; None for itself, or where they have no seed in common."""
    seeds = tuple(sorted(set(arm.runs) & set(reference.runs)))
    if not seeds or arm is reference:
        return None
    mine, theirs = arm.scores(), reference.scores()
    over = np.array([mine[one] - theirs[one] for one in seeds])
    ours, others = (
        np.mean(
            [[q.correct[of.summaries[one]["protocol"]] for q in of.runs[one].questions.values()] for one in seeds], 0
        )
        for of in (arm, reference)
    )
    questions, summary = list(arm.runs[seeds[0]].questions.values()), arm.summaries[seeds[0]]
    if _public(summary):
        clusters = [question.image_group for question in questions]
        _, low, high, _ = paired_cluster_bootstrap(ours, others, clusters, num_resamples=PAIRED_RESAMPLES, seed=seed)
    else:  # of the mean over specialties, as the scores are
        rows = [
            (float(ours[place] - others[place]), question.image_group, name)
            for place, question in enumerate(questions)
            for group, name in question.breakdowns
            if group == "specialty" and name in arm.specialties(seeds[0])
        ]
        _, low, high = macro_bootstrap_ci(*zip(*rows, strict=True), num_resamples=PAIRED_RESAMPLES, seed=seed)
    mean = float(np.round(over.mean(), 9))  # no 1e-14 of two sums of one value
    return Paired(seeds, mean, half_width(over), 100 * low, 100 * high)


def _public(summary: Mapping[str, Any]) -> bool:
    return bool(summary["question_set"]["public"])
