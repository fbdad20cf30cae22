"""Finished evaluations, read again: which model answered what to which question, over the same questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from mmedexpert.errors import UserError
from mmedexpert.evaluation.predict import PROTOCOLS, Prediction, vote
from mmedexpert.runtime.identity import labels_of

ANSWER = ("id", "image_group", "kind", "groups", "perspective", "mean_logp", "adherence", "criteria", *PROTOCOLS)


@dataclass(frozen=True)
class Question:
    """What a comparison needs of a question's prediction (the vote, where it was asked under several perspectives);
    `answers` are those under a perspective, each with its keys of ANSWER."""

    gold: str
    image_group: str
    breakdowns: tuple[tuple[str, str], ...]
    correct: dict[str, bool]
    parsed: bool
    truncated: bool
    answers: tuple[Prediction, ...] = ()


@dataclass(frozen=True)
class EvalRun:
    """One model's predictions on one benchmark (empty: not named by the run). `label` names it in the tables.

    `recipe` is all that it was made from but the seed (empty: not told), `family` its name in the tables without the
    seed; `seed_of` is the family of runs under several seeds, None for a run that stands alone.
    """

    path: Path
    model: str
    benchmark: str
    seed: int | None
    settings: str
    recipe: str
    questions: dict[str, Question]
    notes: tuple[str, ...] = ()
    label: str = ""
    family: str = ""
    seed_of: str | None = None

    @property
    def title(self) -> str:
        return f"{self.label} on {self.benchmark}" if self.benchmark else self.label


def read_runs(paths: Sequence[str | Path]) -> list[EvalRun]:
    """The runs in these eval run folders (which must be finished) or predictions.jsonl files, each with its label.

    Runs of one recipe whose seeds all differ are one model under several seeds. Namesakes of different recipes (arms of
    an ablation) are told apart by the settings in which they differ.

    Raises:
        UserError: no path, the same one twice, a file missing or unfinished, or a line that is no prediction.
    """
    if not paths:
        raise UserError("report.runs is empty: give eval run folders, report.runs='[outputs/eval/a,outputs/eval/b]'")
    files = [path / "predictions.jsonl" if path.is_dir() else path for path in map(Path, paths)]
    twice = [str(path) for i, path in enumerate(files) if path.resolve() in {other.resolve() for other in files[:i]}]
    if twice:
        raise UserError(f"report.runs names {twice[0]} twice: give each run once")
    for given, file in zip(paths, files, strict=True):
        if not file.is_file():
            raise UserError(
                f"report.runs: {file} is not there: give the folder of an eval run or its predictions.jsonl"
            )
        if Path(given).is_dir() and not (file.parent / "DONE").exists():
            raise UserError(f"report.runs: {given} is not finished: run its command again, it continues")
    runs = [_read_run(file) for file in files]

    labelled = []
    for run in runs:
        namesakes = [r for r in runs if (r.benchmark, r.model) == (run.benchmark, run.model)]
        same = [r for r in namesakes if r.recipe == run.recipe]
        family = run.model
        if len(same) < len(namesakes):
            first = {r.recipe: r.path.parent for r in reversed(namesakes)}
            told = labels_of(first)
            different = len(set(told.values())) == len(told) and all(told.values())
            family = f"{run.model} ({told[run.recipe]})" if different else _place(run)
        seeds = [r.seed for r in same]
        if len(same) > 1 and run.recipe and None not in seeds and len(set(seeds)) == len(seeds):
            labelled.append(replace(run, label=f"{family} (seed {run.seed})", family=family, seed_of=family))
        else:
            label = family if len(same) == 1 else _place(run)
            labelled.append(replace(run, label=label, family=label))
    names = [(run.benchmark, run.label) for run in labelled]
    return [
        run if names.count((run.benchmark, run.label)) == 1
        else replace(run, label=str(run.path), family=str(run.path), seed_of=None)
        for run in labelled
    ]  # fmt: skip


def _place(run: EvalRun) -> str:
    """The name of a run's folder, or of its file: all that differs where nothing else is known."""
    return run.path.parent.name if run.path.name == "predictions.jsonl" else run.path.stem


def _read_run(file: Path) -> EvalRun:
    manifest, asked = _json(file.parent / "manifest.json"), _json(file.parent / "summary.json").get("question_set", {})
    config, key = file.parent / "config.yaml", _json(file.parent / "identity.json").get("key")
    rows: dict[str, dict[Any, Any]] = {}  # id to perspective to line
    cut = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                cut += 1  # by a kill; the question was asked again, or is missed when the runs are aligned
                continue
            try:
                _question(row)
                row.pop("response", None)  # the long part, not needed here
                rows.setdefault(str(row["id"]), {})[row.get("perspective")] = row
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{file} line {number} is no prediction ({error!r}): evaluate again") from error
    questions = {
        i: replace(
            _question(vote(list(answers.values())) if len(answers) > 1 else next(iter(answers.values()))),
            answers=tuple({key: row[key] for key in ANSWER if key in row} for p, row in answers.items() if p),
        )
        for i, answers in rows.items()
    }
    if not questions:
        raise UserError(f"{file} holds no prediction: run its command again")
    benchmark = str(asked.get("name", ""))
    own_name = file.parent.name if file.name == "predictions.jsonl" else file.stem
    model = str(manifest.get("name", own_name)).removesuffix(f"-{benchmark}")
    notes = [f"{benchmark}: {', '.join(asked['source'])}; left out: {asked['left_out']}"] if asked else []
    notes += [f"{model}: {cut} unreadable line(s) of {file} left out"] if cut else []
    notes += [] if manifest else [f"{model}: no manifest.json beside {file}, so its seed is not known"]
    return EvalRun(
        path=file, model=model, benchmark=benchmark, seed=manifest.get("seed"),
        recipe=str(manifest.get("recipe") or ""),
        settings=json.dumps(key) if key else config.read_text(encoding="utf-8") if config.is_file() else "",
        questions=questions, notes=tuple(notes),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder, empty where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object ({error}): evaluate again") from error


def _question(row: Mapping[str, Any]) -> Question:
    correct = {protocol: row[protocol]["correct"] for protocol in PROTOCOLS}
    if not all(isinstance(value, bool) for value in correct.values()):
        raise ValueError("a verdict is neither true nor false")
    breakdowns = [("specialty", str(name)) for name in row.get("specialties") or () if name != "all"]
    groups = {name: row.get(name) for name in ("kind", "modality", "body_system")} | (row.get("groups") or {})
    breakdowns += [(name, str(value)) for name, value in groups.items() if value]
    return Question(
        str(row["gold"]), str(row["image_group"]), tuple(breakdowns), correct, bool(row["robust"]["parsed"]),
        row.get("finish_reason") == "length",
    )  # fmt: skip


def aligned(runs: Sequence[EvalRun], *, common: bool) -> tuple[list[EvalRun], list[str]]:
    """The runs with the same questions in the same order within each benchmark, and what was left out for that.

    Raises:
        UserError: runs of one benchmark differ in questions (unless `common`), have none in common, or give one id
            different gold answers or images.
    """
    kept, notes = [], []
    for benchmark, members in by_benchmark(runs):
        every = set().union(*(run.questions for run in members))
        shared = sorted(every.intersection(*(run.questions for run in members)))
        what = benchmark or "the runs"
        if not shared:
            raise UserError(
                f"{what}: {members[0].label} and the others have no question in common: compare runs of one benchmark"
            )
        if left := len(every) - len(shared):
            missing = next((i, run.label) for i in sorted(every) for run in members if i not in run.questions)
            told = f"{what}: {left} of {len(every)} questions are not in every run (such as {missing[0]}, not in "
            told += f"{missing[1]})"
            if not common:
                fix = f"report.common=true compares on the {len(shared)} common ones"
                raise UserError(f"{told}: evaluate all on the same questions, or {fix}")
            notes.append(f"{told}; all numbers are over the {len(shared)} common ones")
        facts = {i: {(run.questions[i].gold, run.questions[i].image_group) for run in members} for i in shared}
        if differing := [i for i in shared if len(facts[i]) > 1]:
            raise UserError(
                f"{what}: {len(differing)} questions have another gold answer or image in another run (such as "
                f"{differing[0]}): evaluate all on the same version of the data"
            )
        kept += [replace(run, questions={i: run.questions[i] for i in shared}) for run in members]
        if len({run.settings for run in members}) > 1:
            notes.append(f"{what}: settings differ between the runs: prompts, pixels or tokens may not be the same")
    return kept, list(dict.fromkeys([note for run in runs for note in run.notes] + notes))


def by_benchmark(runs: Sequence[EvalRun]) -> list[tuple[str, list[EvalRun]]]:
    """The runs of each benchmark, in the order given."""
    order = {run.benchmark: place for place, run in reversed([*enumerate(runs)])}
    ordered = sorted(runs, key=lambda run: order[run.benchmark])
    return [(name, list(members)) for name, members in groupby(ordered, key=lambda run: run.benchmark)]
