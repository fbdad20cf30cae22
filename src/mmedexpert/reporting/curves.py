"""Learning curves of the runs behind the compared models, from what their folders keep of every step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.figures import Line, legend, line_figure
from mmedexpert.reporting.lineage import Made
from mmedexpert.reporting.loggers import read_rows
from mmedexpert.reporting.markup import folded, missing, paragraph, table
from mmedexpert.reporting.tables import Row
from mmedexpert.runtime.curve import STEPS, read_curve

POINTS = 300  # ours: of a line; of longer ones each point is the mean of neighbours
TRAINED = {
    "pretrain": "The base (pretrain)", "dsa": "Experts (DSA)", "gba": "Reasoners (GBA)", "distil": "Taught merge",
}  # fmt: skip
NAMES = {
    "loss": "Loss",
    "mean_token_accuracy": "Token accuracy",
    "reward": "Reward",
    "rewards/accuracy/mean": "Right answers",
    "rewards/format/mean": "Reward for the format",
    "reward_std_group": "Deviation of rewards within a group",
    "frac_reward_zero_std": "Share of groups with equal rewards",
    "adherence": "Adherence, all perspectives",
    "advantages/share": "Perspectives' share of the advantage",
    "entropy": "Entropy",
    "kl": "KL divergence",
    "agreement": "Tokens that merge and experts agree on",
    "completions/mean_length": "Completion length in tokens",
    "completions/clipped_ratio": "Share of completions cut off",
    "clip_ratio/region_mean": "Share of clipped tokens",
    "sampling/sampling_logp_difference/mean": "Log-probability gap of sampler and trainer",
    "grader/kappa": "Kappa of rules and judge",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
# what `curve.jsonl` of a reasoner tells of each rollout, under the names of `steps.jsonl`
OF_ROLLOUTS = {
    "reward": "reward", "accuracy": "rewards/accuracy/mean", "adherence": "adherence", "share": "advantages/share",
}  # fmt: skip
Series = dict[str, tuple[list[float], list[float]]]  # metric to steps and values


@dataclass(frozen=True)
class Curve:
    """What a run keeps of its steps; `kept` says in which file, empty where in none."""

    name: str
    run_id: str
    kept: str
    series: Series


def curves_section(runs: Sequence[Made]) -> list[str]:
    """Figures of each stage that trained, as HTML; what keeps no curve is named."""
    parts = []
    for stage, title in TRAINED.items():
        trained = [made for made in runs if made.stage == stage]
        curves = [curve_of(made, name) for made, name in zip(trained, _names(trained), strict=True)]
        if curves:
            parts.append(_stage(title, curves))
    if not parts:
        return [missing("No training run was found behind these models: see Provenance for what is known of them.")]
    said = "Each line is one run; a line that is one dot has one step. "
    return [paragraph(f"{said}Of lines with over {POINTS} steps each point is a mean of neighbours."), *parts]


def curve_of(made: Made, name: str) -> Curve:
    """The numbers of a run by step: `steps.jsonl`, else the csv logger's, else a reasoner's `curve.jsonl`."""
    rollouts = {
        OF_ROLLOUTS[key]: s
        for key, s in _series(read_curve(made.folder / "curve.jsonl", "rollout"), "rollout").items()
        if key in OF_ROLLOUTS
    }
    for file, rows in ((STEPS, read_curve(made.folder / STEPS)), ("csv/metrics.csv", _csv(made))):
        if rows:
            return Curve(name, made.run_id, file, rollouts | _series(rows, "step"))
    return Curve(name, made.run_id, "curve.jsonl, by rollout" if rollouts else "", rollouts)


def _csv(made: Made) -> list[dict[str, float]]:
    rows = []
    for row in read_rows(made.folder / "csv" / "metrics.csv"):
        try:
            rows.append({name: float(value) for name, value in row.items() if value != ""})
        except ValueError:
            continue
    return rows


def _series(rows: Sequence[Mapping[str, float]], step: str) -> Series:
    found: Series = {}
    for row in rows:
        for name, value in row.items():
            if name != step and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row[step]))
                values.append(float(value))
    return {name: _thinned(*both) for name, both in found.items()}


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    width = math.ceil(len(steps) / POINTS)
    parts = [slice(start, start + width) for start in range(0, len(steps), width)]
    return [_mean(steps[part]) for part in parts], [_mean(values[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _names(runs: Sequence[Made]) -> list[str]:
    """What tells runs of one stage apart: the name, with the seed or the run id where it is another's, too."""
    names = [made.name for made in runs]
    for part in ("seed", "run_id"):
        counts = Counter(names)
        more = [made.manifest.get("seed") if part == "seed" else made.run_id for made in runs]
        names = [
            f"{n} ({part.replace('_', ' ')} {m})" if counts[n] > 1 else n for n, m in zip(names, more, strict=True)
        ]
    return names


def _stage(title: str, curves: Sequence[Curve]) -> str:
    drawn = [curve for curve in curves if curve.series]
    bare = [f"{curve.name} ({curve.run_id})" for curve in curves if not curve.series]
    figures = [
        line_figure(
            [Line(c.name, *c.series[metric], place) for place, c in enumerate(drawn) if metric in c.series],
            said, "step", f"{said} of {len(drawn)} runs by step; first and last values are in the table below.",
        )
        for metric, said in NAMES.items()
        if any(metric in curve.series for curve in drawn)
    ]  # fmt: skip
    parts = [f"<h3>{title}</h3>"]
    if drawn:
        parts += [legend([curve.name for curve in drawn]), f'<div class="figures">{"".join(figures)}</div>']
        parts += [_perspectives(curve) for curve in drawn if any(_adherence(p) in curve.series for p in PERSPECTIVES)]
        parts.append(folded(f"{title}: first and last values", table(_ends(drawn), f"{title}: first and last values")))
    if bare:
        fix = "they were trained before every run kept steps.jsonl, without logger=csv"
        parts.append(missing(f"No curve in these runs' folders ({fix}): {', '.join(bare)}."))
    return "\n".join(parts)


def _perspectives(curve: Curve) -> str:
    """Adherence to each perspective of one reasoner: lines are perspectives here."""
    asked = [p for p in PERSPECTIVES if _adherence(p) in curve.series]
    title = f"Adherence by perspective: {curve.name}"
    lines = [Line(p, *curve.series[_adherence(p)], place) for place, p in enumerate(asked)]
    figure = line_figure(lines, title, "step", f"{title}; lines: {', '.join(asked)}.")
    return f'<div class="figures">{figure}</div>{legend(asked)}'


def _adherence(perspective: str) -> str:
    return f"adherence/{perspective}"


def _ends(curves: Sequence[Curve]) -> list[Row]:
    rows = []
    for curve in curves:
        row = {"run": curve.name, "kept in": curve.kept, "steps": f"{max(s[-1] for s, _ in curve.series.values()):.0f}"}
        ends = {NAMES[m]: curve.series[m][1] for m in NAMES if m in curve.series}
        ends |= {
            f"Adherence, {p}": curve.series[_adherence(p)][1] for p in PERSPECTIVES if _adherence(p) in curve.series
        }
        rows.append(row | {name: f"{values[0]:.4g} \u2192 {values[-1]:.4g}" for name, values in ends.items()})
    return rows
