"""Public benchmarks: downloaded at a pinned revision or read from a local folder, checked, and made question sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from hydra.utils import get_method, instantiate

from mmedexpert.data.record import Record
from mmedexpert.data.records_io import LeftOut, fingerprint, image_faults, load_records, not_text, save_records, twins
from mmedexpert.errors import UserError
from mmedexpert.evaluate import QuestionSet
from mmedexpert.runs import Run
from mmedexpert.schema import BenchmarkConfig, Config
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.contamination import compare, counts
from mmedexpert.stages.data import root_fingerprint


def run(config: Config) -> dict[str, Run]:
    """Prepare every benchmark of the config: `records.jsonl`, extracted images, and what was left out."""
    return {name: prepared(config, benchmark) for name, benchmark in config.benchmark.items()}


def prepared(config: Config, benchmark: BenchmarkConfig) -> Run:
    """The benchmark's questions as a run folder; questions that cannot be asked are left out, counted and named there.

    Raises UserError where the folder is not this benchmark's, or nothing of it can be asked.
    """
    if benchmark.root is not None:
        root, key = Path(benchmark.root), {"root": root_fingerprint(Path(benchmark.root))}
    else:
        root = download(benchmark)
        key = {"root": f"{benchmark.repo}@{root.name}"}  # the hub's folder is named by the commit

    def work(run: Run) -> dict[str, float]:
        with run.phase("load"):
            records, image_root, bad = instantiate(benchmark.load, root=root, out_dir=run.folder, _convert_="all")
        with run.phase("check images"):
            records, broken = askable(records, image_root)
        if not records:
            reasons = "; ".join(reason for _, reason in [*bad, *broken][:1])
            raise UserError(f"benchmark {benchmark.name}: no question in {root} can be asked ({reasons})")
        save_records(records, run.folder, image_root, skipped=[*bad, *broken])
        own = _own_training_part(config, benchmark, root, run, records, image_root)
        run.notes |= {
            "own_training_part": own,
            "changed": dict(sorted(broken.changed.items())),
            "source": sorted({record.source for record in records}),
            "data_fingerprint": fingerprint(records, image_root),
            "left_out": [{"id": identity, "reason": reason} for identity, reason in [*bad, *broken]],
        }
        return {"questions": float(len(records)), "left_out": float(len(bad) + len(broken))}

    # the place of the images is part of the folder, not of what is asked: predictions follow `data_fingerprint`
    where = {"place": str(root.resolve())} if benchmark.root is not None else {}
    return stage_run(config, "benchmark", benchmark.name, {"load": benchmark.load, **key, **where}, work, seed=0)


def _own_training_part(
    config: Config, benchmark: BenchmarkConfig, root: Path, run: Run, test: list[Record], image_root: Path
) -> dict[str, Any] | None:
    """What of the test part the benchmark's published training part shows; None where it has none here."""
    if benchmark.train_split is None:
        return None
    try:
        train, train_root, _ = instantiate(
            benchmark.load, root=root, out_dir=run.folder, split=benchmark.train_split, _convert_="all"
        )
    except UserError:
        return None  # only the test part lies here
    usable, _ = askable(train, train_root)
    return counts(compare(config, (usable, train_root), (test, image_root)))


def question_set(benchmark: BenchmarkConfig, run: Run) -> QuestionSet:
    """The questions of a prepared benchmark, with its rules."""
    records, image_root = load_records(run.folder)
    return QuestionSet(
        benchmark.name, records, image_root, get_method(benchmark.ask), get_method(benchmark.judge),
        tuple(benchmark.breakdowns),
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
