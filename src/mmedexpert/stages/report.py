"""`stage=report`: finished eval runs side by side: a table in the terminal, comparison.md, .tex, .csv, .json, and
report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from mmedexpert.errors import UserError
from mmedexpert.evaluation.comparison import Number, accuracies, paired, paired_over_seeds, seed_rows
from mmedexpert.evaluation.finished import EvalRun, aligned, by_benchmark, read_runs
from mmedexpert.evaluation.perspectives import measured, rows_of_numbers
from mmedexpert.evaluation.summary import Summary
from mmedexpert.reporting.comparison import (
    METHODS,
    OVER_SEEDS,
    ByModel,
    Source,
    asked_under,
    over_seeds,
    overview,
    sections,
)
from mmedexpert.reporting.page import Compared, Experiment, write_page
from mmedexpert.reporting.perspectives import SAID
from mmedexpert.reporting.tables import csv_text, latex, markdown, print_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.runs import Run, run_id, write_json
from mmedexpert.schema import Config

CHECKOUT = Path(__file__).parents[3]


def run(config: Config) -> dict[str, Run]:
    """Compare `report.runs`, print and write the tables; trains nothing, so there is no run to return."""
    settings = config.report
    if not 0 <= settings.image_mb < math.inf:
        raise UserError(f"report.image_mb={settings.image_mb} must be 0 (no images) or more megabytes")
    if settings.published:  # a mistake in it is told before the runs are read
        load_published(Path(settings.published))
    runs = read_runs(settings.runs)
    against = None
    if settings.against is not None:
        given = Path(settings.against)
        wanted = (given / "predictions.jsonl" if given.is_dir() else given).resolve()
        against = next((r for r in runs if r.path.resolve() == wanted), None)
        if against is None or len(runs) == 1:
            raise UserError(f"report.against={settings.against} must be one of two or more report.runs")
    runs, notes = aligned(runs, common=settings.common)
    identity = run_id("report", {"runs": [str(r.path.resolve()) for r in runs], "against": settings.against})
    folder = Path(settings.out) if settings.out else Path(config.paths.outputs) / "report" / f"comparison-{identity}"
    made = compare(config, runs, against, notes, folder)
    if by_perspective := asked_under(made.perspectives):
        print_table(by_perspective, "Perspectives", SAID)
    spread = [over_seeds(n) for n in made.numbers if n["table"] == "paired_seeds" and n["protocol"] == "robust"]
    if spread:
        print_table(spread, "Paired differences over seeds", OVER_SEEDS)
    print_table(
        overview(made.numbers),
        "Comparison",
        "\n".join([METHODS, *made.notes, f"{folder}/comparison.md .tex .csv .json", f"{folder}/report.html"]),
    )
    return {}


def compare(
    config: Config, runs: Sequence[EvalRun], against: EvalRun | None, notes: Sequence[str], folder: Path,
    experiment: Experiment | None = None,
) -> Compared:  # fmt: skip
    """Compare aligned runs, each with `against` if given, and write the tables and the page to `folder`."""
    settings, resamples = config.report, config.eval.num_resamples
    sources = load_published(Path(settings.published)) if settings.published else []
    numbers = accuracies(runs, num_resamples=resamples, seed=config.seed) + seed_rows(runs)
    if against is not None:
        tests, missing = paired(runs, against, seed=config.seed)
        numbers = numbers + tests + paired_over_seeds(runs, against, seed=config.seed)
        notes = [*notes, *missing]
    found = perspectives_of(runs, num_resamples=resamples, seed=config.seed)
    numbers += [
        {"table": "perspectives", "benchmark": benchmark, "model": model, **number}
        for benchmark, models in found.items()
        for model, one in models.items()
        for number in rows_of_numbers(one)
    ]
    compared = Compared(runs, numbers, notes, sources, found, config.seed, experiment)
    write(folder, runs, numbers, notes, sources, found)
    write_page(folder / "report.html", compared, image_mb=settings.image_mb)
    return compared


def perspectives_of(runs: Sequence[EvalRun], *, num_resamples: int, seed: int) -> ByModel:
    """What each perspective changes in every run, over the questions that are compared."""
    mean = Summary(num_resamples=num_resamples, seed=seed).mean
    return {
        benchmark: {
            run.label: measured([row for q in run.questions.values() for row in q.answers], mean) for run in members
        }
        for benchmark, members in by_benchmark(runs)
    }


def load_published(path: Path) -> list[Source]:
    """The tables of experiments/published.yaml; a relative path that is not below the working folder is the checkout's.

    Raises:
        UserError: the file is missing, is no such YAML, or a row has not one number or null per column.
    """
    fix = "mend it, or report.published=null"
    if not path.exists() and (CHECKOUT / path).is_file():
        path = CHECKOUT / path
    try:
        tables = [Source(**table) for table in yaml.safe_load(path.read_text(encoding="utf-8"))["tables"]]
        rows = [(table, model, values) for table in tables for model, values in table.rows.items()]
    except OSError as error:
        raise UserError(f"report.published={path} cannot be read ({error.strerror}): give its path, or null") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list `tables` of source, note, columns, rows ({error}): {fix}") from error
    for table, model, values in rows:
        fits = isinstance(values, list) and len(values) == len(table.columns)
        if not fits or not all(isinstance(value, int | float | None) for value in values):
            raise UserError(f"{path}: {table.source}, {model}: needs {len(table.columns)} numbers or null: {fix}")
    return tables


def write(
    folder: Path,
    runs: Sequence[EvalRun],
    numbers: Sequence[Number],
    notes: Sequence[str],
    sources: Sequence[Source],
    perspectives: ByModel,
) -> None:
    """`comparison.md` and `.tex` (tables to read), `.csv` (one row per number) and `.json` (the same, and the runs)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"report.out={folder} cannot be written ({error.strerror}): give another folder") from error
    tables = sections(numbers, sources, perspectives)
    md = ["# Comparison\n", METHODS + "\n", "".join(f"- {note}\n" for note in notes)]
    md += [f"## {title}\n{note and f'{chr(10)}{note}{chr(10)}'}\n{markdown(rows)}" for title, note, rows in tables]
    tex = [f"% {METHODS}\n", "".join(f"% {note}\n" for note in notes)]
    tex += [f"% {title}. {note}\n{latex(rows)}" for title, note, rows in tables]
    quoted: list[Number] = [
        {"table": "published", "benchmark": benchmark, "model": model, "source": table.source, "percent": value}
        for table in sources
        for model, values in table.rows.items()
        for benchmark, value in zip(table.columns, values, strict=True)
        if value is not None
    ]
    write_atomic(folder / "comparison.md", "\n".join(text for text in md if text).encode())
    write_atomic(folder / "comparison.tex", "\n".join(text for text in tex if text).encode())
    write_atomic(folder / "comparison.csv", csv_text([*numbers, *quoted]).encode())
    named = [
        {"label": r.label, "model": r.model, "benchmark": r.benchmark, "seed": r.seed, "n": len(r.questions),
         "path": str(r.path)} for r in runs
    ]  # fmt: skip
    write_json(folder / "comparison.json", {"runs": named, "notes": notes, "numbers": numbers, "published": quoted})
