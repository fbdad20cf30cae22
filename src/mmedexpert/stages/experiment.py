"""How a command of an experiment ends: its evaluations over all seeds as one table, in a folder of its own."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmedexpert.evaluation.finished import EvalRun, aligned, by_benchmark, read_runs
from mmedexpert.evaluation.seeds import Arm, arms_of, best_first, named, paired
from mmedexpert.reporting.arms import (
    MATRIX,
    SAID,
    TOGETHER,
    VOTED,
    as_json,
    figure,
    kind_rows,
    matrix_rows,
    resolution,
    rows_of,
    together_rows,
)  # fmt: skip
from mmedexpert.reporting.page import Experiment
from mmedexpert.reporting.tables import Captioned, latex, markdown, print_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.identity import folder_of
from mmedexpert.runtime.jsonl import read_object
from mmedexpert.runtime.privacy import redacted, without_places
from mmedexpert.runtime.runs import Run, console, git_sha, write_json
from mmedexpert.schema import Config
from mmedexpert.stages.report import compare


def conclude(
    config: Config, jobs: Sequence[tuple[Config, Iterable[Run]]], failed: Sequence[str] = ()
) -> Path | None:  # fmt: skip
    """Print and write the table of the evaluations among the runs of `jobs`, to `<outputs>/experiments/<results.id>`:
    table.md, results.json, a .tex and a figure of each set of questions, and the whole comparison with its page; None
    without any. `failed`: jobs that are missing in it.

    A table over some of the runs of one that is there leaves it, and goes to `<results.id>-part`.
    """
    results, outputs = config.results, Path(config.paths.outputs)
    arms_with = _arms_with(jobs)
    if not arms_with:
        return None
    evaluations, notes = aligned(read_runs(list(arms_with)), common=True)
    evaluations = _by_arm(evaluations, arms_with, config)
    notes = [note for note in notes if "settings differ" not in note]  # they are what the arms vary
    notes += [f"failed, so not in it: {name}" for name in failed]
    folder = _place(outputs / "experiments" / str(results.id), evaluations)
    folder.mkdir(parents=True, exist_ok=True)
    text, first = [f"# {results.id}\n\n{results.claim}\n".replace("\n\n\n", "\n")], None
    numbers: dict[str, Any] = {}
    tables: list[Captioned] = []
    for benchmark, members in by_benchmark(evaluations):
        arms = best_first(arms_of(members))
        references = {arm.label: _reference(arms, arm, config) for arm in arms}
        reference = named(arms, results.against)
        first = first or (next(iter(reference.runs.values())) if reference else None)
        if results.models is not None:
            kept = [arm for arm in arms if arm is reference or next(iter(arm.runs.values())).model in results.models]
            arms = kept or arms
        told = [*notes]
        if results.against is not None and not any(references.values()):
            told.append(f"nothing to compare with: {results.against} is not among these runs")
        text += _tell(config, benchmark, arms, references, told, folder, numbers, tables)
    cost = _cost([run.path.parent for run in evaluations], outputs)
    write_atomic(folder / "table.md", "\n".join([*text, _told(cost), _given(config), ""]).encode())
    made: dict[str, Any] = {"made_of": cost, "command": _command(), "debug": config.debug.name}
    whole = {"id": results.id, "git_sha": git_sha(), **made, "sets": numbers}
    shown = Experiment(str(results.id), results.claim, tables)
    compare(config, evaluations, first, notes, folder, shown)
    write_json(folder / "results.json", whole)
    console.print(f"{folder}/report.html", highlight=False, soft_wrap=True)
    return folder


def _tell(
    config: Config, benchmark: str, arms: Sequence[Arm], references: Mapping[str, Arm | None], notes: Sequence[str],
    folder: Path, numbers: dict[str, Any], tables: list[Captioned],
) -> list[str]:  # fmt: skip
    """One set of questions: its tables printed, drawn and as text, its numbers in `numbers`, the tables in `tables`."""
    title, labels = f"{config.results.id} on {benchmark}", {one.label for one in references.values() if one}
    name = next(iter(labels)) if len(labels) == 1 else str(config.results.against) if labels else ""
    against = {
        arm.label: paired(arm, one, seed=config.seed) if (one := references[arm.label]) else None for arm in arms
    }
    rows, place = rows_of(arms, against, name), re.sub(r"\W+", "_", benchmark)
    said = [*filter(None, [SAID, VOTED if together_rows(arms) else "", resolution(against), *notes])]
    print_table(rows, title, "\n".join([*said, f"{folder}"]))
    tables.append((benchmark, " ".join(said), rows))
    text = [f"## {benchmark}\n", markdown(rows), "\n\n".join(said) + "\n"]
    together = together_rows(arms)
    more = {
        "by kind of question": (kind_rows(arms), VOTED if together else ""),
        "asked under every perspective": (together, TOGETHER),
        "what a question needs, and what it is asked under": (matrix_rows(arms), MATRIX),
    }
    for what, (found, caption) in more.items():
        if found:
            print_table(found, f"{title}: {what}", caption)
            tables.append((f"{benchmark}: {what}", caption, found))
            text += [f"### {what[0].upper()}{what[1:]}\n", markdown(found), *([caption + "\n"] if caption else [])]
    write_atomic(folder / f"{place}.tex", latex(rows).encode())
    numbers[benchmark] = as_json(arms, against, name)
    for kind in ("png", "svg"):
        figure(arms, against, name, title, folder / f"{place}.{kind}")
    return text


def _reference(arms: Sequence[Arm], arm: Arm, config: Config) -> Arm | None:
    """What an arm's row is compared with: `results.against`, or of an arm so called the same model's row."""
    against = config.results.against
    if against is not None and against in (config.arms or {}):
        model = next(iter(arm.runs.values())).model
        inside = [one for one in arms if against in one.label.removeprefix(f"{model} (").removesuffix(")").split(", ")]
        return next((one for one in inside if next(iter(one.runs.values())).model == model), None)
    return named(arms, against)


def _given(config: Config) -> str:
    """The command, and a warning where its numbers mean nothing."""
    smoke = " debug=smoke: these numbers mean nothing." if config.debug.name == "smoke" else ""
    return f"Command: {_command()}.{smoke}"


def _command() -> str:
    """As it was typed, without secrets and places of this machine."""
    return "run.py " + " ".join(without_places(word) for word in redacted(sys.argv[1:]))


def _place(folder: Path, evaluations: Sequence[EvalRun]) -> Path:
    """The folder; beside it where it holds a table over runs that these are without."""
    found = read_object(folder / "results.json").get("sets", {})
    there = {
        seed["run"] for one in found.values() for arm in one["arms"].values() for seed in arm["seeds"].values()
    }  # fmt: skip
    if there <= {run.path.parent.name for run in evaluations}:
        return folder
    part = folder.with_name(f"{folder.name}-part")
    line = f"{folder} holds a table over other runs, too: this one is {part}; move that away to have it there"
    console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)
    return part


def _arms_with(jobs: Sequence[tuple[Config, Iterable[Run]]]) -> dict[Path, set[str]]:
    """The folder of each finished evaluation, with the arms (`arm=`) that have it."""
    found: dict[Path, set[str]] = {}
    for config, runs in jobs:
        for run in runs:
            if run.stage == "eval" and run.done:
                found.setdefault(run.folder.resolve(), set()).update([config.arm] if config.arm else [])
    return found


def _by_arm(evaluations: Sequence[EvalRun], arms_with: Mapping[Path, set[str]], config: Config) -> list[EvalRun]:
    """A model that arms have in several kinds is called by its arms: `reasoner (rank_4)`; so is the one that
    `results.against` calls so, and every model where that is an arm."""
    against = config.results.against or ""
    always = {run.model for run in evaluations} if against in (config.arms or {}) else {against.partition(" (")[0]}
    always = always if against in (config.arms or {}) or " (" in against else set()
    every = set().union(*arms_with.values())
    of_recipe: dict[str, set[str]] = {}  # over all seeds: a job that failed takes no arm from a name
    for run in evaluations:
        of_recipe.setdefault(run.recipe, set()).update(arms_with[run.path.parent])
    named = []
    for run in evaluations:
        own, kinds = of_recipe[run.recipe], {r.recipe for r in evaluations if r.model == run.model}
        plain = (own == every and len(every) > 1) or (len(kinds) == 1 and run.model not in always)
        family = run.model if plain or not own else f"{run.model} ({', '.join(sorted(own))})"
        label = f"{family} (seed {run.seed})" if run.seed_of else family
        named.append(replace(run, family=family, label=label, seed_of=run.seed_of and family))
    # of an arm that has a model in several kinds (sft_all, sft_all@480) these are called by what tells them apart
    labels = Counter((run.benchmark, run.label) for run in named)
    named = [run if labels[new.benchmark, new.label] > 1 else new for run, new in zip(evaluations, named, strict=True)]
    return named if every and (len(every) > 1 or always) and _apart(named) else list(evaluations)


def _cost(folders: Sequence[Path], outputs: Path) -> dict[str, Any]:
    """How many runs the evaluations and all that they were made of are (but data, which are known by content), the
    minutes that each of them took, added up, their commits and machines."""
    waiting, seen = list(folders), dict[Path, Mapping[str, Any]]()
    while waiting:
        folder = waiting.pop().resolve()
        if folder not in seen:
            seen[folder] = read_object(folder / "manifest.json")
            inner = (folder_of(outputs, str(one)) for one in seen[folder].get("inputs", {}).values())
            waiting += [one for one in inner if one is not None]
    told = [manifest for manifest in seen.values() if manifest]
    return {
        "runs": len(told),
        "minutes": round(sum(manifest.get("wall_seconds", 0.0) for manifest in told) / 60, 1),
        "commits": sorted({str(manifest.get("git_sha")) for manifest in told}),
        "devices": sorted({str(manifest.get("device")) for manifest in told}),
    }


def _told(cost: Mapping[str, Any]) -> str:
    commits = ", ".join(one[:7] for one in cost["commits"])
    minutes = f"{cost['minutes']:.0f} minutes one after the other"
    return f"Made of {cost['runs']} runs, {minutes} on {' and '.join(cost['devices'])}; code at {commits}."


def _apart(runs: Sequence[EvalRun]) -> bool:
    """Whether no two runs of one benchmark share a label."""
    names = [(run.benchmark, run.label) for run in runs]
    return len(set(names)) == len(names)
