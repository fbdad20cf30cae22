"""How a command of an experiment ends: its evaluations over all seeds as one table, in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmedexpert.evaluation.comparison import aligned, by_benchmark, read_runs
from mmedexpert.evaluation.seeds import arms_of, best_first, named, paired
from mmedexpert.reporting.arms import SAID, as_json, figure, kind_rows, resolution, rows_of
from mmedexpert.reporting.tables import latex, markdown, print_table
from mmedexpert.runtime.runs import Run, console, git_sha, write_json
from mmedexpert.schema import Config
from mmedexpert.stages.report import compare


def conclude(config: Config, runs: Iterable[Run], failed: Sequence[str] = ()) -> Path | None:
    """Print and write the table of the evaluations among `runs`, to `<outputs>/experiments/<results.id>`: table.md,
    results.json, a .tex and a figure of each set of questions, and the whole comparison with its page; None without
    any. `failed`: jobs that are missing in it."""
    wanted, found, first = config.results.models, {}, None
    for run in runs:
        if run.stage == "eval" and run.done:
            found[run.folder.resolve()] = run
    evaluations, notes = aligned(read_runs(list(found)), common=True) if found else ([], [])
    folder = Path(config.paths.outputs) / "experiments" / str(config.results.id)
    notes = [note for note in notes if "settings differ" not in note]  # they are what the arms vary
    notes += [f"failed, so not in it: {name}" for name in failed]
    text, numbers = [f"# {config.results.id}\n\n{config.results.claim}\n".replace("\n\n\n", "\n")], {}
    for benchmark, members in by_benchmark(evaluations):
        arms = arms_of(members)
        reference = named(arms, config.results.against)
        name, arms = reference.label if reference else "", best_first(arms)
        first = first or (next(iter(reference.runs.values())) if reference else None)
        if wanted is not None:
            shown = [arm for arm in arms if arm is reference or next(iter(arm.runs.values())).model in wanted]
            arms = shown or arms
        against = {arm.label: paired(arm, reference, seed=config.seed) if reference else None for arm in arms}
        rows, kinds = rows_of(arms, against, name), kind_rows(arms)
        folder.mkdir(parents=True, exist_ok=True)
        place = re.sub(r"\W+", "_", benchmark)
        said = [SAID, resolution(against), *notes]
        print_table(rows, f"{config.results.id} on {benchmark}", "\n".join([*filter(None, said), f"{folder}"]))
        if kinds:
            print_table(kinds, f"{config.results.id} on {benchmark}, by kind of question")
        text += [f"## {benchmark}\n", markdown(rows), markdown(kinds) if kinds else "", "\n\n".join(filter(None, said))]
        (folder / f"{place}.tex").write_text(latex(rows), encoding="utf-8")
        numbers[benchmark] = as_json(arms, against, name)
        for kind in ("png", "svg"):
            figure(arms, against, name, f"{config.results.id} on {benchmark}", folder / f"{place}.{kind}")
    if not numbers:
        return None
    (folder / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    write_json(folder / "results.json", {"id": config.results.id, "git_sha": git_sha(), "sets": numbers})
    compare(config, evaluations, first, notes, folder)
    console.print(f"{folder}/report.html", highlight=False, soft_wrap=True)
    return folder
