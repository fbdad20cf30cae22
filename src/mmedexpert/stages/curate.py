"""`data=mmedexpert`: the funnel that makes a data set out of several sources, a run for each step of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

from mmedexpert.curation import balance, blind, decontaminate, difficulty, duplicates, labels, structure, traces
from mmedexpert.curation.ingest import Source, ingest
from mmedexpert.curation.retrieval import Statements
from mmedexpert.curation.steps import COUNTS, Records, Verdict, run_step, write_step
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Engine
from mmedexpert.errors import UserError
from mmedexpert.runtime.build import build, values_of
from mmedexpert.runtime.fingerprints import file_digest, folder_digest
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.runtime.versions import VERSIONS, digest, rule_of, text_of, versions
from mmedexpert.schema import AskedConfig, Config, CurateConfig
from mmedexpert.sources.unpack import names_alone
from mmedexpert.stages.common import loading, model_key, processes_of, stage_run
from mmedexpert.stages.pretrain import base_of

REPORT, IMAGES, DRAWN = "report.json", "images", "phantom"
ASKED = ("robust", "prompts", "sampling")  # rules of asking a model and reading its answer
EXAMPLE = "mmedexpert.sources.vqa_table.load"
_told: set[str] = set()  # lines this command has said
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
    done = [_ingest(config)]
    for step in (_duplicates, _decontaminate, _structure, _labels, _blind, _difficulty, _traces, _balance, _split):
        if config.runs.explain and not done[-1].run.done:
            raise UserError(f"data={config.data.name} is not built yet: run stage=data data={config.data.name} first")
        if (made := step(config, curate, done[-1])) is not None:
            done.append(made)
    return done


def settings_of(config: Config) -> CurateConfig:
    """The settings of the funnel; UserError where `data` has none."""
    if config.data.curate is None:
        raise UserError(f"data={config.data.name} names data.sources and no data.curate: see conf/data/mmedexpert.yaml")
    return config.data.curate


def _ingest(config: Config) -> Step:
    settings, curate = config.data, settings_of(config)
    folders, absent = _folders(config, settings.sources, "data.sources")
    if absent:
        _say(f"data {settings.name}: not in {settings.root}, so left out: {', '.join(absent)}")
    if not folders:
        raise UserError(f"data={settings.name}: {settings.root} holds none of {', '.join(absent)}")
    key = {
        "sources": {name: settings.sources[name] for name in folders},
        "content": {name: _content(config, folder) for name, folder in folders.items()},
        "max_side": curate.max_side,
        "rules": {
            **versions("ingest", "images", "dicom"),
            **{k: v for name in folders for k, v in rule_of(settings.sources[name]["_target_"]).items()},
        },
    }
    if DRAWN in folders:
        key["guidelines"] = text_of("guidelines.yaml")

    def work(run: Run) -> dict[str, float]:
        changed: Counter[str] = Counter()
        sources = [_source(config, name, folder, run) for name, folder in folders.items()]
        verdicts = ingest(
            sources, run.folder / "unpacked", run.folder / IMAGES, processes=processes_of(config),
            max_side=curate.max_side, changed=changed,
        )  # fmt: skip
        write_step("ingest", verdicts, run.folder, run.folder / IMAGES, given=None)
        write_json(run.folder / REPORT, {"changed": dict(sorted(changed.items())), "not there": absent})
        return _numbers(run)

    run = stage_run(config, "curate", f"ingest-{settings.name}", key, work, seed=settings.seed)
    return Step(run, run.folder / IMAGES)


def _source(config: Config, name: str, folder: Path | None, run: Run) -> Source:
    told = config.data.sources[name]
    seed = {"seed": config.data.seed} if "seed" in signature(_target(told)).parameters else {}
    made = {"_target_": told["_target_"], **values_of(told), **seed}

    def load(root: Path, out_dir: Path) -> Any:
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            return build(made, f"data.sources.{name}", root=root, out_dir=out_dir)
        except UserError as error:
            if config.data.on_bad_record == "error":
                raise
            _say(f"data {config.data.name}: source {name} is left out: {error}")
            return [], root, [("all of it", str(error))]

    revision = str(told.get("_revision_") or "")
    if folder is None:  # drawn, not read
        revision = revision or f"rules {VERSIONS.get(name, '')}".strip()
    return Source(
        name, load, folder or run.folder, license=str(told.get("_license_") or ""), revision=revision,
        redistribute=told.get("_redistribute_"),
    )  # fmt: skip


def _target(told: Mapping[str, Any]) -> Callable[..., Any]:
    from mmedexpert.runtime.build import method

    return method(told.get("_target_"), "data.sources")


def _duplicates(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings, order = asdict(curate.duplicates), tuple(config.data.sources)
    return _step(
        config, "duplicates", before, {**settings, "order": order}, ("duplicates", "overlap"),
        lambda records, run: duplicates.duplicates(records, sources=order, **settings),
        lambda _, kept: duplicates.report(kept, **settings),
    )  # fmt: skip


def _decontaminate(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings, told = asdict(curate.decontaminate), config.data.benchmarks
    folders, absent = _folders(config, told, "data.benchmarks")
    key = {
        **settings, "benchmarks": {name: told[name] for name in folders},
        "content": {name: _content(config, folder) for name, folder in folders.items()},
    }  # fmt: skip
    rules = {k: v for name in folders for k, v in rule_of(told[name]["_target_"]).items()}

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        read = (_benchmark(config, name, folder, run) for name, folder in folders.items() if folder)
        known = decontaminate.Benchmarks(read, Path(config.paths.outputs) / "image_fingerprints.jsonl", **settings)
        rows = [*known.report(), *({"what": f"{name}: not here, not compared", "value": ""} for name in absent)]
        write_json(run.folder / REPORT, rows)
        yield from decontaminate.decontaminate(records, benchmarks=known)

    if absent:
        _say(f"data {config.data.name}: not compared with benchmarks that are not here: {', '.join(absent)}")
    return _step(config, "decontaminate", before, {**key, "readers": rules}, ("decontaminate", "overlap"), make)


def _benchmark(config: Config, name: str, folder: Path, run: Run) -> tuple[str, list[Record], Path | None]:
    """A benchmark's questions; of one whose images are not here the texts alone."""
    load = {"_target_": config.data.benchmarks[name]["_target_"], **values_of(config.data.benchmarks[name])}
    out_dir = run.folder / "benchmarks" / name
    out_dir.mkdir(parents=True, exist_ok=True)
    where = f"data.benchmarks.{name}"
    records, image_root, bad = build(load, where, root=folder, out_dir=out_dir)
    if len(records) >= len(bad):
        return name, records, image_root
    with names_alone():
        records, _, _ = build(load, where, root=folder, out_dir=out_dir)
    return name, records, None


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
    key = {**settings, "asked": _asked(config, asked), "words": _text("data", "specialties.yaml")}
    return _step(
        config, "labels", before, key, ("specialties", "label"),
        lambda records, run: labels.label(records, engine=_engine(config, asked, "labels"), **settings),
    )  # fmt: skip


def _blind(config: Config, curate: CurateConfig, before: Step) -> Step | None:
    asked = curate.blind
    settings: dict[str, Any] = {"tries": asked.tries, "mode": asked.mode}
    if (told := _asked(config, asked)) is None:
        return None

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = _engine(config, asked, "blind", temperature=1.0)
        assert engine is not None
        kept = run.folder / "replies.jsonl"
        yield from blind.needs_image(records, engine, kept, **settings)
        write_json(run.folder / REPORT, blind.report(records, kept, asked.tries))

    return _step(
        config,
        "needs_image",
        before,
        {**settings, "asked": told},
        ("needs_image", "robust", "prompts", "sampling"),
        make,
    )


def _difficulty(config: Config, curate: CurateConfig, before: Step) -> Step | None:
    asked = curate.difficulty
    low, high = asked.keep
    settings: dict[str, Any] = {
        "rollouts": asked.rollouts, "keep": (low, high), "hard": tuple(asked.hard), "mode": asked.mode,
    }  # fmt: skip
    if (told := _asked(config, asked)) is None:
        return None

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = _engine(config, asked, "difficulty", temperature=1.0)
        assert engine is not None
        kept = run.folder / "replies.jsonl"
        yield from difficulty.difficulty(records, engine, kept, **settings)
        counts, refused = difficulty.histogram(kept, asked.rollouts)
        write_json(run.folder / REPORT, {"solved": counts, "refused": refused})
        difficulty.figure(counts, run.folder / "difficulty.png", keep=(low, high))

    return _step(
        config, "difficulty", before, {**settings, "asked": told}, ("difficulty", "robust", "prompts", "sampling"), make
    )


def _traces(config: Config, curate: CurateConfig, before: Step) -> Step:
    asked = curate.teacher
    teacher, verifier = _asked(config, asked), _asked(config, curate.verifier)
    settings: dict[str, Any] = {
        "verify": asked.verify if teacher else "rules", "perspectives": tuple(asked.perspectives),
        "per_question": asked.per_question, "candidates": asked.candidates, "min_adherence": asked.min_adherence,
        "copy_ratio": asked.copy_ratio, "statements_per_question": asked.statements_per_question,
        "shows_answer": asked.shows_answer, "shows_images": asked.shows_images,
        "written_by": asked.model or (config.model.name if asked.local else ""),
    }  # fmt: skip
    own = [Path(path).expanduser() for path in asked.statements]
    key = {
        **settings, "teacher": teacher, "verifier": verifier if settings["verify"] == "model" else None,
        "temperature": asked.temperature, "untraced": curate.untraced, "statements": [*map(file_digest, own)],
        "texts": [*map(text_of, ("perspectives.yaml", "guidelines.yaml", "cues.yaml"))],
        "essentials": _text("curation", "essentials.yaml"),
    }  # fmt: skip

    def make(records: Records, run: Run) -> Iterator[Verdict]:
        engine = _engine(config, asked, "teacher", temperature=asked.temperature)
        checking = _engine(config, curate.verifier, "verifier") if settings["verify"] == "model" else None
        made = traces.write_traces(records, engine, verifier=checking, statements=Statements(own), **settings)
        for verdict in made:
            keep = verdict.reason == traces.NO_TEACHER and curate.untraced == "keep"
            yield Verdict(verdict.record) if keep else verdict

    return _step(config, "traces", before, key, ("traces", "statements", "rubrics"), make)


def _balance(config: Config, curate: CurateConfig, before: Step) -> Step:
    settings = {key: value for key, value in asdict(curate.balance).items() if key != "fractions"}
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
        return _numbers(run)

    told = {"settings": dict(key), "rules": versions(*rules)}
    inputs = {"before": before.run.run_id}
    run = stage_run(config, "curate", f"{name}-{config.data.name}", told, work, inputs, seed=config.data.seed)
    return Step(run, before.images)


def _folders(
    config: Config, told: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[dict[str, Path | None], list[str]]:
    """Name to the folder that is there (None of what is drawn, not read), and the names of those that are not."""
    root = Path(config.data.root or "")
    folders: dict[str, Path | None] = {}
    absent = []
    for name, one in told.items():
        if "_target_" not in one:
            raise UserError(f"{where}.{name} needs a _target_: the reader of its files, such as {EXAMPLE}")
        at = one.get("_folder_", name)
        if at is None:
            folders[name] = None
        elif config.data.root is None:
            raise UserError(
                f"data={config.data.name} reads folders: give data.root=<folder with {', '.join(list(told)[:3])}, ...>"
            )
        elif (root / at).is_dir():
            folders[name] = root / at
        else:
            absent.append(name)
    return folders, absent


def _content(config: Config, folder: Path | None) -> str | None:
    return None if folder is None else folder_digest(folder, leave_out=Path(config.paths.outputs))


def _asked(config: Config, asked: AskedConfig) -> dict[str, Any] | None:
    """What of a step's model decides its replies, not where it is served; None where the step has none."""
    if asked.local:
        return {"base": base_of(config).identity, **model_key(config), "max_new_tokens": asked.max_new_tokens}
    if asked.base_url is None:
        return None
    return {"model": asked.model, "revision": asked.revision, "max_new_tokens": asked.max_new_tokens}


def _engine(config: Config, asked: AskedConfig, where: str, *, temperature: float = 0.0) -> Engine | None:
    """The step's model: this command's own, one at an address (kept in the ledger), or none."""
    if asked.local:
        from mmedexpert.engines.transformers import TransformersEngine
        from mmedexpert.models.backbone import load_encoder, load_model

        base = base_of(config)
        model = load_model(base.folder, loading(config)).requires_grad_(False)
        return TransformersEngine(
            model, load_encoder(base.folder, loading(config)), batch_size=config.engine.batch_size,
            max_new_tokens=asked.max_new_tokens, temperature=temperature, seed=config.data.seed,
        )  # fmt: skip
    if asked.base_url is None:
        return None
    from mmedexpert.engines.ledger import Ledger
    from mmedexpert.engines.openai import engine_of

    return engine_of(
        asked, f"data.curate.{where}", max_new_tokens=asked.max_new_tokens, temperature=temperature,
        seed=config.data.seed, ledger=Ledger(Path(config.paths.outputs) / "ledger.sqlite"),
        retry_refused=settings_of(config).retry_refused,
    )  # fmt: skip


def _text(folder: str, name: str) -> str:
    """16 hex digits of a file of rules that comes with the package."""
    return digest(files(f"mmedexpert.{folder}").joinpath(name).read_text(encoding="utf-8"))


def _numbers(run: Run) -> dict[str, float]:
    counts = json.loads((run.folder / COUNTS).read_text(encoding="utf-8"))
    return {"in": float(counts["in"]), "out": float(counts["out"])}


def _say(line: str) -> None:
    if line not in _told:
        _told.add(line)
        console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)
