"""Step 2: what was asked before. Records that ask the same of the same image, and images that are nearly the same.

What a duplicate is, is ours: "What modality is this?" is asked of every image, so a question is a duplicate where its
images are the same or near, too; a record without images is told by its text alone. Another question on the same image
is none, but shares the image group, so that no split parts them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmedexpert.curation.near import Index, bands, distances, near_images, packed, parts, pictures_of, plain, similarity
from mmedexpert.curation.near import stem as stem_of
from mmedexpert.curation.steps import Records, Verdict
from mmedexpert.data.overlap import MAX_DISTANCE
from mmedexpert.data.pictures import BITS, Picture
from mmedexpert.data.record import Record
from mmedexpert.data.splits import join_groups

SAME, NEAR = "question asked before", "near-same question asked before"
CONTRADICTION = "same question, another answer"
NUMBERS = re.compile(r"\d+")
NEAR_JACCARD = 0.8  # ours, of word pairs: a word in a question of some twenty differs
NEAR_RATIO = 0.95  # peers: m1 and OpenThoughts, rapidfuzz ratio of 95
# ours: near-same questions that differ in one of these, or in a number, ask different things
TELLING = frozenset(
    """no not non without never except left right bilateral upper lower middle superior inferior anterior posterior
    lateral medial proximal distal ascending descending first second third increased decreased increase decrease high
    low higher lower largest smallest hyper hypo hyperintense hypointense male female man woman boy girl axial coronal
    sagittal least most more less before after normal abnormal benign malignant acute chronic ct mri mr pet""".split()
)
NEGATIONS = frozenset("no not non without never none absent negative".split())
BATCH = 1024
Near = dict[int, list[int]]  # a record's row to those of records that may be near-same


@dataclass(eq=False)
class _Seen:
    """Of all records, in the order of the file: what tells them apart, some hundred bytes each."""

    ids: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # of the source
    groups: list[str] = field(default_factory=list)  # the reader's own, "" where it names none
    same: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))  # what is asked of which pixels
    images: list[tuple[int, ...]] = field(default_factory=list)  # rows of `pictures`
    pictures: dict[Picture | str, int] = field(default_factory=dict)  # a path where nothing is known of the image
    bands: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Text:
    question: str
    options: str
    answer: str

    @classmethod
    def of(cls, record: Record) -> _Text:
        options = record.options or {}
        texts = (options.get(record.answer, record.answer), *options.values())
        answer, *others = (plain(text) or text.strip() for text in texts)
        return cls(stem_of(record) or record.question.strip(), "\n".join(sorted(others)), answer)

    def agrees(self, other: _Text) -> bool:
        """Whether the answers do: equal; in free text also where one says more than the other. # ours"""
        one, two = set(self.answer.split()), set(other.answer.split())
        more = not self.options and (one <= two or two <= one) and not (one ^ two) & NEGATIONS
        return self.answer == other.answer or more


class _Images:
    """The distinct images: which are near each other, and which by a chain of near ones (`label` `[n]`)."""

    def __init__(self, found: Sequence[Picture | str], max_distance: int) -> None:
        self.limit = max_distance
        self.usable = np.array([isinstance(one, Picture) and one.comparable for one in found], dtype=bool)
        rows = np.flatnonzero(self.usable)
        self.hashes = np.zeros((len(found), BITS // 64), np.uint64)
        self.hashes[rows] = packed([one for one in found if isinstance(one, Picture) and one.comparable])
        # images of one hash are one node, so that a thousand copies are no million pairs
        nodes, node_of = np.unique(self.hashes[rows], axis=0, return_inverse=True)
        label = np.arange(len(nodes))
        for one, other in near_images(Index(parts(nodes, max_distance)), nodes, nodes, max_distance):
            edges = coo_array((np.ones(len(one), bool), (label[one], label[other])), shape=(len(nodes),) * 2)
            label = connected_components(edges, directed=False)[1][label]
        self.label = len(nodes) + np.arange(len(found))
        self.label[rows] = label[node_of.ravel()]

    def apart(self, one: Sequence[int], other: Sequence[int]) -> int:
        """Bits by which the images of two records differ at most, each from the nearest of the other; 0 without any."""
        both = [(one, other), (other, one)]
        return max((min(map(lambda b: self._bits(a, b), to), default=BITS) for of, to in both for a in of), default=0)

    def _bits(self, a: int, b: int) -> int:
        if a == b:
            return 0
        return int(distances(self.hashes[[a]], self.hashes[[b]])[0]) if self.usable[a] and self.usable[b] else BITS


def duplicates(
    records: Records,
    *,
    sources: Sequence[str] = (),
    max_distance: int = MAX_DISTANCE,
    min_jaccard: float = NEAR_JACCARD,
    min_ratio: float = NEAR_RATIO,
) -> Iterator[Verdict]:
    """Keep of each question the first, by the order of `sources` (else as they come), then by id; join image groups.

    Same question, options and pixels, but answers that do not agree: all of them are dropped. Near images (up to
    `max_distance` of 256 bits) with other answers stay: they may differ in what is asked. The file is read three times.
    """
    seen = _read(records, sources)
    images = _Images(list(seen.pictures), max_distance)
    groups = _groups(seen, images)
    near = _candidates(seen, images)
    wanted = {row for rows in seen.same.values() if len(rows) > 1 for row in rows}.union(near, *near.values())
    texts = {row: _Text.of(record) for row, record in enumerate(records) if row in wanted}

    found = _contradictions(seen, texts)
    kept: dict[bytes, int] = {}
    digest_of = {row: digest for digest, rows in seen.same.items() for row in rows}
    for row in sorted(range(len(seen.ids)), key=lambda row: (seen.ranks[row], seen.ids[row], row)):
        if row in found:
            continue
        before = kept.get(digest_of[row])
        if before is not None:
            found[row] = (SAME, f"as {seen.ids[before]}")
            continue
        for other in near.get(row, ()):
            if kept.get(digest_of[other]) != other:
                continue  # not kept, or not yet
            if how := _near_same(texts[row], texts[other], min_jaccard, min_ratio):
                bits = images.apart(seen.images[row], seen.images[other])
                if bits <= max_distance:
                    shown = f", images {bits} of {BITS} bits apart" if seen.images[row] else ""
                    found[row] = (NEAR, f"as {seen.ids[other]}: {how}{shown}")
                    break
        else:
            kept[digest_of[row]] = row
    for row, record in enumerate(records):
        yield Verdict(replace(record, image_group=groups[row]), *found.get(row, ()))


def report(
    kept: Records,
    *,
    max_distance: int = MAX_DISTANCE,
    min_jaccard: float = NEAR_JACCARD,
    min_ratio: float = NEAR_RATIO,
) -> list[dict[str, Any]]:
    """Rows for the data set's card: the thresholds, and how records share images afterwards."""
    sizes = Counter(record.image_group for record in kept)
    return [
        {"what": f"near image: perceptual hash within, of {BITS} bits", "value": max_distance},
        {"what": "near question: Jaccard of word pairs at least", "value": min_jaccard},
        {"what": "near question: or edit ratio at least", "value": min_ratio},
        {"what": "image groups", "value": len(sizes)},
        {"what": "records of the largest image group", "value": max(sizes.values(), default=0)},
    ]


def _read(records: Records, sources: Sequence[str]) -> _Seen:
    seen = _Seen()
    rank = {source: number for number, source in enumerate(sources)}
    stream = iter(records)
    while batch := list(islice(stream, BATCH)):
        texts = [_Text.of(record) for record in batch]
        seen.bands.append(bands([f"{text.question}\n{text.options}".strip("\n") for text in texts]))
        for record, text in zip(batch, texts, strict=True):
            source = record.provenance.get("source") or record.source
            shown = zip(pictures_of(record), record.images, strict=True)
            keys = [picture or f"{source}/{name}" for picture, name in shown]
            rows = tuple(sorted({seen.pictures.setdefault(key, len(seen.pictures)) for key in keys}))
            asked = "\n".join([str(rows), text.question, text.options])
            seen.same[hashlib.sha256(asked.encode(errors="replace")).digest()[:16]].append(len(seen.ids))
            seen.ids.append(record.id)
            seen.ranks.append(rank.setdefault(source, len(rank)))
            own = f"{source}/{record.image_group}" if record.image_group else ""
            # a question of text alone is itself whatever set asks it, and with another age or dose it is a sister
            alone = NUMBERS.sub("#", text.question).encode(errors="replace")
            seen.groups.append(own if rows else f"text:{hashlib.sha256(alone).hexdigest()[:16]}")
            seen.images.append(rows)
    return seen


def _groups(seen: _Seen, images: _Images) -> list[str]:
    """The image group of each record: that of the reader, of its pixels and of near ones; of nothing, the record."""
    name: dict[int, str] = {}
    for (found, row), label in zip(seen.pictures.items(), images.label.tolist(), strict=True):
        known = (found.phash if images.usable[row] else found.pixels) if isinstance(found, Picture) else found
        name[label] = min(f"~{known}", name.get(label, "~~"))  # the reader's name goes before it
    shown = ([name[int(images.label[row])] for row in rows] for rows in seen.images)
    own = zip(shown, seen.groups, seen.ids, strict=True)
    return join_groups([[*keys, *([group] if group else [])] or [record] for keys, group, record in own])


def _candidates(seen: _Seen, images: _Images) -> Near:
    """Pairs whose texts may be near-same and whose images are chained; of one image each, near. Both ways round."""
    if not seen.ids:
        return {}
    labels = [frozenset(images.label[list(rows)].tolist()) for rows in seen.images]
    number = {label: n for n, label in enumerate(dict.fromkeys(labels))}
    salts = np.array([number[label] for label in labels], np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # spreads numbers
    keys = np.concatenate(seen.bands) ^ salts[:, None]
    single = np.array([rows[0] if len(rows) == 1 else -1 for rows in seen.images])
    digest = np.empty(len(seen.ids), np.int64)
    for place, rows_of in enumerate(seen.same.values()):
        digest[rows_of] = place
    near: dict[int, set[int]] = defaultdict(set)
    for one, other in Index(keys).pairs(keys):
        likely = (one != other) & (digest[one] != digest[other])
        one, other = one[likely], other[likely]
        a, b = single[one], single[other]
        far = (a >= 0) & (b >= 0) & (a != b)
        far[far] = distances(images.hashes[a[far]], images.hashes[b[far]]) > images.limit
        for row, candidate in zip(one[~far].tolist(), other[~far].tolist(), strict=True):
            near[row].add(candidate)
    place_of = {row: (seen.ranks[row], seen.ids[row], row) for row in near}
    return {row: sorted(others, key=place_of.__getitem__) for row, others in near.items()}


def _contradictions(seen: _Seen, texts: dict[int, _Text]) -> dict[int, tuple[str, str]]:
    """Records that ask exactly the same and whose answers do not agree: which of them is right is not known."""
    found = {}
    for rows in seen.same.values():
        distinct = {texts[row].answer: texts[row] for row in rows} if len(rows) > 1 else {}
        if any(not one.agrees(other) for one, other in combinations(distinct.values(), 2)):
            for row in rows:
                others = [other for other in rows if texts[other].answer != texts[row].answer][:3]
                found[row] = (CONTRADICTION, f"as {', '.join(sorted(seen.ids[other] for other in others))}")
    return found


def _near_same(one: _Text, other: _Text, min_jaccard: float, min_ratio: float) -> str:
    """How near-same two questions are, in words; "" where they are not, or their answers do not agree."""
    apart = set(one.question.split()) ^ set(other.question.split())
    if not one.agrees(other) or apart & TELLING or any(char.isdigit() for word in apart for char in word):
        return ""
    found = [similarity(*pair) for pair in ((one.question, other.question), (one.options, other.options)) if any(pair)]
    if any(jaccard < min_jaccard and ratio < min_ratio for jaccard, ratio in found):
        return ""
    jaccard, ratio = min(found)
    return f"Jaccard {jaccard:.2f}, edit ratio {ratio:.2f}"
