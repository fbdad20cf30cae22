"""Invented curated records with small pictures, for the tests of balance, release, funnel and page."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedexpert.curation.steps import Records, Verdict, write_step
from mmedexpert.data.record import Record, Trace


def draft(
    record_id: str, specialty: str = "pediatrics", perspective: str | None = "mechanistic", *, image: str | None = None,
    pixels: str = "", group: str = "", kind: str = "choice", redistribute: bool = True, **given: Any,
) -> Record:  # fmt: skip
    """A record as the steps before leave it; its image has its own name unless one is given."""
    image = image or f"{record_id}.png"
    choice = kind == "choice"
    fields = {
        "question": f"What does picture {record_id} show?", "license": "CC BY 4.0", "source": "Invented set, 2026",
        "modality": "", "body_system": "Skeletal", "split": "train",
    } | given  # fmt: skip
    return Record(
        id=record_id,
        images=(image,),
        options={"A": "a fracture", "B": "nothing"} if choice else None,
        answer="A" if choice else "yes",
        specialties=(specialty, "oncology_surgery"),
        image_group=group or image,
        kind=kind,
        trace=Trace(perspective, ("The cortex is broken.", "So it is a fracture.")) if perspective else None,
        groups={"task": "diagnosis"},
        latent={"angle": [1.5, None]},
        provenance={
            "source": "invented", "revision": "0f3a", "redistribute": redistribute, "source_id": f"s-{record_id}",
            "images": [{"pixels": pixels}] if pixels else [],
            "labels": [
                {"label": specialty, "score": 1.0, "method": "rule", "evidence": "4-year-old", "version": "1"},
                {"label": "oncology_surgery", "score": 0.4, "method": "rule", "evidence": "tumour", "version": "1"},
            ],
            "checks": {"difficulty": {"passed": 5, "of": 16}},
        },
        **fields,
    )  # fmt: skip


def pictured(record: Record, folder: Path, seed: int) -> Record:
    """The record with a small picture of its own in `folder`, named by its content as in a release."""
    values = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest[:24]}.png").write_bytes(data.getvalue())
    known = {**record.provenance, "images": [{"sha256": digest, "pixels": digest}]}
    fields = {**vars(record), "images": (f"{digest[:24]}.png",), "image_group": digest[:24], "provenance": known}
    return Record(**fields)


def written(records: list[Record], folder: Path, image_root: Path | None = None) -> Records:
    """The records as a step's folder."""
    return write_step("traces", map(Verdict, records), folder, image_root or folder / "images", given=len(records))
