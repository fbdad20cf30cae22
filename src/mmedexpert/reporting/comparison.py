"""The tables of a comparison: what `evaluation.comparison` counted, as rows a person reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmedexpert.evaluation.comparison import PROTOCOLS, Number
from mmedexpert.reporting.perspectives import GROUPS, SAID, group_rows, perspective_rows
from mmedexpert.reporting.tables import Row

TABLES = ("accuracy", "seeds", "paired", "paired_seeds", "breakdown")
OVER_SEEDS = (
    "In percentage points over questions, against the reference under the same seeds. The first interval and p, by "
    "Student's t over seeds (Holm over these comparisons), say what training does; the second, by bootstrap over "
    "images of each question's mean, what questions do: a claim about training needs the first."
)
ByModel = dict[str, dict[str, dict[str, Any]]]  # benchmark to model to what `perspectives.measured` found
PUBLISHED_UNDER = "medevalkit"  # ours: which of our two numbers stands beside those of others
METHODS = (
    "Accuracy in percent over questions; intervals: 95% bootstrap, clustered on image. Paired: the same questions; "
    "McNemar exact takes questions as independent, the paired bootstrap is clustered on image; both tell these very "
    "models apart, not ways of training; Holm adjusts over all comparisons under one protocol, each seed as one. "
    "Unparsed: no answer could be read (robust protocol; counts as wrong)."
)


@dataclass(frozen=True)
class Source:
    """One published table: `columns` benchmark to the source's own heading, `rows` model to percent or None."""

    source: str
    note: str
    columns: dict[str, str]
    rows: dict[str, list[float | None]]


def sections(
    numbers: Sequence[Number], sources: Sequence[Source], perspectives: ByModel | None = None
) -> list[tuple[str, str, list[Row]]]:
    """The tables of the report as (title, note, rows); those without rows are left out."""
    of = {name: [n for n in numbers if n["table"] == name] for name in TABLES}
    seeds_note = "Mean and standard deviation over training seeds; which questions were asked does not vary here."
    found = [("Accuracy", "", _models(of["accuracy"])), ("Seeds", seeds_note, _seeds(of["seeds"]))]
    found += [("Paired differences", "In percentage points.", [_test(number) for number in of["paired"]])]
    found += [("Paired differences over seeds", OVER_SEEDS, [over_seeds(number) for number in of["paired_seeds"]])]
    found.append(
        ("Perspectives", f"Accuracies, gain and agreement in percent. {SAID}", asked_under(perspectives or {}))
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


def asked_under(found: ByModel) -> list[Row]:
    """Each model under each perspective, of every benchmark."""
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


def over_seeds(number: Number) -> Row:
    """A difference over seeds as a row."""
    return _named(number) | {
        "protocol": number["protocol"],
        "against": number["against"],
        "seeds": str(number["seeds"]),
        "difference [95%, seeds]": _over_seeds(number),
        "p (seeds)": _p(number["p_seeds"]),
        "p (seeds), Holm": _p(number["holm_seeds"]),
        "[95%, questions]": f"[{100 * number['ci_low']:+.1f}, {100 * number['ci_high']:+.1f}]",
        "p (questions)": _p(number["p_bootstrap"]),
    }


def _over_seeds(number: Number) -> str:
    mean, half = 100 * number["difference"], 100 * number["half"]
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


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
