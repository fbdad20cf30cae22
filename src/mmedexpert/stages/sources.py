"""What the funnel reads: the sources of `data.sources` as its first step, and the benchmarks it keeps away from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from mmedexpert.curation.ingest import Source, ingest
from mmedexpert.curation.steps import write_step
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError, suggestion
from mmedexpert.runtime.build import build, method, values_of
from mmedexpert.runtime.fingerprints import folder_digest
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.runtime.versions import rule_of, text_of, versions
from mmedexpert.schema import Config
from mmedexpert.sources.unpack import names_alone
from mmedexpert.stages.common import processes_of, stage_run

REPORT, IMAGES = "report.json", "images"
EXAMPLE = "mmedexpert.sources.vqa_table.load"
ABOUT = ("_target_", "_folder_", "_license_", "_revision_", "_redistribute_")  # of a source; all else is its reader's
_told: set[str] = set()  # lines this command has said


def ingested(config: Config) -> Run:
    """Step 1 as a run: the records of every source whose folder is there, and in `images` what they show."""
    settings, curate = config.data, config.data.curate
    assert curate is not None  # stages/curate.settings_of
    folders, absent = folders_of(config, settings.sources, "data.sources")
    folders_of(config, settings.benchmarks, "data.benchmarks")  # a mistake there is told now
    if absent:
        say(f"data {settings.name}: not in {settings.root}, so left out: {', '.join(absent)}")
    for where, names in (("trusted", curate.trusted), ("balance.fill", curate.balance.fill)):
        for name in (one for one in names if one not in settings.sources):  # or a source that was taken out
            say(f"data.curate.{where}: no source is called {name!r}{suggestion(name, list(settings.sources))}")
    if not folders:
        raise UserError(f"data={settings.name}: {settings.root} holds none of {', '.join(absent)}")
    key = {
        "sources": {name: settings.sources[name] for name in folders},
        "content": {name: content_of(config, folder) for name, folder in folders.items()},
        "max_side": curate.max_side,
        "on_bad_record": settings.on_bad_record,
        "rules": {
            **versions("ingest", "images", "dicom", "overlap"),
            **{k: v for name in folders for k, v in rule_of(settings.sources[name]["_target_"]).items()},
        },
    }
    if None in folders.values():  # drawn by the guidelines
        key["guidelines"] = text_of("guidelines.yaml")

    def work(run: Run) -> dict[str, float]:
        changed: Counter[str] = Counter()
        sources = [_source(config, name, folder, run) for name, folder in folders.items()]
        verdicts = ingest(
            sources, run.folder / "unpacked", run.folder / IMAGES, processes=processes_of(config),
            max_side=curate.max_side, changed=changed,
        )  # fmt: skip
        write_step("ingest", verdicts, run.folder, run.folder / IMAGES, given=None)
        write_json(run.folder / REPORT, {**dict(sorted(changed.items())), "not there": ", ".join(absent)})
        return {"sources": float(len(sources))}

    return stage_run(config, "curate", f"ingest-{settings.name}", key, work, seed=settings.seed)


def _source(config: Config, name: str, folder: Path | None, run: Run) -> Source:
    told = config.data.sources[name]
    reader = method(told.get("_target_"), f"data.sources.{name}._target_")
    known = {"seed": config.data.seed, "name": name}  # a reader's own word for the name may be that of its folder
    given = {key: value for key, value in known.items() if key in signature(reader).parameters}
    made = {"_target_": told["_target_"], **given, **values_of(told)}

    def load(root: Path, out_dir: Path) -> Any:
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            return build(made, f"data.sources.{name}", root=root, out_dir=out_dir)
        except UserError as error:
            if config.data.on_bad_record == "error":
                raise
            say(f"data {config.data.name}: source {name} is left out: {error}")
            return [], root, [("all of it", str(error))]

    revision = str(told.get("_revision_") or "")
    if folder is None:  # drawn, not read
        revision = revision or "rules " + ", ".join(f"{k} {v}" for k, v in rule_of(told["_target_"]).items())
    return Source(
        name, load, folder or run.folder, license=str(told.get("_license_") or ""), revision=revision,
        redistribute=told.get("_redistribute_"),
    )  # fmt: skip


def benchmark_of(config: Config, name: str, folder: Path, run: Run) -> list[tuple[str, list[Record], Path | None]]:
    """A benchmark's questions with their images, and those whose images are not here, of which texts are compared."""
    load = {"_target_": config.data.benchmarks[name]["_target_"], **values_of(config.data.benchmarks[name])}
    out_dir = run.folder / "benchmarks" / name
    out_dir.mkdir(parents=True, exist_ok=True)
    where = f"data.benchmarks.{name}"
    records, image_root, bad = build(load, where, root=folder, out_dir=out_dir)
    sets = [(name, records, image_root)] if records or not bad else []
    if bad:
        with names_alone():
            all_of_them, _, _ = build(load, where, root=folder, out_dir=out_dir)
        known = {record.id for record in records}
        if rest := [record for record in all_of_them if record.id not in known]:
            sets.append((f"{name}, without images", rest, None))
    return sets


def folders_of(
    config: Config, told: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[dict[str, Path | None], list[str]]:
    """Name to the folder that is there (None of what is drawn, not read), and the names of those that are not."""
    root = Path(config.data.root or "")
    folders: dict[str, Path | None] = {}
    absent = []
    for name, one in told.items():
        if "_target_" not in one:
            raise UserError(f"{where}.{name} needs a _target_: the reader of its files, such as {EXAMPLE}")
        if unknown := [key for key in one if key.startswith("_") and key not in ABOUT]:  # no licence may be overlooked
            raise UserError(f"{where}.{name}.{unknown[0]} is not known{suggestion(unknown[0], ABOUT)}")
        if one.get("_redistribute_") not in (None, True, False):
            raise UserError(f"{where}.{name}._redistribute_={one['_redistribute_']!r} must be true, false or null")
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


def content_of(config: Config, folder: Path | None) -> str | None:
    """What a folder holds, without results that lie in it; None of what is drawn."""
    return None if folder is None else folder_digest(folder, leave_out=Path(config.paths.outputs))


def say(line: str) -> None:
    """A line for the user, once."""
    if line not in _told and rank() == 0:
        _told.add(line)
        console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)
