"""A pair of answers to one question, and which of them people prefer in each dimension; kept as a record whose two
options are the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmedexpert.data.record import TEXT, Record
from mmedexpert.data.specialties import primary_specialty
from mmedexpert.data.validation import Bad

DIMENSIONS = ("accuracy", "relevance", "comprehensiveness", "creativity", "responsiveness", "overall")
A, B, TIE, INVALID = "A", "B", "tie", "invalid"
LABELS = (A, B, TIE)
Order = Literal["ab", "ba"]
ORDERS: tuple[Order, Order] = ("ab", "ba")  # answer_a stands first, second
OTHER = {A: B, B: A}


@dataclass(frozen=True)
class Pair:
    """Two answers to a question about `images` (paths relative to the set's image root).

    `labels`: dimension to A, B or tie; a dimension that nobody labelled is absent. `group`, the image, is the unit of
    the bootstrap; `part` (of the set: an organ, a category) is empty where not told; `specialty` follows from the rules
    of `data/specialties.py`.
    """

    id: str
    images: tuple[str, ...]
    question: str
    answers: Mapping[str, str]
    labels: Mapping[str, str]
    group: str
    part: str = ""
    specialty: str = ""


def pair_of(record: Record, part: str = "organ") -> Pair:
    """The pair that a record keeps (see `record_of`); `part` names the group of the record that is its part."""
    labels: dict[str, str] = record.latent["labels"]
    assert record.options is not None
    return Pair(
        record.id, record.images, record.question, record.options, labels, record.image_group,
        record.groups.get(part, ""), record.specialties[0],
    )  # fmt: skip


def record_of(
    *, identity: str, images: Sequence[str], question: Any, answers: Mapping[str, Any], labels: Mapping[str, Any],
    source: str, license: str, group: str = "", organ: str = "", specialty: str = "",
    groups: Mapping[str, str] | None = None,
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
        modality="" if images else TEXT, latent={"labels": {name: known[name] for name in DIMENSIONS if name in known}},
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
    """Each pair once: a copy with its answers swapped, or as it is, is folded into the first, and told.

    One whose labels contradict those of its copy is left out with it: counted twice, a pair would weigh double, and a
    swapped one would hide what a judge does with the place of an answer.
    """
    first: dict[Any, Record] = {}
    clash: set[Any] = set()
    bad: Bad = []
    for record in records:
        pair, labels = pair_of(record), pair_of(record).labels
        if pair.answers[A] > pair.answers[B]:
            labels = {name: OTHER.get(label, label) for name, label in labels.items()}
        texts = tuple(sorted(pair.answers.values()))
        key = (pair.images, pair.question, texts)
        if key not in first:
            first[key] = replace(record, provenance={**record.provenance, "canonical_labels": labels})
            continue
        if first[key].provenance["canonical_labels"] == labels:
            bad.append((record.id, f"a copy of {first[key].id}, folded into it"))
        else:
            clash.add(key)
            bad.append((record.id, f"a copy of {first[key].id} with other labels: both are left out"))
    bad += [(first[key].id, "its copy has other labels: both are left out") for key in clash]
    kept = [record for key, record in first.items() if key not in clash]
    return [_without(record) for record in kept], bad


def _without(record: Record) -> Record:
    return replace(record, provenance={k: v for k, v in record.provenance.items() if k != "canonical_labels"})
