"""The numbers a run is judged by, as W&B's summary holds them: what a curve came to, and evaluations with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmedexpert.runtime.runs import Run

STEP = "trainer/global_step"  # Lightning's name: the x axis of every curve
# of a training's noisy curve the summary holds these, not its last step
ENDS = ("start", "end", "gain", "best")
CURVES = ("loss", "mean_token_accuracy", "entropy", "kl", "reward", "adherence")
NOISY = (*CURVES, "rewards/accuracy/mean", "advantages/share")  # of a reasoner's: `accuracy/`, `share/` (stages/gba.py)
SMALLER = ("loss", "entropy", "kl")  # the best of these is the smallest
LEAD = ("macro_accuracy", "macro_ci_low", "macro_ci_high", "n", "parse_failure_rate")
ASIDE = ("perspectives/", "baselines/", "question_set/", "contamination/", "layers/")  # in the run's own files


def ends(name: str, values: Sequence[float]) -> dict[str, float]:
    """Of a curve the means of its first and last fifth, the gain from one to the other, and its best value."""
    fifth = max(1, len(values) // 5)
    start, end = sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth
    best = min(values) if name in SMALLER else max(values)
    return {f"{name}/{place}": value for place, value in zip(ENDS, (start, end, end - start, best), strict=True)}


def finals(run: Run, metrics: Mapping[str, float], inputs: Mapping[str, str], split: str) -> dict[str, float]:
    """What of a stage's metrics is shown at its end, of a pipeline with what its reasoner's reward came to.

    An evaluation's numbers stand under its question set: `test/macro_accuracy`, `vqa_rad/macro_accuracy`.
    """
    if run.stage == "eval":
        place = set_of(run, split)
        kept = {key: value for key, value in metrics.items() if not key.startswith(ASIDE) and "/by_" not in key}
        return {f"{place}/{key.removeprefix('protocols/')}": value for key, value in kept.items()}
    if run.stage == "pipeline":
        asked = {key: value for key, value in metrics.items() if key.rpartition("/")[2] in LEAD and key.count("/") == 1}
        last = next((key.partition("/")[0] for key in reversed(asked)), "")
        led = {key: asked[f"{last}/{key}"] for key in LEAD if f"{last}/{key}" in asked}
        public = {key: value for key, value in metrics.items() if _of_benchmark(key)}
        found = {f"{split}/{key}": value for key, value in {**asked, **led}.items()} | public
        for name, run_id in inputs.items():
            if name.startswith("gba/"):
                found |= {
                    f"{name}/{key}": v
                    for key, v in _metrics(run, "gba", run_id).items()
                    if _is_end(key) or key.startswith("weight/")
                }
        return found
    return {key: value for key, value in metrics.items() if not key.startswith(ASIDE)}


def lead(run: Run, split: str) -> dict[str, float]:
    """An evaluation's main numbers with their interval, as the run of the model that was asked shows them."""
    place, metrics = set_of(run, split), run.metrics
    return {f"{place}/{key}": metrics[key] for key in LEAD if key in metrics}


def set_of(run: Run, split: str) -> str:
    """The question set of an evaluation: a benchmark's name; of the own data the split."""
    asked = run.summary["question_set"]
    return asked["name"] if asked["public"] else split


def _is_end(key: str) -> bool:
    return key.rpartition("/")[2] in ENDS


def _of_benchmark(key: str) -> bool:
    """`vqa_rad/caci/medevalkit/accuracy`, not its breakdowns."""
    parts = key.split("/")
    return len(parts) == 4 and parts[2] in ("robust", "medevalkit") and parts[3] in ("accuracy", "ci_low", "ci_high")


def _metrics(run: Run, stage: str, run_id: str) -> dict[str, float]:
    """The metrics of another run beside this one; none where it is gone."""
    for path in Path(run.folder).parents[1].glob(f"{stage}/*-{run_id}/metrics.json"):
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {}
