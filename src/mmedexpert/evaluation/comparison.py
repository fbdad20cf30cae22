"""Finished evaluations compared: accuracies with intervals, breakdowns, seeds, and paired tests against one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmedexpert.evaluation.finished import EvalRun, by_benchmark
from mmedexpert.evaluation.predict import PROTOCOLS
from mmedexpert.evaluation.stats import (
    across_seeds,
    cluster_bootstrap_ci,
    half_width,
    holm,
    mcnemar_exact,
    paired_cluster_bootstrap,
    student_p,
)

PAIRED_RESAMPLES = 10_000  # ours: the smallest p is 0.0002, so that Holm over 100 comparisons can still find one
Number = dict[str, Any]  # one row of comparison.csv: shares in [0, 1], None where there is no number


def accuracies(runs: Sequence[EvalRun], *, num_resamples: int, seed: int) -> list[Number]:
    """Accuracy over all questions of each run (group empty) and over each value of each breakdown, by protocol.

    Every question counts once (micro accuracy); one with several specialties counts in each. A breakdown whose one
    value covers all questions says nothing and is left out. 95 % intervals by bootstrap clustered on images.
    """
    numbers = []
    for run in runs:
        questions = list(run.questions.values())
        _, clusters = np.unique([q.image_group for q in questions], return_inverse=True)
        parts: dict[tuple[str, str], list[int]] = {}
        for place, question in enumerate(questions):
            for part in set(question.breakdowns):
                parts.setdefault(part, []).append(place)
        whole: list[tuple[tuple[str, str], list[int]]] = [(("", ""), list(range(len(questions))))]
        informative = [item for item in sorted(parts.items()) if len(item[1]) < len(questions)]
        for (group, value), places in whole + informative:
            chosen = [questions[place] for place in places]
            rates = {
                "unparsed": float(np.mean([not q.parsed for q in chosen])),
                "truncated": float(np.mean([q.truncated for q in chosen])),
            }
            for protocol in PROTOCOLS:
                mean, low, high = cluster_bootstrap_ci(
                    [q.correct[protocol] for q in chosen], clusters[places], num_resamples=num_resamples, seed=seed
                )
                numbers.append({
                    "table": "breakdown" if group else "accuracy", "benchmark": run.benchmark, "model": run.label,
                    "seed": run.seed, "protocol": protocol, "group": group, "value": value, "n": len(chosen),
                    "accuracy": mean, "ci_low": low, "ci_high": high, **rates,
                })  # fmt: skip
    return numbers


def seed_rows(runs: Sequence[EvalRun]) -> list[Number]:
    """Mean and standard deviation of each model that ran under several seeds: training, not questions, varies here."""
    families: dict[tuple[str, str], list[EvalRun]] = {}
    for run in runs:
        if run.seed_of is not None:
            families.setdefault((run.benchmark, run.seed_of), []).append(run)
    numbers = []
    for (benchmark, model), members in families.items():
        for protocol in PROTOCOLS:
            mean, std, count = across_seeds(
                [np.mean([q.correct[protocol] for q in run.questions.values()]) for run in members]
            )
            numbers.append({
                "table": "seeds", "benchmark": benchmark, "model": model, "protocol": protocol,
                "n": len(members[0].questions), "seeds": count, "accuracy": mean, "std": std,
            })  # fmt: skip
    return numbers


def paired(runs: Sequence[EvalRun], against: EvalRun, *, seed: int) -> tuple[list[Number], list[str]]:
    """Every other run minus the reference on the same questions: the run of `against`'s family under the same seed,
    else `against`; on other benchmarks its namesake.

    p by McNemar (exact; takes questions as independent) and by paired bootstrap clustered on images, each also adjusted
    by Holm over all comparisons of the report under one protocol (the two protocols read the same responses).  # ours

    Returns:
        The comparisons, and a note for each benchmark where the reference's model was not run.
    """
    numbers: list[Number] = []
    notes = []
    for benchmark, members in by_benchmark(runs):
        if _reference(members, against, against.seed) is None:
            notes.append(f"{benchmark}: nothing to compare with, {against.label} was not run there")
            continue
        clusters = [q.image_group for q in members[0].questions.values()]
        for run in members:
            reference = _reference(members, against, run.seed) or _reference(members, against, against.seed)
            assert reference is not None
            for protocol in PROTOCOLS if run.family != reference.family else ():
                a = np.array([q.correct[protocol] for q in run.questions.values()])
                b = np.array([q.correct[protocol] for q in reference.questions.values()])
                difference, low, high, p = paired_cluster_bootstrap(
                    a, b, clusters, num_resamples=PAIRED_RESAMPLES, seed=seed
                )
                numbers.append({
                    "table": "paired", "benchmark": benchmark, "model": run.label, "seed": run.seed,
                    "protocol": protocol, "n": len(clusters), "against": reference.label, "difference": difference,
                    "ci_low": low, "ci_high": high, "wins": int((a & ~b).sum()), "losses": int((b & ~a).sum()),
                    "p_mcnemar": mcnemar_exact(a, b), "p_bootstrap": None if math.isnan(p) else p,
                })  # fmt: skip
    _adjust(numbers, ("mcnemar", "bootstrap"))
    return numbers, notes


def _reference(members: Sequence[EvalRun], against: EvalRun, seed: int | None) -> EvalRun | None:
    """The run of the reference's family under this seed among these; under its own seed, else its only one."""
    same = [run for run in members if run.family == against.family] or [r for r in members if r.model == against.model]
    of_seed = [run for run in same if run.seed == seed]
    if len(of_seed) == 1:
        return of_seed[0]
    return same[0] if len(same) == 1 else None


def paired_over_seeds(runs: Sequence[EvalRun], against: EvalRun, *, seed: int) -> list[Number]:
    """Each family that ran under two or more of the reference's seeds, minus the reference: of every question the mean
    over the seeds is compared, and the spread of the difference over seeds stands beside it.  # ours

    `half` is half the 95% interval over seeds (Student's t: what training does), as in an experiment's table, and
    `p_seeds` its p, adjusted by Holm over all of these under one protocol; the other interval and p (95%, paired
    bootstrap clustered on images) say what questions do.
    """
    numbers: list[Number] = []
    for benchmark, members in by_benchmark(runs):
        references = {run.seed: run for run in members if run.family == against.family and run.seed_of}
        for family in dict.fromkeys(run.seed_of for run in members if run.seed_of not in (None, against.family)):
            pairs = [(run, references[run.seed]) for run in members if run.seed_of == family and run.seed in references]
            for protocol in PROTOCOLS if len(pairs) > 1 else ():
                ours, theirs = (
                    np.array(
                        [[q.correct[protocol] for q in pair[side].questions.values()] for pair in pairs], dtype=float
                    )
                    for side in (0, 1)
                )
                clusters = [q.image_group for q in pairs[0][0].questions.values()]
                difference, low, high, p = paired_cluster_bootstrap(
                    ours.mean(0), theirs.mean(0), clusters, num_resamples=PAIRED_RESAMPLES, seed=seed
                )
                each = (ours - theirs).mean(1)
                _, std, count = across_seeds(each)
                numbers.append({
                    "table": "paired_seeds", "benchmark": benchmark, "model": family, "against": against.family,
                    "protocol": protocol, "n": len(clusters), "seeds": count, "difference": difference,
                    "ci_low": low, "ci_high": high, "std": std, "half": half_width(each),
                    "p_seeds": student_p(each), "p_bootstrap": None if math.isnan(p) else p,
                })  # fmt: skip
    _adjust(numbers, ("seeds",))
    return numbers


def _adjust(numbers: Sequence[Number], kinds: Sequence[str]) -> None:
    """Holm's p beside each, over all comparisons under one protocol."""
    for protocol in PROTOCOLS:
        family = [number for number in numbers if number["protocol"] == protocol]
        for kind in kinds:
            values = [math.nan if number[f"p_{kind}"] is None else number[f"p_{kind}"] for number in family]
            for number, adjusted in zip(family, holm(values), strict=True):
                number[f"holm_{kind}"] = None if math.isnan(adjusted) else adjusted
