"""`report.html`: a comparison as one page that needs nothing beside it; texts of data and models are never markup."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mmedexpert.curation.page import PRIVATE
from mmedexpert.evaluation.comparison import PROTOCOLS, Number
from mmedexpert.evaluation.finished import EvalRun, by_benchmark
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.answers import answers_of, asked_of, drawn
from mmedexpert.reporting.browser import browser_data, share
from mmedexpert.reporting.comparison import METHODS, ByModel, Source, overview, sections
from mmedexpert.reporting.conflicts import conflicts_section
from mmedexpert.reporting.curves import curves_section
from mmedexpert.reporting.figures import interval_figure
from mmedexpert.reporting.lineage import (
    Made,
    command_rows,
    input_rows,
    lineage,
    public_word,
    run_rows,
    told,
    version_rows,
)
from mmedexpert.reporting.liveness import liveness_rows
from mmedexpert.reporting.markup import folded, heat_map, missing, number, paragraph, section, table
from mmedexpert.reporting.tables import Captioned, Row
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.pages import asset, data_block, document
from mmedexpert.runtime.privacy import without_places
from mmedexpert.runtime.runs import git_sha

PACKAGE = "mmedexpert.reporting"
TOGETHER = "Of questions asked under several perspectives: agreement and gain in percent, kappa beyond chance"


@dataclass(frozen=True)
class Experiment:
    """What an experiment's page begins with: its name, its claim, and its tables over seeds."""

    id: str
    claim: str
    tables: Sequence[Captioned]


@dataclass(frozen=True)
class Compared:
    """What a report is about: runs over the same questions, their numbers, and what is told beside them."""

    runs: Sequence[EvalRun]
    numbers: Sequence[Number]
    notes: Sequence[str]
    sources: Sequence[Source]
    perspectives: ByModel
    seed: int
    experiment: Experiment | None = None


def write_page(path: Path, given: Compared, *, image_mb: float) -> None:
    """Write the page. What a run does not hold is a line that says so."""
    compared = _public(given)
    made = lineage(run.path.parent for run in compared.runs)
    benchmarks = by_benchmark(compared.runs)
    shown = {name: drawn(members, share(len(benchmarks))) for name, members in benchmarks}
    answers = {run.path: answers_of(run, shown[run.benchmark]) for run in compared.runs}
    asked = {name: asked_of(members) for name, members in benchmarks}
    data = browser_data(compared.runs, answers, asked, made, image_bytes=image_mb * 1e6)
    told_ = sections(compared.numbers, compared.sources, compared.perspectives)
    tables = {found[0]: _captioned(*found) for found in told_}
    checks = liveness_rows(compared.runs, answers, made, seed=compared.seed)
    whole, models = compared.experiment or Experiment("", "", []), dict.fromkeys(run.family for run in compared.runs)
    over_seeds = [_captioned(*found) for found in whole.tables]
    before = [
        *([("experiment", "Over training seeds", over_seeds)] if over_seeds else []),
        ("headline", "Accuracy", _headline(compared.numbers)),
        ("paired", "Paired differences", _paired(tables)),
        ("specialties", "Specialties", _specialties(compared.numbers)),
        ("perspectives", "Perspectives", _perspectives(tables, compared.perspectives)),
        ("curves", "Learning curves", curves_section(made)),
        ("conflicts", "Conflicts of the merge", conflicts_section(made)),
        ("liveness", "Do the models look?", [table(checks, "Checks that the image reaches the answer")]),
    ]
    after = [
        ("tables", "All other tables", [folded(title, body) for title, body in tables.items()]),
        ("provenance", "Provenance", _provenance(made)),
    ]
    names = [*before, ("browser", "Answers, one by one", []), *after]
    body = Template(asset(PACKAGE, "report.html")).substitute(
        heading=escape(whole.id or f"Comparison of {', '.join(models)}"),
        claim=paragraph(f"Claim under test: {whole.claim}") if whole.claim else "",
        methods=escape(METHODS),
        notes=_list(compared.notes),
        links="".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in names),
        before="\n".join(section(name, title, *parts) for name, title, parts in before),
        browsernotes=paragraph(PRIVATE, "warning") * data["private"] + _list(data["notes"]),
        after="\n".join(section(name, title, *parts) for name, title, parts in after),
        made=escape(_made_by()),
        data=data_block("data", data),
    )
    style, script = asset(PACKAGE, "report.css"), asset(PACKAGE, "report.js")
    write_atomic(path, document(whole.id or "Comparison", body, style=style, script=script))


def _public(given: Compared) -> Compared:
    """The same without places of this machine in labels and notes; labels stay apart."""
    names = _labels(given.runs)
    runs = [replace(run, label=names[run.label], family=names[run.family]) for run in given.runs]

    def renamed(number: Number) -> Number:
        found = {key: names.get(number[key], number[key]) for key in ("model", "against") if key in number}
        return number | found

    paths = sorted((str(run.path) for run in given.runs), key=len, reverse=True)

    def placeless(text: str) -> str:
        for path in paths:
            text = text.replace(path, Path(path).name)
        return without_places(text)

    experiment = given.experiment and replace(
        given.experiment,
        tables=[
            (
                name,
                placeless(note),
                [{key: placeless(names.get(cell, cell)) for key, cell in row.items()} for row in rows],
            )
            for name, note, rows in given.experiment.tables
        ],
    )
    found = {b: {names.get(m, m): one for m, one in models.items()} for b, models in given.perspectives.items()}
    return replace(
        given, runs=runs, numbers=[*map(renamed, given.numbers)], notes=[*map(placeless, given.notes)],
        perspectives=found, experiment=experiment,
    )  # fmt: skip


def _labels(runs: Sequence[EvalRun]) -> dict[str, str]:
    """Labels and families to what the page calls them; one that is a path loses its place."""
    names: dict[str, str] = {}
    same: Counter[str] = Counter()
    for run in runs:
        for label in dict.fromkeys((run.label, run.family)):
            if label not in names:
                path = label == str(run.path)
                name = f"{run.path.parent.name}/{run.path.name}" if path else without_places(label)
                same[name] += 1
                names[label] = f"{name} [{same[name]}]" if same[name] > 1 else name
    return names


def _captioned(title: str, note: str, rows: Sequence[Row]) -> str:
    return table(rows, f"{title}. {note}" if note else title)


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _headline(numbers: Sequence[Number]) -> list[str]:
    whole = [n for n in numbers if n["table"] == "accuracy"]
    figures = []
    for benchmark in dict.fromkeys(n["benchmark"] for n in whole):
        of = {(n["model"], n["protocol"]): n for n in whole if n["benchmark"] == benchmark}
        rows = [
            (model, [tuple(100 * of[model, p][k] for k in ("accuracy", "ci_low", "ci_high")) for p in PROTOCOLS])
            for model in dict.fromkeys(model for model, _ in of)
        ]
        title = f"Accuracy and 95% interval{f', {benchmark}' if benchmark else ''}"
        figures.append(interval_figure(rows, PROTOCOLS, title, f"{title}; the numbers are in the table."))
    return [table(overview(numbers), "Accuracy in percent"), f'<div class="figures intervals">{"".join(figures)}</div>']


def _paired(tables: dict[str, str]) -> list[str]:
    parts = [tables.pop(title) for title in [*tables] if title.startswith("Paired")]
    return parts or [missing("Not run: report.against names no run that the others are compared with.")]


def _specialties(numbers: Sequence[Number]) -> list[str]:
    """A heat map for each benchmark and protocol: specialty by model."""
    chosen = [n for n in numbers if n["table"] == "breakdown" and n["group"] == "specialty"]
    parts = []
    for benchmark, protocol in dict.fromkeys((n["benchmark"], n["protocol"]) for n in chosen):
        rows: dict[str, dict[str, tuple[float | None, str, str]]] = {}
        for n in (n for n in chosen if (n["benchmark"], n["protocol"]) == (benchmark, protocol)):
            cell = (n["accuracy"], f"{100 * n['accuracy']:.1f}", f"{100 * n['ci_low']:.1f} to {100 * n['ci_high']:.1f}")
            rows.setdefault(f"{n['value']} (n={n['n']})", {})[n["model"]] = cell
        where = f", {benchmark}" if benchmark else ""
        title = f"Accuracy in percent ({protocol}) by specialty and model{where}"
        shown = heat_map(rows, f"{title}; below each its 95% interval", corner="specialty")
        parts.append(shown if protocol == PROTOCOLS[0] else folded(title, shown))
    return parts or [missing("All questions of these runs are of one specialty, or state none.")]


def _perspectives(tables: dict[str, str], found: ByModel) -> list[str]:
    """The table of the perspectives, and for each model kinds of questions by perspective."""
    whole = [folded("Table: each perspective, adherence and criteria", tables.pop("Perspectives", ""))]
    for title in [title for title in tables if title.startswith("Kinds of questions")]:
        del tables[title]
    parts, kinds = [], []
    for benchmark, models in found.items():
        rows = {model: _each(one) for model, one in models.items() if one["each"]}
        where = f", {benchmark}" if benchmark else ""
        parts.append(heat_map(rows, f"Accuracy in percent (robust) under each perspective{where}", corner="model"))
        parts.append(table([_reached(model, one) for model, one in models.items() if one["together"]], TOGETHER))
    for benchmark, models in found.items():
        where = f" on {benchmark}" if benchmark else ""
        alone: dict[str, dict[str, Any]] = {}  # kind to model to its row, where each kind was asked in one way
        for model, one in models.items():
            for key, values in one.get("groups", {}).items():
                if all(len(of) == 1 for of in values.values()):
                    row = {str(value): _kind(next(iter(of.values()))) for value, of in values.items()}
                    alone.setdefault(key, {})[model] = row
                    continue
                title = f"{model}{where}: accuracy in percent (robust) by {key} and perspective"
                kinds.append(heat_map(
                    {str(value): {p: _kind(of.get(p)) for p in PERSPECTIVES} for value, of in values.items()},
                    title, corner=key,
                ))  # fmt: skip
        for key, rows in alone.items():
            title = f"Accuracy in percent (robust){where} by {key}, each asked under one perspective"
            parts.append(heat_map(rows, title, corner="model"))
    if not any(parts):
        return [missing("Not run: no compared run was asked under perspectives (eval.perspectives).")]
    maps = "".join(f"<div>{one}</div>" for one in kinds)
    return [*parts, f'<div class="maps">{maps}</div>', *whole]


def _each(one: Mapping[str, Any]) -> dict[str, tuple[float | None, str, str]]:
    """Cells of one model: each perspective alone, and what they reach together where they had the same questions."""
    cells = {p: _kind(one["each"].get(p)) for p in dict.fromkeys((*PERSPECTIVES, *one["each"]))}
    if together := one["together"].get("robust"):
        cells |= {
            said: _accuracy(together[key]) for key, said in (("vote", "vote"), ("oracle", "any of them (oracle)"))
        }
    return cells


def _reached(model: str, one: Mapping[str, Any]) -> dict[str, str]:
    """How far one model's perspectives agree, under each protocol."""
    row = {"model": model}
    for protocol, of in one["together"].items():
        agreed, gain = of["agreement"]["mean"], of["gain"]["mean"]
        row[f"agreement ({protocol})"] = f"{100 * agreed:.1f}"
        row[f"Fleiss' kappa ({protocol})"] = "-" if of["kappa"] is None else number(of["kappa"], ".2f")
        row[f"gain of the vote ({protocol})"] = number(100 * gain, "+.1f")
    return row


def _kind(of: Mapping[str, Any] | None) -> tuple[float | None, str, str]:
    if of is None:
        return None, "not asked", ""
    return _accuracy(of["robust"])


def _accuracy(entry: Mapping[str, Any]) -> tuple[float | None, str, str]:
    return entry["accuracy"], f"{100 * entry['accuracy']:.1f}", f"n={entry['n']}"


def _provenance(made: Sequence[Made]) -> list[str]:
    return [
        table(run_rows(made), "Runs behind this page, in the order of the stages"),
        folded("Commands", table(command_rows(made), "Commands, without folders of the machine")),
        folded("Versions", table(version_rows(made), "Packages")),
        folded(
            "Inputs and hashes", table(input_rows(made), "What each run read: run ids, and sha256 of data and weights")
        ),
    ]


def _made_by() -> str:
    """How this page was made."""
    command = " ".join(map(public_word, sys.argv))
    return f"Made {time.strftime('%Y-%m-%d %H:%M')} by {command}, commit {told(git_sha())}."
