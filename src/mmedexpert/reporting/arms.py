"""An experiment's table over seeds, as people read it: rows, a figure, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmedexpert.evaluation.seeds import KIND, Arm, Paired
from mmedexpert.evaluation.stats import detectable, half_width
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.tables import Row, short_names
from mmedexpert.runtime.drawing import save_drawing

COLOUR, REFERENCE = "#0072B2", "#D55E00"  # of Okabe and Ito: told apart without red and green
SAID = (
    "Percent of answers that are right. Spread: standard deviation over training seeds. Difference: percentage points, "
    "of the same seed on the same questions; first the 95% interval by Student's t over seeds (what training does), "
    "then by bootstrap over images of each question's mean over seeds (what questions do). The largest of several "
    "rows flatters itself."
)
VOTED = "Each question was asked under all four perspectives: an answer here is their vote."
TOGETHER = (
    "mean: of the four alone. best: the one with most right answers, picked in each seed on these questions, which "
    "flatters it. oracle: any of the four right."
)
MATRIX = (
    "own - next: its own perspective minus the best other one, which is picked in each seed on these very questions."
)


def rows_of(arms: Sequence[Arm], against: Mapping[str, Paired | None], reference: str) -> list[Row]:
    """A row an arm: specialties, mean, spread, difference to the reference, and each seed."""
    rows = []
    short = short_names(dict.fromkeys(value for arm in arms for group, value in arm.parts() if group == "specialty"))
    for arm in arms:
        scores = list(arm.scores().values())
        row = {"model": arm.label, "seeds": str(len(scores))}
        row |= {short[value]: f"{x:.1f}" for (group, value), x in arm.parts().items() if group == "specialty"}
        row["mean"] = f"{np.mean(scores):.1f}"
        row["spread"] = f"{np.std(scores, ddof=1):.1f}" if len(set(scores)) > 1 else "-"  # one: no training in it
        if reference:
            row[f"against {reference}"] = shown(against[arm.label])
        row["each seed"] = ", ".join(f"{score:.1f}" for score in scores)
        rows.append(row)
    return rows


def kind_rows(arms: Sequence[Arm]) -> list[Row]:
    """A row an arm: its answers to the kinds of drawn questions; none where no question is of a kind."""
    parts = {arm.label: {value: x for (group, value), x in arm.parts().items() if group == KIND} for arm in arms}
    return [
        {"model": label} | {f"needs {kind}": f"{x:.1f}" for kind, x in found.items()}
        for label, found in parts.items()
        if found
    ]


def together_rows(arms: Sequence[Arm]) -> list[Row]:
    """A row an arm whose questions were asked under several perspectives: each alone, their mean, the best (chosen on
    these very questions), the vote, any of them right, and how far they agree; means over seeds, percent."""
    rows = []
    for arm in arms:
        found = [_perspectives(one) for one in arm.summaries.values()]
        if not all(together for _, together, _ in found):
            continue
        row = {"model": arm.label}
        for name in PERSPECTIVES:
            row[name] = f"{np.mean([100 * each[name] for each, _, _ in found]):.1f}"
        for name in ("mean", "best", "vote", "oracle"):
            row[name] = f"{np.mean([100 * together[name]['accuracy'] for _, together, _ in found]):.1f}"
        gains = [100 * (one["oracle"]["accuracy"] - one["best"]["accuracy"]) for _, one, _ in found]
        row["oracle - best"] = _over(gains)
        row["agreement"] = f"{np.mean([100 * together['agreement']['mean'] for _, together, _ in found]):.1f}"
        kappas = [one["kappa"] for _, one, _ in found if one["kappa"] is not None]
        row["kappa"] = f"{np.mean(kappas):.2f}" if kappas else "-"
        rows.append(row)
    return rows


def matrix_rows(arms: Sequence[Arm]) -> list[Row]:
    """Of each arm asked under several perspectives: what a question needs (rows) by what it is asked under (columns),
    means over seeds, percent; and its own perspective minus the best of the others in each seed."""
    rows = []
    for arm in arms:
        found = [groups.get(KIND, {}) for _, together, groups in map(_perspectives, arm.summaries.values()) if together]
        for kind in PERSPECTIVES if found and all(found) else ():
            cells = [{name: 100 * values[kind][name] for name in PERSPECTIVES} for values in found]
            row = {"model": arm.label, "needs": kind}
            row |= {name: f"{np.mean([one[name] for one in cells]):.1f}" for name in PERSPECTIVES}
            rest = [max(value for name, value in one.items() if name != kind) for one in cells]
            row["own - next"] = _over([one[kind] - other for one, other in zip(cells, rest, strict=True)])
            rows.append(row)
    return rows


def _perspectives(summary: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Of one evaluation, in its own protocol: each perspective's accuracy, what they are together (empty: asked under
    one), and group -> value -> perspective -> accuracy."""
    found, protocol = summary["perspectives"], summary["protocol"]
    each = {name: one[protocol]["accuracy"] for name, one in found["each"].items()}
    groups = {
        key: {v: {name: of[protocol]["accuracy"] for name, of in by.items()} for v, by in values.items()}
        for key, values in found.get("groups", {}).items()
    }
    return each, found["together"].get(protocol, {}), groups


def _over(values: Sequence[float]) -> str:
    """`+35.9 [+35.3, +36.6]`: the mean over seeds with Student's 95%."""
    half = half_width(values)
    told = "" if not half else f" [{np.mean(values) - half:+.1f}, {np.mean(values) + half:+.1f}]"
    return f"{np.mean(values):+.1f}{told}"


def shown(one: Paired | None) -> str:
    """`+0.9 [-0.6, +2.3] [+0.1, +1.7]`."""
    if one is None:
        return "-"
    over = "-"
    if one.half:
        over = f"[{one.difference - one.half:+.1f}, {one.difference + one.half:+.1f}]"
    return f"{one.difference:+.1f} {over} [{one.low:+.1f}, {one.high:+.1f}]"


def resolution(against: Mapping[str, Paired | None]) -> str:
    """What the table can tell apart, in a sentence; empty where no pair has several seeds."""
    pairs = [(one.half, len(one.seeds)) for one in against.values() if one and one.half]  # 0: neither is trained
    if not pairs:
        return ""
    half = float(np.median([half for half, _ in pairs]))
    found = float(np.median([half * detectable(seeds) for half, seeds in pairs]))
    return (
        f"Half the interval over seeds: {half:.1f} points for the median pair, of which a true difference of "
        f"{found:.1f} would be found four times in five."
    )


def as_json(arms: Sequence[Arm], against: Mapping[str, Paired | None], reference: str) -> dict[str, Any]:
    """All of it: of each arm and seed score, run id and commit; means, spread, parts, and the paired difference."""
    found: dict[str, Any] = {"reference": reference or None, "arms": {}}
    for arm in arms:
        scores, difference = arm.scores(), against[arm.label]
        found["arms"][arm.label] = {
            "mean": float(np.mean(list(scores.values()))),
            "spread": float(np.std(list(scores.values()), ddof=1)) if len(scores) > 1 else None,
            "parts": {f"{group}: {value}": x for (group, value), x in arm.parts().items()},
            "against_reference": None if difference is None else vars(difference),
            "questions": len(next(iter(arm.runs.values())).questions),
            "seeds": {
                str(seed): {"score": score, "run": arm.runs[seed].path.parent.name} for seed, score in scores.items()
            },
        }
    return found


def figure(arms: Sequence[Arm], against: Mapping[str, Paired | None], reference: str, title: str, path: Path) -> None:
    """Each arm's seeds as dots, its mean as a bar; to the right the difference to the reference over seeds."""
    from matplotlib.figure import Figure  # lazily: half a second

    names = [arm.label for arm in arms]
    drawn = Figure(figsize=(11, 1.2 + 0.42 * len(arms)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for place, arm in enumerate(arms):
        scores, colour = list(arm.scores().values()), REFERENCE if arm.label == reference else COLOUR
        left.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.6, markersize=5)
        left.plot([float(np.mean(scores))] * 2, [place - 0.3, place + 0.3], "-", color=colour, linewidth=2.5)
        if (one := against[arm.label]) is not None:
            right.plot(one.difference, place, "D", color=colour, markersize=5)
            if one.half is not None:
                ends = [one.difference - one.half, one.difference + one.half]
                right.plot(ends, [place, place], "-", color=colour, linewidth=1.5)
    left.set_yticks(range(len(arms)), names)
    left.invert_yaxis()
    left.set_xlabel("percent right (dots: seeds, bar: mean)")
    right.axvline(0, color="0.5", linewidth=1)
    right.set_xlabel(f"points against {reference}\n(95% over seeds)" if reference else "")
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(title)
    save_drawing(drawn, path)
