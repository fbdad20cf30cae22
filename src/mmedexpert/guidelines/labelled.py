"""How well the rubrics tell the four perspectives apart on rationales that people have labelled. # ours

Source of the measures: none is published for such rubrics; the area under the ROC curve is the usual one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedexpert.errors import UserError
from mmedexpert.guidelines.perspectives import PERSPECTIVES, perspectives
from mmedexpert.guidelines.rubrics import grades

LOW, HALF = 0.25, 0.5  # ours: what a text without reasoning may score; what each of two strategies must


@dataclass(frozen=True)
class Rationale:
    """A completion and the perspectives that a person found in it: none, one or two."""

    id: str
    completion: str
    options: Mapping[str, str] | None
    strategies: tuple[str, ...]
    scores: Mapping[str, float]  # of every rubric, in [0, 1]
    faults: tuple[str, ...] = ()
    criteria: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # by perspective

    def right(self) -> bool:
        """One strategy: it alone scores highest. Two: both at least one half. None: nothing above one quarter."""
        if not self.strategies:
            return max(self.scores.values()) <= LOW
        if len(self.strategies) > 1:
            return all(self.scores[name] >= HALF for name in self.strategies)
        (own,) = self.strategies
        return all(self.scores[own] > score for name, score in self.scores.items() if name != own)


def read_labelled(path: Path) -> list[Rationale]:
    """A JSON list of rationales, scored: `strategy` is a perspective, a list of them or null; the text is `completion`,
    or `rationale` and `answer`; `options` maps letters to texts, null for an open question.

    Raises UserError that names file, entry and key for what is not of this form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of rationales: write [{{strategy, completion, options}}, ...]")
    return [_parse(entry, f"{path}, entry {number}", number) for number, entry in enumerate(entries)]


def _parse(entry: Any, where: str, number: int) -> Rationale:
    if not isinstance(entry, dict) or "strategy" not in entry:
        raise UserError(f"{where} has no strategy: give one of {', '.join(PERSPECTIVES)}, a list of them, or null")
    given = entry["strategy"]
    names = tuple(given) if isinstance(given, list) else () if given is None else (given,)
    if unknown := [name for name in names if name not in PERSPECTIVES]:
        raise UserError(f"{where}: strategy {unknown[0]!r} is none of {', '.join(PERSPECTIVES)}")
    text, options = entry.get("completion"), entry.get("options")
    if text is None and isinstance(entry.get("rationale"), str):
        text = f"<think>{entry['rationale']}</think><answer>{entry.get('answer', '')}</answer>"
    if not isinstance(text, str):
        raise UserError(f"{where} has no text: give completion, or rationale and answer")
    if options is not None and not (isinstance(options, dict) and all(isinstance(v, str) for v in options.values())):
        raise UserError(f"{where}: options must map letters to texts, or be null")
    found = grades(text, options)
    return Rationale(str(entry.get("id", number)), text, options, names, found.scores, found.faults, found.criteria)


def confusion(rationales: Sequence[Rationale]) -> list[dict[str, str]]:
    """Mean score of every rubric (columns) on the texts of every strategy (rows), and the share that is `right`."""
    groups: dict[str, list[Rationale]] = {name: [] for name in (*PERSPECTIVES, "two of them", "none of them")}
    for one in rationales:
        kind = ("none of them", *one.strategies)[-1] if len(one.strategies) < 2 else "two of them"
        groups[kind].append(one)
    return [
        {
            "labelled": label, "n": str(len(found)),
            **{name: f"{sum(one.scores[name] for one in found) / len(found):.2f}" for name in PERSPECTIVES},
            "as it should be": f"{sum(one.right() for one in found) / len(found):.2f}",
        }
        for label, found in groups.items() if found
    ]  # fmt: skip


def held(rationales: Sequence[Rationale]) -> list[dict[str, str]]:
    """How often each criterion holds (at least one half) in texts of its own strategy, of others alone, and of none."""
    rows = []
    for name, one in perspectives().items():
        for criterion in one.criteria:
            row = {"perspective": name, "criterion": criterion}
            own = [text for text in rationales if name in text.strategies]
            others = [text for text in rationales if text.strategies and name not in text.strategies]
            none = [text for text in rationales if not text.strategies]
            for title, part in (("own", own), ("others", others), ("none", none)):
                values = [text.criteria[name][criterion] or 0.0 for text in part]
                row[title] = f"{sum(value >= HALF for value in values) / len(values):.2f}" if values else "-"
            rows.append(row)
    return rows


def measures(rationales: Sequence[Rationale]) -> dict[str, float]:
    """Shares in [0, 1] of texts scored as their label asks (see `Rationale.right`), and each rubric's AUC: the chance
    that a text of its strategy scores above one without it, ties counted half. Absent where there is no such text.
    """
    parts = {
        "own strategy highest": [one for one in rationales if len(one.strategies) == 1],
        "none: at most 0.25": [one for one in rationales if not one.strategies],
        "two: both at least 0.5": [one for one in rationales if len(one.strategies) > 1],
    }
    found = {name: sum(one.right() for one in part) / len(part) for name, part in parts.items() if part}
    for name in PERSPECTIVES:
        own = [one.scores[name] for one in rationales if name in one.strategies]
        rest = [one.scores[name] for one in rationales if name not in one.strategies]
        if own and rest:
            wins = sum((a > b) + (a == b) / 2 for a in own for b in rest)
            found[f"AUC {name}"] = wins / (len(own) * len(rest))
    return found


def worst(rationales: Sequence[Rationale], count: int) -> list[Rationale]:
    """The texts that are scored least as their label asks, worst first; none that is scored as it should be."""

    def lack(one: Rationale) -> float:
        if not one.strategies:
            return max(one.scores.values()) - LOW
        if len(one.strategies) > 1:
            return HALF - min(one.scores[name] for name in one.strategies)
        (own,) = one.strategies
        return max(score for name, score in one.scores.items() if name != own) - one.scores[own]

    return sorted((one for one in rationales if not one.right()), key=lack, reverse=True)[:count]
