"""`stage=report`: finished eval runs side by side: a table in the terminal, and comparison.md, .tex, .csv, .json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmedexpert.errors import UserError
from mmedexpert.evaluation.comparison import (
    PROTOCOLS,
    EvalRun,
    Number,
    accuracies,
    aligned,
    by_benchmark,
    paired,
    paired_over_seeds,
    read_runs,
    seed_rows,
)
from mmedexpert.evaluation.perspectives import measured, rows_of_numbers
from mmedexpert.evaluation.summary import Summary
from mmedexpert.reporting.perspectives import GROUPS, SAID, group_rows, perspective_rows
from mmedexpert.reporting.tables import Row, csv_text, latex, markdown, print_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.runs import Run, run_id, write_json
from mmedexpert.schema import Config

TABLES = ("accuracy", "seeds", "paired", "paired_seeds", "breakdown")
OVER_SEEDS = (
    "In percentage points; of each question the mean over seeds, against the reference under the same seeds. The "
    "interval says how much the questions matter, the spread over seeds how much the training does."
)
ByModel = dict[str, dict[str, dict[str, Any]]]  # benchmark to model to what `perspectives.measured` found
PUBLISHED_UNDER = "medevalkit"  # ours: which of our two numbers stands beside those of others
METHODS = (
    "Accuracy in percent over questions; intervals: 95% bootstrap, clustered on image. Paired: the same questions; "
    "McNemar exact takes questions as independent, the paired bootstrap is clustered on image; Holm adjusts over all "
    "comparisons under one protocol. Unparsed: no answer could be read (robust protocol; counts as wrong)."
)


@dataclass(frozen=True)
class Source:
    """One published table: `columns` benchmark to the source's own heading, `rows` model to percent or None."""

    source: str
    note: str
    columns: dict[str, str]
    rows: dict[str, list[float | None]]


def run(config: Config) -> dict[str, Run]:
    """Compare `report.runs`, print and write the tables; trains nothing, so there is no run to return."""
    settings = config.report
    sources = load_published(Path(settings.published)) if settings.published else []
    runs = read_runs(settings.runs)
    against = None
    if settings.against is not None:
        given = Path(settings.against)
        wanted = (given / "predictions.jsonl" if given.is_dir() else given).resolve()
        against = next((r for r in runs if r.path.resolve() == wanted), None)
        if against is None or len(runs) == 1:
            raise UserError(f"report.against={settings.against} must be one of two or more report.runs")
    runs, notes = aligned(runs, common=settings.common)
    numbers = accuracies(runs, num_resamples=config.eval.num_resamples, seed=config.seed) + seed_rows(runs)
    if against is not None:
        tests, missing = paired(runs, against, seed=config.seed)
        numbers, notes = numbers + tests + paired_over_seeds(runs, against, seed=config.seed), notes + missing

    found = perspectives_of(runs, num_resamples=config.eval.num_resamples, seed=config.seed)
    numbers += [
        {"table": "perspectives", "benchmark": benchmark, "model": model, **number}
        for benchmark, models in found.items()
        for model, one in models.items()
        for number in rows_of_numbers(one)
    ]

    identity = run_id("report", {"runs": [str(r.path.resolve()) for r in runs], "against": settings.against})
    folder = Path(settings.out) if settings.out else Path(config.paths.outputs) / "report" / f"comparison-{identity}"
    write(folder, runs, numbers, notes, sources, found)
    if asked_under := _perspectives(found):
        print_table(asked_under, "Perspectives", SAID)
    if over_seeds := [_over_seeds(n) for n in numbers if n["table"] == "paired_seeds" and n["protocol"] == "robust"]:
        print_table(over_seeds, "Paired differences over seeds", OVER_SEEDS)
    print_table(
        overview(numbers), "Comparison", "\n".join([METHODS, *notes, f"{folder}/comparison.md .tex .csv .json"])
    )
    return {}


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
    """The tables of experiments/published.yaml.

    Raises:
        UserError: the file is missing, is no such YAML, or a row has not one number or null per column.
    """
    fix = "mend it, or report.published=null"
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


def sections(
    numbers: Sequence[Number], sources: Sequence[Source], perspectives: ByModel | None = None
) -> list[tuple[str, str, list[Row]]]:
    """The tables of the report as (title, note, rows); those without rows are left out."""
    of = {name: [n for n in numbers if n["table"] == name] for name in TABLES}
    seeds_note = "Mean and standard deviation over training seeds; which questions were asked does not vary here."
    found = [("Accuracy", "", _models(of["accuracy"])), ("Seeds", seeds_note, _seeds(of["seeds"]))]
    found += [("Paired differences", "In percentage points.", [_test(number) for number in of["paired"]])]
    found += [("Paired differences over seeds", OVER_SEEDS, [_over_seeds(number) for number in of["paired_seeds"]])]
    found.append(
        ("Perspectives", f"Accuracies, gain and agreement in percent. {SAID}", _perspectives(perspectives or {}))
    )
    found += [
        (
            f"Kinds of questions{f' of {name}' if name else ''}",
            f"In percent. {GROUPS}",
            group_rows(models, "robust", _percent),
        )
        for name, models in (perspectives or {}).items()
    ]
    for benchmark, group in dict.fromkeys((n["benchmark"], n["group"]) for n in of["breakdown"]):
        part = [n for n in of["breakdown"] if (n["benchmark"], n["group"]) == (benchmark, group)]
        for protocol in PROTOCOLS:
            title = f"{f'{benchmark}: ' if benchmark else ''}{group}, protocol {protocol}"
            found.append((title, "", _breakdown([n for n in part if n["protocol"] == protocol])))
    ours = _ours(numbers)
    for source in sources:
        found.append(
            (f"Published: {source.source}", f"{source.note} Ours: {PUBLISHED_UNDER}.", _published(source, ours))
        )
    return [section for section in found if section[2]]


def overview(numbers: Sequence[Number]) -> list[Row]:
    """One row per run for the terminal: both accuracies, and against the reference under the robust protocol; then one
    per model that ran under several seeds."""
    rows = _models([number for number in numbers if number["table"] == "accuracy"])
    tests = {(n["benchmark"], n["model"]): n for n in numbers if n["table"] == "paired" and n["protocol"] == "robust"}
    for row in rows if tests else ():
        test = tests.get((row.get("benchmark", ""), row["model"]))
        columns = {"robust difference": "difference [95% CI]", "wins/losses": "wins/losses", "p": "McNemar p"}
        columns |= {"Holm p": "McNemar, Holm", "clustered Holm p": "bootstrap, Holm"}
        row |= {name: _test(test)[column] if test else "-" for name, column in columns.items()}
    for spread in _seeds([number for number in numbers if number["table"] == "seeds"]):
        name = {"model": f"{spread['model']} (mean \u00b1 std of {spread['seeds']} seeds)"}
        rows.append(spread | name | {f"{protocol} [95% CI]": spread[protocol] for protocol in PROTOCOLS})
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(number: Number, key: str = "accuracy", show: Callable[[float], str] = _percent) -> str:
    return f"{show(number[key])} [{show(number['ci_low'])}, {show(number['ci_high'])}]"


def _named(number: Number) -> Row:
    """The benchmark, where there is one, and the model."""
    return ({"benchmark": number["benchmark"]} if number["benchmark"] else {}) | {"model": number["model"]}


def _models(numbers: Sequence[Number]) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for number in numbers:
        row = rows.setdefault((number["benchmark"], number["model"]), _named(number))
        row |= {"n": str(number["n"])} | {name: f"{_percent(number[name])}%" for name in ("unparsed", "truncated")}
        row[f"{number['protocol']} [95% CI]"] = _interval(number)
    return list(rows.values())


def _perspectives(found: ByModel) -> list[Row]:
    return [
        ({"benchmark": benchmark} if benchmark else {}) | row
        for benchmark, models in found.items()
        for row in perspective_rows(models, _percent)
    ]


def _seeds(numbers: Sequence[Number]) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for number in numbers:
        row = rows.setdefault((number["benchmark"], number["model"]), _named(number))
        row[number["protocol"]] = f"{_percent(number['accuracy'])} \u00b1 {_percent(number['std'])}"
        row["seeds"] = str(number["seeds"])
    return list(rows.values())


def _test(number: Number) -> Row:
    return _named(number) | {
        "protocol": number["protocol"],
        "against": number["against"],
        "difference [95% CI]": _interval(number, "difference", lambda share: f"{100 * share:+.1f}"),
        "wins/losses": f"{number['wins']}/{number['losses']}",
        "McNemar p": _p(number["p_mcnemar"]),
        "McNemar, Holm": _p(number["holm_mcnemar"]),
        "bootstrap p": _p(number["p_bootstrap"]),
        "bootstrap, Holm": _p(number["holm_bootstrap"]),
    }


def _over_seeds(number: Number) -> Row:
    return _named(number) | {
        "protocol": number["protocol"],
        "against": number["against"],
        "seeds": str(number["seeds"]),
        "difference [95% CI]": _interval(number, "difference", lambda share: f"{100 * share:+.1f}"),
        "std over seeds": _percent(number["std"]),
        "bootstrap p": _p(number["p_bootstrap"]),
    }


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _breakdown(numbers: Sequence[Number]) -> list[Row]:
    rows: dict[str, Row] = {}
    for number in numbers:
        row = rows.setdefault(number["value"], {"name": number["value"], "n": str(number["n"])})
        row[number["model"]] = _interval(number)
    return list(rows.values())


def _ours(numbers: Sequence[Number]) -> dict[str, dict[str, float]]:
    """Our accuracy by model and benchmark; a model with several seeds gives their mean, not each of them."""
    chosen = [n for n in numbers if n["table"] in ("accuracy", "seeds") and n["protocol"] == PUBLISHED_UNDER]
    several = {(n["benchmark"], f"{n['model']} (seed ") for n in chosen if n["table"] == "seeds"}
    found: dict[str, dict[str, float]] = {}
    for n in chosen:
        of_several = any(n["benchmark"] == b and n["model"].startswith(start) for b, start in several)
        if n["table"] == "seeds" or not of_several:
            found.setdefault(n["model"], {})[n["benchmark"]] = n["accuracy"]
    return found


def _published(source: Source, ours: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Our models that ran any of these benchmarks, then the rows as published; a dash where nothing was run."""

    def row(model: str, whose: str, values: Sequence[Any]) -> Row:
        return {"model": model, "source": whose} | dict(zip(source.columns.values(), values, strict=True))

    rows = [
        row(model, "ours", [_percent(scores[key]) if key in scores else "-" for key in source.columns])
        for model, scores in ours.items()
        if set(scores) & set(source.columns)
    ]
    rows = rows or [row("not run", "ours", ["-"] * len(source.columns))]
    for model, values in source.rows.items():
        rows.append(row(model, "published", ["-" if v is None or math.isnan(v) else f"{v:g}" for v in values]))
    return rows
