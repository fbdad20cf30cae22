"""`data=mmedexpert`: the funnel that makes a data set out of several sources, a run for each step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmedexpert.curation import balance, blind, decontaminate, difficulty, duplicates, labels, structure, traces
from mmedexpert.curation.retrieval import Statements
from mmedexpert.curation.steps import Records, Verdict, run_step
from mmedexpert.data.records import RECORDS
from mmedexpert.errors import UserError
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.runs import Run, write_json
from mmedexpert.runtime.versions import digest, rule_of, text_of, versions
from mmedexpert.schema import Config
from mmedexpert.schema_data import CurateConfig
from mmedexpert.stages.asked import engine_for, identity_of
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.sources import IMAGES, REPORT, benchmark_of, content_of, folders_of, ingested, say

ASKED = ("robust", "prompts", "sampling")  # rules of asking a model and reading its answer
Make = Callable[[Records, Run], Iterator[Verdict]]
Report = Callable[[Records, Records], Any]  # of what a step was given and what it kept


@dataclass(frozen=True)
class Step:
    """A step's run, and where the images are that its records name."""

    run: Run
    images: Path

    @property
    def records(self) -> Records:
        return Records(self.run.folder, self.images)


def funnel(config: Config) -> list[Step]:
    """The steps in order, finished ones reused; the records of the last are the set. A step whose model is not given
    is not among them. With `runs.explain` UserError for a set that is not built yet."""
    curate = settings_of(config)
    first = ingested(config)
    done = [Step(first, first.folder / IMAGES)]
    for step in (_duplicates, _decontaminate, _structure, _labels, _blind, _difficulty, _traces, _balance, _split):
        if config.runs.explain and not done[-1].run.done:
            lacks, name = done[-1].run.name.rpartition("-")[0], config.data.name
            raise UserError(f"data={name}: its step {lacks} is not made yet: run stage=data data={name} first")
        if (made := step(config, curate, done[-1])) is not None:
            done.append(made)
    return done


def teacher_of(config: Config) -> str | None:
    """What the teacher is called, without the place of its files; None without one."""
    curate = settings_of(config)
    if curate.teacher.local:
        return config.model.name
    model = curate.teacher.model
    return Path(model).name if model and model.startswith(("/", "~", ".")) else model


def settings_of(config: Config) -> CurateConfig:
    """The settings of the funnel; UserError where `data` has none."""
    if config.data.curate is None:
        raise UserError(f"data={config.data.name} names data.sources and no data.curate: see conf/data/mmedexpert.yaml")
    return config.data.curate


def _duplicates(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings, order = asdict(curate.duplicates), tuple(config.data.sources)
    return _step(
        config, "duplicates", before, {**settings, "order": order}, ("duplicates", "overlap"),
        lambda records, run: duplicates.duplicates(records, sources=order, **settings),
        lambda _, kept: duplicates.report(kept, **settings),
    )  # fmt: skip


def _decontaminate(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings, told = asdict(curate.decontaminate), config.data.benchmarks
    folders, absent = folders_of(config, told, "data.benchmarks")
    key = {
        **settings, "benchmarks": {name: told[name] for name in folders},
        "content": {name: content_of(config, folder) for name, folder in folders.items()},
    }  # fmt: skip
    rules = {k: v for name in folders for k, v in rule_of(told[name]["_target_"]).items()}

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        read = (one for name, folder in folders.items() if folder for one in benchmark_of(config, name, folder, run))
        known = decontaminate.Benchmarks(read, Path(config.paths.outputs) / "image_fingerprints.jsonl", **settings)
        rows = [*known.report(), *({"what": f"{name}: not here, not compared", "value": ""} for name in absent)]
        write_json(run.folder / REPORT, rows)
        yield from decontaminate.decontaminate(records, benchmarks=known)

    if absent:
        say(f"data {config.data.name}: not compared with benchmarks that are not here: {', '.join(absent)}")
    return _step(config, "decontaminate", before, {**key, "readers": rules}, ("decontaminate", "overlap"), make)


def _structure(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings = asdict(curate.structure)
    return _step(
        config, "structure", before, settings, ("structure",),
        lambda records, run: structure.structure(records, **settings),
        lambda given, kept: structure.report(given, kept, blank=curate.structure.blank),
    )  # fmt: skip


def _labels(config: Config, curate: CurateConfig, before: Step) -> Step:
    asked = curate.labels
    settings: dict[str, Any] = {
        "also": asked.also, "drop_disagreement": asked.drop_disagreement, "trusted": sorted(curate.trusted),
    }  # fmt: skip
    key = {**settings, "asked": identity_of(config, asked), "words": _text("data", "specialties.yaml")}
    return _step(
        config, "labels", before, key, ("specialties", "label"),
        lambda records, run: labels.label(records, engine=engine_for(config, asked, "labels"), **settings),
    )  # fmt: skip


def _blind(config: Config, curate: CurateConfig, before: Step) -> Step | None:
    asked = curate.blind
    settings: dict[str, Any] = {"tries": asked.tries, "mode": asked.mode}
    if (told := identity_of(config, asked)) is None:
        return None

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = engine_for(config, asked, "blind", temperature=1.0)
        assert engine is not None
        kept = run.folder / "replies.jsonl"
        yield from blind.needs_image(records, engine, kept, **settings)
        write_json(run.folder / REPORT, blind.report(records, kept, asked.tries))

    return _step(
        config,
        "needs_image",
        before,
        {**settings, "asked": told},
        ("needs_image", *ASKED),
        make,
    )


def _difficulty(config: Config, curate: CurateConfig, before: Step) -> Step | None:
    asked = curate.difficulty
    low, high = asked.keep
    settings: dict[str, Any] = {
        "rollouts": asked.rollouts, "keep": (low, high), "hard": tuple(asked.hard), "mode": asked.mode,
    }  # fmt: skip
    if (told := identity_of(config, asked)) is None:
        return None

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = engine_for(config, asked, "difficulty", temperature=1.0)
        assert engine is not None
        kept = run.folder / "replies.jsonl"
        yield from difficulty.difficulty(records, engine, kept, **settings)
        counts, refused = difficulty.histogram(kept, asked.rollouts)
        write_json(run.folder / REPORT, {"solved": counts, "refused": refused})
        difficulty.figure(counts, run.folder / "difficulty.png", keep=(low, high))

    return _step(config, "difficulty", before, {**settings, "asked": told}, ("difficulty", *ASKED), make)


def _traces(config: Config, curate: CurateConfig, before: Step) -> Step:
    asked = curate.teacher
    teacher, verifier = identity_of(config, asked), identity_of(config, curate.verifier)
    settings: dict[str, Any] = {
        "verify": asked.verify if teacher else "rules", "perspectives": tuple(asked.perspectives),
        "per_question": asked.per_question, "candidates": asked.candidates, "min_adherence": asked.min_adherence,
        "copy_ratio": asked.copy_ratio, "statements_per_question": asked.statements_per_question,
        "shows_answer": asked.shows_answer, "shows_images": asked.shows_images,
        "written_by": teacher_of(config) or "",
    }  # fmt: skip
    own = [Path(path).expanduser() for path in asked.statements]
    key = {
        **settings, "teacher": teacher, "verifier": verifier if settings["verify"] == "model" else None,
        "temperature": asked.temperature, "untraced": curate.untraced, "statements": [*map(file_digest, own)],
        "texts": {name: text_of(name) for name in DATA},
        "essentials": _text("curation", "essentials.yaml"),
    }  # fmt: skip

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = engine_for(config, asked, "teacher", temperature=asked.temperature)
        checking = engine_for(config, curate.verifier, "verifier") if settings["verify"] == "model" else None
        made = traces.write_traces(records, engine, verifier=checking, statements=Statements(own), **settings)
        for verdict in made:
            keep = verdict.reason == traces.NO_TEACHER and curate.untraced == "keep"
            yield Verdict(verdict.record) if keep else verdict

    return _step(config, "traces", before, key, ("traces", "statements", "rubrics", "robust", "prompts"), make)


def _balance(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings = {key: value for key, value in asdict(curate.balance).items() if key != "fractions"}
    for key in ("specialty", "perspective"):  # 1 and 1.0 are one share
        settings[key] = {name: float(share) for name, share in (settings[key] or {}).items()}
    return _step(
        config, "balance", before, settings, ("balance",),
        lambda records, run: balance.balance(records, seed=config.data.seed, **settings),
    )  # fmt: skip


def _split(config: Config, curate: CurateConfig, before: Step) -> Step:
    train, val, test = curate.balance.fractions
    fractions = (train, val, test)
    return _step(
        config, "split", before, {"fractions": fractions}, ("balance", "splits"),
        lambda records, run: balance.split(records, fractions=fractions, seed=config.data.seed),
    )  # fmt: skip


def _step(
    config: Config, name: str, before: Step, key: Mapping[str, Any], rules: tuple[str, ...], make: Make,
    report: Report | None = None,
) -> Step:  # fmt: skip
    """A step as a run, found again by its settings and by what came before it."""

    def work(run: Run) -> dict[str, float]:
        kept = run_step(name, lambda records: make(records, run), before.records, run.folder)
        if report is not None:
            write_json(run.folder / REPORT, report(before.records, kept))
        return {key: float(kept.counts[key]) for key in ("in", "out")}

    told = {"settings": dict(key), "rules": versions(*rules)}
    # what it holds, too: a step whose folder was deleted may come out anew, as a server now takes what it had refused
    inputs = {"before": before.run.run_id, "records": file_digest(before.run.folder / RECORDS)}
    run = stage_run(config, "curate", f"{name}-{config.data.name}", told, work, inputs, seed=config.data.seed)
    return Step(run, before.images)


def _text(folder: str, name: str) -> str:
    """16 hex digits of a file of rules that comes with the package."""
    return digest(files(f"mmedexpert.{folder}").joinpath(name).read_text(encoding="utf-8"))
