"""Public benchmarks: downloaded at a pinned revision or read from a local folder, checked, and made question sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint, load_records, move_root, save_records
from mmedexpert.data.validation import LeftOut, image_faults, not_text, twins
from mmedexpert.errors import UserError
from mmedexpert.evaluation.predict import QuestionSet
from mmedexpert.runtime.build import build, function, values_of
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.versions import rule_of, text_of, versions
from mmedexpert.schema import BenchmarkConfig, Config
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.data import root_fingerprint
from mmedexpert.stages.overlap import compare, counts


def run(config: Config) -> dict[str, Run]:
    """Prepare every benchmark of the config: `records.jsonl`, extracted images, and what was left out."""
    return {name: prepared(config, benchmark) for name, benchmark in config.benchmark.items()}


def prepared(config: Config, benchmark: BenchmarkConfig, where: str | None = None) -> Run:
    """The benchmark's questions as a run folder; questions that cannot be asked are left out, counted and named there;
    `where` is the config key that errors name it by.

    Raises UserError where the folder is not this benchmark's, or nothing of it can be asked.
    """
    where = where or f"benchmark.{benchmark.name}"
    root: Path | None = None
    if benchmark.load.get("_needs_root_") is False:
        key: dict[str, str | None] = {"root": "drawn", "guidelines": text_of("guidelines.yaml")}
    elif benchmark.root is not None:
        root = Path(benchmark.root)
        key = {"root": root_fingerprint(root, Path(config.paths.outputs))}
    else:
        root = download(benchmark)
        key = {"root": f"{benchmark.repo}@{root.name}"}  # the hub's folder is named by the commit

    def work(run: Run) -> dict[str, float]:
        with run.phase("load"):
            load = {key: value for key, value in benchmark.load.items() if key != "_needs_root_"}
            records, image_root, bad = build(load, f"{where}.load", root=root, out_dir=run.folder)
        with run.phase("check images"):
            records, broken = askable(records, image_root)
        if not records:
            reasons = "; ".join(reason for _, reason in [*bad, *broken][:1])
            raise UserError(f"benchmark {benchmark.name}: no question in {root} can be asked ({reasons})")
        save_records(records, run.folder, image_root, skipped=[*bad, *broken], source_root=root)
        own, missed = _own_training_part(config, benchmark, root, run, records, image_root) if root else (None, None)
        run.notes |= {
            "own_training_part": own,
            "own_training_part_left_out": missed,
            "changed": dict(sorted(broken.changed.items())),
            "source": sorted({record.source for record in records}),
            "data_fingerprint": fingerprint(records, image_root),
            "left_out": [{"id": identity, "reason": reason} for identity, reason in [*bad, *broken]],
        }
        return {"questions": float(len(records)), "left_out": float(len(bad) + len(broken))}

    rules = {**versions("images"), **rule_of(benchmark.load["_target_"])}
    parts = {"load": values_of(benchmark.load), "train_split": benchmark.train_split, "rules": rules, **key}
    run = stage_run(config, "benchmark", benchmark.name, parts, work, seed=0)
    move_root(run.folder, root)
    return run


def _own_training_part(
    config: Config, benchmark: BenchmarkConfig, root: Path, run: Run, test: list[Record], image_root: Path
) -> tuple[dict[str, Any] | None, str | None]:
    """What of the test part the benchmark's published training part shows, or None and why it was not compared.

    The training part is never needed: often only the test part lies here, and damage in the other is no reason to stop.
    """
    if benchmark.train_split is None:
        return None, None
    try:
        load = {**benchmark.load, "split": benchmark.train_split}
        train, train_root, _ = build(load, f"benchmark.{benchmark.name}.load", root=root, out_dir=run.folder)
    except UserError as error:
        return None, str(error)
    usable, _ = askable(train, train_root)
    if not usable:
        return None, f"no record of split {benchmark.train_split} in {root} can be used"
    return counts(compare(config, (usable, train_root), (test, image_root))), None


def question_set(benchmark: BenchmarkConfig, run: Run) -> QuestionSet:
    """The questions of a prepared benchmark, with its rules."""
    records, image_root = load_records(run.folder)
    return QuestionSet(
        benchmark.name, records, image_root, function(benchmark.ask, f"benchmark.{benchmark.name}.ask"),
        function(benchmark.judge, f"benchmark.{benchmark.name}.judge"), tuple(benchmark.breakdowns),
    )  # fmt: skip


def download(benchmark: BenchmarkConfig) -> Path:
    """The hub's files of a benchmark at its revision; UserError says how to go on without the hub."""
    here = f"benchmark.{benchmark.name}.root=<folder>"
    if benchmark.repo is None:
        raise UserError(f"benchmark {benchmark.name} is not on the hub: give {here}")
    try:
        folder = snapshot_download(
            benchmark.repo, repo_type="dataset", revision=benchmark.revision, allow_patterns=benchmark.patterns
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise UserError(
            f"benchmark {benchmark.name}: {benchmark.repo} cannot be downloaded ({reason}): give {here}"
        ) from error
    return Path(folder)


def askable(records: list[Record], image_root: Path) -> tuple[list[Record], LeftOut]:
    """The records whose images can all be opened and whose ids are their own, and (id, reason) of the others."""
    good: list[Record] = []
    bad = LeftOut()
    ids: set[str] = set()
    for record, fault in zip(records, image_faults(records, image_root=image_root, changed=bad.changed), strict=True):
        fault = "the id occurs twice" if record.id in ids else fault or not_text(record)
        ids.add(record.id)
        if fault is None:
            good.append(record)
            if twins(record):  # a published question is asked as it is
                bad.changed["questions: the right answer stands under two letters"] += 1
        else:
            bad.append((record.id, fault))
    return good, bad
