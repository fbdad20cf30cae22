"""Step 3: what a benchmark asks. Records that show an image of a benchmark, or ask a question of one.

An image of a benchmark drops the record whatever it asks: who learns its other questions is told what it shows. A text
drops it where it is long enough to be of one question. What is compared is the question without its options: they are
short lists of terms that stand in many sets, and their order and number change from copy to copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmedexpert.curation.near import (
    Index,
    bands,
    combined,
    distances,
    near_images,
    number_of,
    packed,
    parts,
    pictures_of,
    plain,
    similarity,
    stem,
)
from mmedexpert.curation.steps import Records, Verdict
from mmedexpert.data.overlap import MAX_DISTANCE
from mmedexpert.data.pictures import BITS, Picture, picture_at, read_cache
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError

IMAGE, NEAR = "image is in a benchmark", "near-same question as a benchmark"
PASSAGE = "{}-word passage of a benchmark"
WORDS = 8  # peers: Open-R1
# ours: one passage alone condemns 15% of unrelated vignettes ("brought to the emergency department because of"), which
# share up to 11% of the passages of the shorter question with one of MedXpertQA's; peers: PaLM asks for 70%
MIN_SHARE = 0.3
COMMON = 3  # ours: of MedXpertQA's 2,000 questions, 694 of 134,000 passages stand in more ("which of the following is")
# ours: questions on images are asked of many images up to 15 words (99% of VQA-RAD's and OmniMedVQA's)
MIN_WORDS = 16
MIN_JACCARD, MIN_RATIO = 0.5, 0.9  # peers: MedVLSynther's shipped run (Jaccard of character 3-grams there)
BATCH = 1024
Benchmark = tuple[str, Iterable[Record], Path | None]  # name, records, image root (None: its images are not here)
Found = dict[int, tuple[str, str]]  # row of a batch to reason and detail


class Benchmarks:
    """What the benchmarks show and ask, as sorted keys: built once, some hundred bytes a question and its text.

    Passages are `words` words in a row; those in more than `common` different questions of a benchmark are phrases and
    do not count. A question on images is told by its text from `min_words` words on, one without from `words` on.
    `cache`: a file of image fingerprints (data/pictures.py). An image that cannot be read is counted in `report`.
    """

    def __init__(
        self,
        sets: Iterable[Benchmark],
        cache: Path | None = None,
        *,
        max_distance: int = MAX_DISTANCE,
        min_jaccard: float = MIN_JACCARD,
        min_ratio: float = MIN_RATIO,
        words: int = WORDS,
        min_words: int = MIN_WORDS,
        min_share: float = MIN_SHARE,
        common: int = COMMON,
    ) -> None:
        self.max_distance, self.min_jaccard, self.min_ratio = max_distance, min_jaccard, min_ratio
        self.words, self.min_words, self.min_share, self.common = words, min_words, min_share, common
        self.rows: list[dict[str, Any]] = []  # of the report, one a benchmark
        self.texts: dict[str, str] = {}  # distinct text to who asks it first, such as "vqa_rad test-12"
        self.pictures: dict[Picture, str] = {}  # to who shows it first
        known = read_cache(cache) if cache else {}
        passages: list[tuple[np.ndarray, np.ndarray]] = []
        for name, records, image_root in sets:
            passages.append(self._add(name, records, image_root, known, cache))
        self.asked = list(self.texts)
        self.bands = Index(bands(self.asked))
        grams = np.concatenate([_NO_GRAM, *(grams for grams, _ in passages)])
        asking = np.concatenate([_NO_GRAM.astype(np.int32), *(rows for _, rows in passages)])
        order = np.lexsort((asking, grams))
        grams, asking = grams[order], asking[order]
        again = (grams[1:] == grams[:-1]) & (asking[1:] == asking[:-1])  # a question that two benchmarks ask
        once = np.flatnonzero(np.append(True, ~again)[: len(grams)])
        self.passages, self.passage_of = Index(grams[once, None]), asking[once]
        usable = [picture for picture in self.pictures if picture.comparable]
        self.shown = [self.pictures[picture] for picture in usable]
        self.hashes = packed(usable)
        self.parts = Index(parts(self.hashes, max_distance))
        self.pixels = {picture.pixels: who for picture, who in reversed(self.pictures.items())}

    def report(self) -> list[dict[str, Any]]:
        """Rows for the data set's card: the thresholds, and of each benchmark what was compared."""
        return [
            {"what": f"image: same pixels, or perceptual hash within, of {BITS} bits", "value": self.max_distance},
            {"what": "passage: words in a row of the question", "value": self.words},
            {"what": "passage: share of the shorter question's passages at least", "value": self.min_share},
            {"what": "passage: not counted above so many questions of a benchmark", "value": self.common},
            {"what": "text: words of a question on images at least, else its image tells", "value": self.min_words},
            {"what": "near-same question: Jaccard of word pairs at least", "value": self.min_jaccard},
            {"what": "near-same question: and edit ratio at least", "value": self.min_ratio},
            *self.rows,
        ]

    def images_in(self, batch: Sequence[Record]) -> Found:
        """Records that show an image of a benchmark: the same pixels, or a near hash."""
        found: Found = {}
        shown = [(row, picture) for row, record in enumerate(batch) for picture in pictures_of(record) if picture]
        for row, picture in shown:
            if picture.pixels in self.pixels:
                found.setdefault(row, (IMAGE, f"{self.pixels[picture.pixels]}: same pixels"))
        usable = [(row, picture) for row, picture in shown if picture.comparable]
        hashes = packed([picture for _, picture in usable])
        best: dict[int, tuple[int, int]] = {}
        for one, other in near_images(self.parts, self.hashes, hashes, self.max_distance):
            apart = distances(hashes[one], self.hashes[other])
            for a, b, bits in zip(one.tolist(), other.tolist(), apart.tolist(), strict=True):
                row = usable[a][0]
                best[row] = min((bits, b), best.get(row, (BITS, 0)))
        for row, (bits, nearest) in best.items():
            detail = f"{self.shown[nearest]}: {bits} of {BITS} bits apart (limit {self.max_distance})"
            found.setdefault(row, (IMAGE, detail))
        return found

    def passages_in(self, batch: Sequence[Record]) -> Found:
        """Records that share passages with a benchmark's question, enough of the shorter of the two."""
        grams = [_grams(self._long(stem(record)), self.words) for record in batch]
        row_of = np.repeat(np.arange(len(batch)), [len(found) for found in grams])
        pairs = [
            np.stack([row_of[one], self.passage_of[other]], axis=1)
            for one, other in self.passages.pairs(np.concatenate(grams)[:, None])
        ]
        shared, counts = np.unique(np.concatenate([_NO_PAIR, *pairs]), axis=0, return_counts=True)
        best: dict[int, tuple[float, int]] = {}
        for (row, asked), count in zip(shared.tolist(), counts.tolist(), strict=True):
            size = min(len(grams[row]), self.asked[asked].count(" ") + 2 - self.words)
            best[row] = max((min(1.0, count / size), -asked), best.get(row, (0.0, 0)))
        return {
            row: (PASSAGE.format(self.words), f"{self.texts[self.asked[-asked]]}: shares {share:.0%} of the passages")
            for row, (share, asked) in best.items()
            if share >= self.min_share
        }

    def questions_in(self, batch: Sequence[Record]) -> Found:
        """Records whose question is near-same to a benchmark's: MinHash proposes, both measures have to agree."""
        texts = {row: text for row, record in enumerate(batch) if (text := self._text(record))}
        rows = list(texts)
        best: dict[int, tuple[float, float, int]] = {}
        looked: set[tuple[int, int]] = set()
        for one, other in self.bands.pairs(bands(list(texts.values()))):
            for a, b in zip(one.tolist(), other.tolist(), strict=True):
                if (a, b) in looked:
                    continue
                looked.add((a, b))
                alike, ratio = similarity(texts[rows[a]], self.asked[b])
                if alike >= self.min_jaccard and ratio >= self.min_ratio:
                    best[rows[a]] = max((ratio, alike, -b), best.get(rows[a], (0.0, 0.0, 0)))
        limits = f"at least {self.min_jaccard:g} and {self.min_ratio:g}"
        return {
            row: (NEAR, f"{self.texts[self.asked[-b]]}: Jaccard {alike:.2f}, edit ratio {ratio:.2f} ({limits})")
            for row, (ratio, alike, b) in best.items()
        }

    def _text(self, record: Record) -> str:
        """What tells a question: its words where they are enough; of a short one without images, the options, too; ""
        where only its image tells it from others."""
        text = stem(record)
        if text.count(" ") + 1 >= (self.min_words if record.images else self.words):
            return text
        return "" if record.images else "\n".join([text, *sorted(map(plain, (record.options or {}).values()))])

    def _long(self, text: str) -> list[str]:
        """The words of a question that is long enough to be told by some of them, else none."""
        words = text.split("\n")[0].split()
        return words if len(words) >= self.min_words else []

    def _add(
        self, name: str, records: Iterable[Record], root: Path | None, known: dict[str, Picture], cache: Path | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take in a benchmark; its passages as numbers, and the rows of the questions that hold them."""
        numbers, questions, own = array("Q"), array("i"), set[str]()
        row_of = {text: row for row, text in enumerate(self.texts)}
        count, shown, missing = 0, set[str](), set[str]()
        for record in records:
            count += 1
            who = f"{name} {record.id}"
            if (text := self._text(record)) and text not in own:
                own.add(text)
                self.texts.setdefault(text, who)
                row = row_of.setdefault(text, len(row_of))
                found = np.unique(_grams(self._long(text), self.words))
                numbers.frombytes(found.tobytes())
                questions.extend([row] * len(found))
            for image, picture in zip(record.images, pictures_of(record), strict=True):
                if image in shown or image in missing:
                    continue
                try:
                    if picture is None and root is not None:
                        picture = picture_at(root / image, known, cache)
                except UserError:
                    picture = None
                (shown if picture else missing).add(image)
                if picture:
                    self.pictures.setdefault(picture, who)
        grams, rows = np.array(numbers, np.uint64), np.array(questions, np.int32)
        _, back, counts = np.unique(grams, return_inverse=True, return_counts=True)
        specific = counts[back] <= self.common
        self.rows.append({
            "benchmark": name, "questions": count, "questions told by their text": len(own), "images": len(shown),
            "images that cannot be read (text alone is compared)": len(missing),
            "passages": int(np.sum(counts <= self.common)),
            "passages too common to count": int(np.sum(counts > self.common)),
        })  # fmt: skip
        return grams[specific], rows[specific]


def decontaminate(records: Records, *, benchmarks: Benchmarks) -> Iterator[Verdict]:
    """Drop what shows an image, shares passages, or asks nearly the question of a benchmark; the first counts."""
    stream = iter(records)
    while batch := list(islice(stream, BATCH)):
        found = benchmarks.images_in(batch)
        for more in (benchmarks.passages_in(batch), benchmarks.questions_in(batch)):
            found = more | found
        for row, record in enumerate(batch):
            yield Verdict(record, *found.get(row, ()))


_NO_GRAM = np.empty(0, np.uint64)
_NO_PAIR = np.empty((0, 2), np.int64)


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> int:
    return number_of(word.encode(errors="replace"))


def _grams(words: Sequence[str], size: int) -> np.ndarray:
    """A number for each `size` words in a row."""
    if len(words) < size:
        return _NO_GRAM
    numbers = np.array([_word(word) for word in words], np.uint64)
    return combined(np.lib.stride_tricks.sliding_window_view(numbers, size))
