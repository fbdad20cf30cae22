"""Which test questions show images that were trained on: the overlap of a question set with the training data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmedexpert.data.overlap import Overlap, fingerprints, overlap, report
from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint, load_records
from mmedexpert.evaluation.predict import QuestionSet
from mmedexpert.runtime.runs import Run, write_json
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import stage_run


def clean_part(config: Config, data: Run, questions: QuestionSet, identity: str) -> dict[str, Any]:
    """`clean` (ids whose images are not in training), `found` (name to count) and the worst examples; computed once.

    `identity` follows the content of the questions.
    """
    records, image_root = load_records(data.folder)
    train = [record for record in records if record.split == "train"]

    def work(run: Run) -> dict[str, float]:
        found = compare(config, (train, image_root), (questions.records, questions.image_root))
        rows = report(found)
        write_json(
            run.folder / "overlap.json",
            {"clean": sorted(found.clean), "table": rows, "worst": [asdict(match) for match in found.worst]},
        )
        return counts(found)

    name = f"{questions.name}-in-{data.name}"
    key = {"rules": versions("overlap", "images")}
    inputs = {"data": fingerprint(train, image_root), "questions": identity}
    run = stage_run(config, "overlap", name, key, work, inputs, seed=0)
    return {**json.loads((run.folder / "overlap.json").read_text(encoding="utf-8")), "found": run.metrics}


def compare(config: Config, train: tuple[list[Record], Path], test: tuple[list[Record], Path]) -> Overlap:
    """What of `test` is in `train`, each records and image root; all data sets share one cache of hashes."""
    cache = Path(config.paths.outputs) / "image_fingerprints.jsonl"
    return overlap(fingerprints(*train, cache), fingerprints(*test, cache))


def counts(found: Overlap) -> dict[str, float]:
    """Of the test questions and images, how many are in training."""
    return {
        "questions": float(len(found.ids)), "image_seen": float(found.image.sum()),
        "question_seen": float(found.question.sum()), "both_seen": float(found.joint.sum()),
        "images": float(found.images), "images_exact": float(found.images_exact),
        "images_seen": float(found.images_seen),
    }  # fmt: skip
