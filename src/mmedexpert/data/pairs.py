"""A pair of answers to one question, and which of them people prefer in each dimension; kept as a record whose two
options are the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmedexpert.data.record import TEXT, Record
from mmedexpert.data.specialties import primary_specialty
from mmedexpert.data.validation import Bad

DIMENSIONS = ("accuracy", "relevance", "comprehensiveness", "creativity", "responsiveness", "overall")
A, B, TIE, INVALID = "A", "B", "tie", "invalid"
Order = Literal["ab", "ba"]
ORDERS: tuple[Order, Order] = ("ab", "ba")  # answer_a stands first, second
OTHER = {A: B, B: A}


@dataclass(frozen=True)
class Pair:
    """Two answers to a question about `images` (paths relative to the set's image root).

    `labels`: dimension to A, B or tie; a dimension that nobody labelled is absent. `group`, the image, is the unit of
    the bootstrap; `part` (of the set: an organ, a category) is empty where not told; `specialty` follows from the rules
    of `data/specialties.py`. `reason` says why the overall better answer is it, with `{better}` and `{worse}` for the
    answers' letters; empty where nobody wrote one.
    """

    id: str
    images: tuple[str, ...]
    question: str
    answers: Mapping[str, str]
    labels: Mapping[str, str]
    group: str
    part: str = ""
    specialty: str = ""
    reason: str = ""


def pair_of(record: Record, part: str = "organ") -> Pair:
    """The pair that a record keeps (see `record_of`); `part` names the group of the record that is its part."""
    labels: dict[str, str] = record.latent["labels"]
    assert record.options is not None
    return Pair(
        record.id, record.images, record.question, record.options, labels, record.image_group,
        record.groups.get(part, ""), record.specialties[0], record.latent.get("reason", ""),
    )  # fmt: skip


def group_mark(pair: Pair) -> str:
    """12 hex digits that tell a pair's group apart without its name, which may be a patient's."""
    return hashlib.sha256(pair.group.encode()).hexdigest()[:12]


def record_of(
    *, identity: str, images: Sequence[str], question: Any, answers: Mapping[str, Any], labels: Mapping[str, Any],
    source: str, license: str, group: str = "", organ: str = "", specialty: str = "",
    groups: Mapping[str, str] | None = None, reason: str = "",
) -> Record:  # fmt: skip
    """A pair as a record; ValueError says what is wrong with it.

    The record's answer is the overall label, else the first one that is no tie, else A: other stages ask for a letter.
    """
    texts = {"question": question, "answer A": answers.get(A), "answer B": answers.get(B)}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the {name} is empty")
    known = {str(name): _label(name, value) for name, value in labels.items() if value is not None}
    if not known:
        raise ValueError(f"no dimension has a label; give one of {', '.join(DIMENSIONS)}")
    if specialty == "":
        specialty = primary_specialty(question=str(question), metadata={"organ": organ.replace("_", " ")})
    decided = [known.get("overall"), *known.values()]
    return Record(
        id=identity, images=tuple(images), question=str(question), options={A: str(answers[A]), B: str(answers[B])},
        answer=next((label for label in decided if label in OTHER), A), specialties=(specialty,), source=source,
        license=license, split="test", image_group=group or (images[0] if images else identity), kind="choice",
        modality="" if images else TEXT,
        latent={
            "labels": {name: known[name] for name in DIMENSIONS if name in known},
            **({"reason": reason} if reason else {}),
        },
        groups={"organ": organ, **(groups or {})} if organ else dict(groups or {}),
    )  # fmt: skip


def _label(dimension: Any, value: Any) -> str:
    if dimension not in DIMENSIONS:
        raise ValueError(f"there is no dimension {dimension!r}: use {', '.join(DIMENSIONS)}")
    label = value.strip() if isinstance(value, str) else value
    found = {"A": A, "B": B, "tie": TIE, "TIE": TIE, "Tie": TIE}.get(label) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f"the label of {dimension} is {value!r}: use A, B or tie")
    return found


def folded(records: Sequence[Record]) -> tuple[list[Record], Bad]:
    """Each pair once: a copy with its answers swapped, or as it is, is folded into the first, labels and all, and told.

    One whose labels contradict those of a copy is left out with all its copies: counted twice, a pair would weigh
    double, and a swapped one would hide what a judge does with the place of an answer.
    """
    copies: dict[Any, list[Record]] = {}
    for record in records:
        pair = pair_of(record)
        copies.setdefault((pair.images, pair.question, tuple(sorted(pair.answers.values()))), []).append(record)
    kept: list[Record] = []
    bad: Bad = []
    for first, *others in copies.values():
        labels = dict(pair_of(first).labels)
        facing = [_facing(other, first) for other in others]
        if _clash([labels, *facing]):
            bad += [
                (one.id, f"a copy of it has other labels ({first.id}): all are left out") for one in (first, *others)
            ]
            continue
        for one in facing:
            labels |= one
        bad += [(other.id, f"a copy of {first.id}, folded into it") for other in others]
        ordered = {name: labels[name] for name in DIMENSIONS if name in labels}
        kept.append(replace(first, latent={**first.latent, "labels": ordered}) if others else first)
    return kept, bad


def _facing(record: Record, first: Record) -> dict[str, str]:
    """A copy's labels, of the answers as they stand in the first."""
    pair = pair_of(record)
    turned = pair.answers[A] != pair_of(first).answers[A]
    return {name: OTHER.get(label, label) if turned else label for name, label in pair.labels.items()}


def _clash(labels: Sequence[Mapping[str, str]]) -> bool:
    """Whether any dimension has two labels."""
    return any(len({one[name] for one in labels if name in one}) > 1 for name in DIMENSIONS)
