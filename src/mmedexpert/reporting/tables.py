"""Tables a person reads: models of a pipeline, stages of a command, jobs of a sweep; rich, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.names import BASELINES
from mmedexpert.reporting.perspectives import GROUPS, SAID, group_rows, perspective_rows
from mmedexpert.runtime.jobs import Job, varied
from mmedexpert.runtime.runs import Run, explained

Row = dict[str, str]
Captioned = tuple[str, str, Sequence[Row]]  # title, note, rows
# columns of text
LEFT = (
    "benchmark", "model", "job", "stage", "name", "folder", "protocol", "source", "numbers", "run_id", "state", "why",
    "asked under", "questions", "criteria", "GiB", "MiB",
)  # fmt: skip
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\u00b1": r"$\pm$", "\n": " ",
})  # fmt: skip
SHORT = {"adult_medicine": "adult", "pediatrics": "pediatric", "brain_sensory": "brain", "oncology_surgery": "oncology"}


def interval(entry: Mapping[str, Any], mean: str = "accuracy", prefix: str = "ci") -> str:
    """`0.83 [0.76, 0.90]`."""
    return f"{entry[mean]:.2f} [{entry[f'{prefix}_low']:.2f}, {entry[f'{prefix}_high']:.2f}]"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """A specialty's name to what heads its column; whole where the short one is another's."""
    listed = list(names)
    return {name: name if SHORT.get(name) in listed else SHORT.get(name, name) for name in listed}


def _row(name: str, model: Mapping[str, Any]) -> Row:
    row, short = {"model": name}, short_names(model["per_specialty"])
    row |= {short[key]: f"{entry['accuracy']:.2f}" for key, entry in model["per_specialty"].items()}
    row["macro accuracy [95% CI]"] = interval(model, "macro_accuracy", "macro_ci")
    row["unparsed"] = f"{100 * model['parse_failure_rate']:.0f}%"
    return row | {
        name: f"{model['adherence'][name]:.2f}" if name in model["adherence"] else "-" for name in PERSPECTIVES
    }


def model_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row per model of a pipeline's summary: base, experts, the others, baselines."""
    models = dict(summary["models"])
    experts = models.pop("experts")
    short = short_names(experts)
    first = [("base", models.pop("base"))] if "base" in models else []
    last = [(f"{name} (baseline)", models.pop(name)) for name in BASELINES if name in models]
    named = [*first, *((f"expert: {short[name]}", model) for name, model in experts.items()), *models.items(), *last]
    return [_row(name, model) for name, model in named]


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(c, "-") for c in columns] for row in rows)]
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def latex(rows: Sequence[Row]) -> str:
    """A LaTeX tabular with the rules of booktabs."""
    columns = list(rows[0])
    lines = [_latex_line(columns), *(_latex_line([row.get(c, "-") for c in columns]) for row in rows)]
    align = "".join("l" if column in LEFT else "r" for column in columns)
    lines[:1] = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_line(cells: Sequence[str]) -> str:
    minus = [re.sub(r"(?<![\w.)-])-(?=\d)", "$-$", cell.translate(LATEX)) for cell in cells]
    # `[` and `*` after the line break before would be read as its arguments
    return ("{}" if cells[0].startswith(("[", "*")) else "") + " & ".join(minus) + r" \\"


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """CSV with a header; columns in order of appearance, empty where a row has no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rich_table(rows: Sequence[Row], title: str, caption: str = "") -> Table:
    """A table for the terminal, names to the left and numbers to the right."""
    title, caption = escape(title), escape(caption)  # a list in brackets is no style
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=column in ("model", "job"))
    for row in rows:
        table.add_row(*(escape(row.get(column, "-")) for column in rows[0]))
    return table


def print_table(rows: Sequence[Row], title: str, caption: str = "") -> None:
    """To stdout, wide enough not to break rows when the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(rich_table(rows, title, caption))


def print_result(runs: Mapping[str, Run], note: str = "") -> None:
    """The last tables of a command: models where models were evaluated, else each run with its main numbers.

    `note` goes below the table of the own data set.
    """
    evaluated = {name.removeprefix("eval/"): run.summary for name, run in runs.items() if run.stage == "eval"}
    if evaluated:
        public = {n.removeprefix("benchmarks/"): s for n, s in evaluated.items() if s["question_set"]["public"]}
        own = {name: one for name, one in evaluated.items() if not one["question_set"]["public"]}
        if asked_under := perspective_rows({name: one["perspectives"] for name, one in (own | public).items()}):
            print_table(asked_under, "Perspectives", SAID)
        by_model = {name: one["perspectives"] for name, one in own.items()}
        if by_group := group_rows(by_model, "robust"):
            print_table(by_group, "Kinds of questions", GROUPS)
        if own:
            pipeline = runs.get("pipeline")
            rows = model_rows(pipeline.summary) if pipeline else [_row(name, one) for name, one in own.items()]
            sizes = next(iter(own.values()))["per_specialty"]
            short = short_names(sizes)
            asked = ", ".join(f"{short[name]} {entry['n']}" for name, entry in sizes.items())
            caption = f"Accuracy per specialty (questions: {asked}); last four columns: adherence per perspective."
            place = f"{pipeline.folder}/summary.json" if pipeline else ""
            lines = [caption, *unanswered(own), note, place]
            print_table(rows, "Models", "\n".join(line for line in lines if line))
        if public:
            print_benchmarks(public)
        return
    rows = [
        {"stage": run.stage, "name": name, **_main_numbers(run), "folder": str(run.folder)}
        for name, run in runs.items() if run.stage != "verdicts"  # whose table stages/judging.py has printed
    ]  # fmt: skip
    if rows:
        print_table(rows, "Runs")


def print_explained() -> None:
    """The table of `runs.explain=true`: each run of this job, once, whether it would be reused, and why."""
    first: dict[str, Row] = {}
    for row in explained:
        first.setdefault(row["run_id"], row)  # what was made to answer is asked for again
    rows = list(first.values())
    explained.clear()
    print_table(
        rows,
        "Runs",
        "Nothing was trained or asked. made: no result of this is here; resumed: goes on from its checkpoint.",
    )


def benchmark_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row per benchmark and model, both protocols, and what the numbers have to be held against."""
    rows = []
    for name, one in summaries.items():
        asked, model = name.split("/", 1)
        row = {"benchmark": asked, "model": model, "n": str(one["n"]), "left out": str(one["question_set"]["left_out"])}
        row |= {f"{protocol} [95% CI]": interval(found) for protocol, found in sorted(one["protocols"].items())}
        row |= {
            "unparsed": f"{100 * one['parse_failure_rate']:.0f}%",
            "cut off": f"{100 * one['truncation_rate']:.0f}%",
        }
        clean = one["protocols"][one["protocol"]].get("clean")
        row["clean part (n)"] = f"{clean['accuracy']:.2f} ({clean['n']})" if clean else "- (0)" if clean == {} else "-"
        row |= {f"{kind}": f"{value:.2f}" for kind, value in one["baselines"].items()}
        if scored := one["protocols"]["robust"].get("open"):  # MedEvalKit's own unpacks its F1 in another order
            row["open: F1"] = f"{scored['f1']:.2f}"
        if one.get("llm_judge"):
            row["LLM judge"] = interval(one["llm_judge"])
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def print_benchmarks(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of `stage=eval benchmark=...`, what was asked, and a warning where images were trained on."""
    said = {}
    for one in summaries.values():
        asked, found = one["question_set"], one["contamination"]
        said[asked["name"]] = f"{asked['name']}: {', '.join(asked['source'])}; led by protocol {one['protocol']}"
        if asked["left_out"]:
            said[asked["name"]] += f"; {asked['left_out']} left out, see manifest.json in {asked['folder']}"
        if found and (compared := one.get("compared_with")):
            said[asked["name"]] += f"; clean: not in the training part of data={compared}, the only one looked at"
        if own := asked["own_training_part"]:
            said[asked["name"]] += (
                f"\n  its own training part shows {own['images_seen']:.0f} of its {own['images']:.0f} test images"
            )
        if found and found["image_seen"]:
            said[asked["name"]] += (
                f"\n  LEAK: the images of {found['image_seen']:.0f} of {found['questions']:.0f} questions are in the "
                "training data; quote the clean part"
            )
    print_table(benchmark_rows(summaries), "Benchmarks", "\n".join([*said.values(), *unanswered(summaries)]))


def unanswered(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each evaluation in which questions were refused: they count as wrong, and are named."""
    lines = []
    for name, one in summaries.items():
        for row in one.get("refused", [])[:1]:
            others = f" and {one['unanswered'] - 1} more" if one["unanswered"] > 1 else ""
            lines.append(
                f"{name}: {one['unanswered']} unanswered, counted as wrong: {row['id']}{others} "
                f"({row['refused'][:120]}); all in summary.json"
            )
    return lines


def _main_numbers(run: Run) -> dict[str, str]:
    numbers = [f"{key}={value:.3g}" for key, value in run.metrics.items() if key.count("/") < 2][:6]
    state = "reused" if run.reused else f"{run.manifest['wall_seconds']:.1f} s"
    return {"time": state, "numbers": "  ".join(numbers)}


def job_rows(jobs: Sequence[tuple[str, Mapping[str, Run]]]) -> list[Row]:
    """Each job's name and headline numbers: a row per pipeline, or per run where a stage ran alone."""
    rows = []
    for name, runs in jobs:
        row = {"job": name}
        pipeline = runs.get("pipeline")
        if pipeline is not None:
            models = pipeline.summary["models"]
            experts = [model["macro_accuracy"] for model in models.pop("experts").values()]
            row |= {"base": f"{models['base']['macro_accuracy']:.2f}"} if "base" in models else {}
            row |= {"best expert": f"{max(experts):.2f}"} if experts else {}
            for kind, model in models.items():
                if kind not in ("base", *BASELINES):
                    row[f"{kind} [95% CI]"] = interval(model, "macro_accuracy", "macro_ci")
                    if kind == "reasoner":
                        row |= {p: f"{model['adherence'].get(p, float('nan')):.2f}" for p in PERSPECTIVES}
            rows.append(row)
        else:
            rows += [{**row, "stage": run.stage, "name": part, **_main_numbers(run)} for part, run in runs.items()]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def print_jobs(jobs: Sequence[Job]) -> None:
    """The table over the jobs of a sweep, each under what was varied; below it those that failed, and why."""
    named = list(zip(varied([job.overrides for job in jobs]) if len(jobs) > 1 else ["0"], jobs, strict=True))
    if done := [(name, job.runs) for name, job in named if job.error is None]:
        print_table(job_rows(done), "Jobs")
    for name, job in named:
        if job.error is not None:
            print(f"failed: {name}: {job.error}")
