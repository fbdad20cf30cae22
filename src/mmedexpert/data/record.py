"""The record: one question about one or more images, with its gold answer and, for training, a reasoning trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")
KINDS = ("choice", "yes_no", "closed", "open")
TEXT = "text"  # the modality of a question without an image
NO_TRACE = "no trace"  # the perspective of a record without one


@dataclass(frozen=True)
class Trace:
    """A step-by-step reasoning trace written from one clinical reasoning perspective.

    `answer` is what it comes to where that is not the record's: what its perspective knows may not decide the question.
    """

    perspective: str
    steps: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Record:
    """One question. `images` are paths relative to the data set's image root (none where `modality` is "text");
    `options` is None but for `kind` choice.

    `answer` is an option letter, or text; `image_group` is the unit that never crosses splits (image or patient);
    `groups` are a benchmark's own breakdowns (name to value); `latent` holds exact ground truth of synthetic images
    (measurement, unit, population). `kind` is one of KINDS; empty: choice with options, open without. `provenance`
    tells where it comes from and what was found out about it, in a set that was curated (curation/steps.py).
    """

    id: str
    images: tuple[str, ...]
    question: str
    options: dict[str, str] | None
    answer: str
    specialties: tuple[str, ...]
    source: str
    license: str
    split: str
    image_group: str
    modality: str = ""
    body_system: str = ""
    trace: Trace | None = None
    latent: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    language: str = "en"
    groups: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def asked_as(self) -> str:
        """One of KINDS."""
        return self.kind or ("choice" if self.options is not None else "open")
