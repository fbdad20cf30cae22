"""Which records make the released set: quotas for each specialty and perspective, caps, and splits that do not leak."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmedexpert.curation.steps import Records, Verdict
from mmedexpert.data.record import NO_TRACE, Record
from mmedexpert.data.splits import FRACTIONS, assign_splits, join_groups
from mmedexpert.errors import UserError
from mmedexpert.runtime.runs import console

TARGET = 10_000  # the paper's abstract; 3,900 is the other published size
MODALITY_SHARE = 0.5  # ours: chest films and CT are most of what is public
KIND_SHARES = {"yes_no": 0.25}  # ours: half of them are solved by a coin
PER_IMAGE = 4  # ours: one record in each perspective
UNKNOWN = "unknown"

OVER_QUOTA = "over the quota of its specialty and perspective"
OVER_MODALITY = "over the cap of its modality"
OVER_KIND = "over the cap of its question type"
OVER_IMAGE = "over the cap of its image"
NOT_WANTED = "specialty or perspective is given no share"

Weights = Mapping[str, float] | None  # name to its share, relative to the others'; none: all that are found, equally


@dataclass(frozen=True, slots=True)
class Candidate:
    """What decides of a record, in its order of being asked."""

    order: bytes
    place: int
    modality: str
    kind: str
    images: tuple[str, ...]


def balance(
    records: Records,
    *,
    target: int = TARGET,
    specialty: Weights = None,
    perspective: Weights = None,
    modality: float = MODALITY_SHARE,
    kind: Mapping[str, float] = KIND_SHARES,
    per_image: int = PER_IMAGE,
    fill: Collection[str] = (),
    seed: int = 0,
) -> Iterator[Verdict]:
    """Up to `target` records, whatever their order: each goes to the specialty, and in it to the perspective, that is
    furthest below its share; so what one lacks falls to the others. # ours

    Shares by Webster's divisor method. Within one specialty and perspective a seeded hash of the ids decides, and the
    sources of `fill` come last: they only fill what the others leave.
    `modality` (each one) and `kind` (those named) cap a share of `target`, `per_image` the records on one image. What
    is short of the target is told on stderr. Raises UserError for a share or a number that can select nothing.
    """
    _check(target, specialty, perspective, modality, kind, per_image)
    cells: dict[str, dict[str, list[Candidate]]] = {}
    unwanted: set[int] = set()
    for place, record in enumerate(records):
        first, second = primary(record), perspective_of(record)
        if _weight(specialty, first) and _weight(perspective, second):
            last = bytes([source_of(record) in fill])
            order = last + hashlib.sha256(f"{seed}:{record.id}".encode()).digest()[:16]
            found = Candidate(order, place, record.modality, record.asked_as, image_keys(record))
            cells.setdefault(first, {}).setdefault(second, []).append(found)
        else:
            unwanted.add(place)
    waiting = {
        first: {second: deque(sorted(rows, key=lambda row: (row.order, row.place))) for second, rows in row.items()}
        for first, row in cells.items()
    }
    del cells
    kept, capped = _select(waiting, target, specialty, perspective, modality, kind, per_image)
    chosen: Counter[str] = Counter()
    for place, record in enumerate(records):
        if place in kept:
            chosen[primary(record)] += 1
            yield Verdict(record)
        elif place in capped:
            yield Verdict(record, *capped[place])
        else:
            reason = NOT_WANTED if place in unwanted else OVER_QUOTA
            yield Verdict(record, reason, f"{primary(record)}, {perspective_of(record)}")
    if len(kept) < target:
        wanted = quotas(target, {name: _weight(specialty, name) for name in specialty or chosen})
        rows = [f"{name} has {chosen[name]} of {count}" for name, count in wanted.items() if chosen[name] < count]
        short = f": {', '.join(rows)}" if rows else ""
        console.print(f"balance: {len(kept)} records, {target - len(kept)} short of {target}{short}", highlight=False)


def split(records: Records, *, fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0) -> Iterator[Verdict]:
    """Each record with its split (train, val, test by `fractions`); those that share an image or a group share it.

    The source's own split is forgotten. Specialties are split alike (`data/splits.py`). Groups get names of their own:
    a source's hold patients or file names.
    """
    keys: list[tuple[str, ...]] = []
    strata: list[str] = []
    for record in records:
        own = (f"group {record.image_group}",) if record.image_group else ()
        keys.append((*own, *image_keys(record)) or (f"record {record.id}",))
        strata.append(primary(record))
    groups = join_groups(keys)
    try:
        names = assign_splits(groups, fractions=fractions, seed=seed, strata=strata)
    except ValueError as error:
        raise UserError(f"the fractions of the splits: {error}") from error
    for record, name, group in zip(records, names, groups, strict=True):
        yield Verdict(replace(record, split=name, image_group=hashlib.sha256(group.encode()).hexdigest()[:16]))


def make_up(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """How many records there are of each specialty, perspective, modality, question type, language, source and split,
    and of each (`cells`) specialty, perspective and split together, parted by `|`."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        found = {
            "specialty": primary(record), "perspective": perspective_of(record), "modality": record.modality or UNKNOWN,
            "kind": record.asked_as, "language": record.language, "split": record.split,
            "source": source_of(record),
        }  # fmt: skip
        found["cells"] = "|".join(found[name] for name in ("specialty", "perspective", "split"))
        for name, value in found.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: dict(sorted(row.items())) for name, row in counts.items()}


def quotas(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`total` parted by weights, by largest remainder; ties by name."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))[: total - sum(counts.values())]
    return {name: count + (name in rest) for name, count in counts.items()}


def primary(record: Record) -> str:
    """The specialty a record counts for."""
    return record.specialties[0] if record.specialties else UNKNOWN


def perspective_of(record: Record) -> str:
    """The perspective of its trace."""
    return record.trace.perspective if record.trace else NO_TRACE


def source_of(record: Record) -> str:
    """The source it came from, by its id in the config."""
    return str(record.provenance.get("source") or record.source)


def image_keys(record: Record) -> tuple[str, ...]:
    """What an image is known by: its pixels where they were hashed, else its path."""
    hashed = record.provenance.get("images") or []
    keys = [image.get("pixels", "") for image in hashed]
    return tuple(dict.fromkeys(keys if len(keys) == len(record.images) and all(keys) else record.images))


def _select(
    waiting: Mapping[str, dict[str, deque[Candidate]]], target: int, specialty: Weights, perspective: Weights,
    modality: float, kind: Mapping[str, float], per_image: int,
) -> tuple[set[int], dict[int, tuple[str, str]]]:  # fmt: skip
    """Places of the records that are kept; and of those over a cap, with reason and detail."""
    kept: set[int] = set()
    capped: dict[int, tuple[str, str]] = {}
    taken: Counter[Any] = Counter()

    def over_cap(row: Candidate) -> tuple[str, str] | None:
        if row.modality and taken["modality", row.modality] >= max(1, int(modality * target)):
            return OVER_MODALITY, row.modality
        if row.kind in kind and taken["kind", row.kind] >= int(kind[row.kind] * target):
            return OVER_KIND, row.kind
        if full := next((image for image in row.images if taken["image", image] >= per_image), None):
            return OVER_IMAGE, full
        return None

    while len(kept) < target and waiting:
        first = min(waiting, key=lambda name: ((2 * taken["specialty", name] + 1) / _weight(specialty, name), name))
        cells = waiting[first]
        second = min(
            cells,
            key=lambda name: (
                (2 * taken["cell", first, name] + 1) / _weight(perspective, name),
                taken["perspective", name],
                name,
            ),
        )
        row = cells[second].popleft()
        if found := over_cap(row):
            capped[row.place] = found
        else:
            kept.add(row.place)
            taken.update([("specialty", first), ("cell", first, second), ("perspective", second)])
            taken.update([("modality", row.modality), ("kind", row.kind)])
            taken.update(("image", image) for image in row.images)
        if not cells[second]:
            del cells[second]
        if not cells:
            waiting = {name: rest for name, rest in waiting.items() if name != first}
    return kept, capped


def _weight(weights: Weights, name: str) -> float:
    return 1.0 if not weights else float(weights.get(name, 0.0))


def _check(
    target: int, specialty: Weights, perspective: Weights, modality: float, kind: Mapping[str, float], per_image: int
) -> None:
    if target < 1 or per_image < 1:
        raise UserError(f"balance: target={target} and per_image={per_image} must be 1 or more")
    for what, weights in (("specialty", specialty), ("perspective", perspective)):
        if weights and (min(weights.values()) < 0 or not sum(weights.values()) > 0):
            raise UserError(f"balance: the shares of {what} must be 0 or more, and one above 0, not {dict(weights)}")
    for name, share in {"each modality": modality, **kind}.items():
        if not 0 <= share <= 1:
            raise UserError(f"balance: the cap of {name} is a share from 0 to 1, not {share}")
