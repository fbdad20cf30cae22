"""Tables a person reads: models of one pipeline, stages of one command, jobs of one sweep; rich and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.runs import Run

Row = dict[str, str]
SHORT = {"adult_medicine": "adult", "pediatrics": "pediatric", "brain_sensory": "brain", "oncology_surgery": "oncology"}


def interval(entry: Mapping[str, Any], mean: str = "accuracy", prefix: str = "ci") -> str:
    """`0.83 [0.76, 0.90]`."""
    return f"{entry[mean]:.2f} [{entry[f'{prefix}_low']:.2f}, {entry[f'{prefix}_high']:.2f}]"


def _row(name: str, model: Mapping[str, Any]) -> Row:
    row = {"model": name}
    row |= {SHORT.get(key, key): f"{entry['accuracy']:.2f}" for key, entry in model["per_specialty"].items()}
    row["macro accuracy [95% CI]"] = interval(model, "macro_accuracy", "macro_ci")
    row["unparsed"] = f"{100 * model['parse_failure_rate']:.0f}%"
    return row | {
        name[:5]: f"{model['adherence'][name]:.2f}" if name in model["adherence"] else "-" for name in PERSPECTIVES
    }


def model_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row per model of a pipeline's summary, baselines last."""
    models = dict(summary["models"])
    experts = models.pop("experts")
    baselines = {f"{name} (baseline)": models.pop(name) for name in ("majority", "blank_image") if name in models}
    named = {"base": models.pop("base"), **{f"expert: {SHORT.get(n, n)}": m for n, m in experts.items()}}
    return [_row(name, model) for name, model in (named | models | baselines).items()]


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(c, "-") for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rich_table(rows: Sequence[Row], title: str, caption: str = "") -> Table:
    """A table for the terminal, names to the left and numbers to the right."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in rows[0]:
        left = column in ("model", "job", "stage", "name", "folder")
        table.add_column(column, justify="left" if left else "right", no_wrap=column in ("model", "job"))
    for row in rows:
        table.add_row(*(row.get(column, "-") for column in rows[0]))
    return table


def print_table(rows: Sequence[Row], title: str, caption: str = "") -> None:
    """To stdout, wide enough not to break rows when the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(rich_table(rows, title, caption))


def print_result(runs: Mapping[str, Run]) -> None:
    """The last table of a command: models where models were evaluated, else each run with its main numbers."""
    evaluated = {name.removeprefix("eval/"): run for name, run in runs.items() if run.stage == "eval"}
    if evaluated:
        if "pipeline" in runs:
            rows = model_rows(json.loads((runs["pipeline"].folder / "summary.json").read_text()))
        else:
            rows = [
                _row(name, json.loads((run.folder / "summary.json").read_text())) for name, run in evaluated.items()
            ]
        sizes = json.loads((next(iter(evaluated.values())).folder / "summary.json").read_text())["per_specialty"]
        asked = ", ".join(f"{SHORT.get(name, name)} {entry['n']}" for name, entry in sizes.items())
        caption = f"Accuracy per specialty (questions: {asked}); adherence per perspective in the last four columns."
        if "pipeline" in runs:
            caption += f"\n{runs['pipeline'].folder}/summary.json"
        print_table(rows, "Models", caption)
        return
    rows = [
        {"stage": run.stage, "name": name, **_main_numbers(run), "folder": str(run.folder)}
        for name, run in runs.items()
    ]
    if rows:
        print_table(rows, "Runs")


def _main_numbers(run: Run) -> dict[str, str]:
    numbers = [f"{key}={value:.3g}" for key, value in run.metrics.items() if key.count("/") < 2][:6]
    state = "reused" if run.reused else f"{run.manifest['wall_seconds']:.1f} s"
    return {"time": state, "numbers": "  ".join(numbers)}


def job_rows(jobs: Sequence[tuple[str, Mapping[str, Run]]]) -> list[Row]:
    """One row per job of a sweep: what was varied, and each job's headline numbers."""
    rows = []
    common = set.intersection(*({*overrides.split()} for overrides, _ in jobs))
    for overrides, runs in jobs:
        row = {"job": " ".join(word for word in overrides.split() if word not in common)}  # only what was varied
        pipeline = runs.get("pipeline")
        if pipeline is not None:
            models = json.loads((pipeline.folder / "summary.json").read_text())["models"]
            experts = models.pop("experts")
            best = max(experts.values(), key=lambda m: m["macro_accuracy"])
            row |= {"base": f"{models['base']['macro_accuracy']:.2f}", "best expert": f"{best['macro_accuracy']:.2f}"}
            for name, model in models.items():
                if name not in ("base", "majority", "blank_image"):
                    row[f"{name} [95% CI]"] = interval(model, "macro_accuracy", "macro_ci")
                    if name == "reasoner":
                        row |= {p[:5]: f"{model['adherence'].get(p, float('nan')):.2f}" for p in PERSPECTIVES}
        else:
            row |= {name: _main_numbers(run)["numbers"] for name, run in runs.items()}
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def print_jobs(finished: Sequence[tuple[str, Mapping[str, Run]]], failed: Sequence[str]) -> None:
    """The table over the jobs of a sweep; failed jobs are named below it."""
    if finished:
        print_table(job_rows(finished), "Jobs", "\n".join(f"failed: {overrides}" for overrides in failed))
