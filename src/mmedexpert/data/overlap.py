"""How much of a test set a model has been trained on: images by pixels and perceptual hash, questions by MinHash.

Zauner (2010), "Implementation and Benchmarking of Perceptual Image Hash Functions"; Broder (1997), "On the resemblance
and containment of documents". Copies re-encoded, resized, in grey or scribbled on are found; those cropped, turned or
mirrored, and other images of the same patient, are not.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmedexpert.data.pictures import BITS, Picture, picture_at, read_cache
from mmedexpert.data.record import Record
from mmedexpert.runtime.progress import track

if TYPE_CHECKING:
    from datasketch import MinHash

# ours, measured on 2,378 distinct images (2.8 million pairs): all are found again within 8 after JPEG at quality 80 or
# halving (99.3% after both, 98.4% after quality 50; 60% when halved without smoothing). The 28 pairs within 8 are all
# copies. Different patients: 439,309 pairs of chest films start at 44, 19,900 of fundi at 22, 3,916 of ECG sheets (one
# layout) at 10, where there are 5. A large test set times a training set has billions of pairs: look at `worst`, too.
MAX_DISTANCE = 8
# ours: on VQA-RAD 0.7 pairs wordings ("Are the kidneys normal?", "Is/Are the kidneys normal?"), 0.6 air with fluid
MIN_JACCARD = 0.7
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # a Chinese character is a word: no blanks part them


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Of the records `ids` `[n]`: record i shows rows `images[i]` of the distinct `pictures` (`names`: a path of each)
    and asks row `texts[i]` of the distinct `questions` (see `normalised`; `signatures`: their MinHash)."""

    ids: tuple[str, ...]
    images: tuple[tuple[int, ...], ...]
    texts: tuple[int, ...]
    pictures: tuple[Picture, ...]
    names: tuple[str, ...]
    questions: tuple[str, ...]
    signatures: tuple[MinHash, ...]


@dataclass(frozen=True)
class Match:
    """A test record and the nearest training record: bits that differ (-1: same pixels), similarity of questions."""

    test_id: str
    train_id: str
    test_image: str
    train_image: str
    distance: int
    jaccard: float


@dataclass(frozen=True, eq=False)
class Overlap:
    """Per test record (`ids`), is it in training: one of its images (`image`), its question on whatever image
    (`question`), both in one training record (`joint`); each bool `[n]`.

    Of `images` distinct test images, `images_exact` have the same pixels in training, `images_seen` these or near ones.
    `clean`: ids of records whose images are all unseen (of a record without images: whose question is). `worst`: up to
    ten matches, most similar questions first.
    """

    ids: tuple[str, ...]
    image: np.ndarray
    question: np.ndarray
    joint: np.ndarray
    images: int
    images_exact: int
    images_seen: int
    clean: frozenset[str]
    worst: tuple[Match, ...]
    max_distance: int
    min_jaccard: float


def fingerprints(records: Sequence[Record], image_root: Path, cache: Path | None) -> Fingerprints:
    """Fingerprints of the records' images (under `image_root`) and of their questions with options.

    `cache` is a file with a JSON line per image, found by the content of the image file, so that one serves all data
    sets. A line is added as soon as an image is hashed: a killed run goes on from there.
    Raises UserError for an image that is missing or cannot be read, and for a cache that is another kind of file.
    """
    from datasketch import MinHash  # a second to import, which a command that finds all done need not wait for

    known = read_cache(cache) if cache else {}
    row_of: dict[Picture, int] = {}
    row_of_name: dict[str, int] = {}
    for name in track(sorted({name for record in records for name in record.images}), "hashing images"):
        row_of_name[name] = row_of.setdefault(picture_at(image_root / name, known, cache), len(row_of))
    name_of = {row: name for name, row in reversed(row_of_name.items())}
    row_of_text: dict[str, int] = {}
    texts = tuple(row_of_text.setdefault(normalised(record), len(row_of_text)) for record in records)
    shingled = ([word.encode() for word in word_pairs(text)] for text in row_of_text)
    return Fingerprints(
        ids=tuple(record.id for record in records),
        images=tuple(tuple(dict.fromkeys(row_of_name[name] for name in record.images)) for record in records),
        texts=texts,
        pictures=tuple(row_of),
        names=tuple(name_of[row] for row in range(len(row_of))),
        questions=tuple(row_of_text),
        signatures=tuple(MinHash.bulk(shingled)),
    )


def overlap(
    train: Fingerprints, test: Fingerprints, *, max_distance: int = MAX_DISTANCE, min_jaccard: float = MIN_JACCARD
) -> Overlap:
    """What of `test` is in `train`, by image, by question, and by both in one training record.

    Images are the same up to the Hamming distance `max_distance` of 256 bits, questions from the Jaccard similarity
    `min_jaccard` of their word pairs (MinHash proposes, at 0.7 it finds 99 of 100; the exact similarity decides).
    Clean means: image not seen.  # ours: a model trained on an image's other questions was told what it shows, while
    "What modality is this?" is asked of every image. Raises ValueError for a distance or similarity out of its range.
    """
    if not 0 <= max_distance <= BITS or not 0 < min_jaccard <= 1:
        raise ValueError(f"distance {max_distance} must be in 0..{BITS}, similarity {min_jaccard} in (0, 1]")
    near_images = _near_images(train, test, max_distance)
    showing: dict[int, list[int]] = defaultdict(list)  # train image to train records
    for record, shown in enumerate(train.images):
        for row in shown:
            showing[row].append(record)
    words = functools.cache(lambda j: word_pairs(train.questions[train.texts[j]]))

    best: dict[int, Match] = {}  # test record to the nearest training record
    for i, (rows, text) in enumerate(zip(test.images, test.texts, strict=True)):
        asked = word_pairs(test.questions[text])
        seen = [(row, *near) for row in rows for near in near_images.get(row, [])]
        found = [(jaccard(asked, words(j)), -d, j, row, other) for row, other, d in seen for j in showing[other]]
        if found:
            similar, minus, j, row, other = max(found)
            best[i] = Match(test.ids[i], train.ids[j], test.names[row], train.names[other], -minus, similar)
    image = np.isin(range(len(test.ids)), list(best))
    joint = np.isin(range(len(test.ids)), [i for i, match in best.items() if match.jaccard >= min_jaccard])
    question = np.isin(test.texts, _near_questions(train, test, min_jaccard)) | joint
    dirty = np.where([bool(rows) for rows in test.images], image, question)
    return Overlap(
        ids=test.ids,
        image=image,
        question=question,
        joint=joint,
        images=len(test.pictures),
        images_exact=sum(any(distance < 0 for _, distance in found) for found in near_images.values()),
        images_seen=len(near_images),
        clean=frozenset(compress(test.ids, ~dirty)),
        worst=tuple(sorted(best.values(), key=lambda m: (-m.jaccard, m.distance, m.test_id))[:10]),
        max_distance=max_distance,
        min_jaccard=min_jaccard,
    )


def report(overlap: Overlap) -> list[dict[str, str]]:
    """Rows of a table: `found` (what was looked for), `count`, `of` (how many there are), `share` in percent."""
    n = len(overlap.ids)
    rows = [
        ("images: same pixels in training", overlap.images_exact, overlap.images),
        (f"images: same, or phash within {overlap.max_distance} of {BITS}", overlap.images_seen, overlap.images),
        ("questions: image seen in training", int(overlap.image.sum()), n),
        (f"questions: near-same text (Jaccard {overlap.min_jaccard:g})", int(overlap.question.sum()), n),
        ("questions: both, in one training record", int(overlap.joint.sum()), n),
        ("questions: clean (image not seen)", len(overlap.clean), n),
    ]
    return [
        {"found": found, "count": f"{count:,}", "of": f"{total:,}", "share": f"{100 * count / max(1, total):.1f}"}
        for found, count, total in rows
    ]


def normalised(record: Record) -> str:
    """Question, then the options in alphabetical order, a line each: lower case, words only (NFKC)."""
    lines = [record.question, *(record.options or {}).values()]
    question, *options = (" ".join(WORD.findall(unicodedata.normalize("NFKC", line).casefold())) for line in lines)
    return "\n".join([question, *sorted(options)])


def word_pairs(text: str) -> frozenset[str]:
    """Neighbouring words within each line (of one word: that word), so that the order of options is no part."""
    # ours: a VQA question has about seven words, too few for the usual shingles of five to thirteen
    found: set[str] = set()
    for line in text.split("\n"):
        words = line.split(" ")
        found.update([f"{a} {b}" for a, b in pairwise(words)] or words)
    return frozenset(found)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over that of the union, of sets that are not both empty."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _near_images(train: Fingerprints, test: Fingerprints, max_distance: int) -> dict[int, list[tuple[int, int]]]:
    """Test image to its (train image, distance), for those that have any; first -1 where the pixels are the same.

    One 64-bit word rules out all but a thousandth of the pairs of radiographs (the last: the first is worse fourfold).
    """
    exact = {picture.pixels: row for row, picture in enumerate(train.pictures)}
    found = {row: [(exact[p.pixels], -1)] for row, p in enumerate(test.pictures) if p.pixels in exact}
    (train_rows, train_words), (test_rows, test_words) = _packed(train), _packed(test)
    different, count = np.empty(len(train_rows), np.uint64), np.empty(len(train_rows), np.uint8)  # reused: in the cache
    for column in track(range(len(test_rows)), "comparing images"):
        word = test_words[:, column]
        np.bitwise_count(np.bitwise_xor(train_words[-1], word[-1], out=different), out=count)
        likely = np.flatnonzero(count <= max_distance)
        distances = np.bitwise_count(train_words[:, likely] ^ word[:, None]).sum(0, dtype=int)
        row = int(test_rows[column])
        for k in np.flatnonzero(distances <= max_distance):
            found.setdefault(row, []).append((int(train_rows[likely[k]]), int(distances[k])))
    return found


def _packed(of: Fingerprints) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[m]` of the comparable images, and their hashes `[4, m]` in words of 64 bits."""
    rows = np.array([row for row, picture in enumerate(of.pictures) if picture.comparable], dtype=int)
    data = b"".join(bytes.fromhex(of.pictures[row].phash) for row in rows)
    return rows, np.ascontiguousarray(np.frombuffer(data, dtype=np.uint64).reshape(len(rows), BITS // 64).T)


def _near_questions(train: Fingerprints, test: Fingerprints, min_jaccard: float) -> list[int]:
    """Test texts that have a near-same one in training."""
    from datasketch import MinHashLSH

    known = set(train.questions)
    near = {row for row, text in enumerate(test.questions) if text in known}
    words = {row: word_pairs(text) for row, text in enumerate(test.questions) if row not in near}
    # A lower threshold and the weight on misses: proposals cost little, and are checked.
    index = MinHashLSH(threshold=0.85 * min_jaccard, weights=(0.1, 0.9))
    for row in words:
        index.insert(row, test.signatures[row])
    for row in track(range(len(train.questions)) if words else (), "comparing questions"):
        if proposed := set(index.query(train.signatures[row])) - near:
            asked = word_pairs(train.questions[row])
            near.update(found for found in proposed if jaccard(asked, words[found]) >= min_jaccard)
    return sorted(near)
