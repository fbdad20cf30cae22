"""What judging one response gives, under either protocol."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Judged:
    """`picked` is the answer read from the response (None when unparsed); `scores`: text metrics of an open answer."""

    correct: bool
    picked: str | None
    parsed: bool
    scores: dict[str, float] = field(default_factory=dict)
