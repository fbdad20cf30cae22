"""The record: one question about one or more images, with its gold answer and, for training, a reasoning trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Trace:
    """A step-by-step reasoning trace written from one clinical reasoning perspective."""

    perspective: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One question. `images` are paths relative to the data set's image root; `options` is None for open questions.

    `answer` is an option letter (text when open); `image_group` is the unit that never crosses splits (image or
    patient); `latent` holds exact ground truth of synthetic images (measurement, unit, population).
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
