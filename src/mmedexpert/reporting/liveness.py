"""Does a model look? What compared runs tell of it: a grey image, the images given, the sampler against the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.evaluation.comparison import paired
from mmedexpert.evaluation.finished import EvalRun, by_benchmark
from mmedexpert.names import BASELINES, BLANK_IMAGE, SWAPPED_IMAGE
from mmedexpert.reporting.answers import Answers
from mmedexpert.reporting.lineage import Made
from mmedexpert.reporting.tables import Row
from mmedexpert.runtime.curve import STEPS, read_curve
from mmedexpert.runtime.jsonl import read_object

NOT_RUN = "not run"
GAP = "sampling/sampling_logp_difference"
BLANK, SWAPPED = "a grey image", "another question's image"
READ, TOKENS, SAMPLER = "images given", "image tokens", "sampler and trainer"


def liveness_rows(
    runs: Sequence[EvalRun], answers: Mapping[Path, Answers], made: Sequence[Made], *, seed: int
) -> list[Row]:
    """A row for each check and run; `not run` where no compared run has the data for it."""
    return [
        *_others(runs, answers, seed),
        *(_read(runs, answers) or [_row(READ, "-", f"{NOT_RUN}: no run notes which images it was given")]),
        *(_tokens(answers, runs) or [_row(TOKENS, "-", f"{NOT_RUN}: no run notes how many tokens its images had")]),
        *(_sampler(made) or [_row(SAMPLER, "-", f"{NOT_RUN}: no GBA run behind these models, or without its metrics")]),
    ]


def _row(check: str, run: str, found: str) -> Row:
    return {"check": check, "run": run, "found": found}


def _others(runs: Sequence[EvalRun], answers: Mapping[Path, Answers], seed: int) -> list[Row]:
    """Each model against itself shown a grey image, and another question's."""
    rows = []
    for check, baseline in ((BLANK, BLANK_IMAGE), (SWAPPED, SWAPPED_IMAGE)):
        found = []
        for _, members in by_benchmark(runs):
            for other in (run for run in members if run.model == baseline):
                whose = _model_of(other)
                seeing = [run for run in members if whose and run.model not in BASELINES and _model_of(run) == whose]
                if not seeing:
                    found.append(_row(check, other.title, "the model that was shown it is not among those compared"))
                found += [_row(check, run.title, _against(run, other, check, answers, seed)) for run in seeing]
        rows += found or [_row(check, "-", f"{NOT_RUN}: no {baseline} run among those compared")]
    return rows


def _model_of(run: EvalRun) -> str:
    return str((read_object(run.path.parent / "manifest.json").get("inputs") or {}).get("model") or "")


def _against(run: EvalRun, blank: EvalRun, what: str, answers: Mapping[Path, Answers], seed: int) -> str:
    """The model's accuracy minus its own on other images, under each protocol, and how many answers change."""
    numbers, _ = paired([run, blank], blank, seed=seed)
    points = ", ".join(
        f"{100 * n['difference']:+.1f} [{100 * n['ci_low']:+.1f}, {100 * n['ci_high']:+.1f}] ({n['protocol']})"
        for n in numbers
    )
    seen, unseen = _said(answers[run.path]), _said(answers[blank.path])
    both = [(seen[key], unseen[key]) for key in seen if key in unseen]
    picks, texts = (sum(one[part] != other[part] for one, other in both) for part in (0, 1))
    told = f"accuracy in points, with the images minus with {what}: {points}"
    return f"{told}; of the {len(both)} answers on this page {picks} picks (robust) and {texts} texts change"


def _said(answers: Answers) -> dict[tuple[str, Any], tuple[Any, Any]]:
    """By question and perspective what was picked (None: unparsed), and the text."""
    return {
        (identity, row.get("perspective")): (row["robust"].get("picked"), row.get("response"))
        for identity, rows in answers.shown.items()
        for row in rows
    }


def _read(runs: Sequence[EvalRun], answers: Mapping[Path, Answers]) -> list[Row]:
    rows = []
    for run in runs:
        files = [sha for shas in answers[run.path].images.values() for sha in shas]
        if files:
            lost = sum(sha is None for sha in files)
            told = f"{len({*files} - {None})} different images with {len(run.questions)} questions"
            rows.append(_row(READ, run.title, told + (f"; {lost} could not be read" if lost else "")))
    return rows


def _tokens(answers: Mapping[Path, Answers], runs: Sequence[EvalRun]) -> list[Row]:
    """How many places of the prompt a question's images had: 0 where the model got none of them."""
    rows = []
    for run in runs:
        told = [row["image_tokens"] for of in answers[run.path].shown.values() for row in of if "image_tokens" in row]
        if told:
            lost = told.count(0)
            text = f"{min(told)} to {max(told)} a question, {sum(told) / len(told):.0f} on average, "
            text += f"{len({*told})} different numbers, over the {len(told)} answers on this page"
            rows.append(_row(TOKENS, run.title, text + (f"; {lost} had none" if lost else "")))
    return rows


def _sampler(made: Sequence[Made]) -> list[Row]:
    """The gap between a completion's log-probabilities as sampled and as trained: large where the two see a prompt, or
    an image, differently."""
    rows = []
    for one in (one for one in made if one.stage == "gba"):
        curve = read_curve(one.folder / STEPS) or [one.metrics]
        steps = "over all steps" if len(curve) > 1 else "at the last step"
        mean, most = (_largest([row.get(f"{GAP}/{kind}") for row in curve]) for kind in ("mean", "max"))
        if mean is not None and most is not None:
            told = f"log-probability gap {steps}: largest mean {mean:.2g}, largest of a token {most:.2g}"
            rows.append(_row(SAMPLER, f"{one.name} ({one.run_id})", told))
    return rows


def _largest(values: Sequence[object]) -> float | None:
    known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return max(known, default=None)
