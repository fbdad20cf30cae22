"""The labels of an image set: one class for each, however it is spelled, and several findings in one cell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmedexpert.data.table import fold, is_unknown

PARTED = re.compile(r"[|;]")  # ours: what always parts findings (ChestX-ray14 writes "Effusion|Mass")
PERHAPS = re.compile(r"\s*[,/+&]\s*|\s+and\s+", re.IGNORECASE)  # ours: what parts them where each is a label by itself


@dataclass(frozen=True)
class Labels:
    """`texts`: the classes of a set (a label's usual spelling) and the text of each as an option; `classes`: those
    that each cell of the label column names, none where it names nothing that is known; `implied`: of each class those
    that are a part of it or that it is a part of ("Pneumonia" of "Pneumonia, bacterial")."""

    texts: dict[str, str]
    classes: dict[str, tuple[str, ...]]
    implied: dict[str, set[str]]

    def folded(self, cell: str) -> bool:
        """Whether a cell names one class by another spelling than the usual one."""
        return len(self.classes[cell]) == 1 and cell != self.classes[cell][0]


def read_labels(cells: Sequence[tuple[str, str]], declared: Mapping[str, str], more: Iterable[str] = ()) -> Labels:
    """The classes of (label, label text or "") cells; `declared` texts by label, where the set has them, are the only
    ones; `more` cells are looked up, too. # ours

    Labels that are the same when folded are one class, and so are labels of the same text. Of undeclared ones the
    commonest spelling is shown, the first where two are as common.
    """
    texts = dict(declared) or _found(cells)
    class_of: dict[str, str] = {}
    by_text: dict[str, str] = {}
    for label, text in texts.items():
        class_of[label] = by_text.setdefault(fold(text), label)
    spelled: dict[str, set[str]] = {}
    for label in texts:
        spelled.setdefault(fold(label), set()).add(class_of[label])
    # declared codes that differ by case alone stay apart: they are found as they are spelled
    folded = {name: found.pop() for name, found in spelled.items() if len(found) == 1}

    def find(part: str) -> str | None:
        return class_of.get(part, folded.get(fold(part)))

    classes: dict[str, tuple[str, ...]] = {}
    for cell in (*(cell for cell, _ in cells), *more):
        if cell not in classes:
            parts = _parts(cell, {fold(label) for label in texts}, whole=bool(declared) and find(cell) is not None)
            named = [find(part) for part in parts if find(part) is not None or not is_unknown(part)]
            classes[cell] = tuple(dict.fromkeys(name for name in named if name)) if None not in named else ()
    shown = {label: text.replace("_", " ") for label, text in texts.items() if class_of[label] == label}
    pieces = {label: {fold(piece) for piece in PERHAPS.split(label)} - {fold(label)} for label in shown}
    implied = {
        one: {other for other in shown if fold(other) in pieces[one] or fold(one) in pieces[other]} for one in shown
    }
    return Labels(shown, classes, implied)


def _found(cells: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Text by label, of a set that declares none."""
    known = {fold(part) for cell, _ in cells for part in PARTED.split(cell)}
    spellings: dict[str, Counter[str]] = {}
    told: dict[str, Counter[str]] = {}
    for cell, text in cells:
        parts = [part for part in _parts(cell, known) if not is_unknown(part)]
        for part in parts:
            spellings.setdefault(fold(part), Counter())[part] += 1
        if len(parts) == 1 and not is_unknown(text):
            told.setdefault(fold(parts[0]), Counter())[text] += 1
    found = {}
    for name, spelled in spellings.items():
        label = spelled.most_common(1)[0][0]
        found[label] = told[name].most_common(1)[0][0] if name in told else label
    return found


def _parts(cell: str, known: set[str], *, whole: bool = False) -> list[str]:
    """The labels that a cell names; `whole`: it is one."""
    if whole:
        return [cell]
    parts = []
    for part in PARTED.split(cell):
        pieces = PERHAPS.split(part)
        parts += pieces if len(pieces) > 1 and all(fold(piece) in known for piece in pieces) else [part]
    return [part.strip() for part in parts if part.strip()]
