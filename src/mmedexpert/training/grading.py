"""How far completions follow the perspective they were prompted with, and who says so: rules, a judge, both. # ours"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedexpert.data.record import Record
from mmedexpert.engines.ledger import Ledger
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.rubrics import Grades, grades
from mmedexpert.guidelines.truth import truth_of
from mmedexpert.schema import RewardConfig

HOLDS = 0.5  # ours: from this value on a criterion of the rules counts as held, where it is compared with the judge's
PAIRS = ("both", "rules_alone", "judge_alone", "neither")  # who says of a criterion that it holds, for kappa

Criteria = dict[str, dict[str, float | None]]  # perspective to criterion to value in [0, 1]; None: cannot be checked


@dataclass(frozen=True)
class Case:
    """A completion to be graded: what it answers, the perspective it was prompted for (None: all), the images it is of.

    Raises ValueError for an unknown perspective.
    """

    record: Record
    completion: str
    perspective: str | None
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.perspective not in (None, *PERSPECTIVES):
            raise ValueError(f"perspective must be None or one of {', '.join(PERSPECTIVES)}, got {self.perspective!r}")

    @property
    def asked(self) -> tuple[str, ...]:
        """The perspectives it is graded by."""
        return PERSPECTIVES if self.perspective is None else (self.perspective,)


@dataclass(frozen=True)
class Grading:
    """What a grader says of N cases.

    `scores` [N, K] in [0, 1], K in the order of PERSPECTIVES, NaN where a perspective was not asked or its grade is
    missing; `criteria` of the asked perspectives, per case, empty where missing; `counts` are sums, which add up over
    batches and ranks (`report_of` makes rates of them), empty where there is nothing to tell.
    """

    scores: list[list[float]]
    criteria: list[Criteria]
    counts: dict[str, float]


Grader = Callable[[Sequence[Case]], Grading]


class RulesGrader:
    """The rubrics of `guidelines.rubrics`: always there, always the same."""

    def __call__(self, cases: Sequence[Case]) -> Grading:
        found = [(case, rules_of(case)) for case in cases]
        return Grading(
            [[one.scores[p] if p in case.asked else math.nan for p in PERSPECTIVES] for case, one in found],
            [{p: dict(one.criteria[p]) for p in case.asked} for case, one in found],
            {},
        )


class HybridGrader:
    """Rules veto, a judge grades the rest. # ours

    A completion that the rules find unsound (a refusal, a placeholder, a contradiction: `Grades.faults`) scores 0 on
    every criterion and is never shown to the judge: no wording can talk the judge into paying for it.
    """

    def __init__(self, judge: Grader) -> None:
        self.judge = judge

    def __call__(self, cases: Sequence[Case]) -> Grading:
        rules = [rules_of(case) for case in cases]
        sound = [i for i, one in enumerate(rules) if not one.faults]
        judged = self.judge([cases[i] for i in sound])
        scores = [[0.0 if p in case.asked else math.nan for p in PERSPECTIVES] for case in cases]
        criteria: list[Criteria] = [
            {p: {c: None if value is None else 0.0 for c, value in one.criteria[p].items()} for p in case.asked}
            for case, one in zip(cases, rules, strict=True)
        ]
        for i, row, held in zip(sound, judged.scores, judged.criteria, strict=True):
            scores[i], criteria[i] = row, held
        vetoed = {"graded": float(len(cases)), "vetoed": float(len(cases) - len(sound))}
        return Grading(scores, criteria, {**judged.counts, **vetoed})


def rules_of(case: Case) -> Grades:
    """What the rules say of a completion."""
    return grades(case.completion, case.record.options, truth_of(case.record))


def pairs_of(case: Case, judged: Mapping[str, Mapping[str, bool]]) -> dict[str, int]:
    """How often rules and judge agree on the criteria of a completion, by PAIRS; what the rules cannot check is left
    out."""
    found, rules = dict.fromkeys(PAIRS, 0), rules_of(case).criteria
    for perspective, criteria in judged.items():
        for name, held in criteria.items():
            value = rules[perspective].get(name)
            if value is not None:
                found[PAIRS[2 * (value < HOLDS) + (not held)]] += 1
    return found


def kappa(both: float, rules_alone: float, judge_alone: float, neither: float) -> float:
    """Cohen's kappa of two graders who say yes or no, from how often each pair of verdicts came. In [-1, 1].

    Source: Cohen (1960). NaN where it is undefined: nothing compared, or both always say the same one thing.
    """
    total = both + rules_alone + judge_alone + neither
    if not total:
        return math.nan
    rules, judge = (both + rules_alone) / total, (both + judge_alone) / total
    chance = rules * judge + (1 - rules) * (1 - judge)
    return math.nan if chance >= 1.0 else ((both + neither) / total - chance) / (1 - chance)


def report_of(counts: Mapping[str, float]) -> dict[str, float]:
    """The metrics `grader/..` of the counts of a `Grading`, or of several added up; none without counts.

    `missing` is the share of the completions that the judge was to grade, `vetoed` (hybrid) of all; `calls`, the
    tokens and `seconds` are sums; `kappa` is left out where it is undefined.
    """
    if not counts:
        return {}
    found = {name: counts[name] for name in ("calls", "cached", "tokens", "prompt_tokens", "seconds")}
    found["missing"] = counts["missing"] / counts["judged"] if counts["judged"] else 0.0
    if "vetoed" in counts:
        found["vetoed"] = counts["vetoed"] / counts["graded"] if counts["graded"] else 0.0
    agreement = kappa(*(counts[pair] for pair in PAIRS))
    if not math.isnan(agreement):
        found["kappa"] = agreement
    return {f"grader/{name}": value for name, value in found.items()}


def grader_of(reward: RewardConfig, ledger: Ledger) -> Grader:
    """The grader that `reward.grader` names; what a judge says is kept in `ledger`.

    Raises UserError where the environment variable with the judge's key is empty.
    """
    if reward.grader == "rules":
        return RulesGrader()
    from mmedexpert.engines.openai import engine_of  # its library takes two seconds to import
    from mmedexpert.training.judge import JudgeGrader  # it needs the interface above

    judge = reward.judge
    engine = engine_of(judge, "reward.judge", max_new_tokens=judge.max_new_tokens, ledger=ledger)
    found = JudgeGrader(engine, shows_images=judge.shows_images, shows_answer=judge.shows_answer)
    return HybridGrader(found) if reward.grader == "hybrid" else found
