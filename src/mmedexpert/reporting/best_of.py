"""Best of n as people read it: a row a model, what it cost, the numbers by k, and a picture of these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedexpert.evaluation.best_of import PAIRED, sizes
from mmedexpert.reporting.tables import Row, interval
from mmedexpert.runtime.drawing import save_drawing

# Okabe and Ito's colours, which every kind of sight tells apart; a line is told by its mark and dash, too
LINES = {
    "pass": ("any of k right (pass@k)", "#0072B2", "o", ":"),
    "pick": ("judge's pick", "#D55E00", "s", "-"),
    "vote": ("majority vote", "#009E73", "^", "--"),
}


def model_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a model: accuracies with their 95% intervals."""
    rows = []
    for name, one in summaries.items():
        scores, count = one["scores"], one["samples"]
        heads = {"greedy": "greedy", "mean": "one sample (pass@1)", f"vote@{count}": f"vote@{count}"}
        heads |= {f"pick@{count}": f"pick@{count}", f"pass@{count}": f"pass@{count}"}
        row = {"model": name, "n": str(one["n"])}
        rows.append(row | {head: interval(scores[key]) if key in scores else "-" for key, head in heads.items()})
    return rows


def difference_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a model: the paired differences with their p, adjusted by Holm over the row."""
    rows = []
    for name, one in summaries.items():
        row = {"model": name}
        for first, second in PAIRED:
            found = one["differences"].get(f"{first}_minus_{second}")
            row[f"{first} - {second}"] = _difference(found) if found else "-"
        rows.append(row)
    return rows


def cost_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a model: tokens and seconds of greedy answers, samples and judge, and what of these was of no use."""
    rows = []
    for name, one in summaries.items():
        row = {"model": name}
        for who in ("greedy", "samples", "judge"):
            cost = one["cost"].get(who)
            row[who] = f"{cost['tokens']:.0f} tokens, {cost['seconds']:.1f} s" if cost else "-"
        judge = one["cost"].get("judge")
        row["judge: calls (cached)"] = f"{judge['calls']:.0f} ({judge['cached']:.0f})" if judge else "-"
        row |= {"unparsed": f"{100 * one['unparsed']:.0f}%", "cut off": f"{100 * one['truncated']:.0f}%"}
        rows.append(row | {"no pick": f"{100 * one['missing']:.0f}%" if "missing" in one else "-"})
    return rows


def size_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row for each k: any of them right, vote and pick among the first k."""
    scores = summary["scores"]
    return [
        {"k": str(k)}
        | {
            head: interval(scores[f"{name}@{k}"]) if f"{name}@{k}" in scores else "-"
            for name, head in (("pass", "pass@k"), ("vote", "vote@k"), ("pick", "pick@k"))
        }
        for k in sizes(summary["samples"])
    ]


def figure(summary: Mapping[str, Any], title: str, path: Path) -> None:
    """Accuracy over k, with the 95% intervals of vote and pick as bands, and the greedy answer as a line."""
    from matplotlib.figure import Figure  # lazily: half a second

    scores, over = summary["scores"], sizes(summary["samples"])
    drawn = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawn.subplots()
    for name, (label, colour, mark, dash) in LINES.items():
        there = [k for k in over if f"{name}@{k}" in scores]
        found = [scores[f"{name}@{k}"] for k in there]
        if not there:
            continue
        axes.plot(there, [one["accuracy"] for one in found], color=colour, marker=mark, linestyle=dash, label=label)
        if name != "pass":
            low, high = ([one[side] for one in found] for side in ("ci_low", "ci_high"))
            axes.fill_between(there, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(scores["greedy"]["accuracy"], color="0.25", linewidth=1, label="greedy answer")
    axes.set_xscale("log", base=2)
    axes.set_xticks(over, [str(k) for k in over])
    axes.set_xlabel("samples of a question, k")
    axes.set_ylabel(f"accuracy ({summary['n']} questions)")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)
    drawn.suptitle(title.replace("$", r"\$"), fontsize=10)
    save_drawing(drawn, path)


def _difference(found: Mapping[str, Any]) -> str:
    p = "-" if found["p_holm"] is None else f"{found['p_holm']:.3g}"
    return f"{found['difference']:+.2f} [{found['ci_low']:+.2f}, {found['ci_high']:+.2f}], p {p}"
