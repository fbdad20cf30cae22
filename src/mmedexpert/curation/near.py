"""What near means among very many images and texts: candidates by keys that agree, decided by the exact measure.

Images: with at most d of 256 bits different, at least one of d + 1 parts of the bits is the same (pigeonhole), so none
is missed. Texts: Broder (1997), MinHash of word pairs in bands, which may miss some (`BANDS`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from datasketch import MinHash
from rapidfuzz import fuzz

from mmedexpert.data.overlap import WORD, jaccard, word_pairs
from mmedexpert.data.pictures import BITS, Picture
from mmedexpert.data.record import Record

ROWS, BANDS = 4, 32  # ours: of 128 permutations; finds 87% at a Jaccard of .5, 98.8% at .6, all but 1 in 10,000 at .7
BLOCK = 1 << 18  # ours: candidate pairs looked at at once, some MB
Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
INLINE = re.compile(r"\n\s*(?:answer choices|choices|options)\s*:", re.IGNORECASE)
_PICTURE = re.compile(r"([0-9a-f]{64})([0-9a-f]{64})")


class Index:
    """Rows found by keys: `keys` uint64 `[n, c]`, of which at least one column has to agree. # ours: sorted columns"""

    def __init__(self, keys: np.ndarray) -> None:
        self.orders = [np.argsort(column, kind="stable").astype(np.int32) for column in keys.T]
        self.columns = [column[order] for column, order in zip(keys.T, self.orders, strict=True)]

    def pairs(self, keys: np.ndarray) -> Pairs:
        """(row of `keys`, row of the index), a block at a time; a pair comes once for each column that agrees."""
        for column, order, asked in zip(self.columns, self.orders, keys.T, strict=True):
            low = np.searchsorted(column, asked, "left")
            counts = np.searchsorted(column, asked, "right") - low
            ends = np.cumsum(counts)
            for start in range(0, int(ends[-1]) if len(ends) else 0, BLOCK):
                number = np.arange(start, min(start + BLOCK, int(ends[-1])))
                row = np.searchsorted(ends, number, "right")
                yield row, order[low[row] + number - (ends[row] - counts[row])]


def pictures_of(record: Record) -> list[Picture | None]:
    """What its provenance says of each of its images (curation/steps.py); None where it says nothing usable."""
    known = record.provenance.get("images")
    known = known if isinstance(known, list) else []
    return [_picture(known[place]) if place < len(known) else None for place in range(len(record.images))]


def _picture(found: object) -> Picture | None:
    try:
        picture = Picture(found["pixels"], found["phash"], float(found["grey_std"]))  # type: ignore[index]
        return picture if _PICTURE.fullmatch(picture.pixels + picture.phash) else None
    except (KeyError, TypeError, ValueError):
        return None


def packed(pictures: Sequence[Picture]) -> np.ndarray:
    """Perceptual hashes as uint64 `[n, 4]`."""
    return np.frombuffer(bytes.fromhex("".join(p.phash for p in pictures)), dtype=np.uint64).reshape(-1, BITS // 64)


def parts(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Keys uint64 `[n, c]` of hashes `[n, 4]`: two that differ in up to `max_distance` bits agree in at least one.

    Every c-th bit makes a part: the first bits alone, the coarsest, are the same in all chest films.
    """
    count = max(max_distance + 1, BITS // 64)
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8), axis=1)
    keys = np.zeros((len(hashes), count, 8), np.uint8)
    for part in range(count):
        found = np.packbits(bits[:, part::count], axis=1)
        keys[:, part, : found.shape[1]] = found
    return keys.view(np.uint64)[:, :, 0]


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ between hashes `[n, 4]`, row by row."""
    return np.bitwise_count(one ^ other).sum(1, dtype=int)


def near_images(index: Index, hashes: np.ndarray, asked: np.ndarray, max_distance: int) -> Pairs:
    """(row of `asked`, row of `hashes`) of all pairs within `max_distance`; `index` holds the `parts` of `hashes`."""
    for row, other in index.pairs(parts(asked, max_distance)):
        close = distances(asked[row], hashes[other]) <= max_distance
        yield row[close], other[close]


def plain(text: str) -> str:
    """The words of a text in lower case (NFKC), a blank between, as `data/overlap.normalised` has them."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def stem(record: Record) -> str:
    """The question as `plain` words, without options that stand in its text, too (MedXpertQA)."""
    return plain(INLINE.split(record.question, maxsplit=1)[0])


def bands(texts: Sequence[str]) -> np.ndarray:
    """Keys uint64 `[n, BANDS]` of texts of one or more lines; a text that comes again costs nothing."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    shingled = ([pair.encode(errors="replace") for pair in word_pairs(text)] for text in row_of)
    keys = np.empty((len(row_of), BANDS), np.uint64)
    for row, signature in enumerate(MinHash.generator(shingled, num_perm=ROWS * BANDS)):
        keys[row] = combined(signature.hashvalues.astype(np.uint64).reshape(BANDS, ROWS))
    return keys[[row_of[text] for text in texts]]


def combined(rows: np.ndarray) -> np.ndarray:
    """One number for each row of uint64 `[n, k]`: the sum of its values, each place with an odd factor of its own."""
    return (rows * _factors(rows.shape[1])).sum(1, dtype=np.uint64)


@cache
def _factors(count: int) -> np.ndarray:
    return np.array([number_of(str(place).encode()) | 1 for place in range(count)], np.uint64)


def number_of(data: bytes) -> int:
    """64 bits of a digest: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def similarity(one: str, other: str) -> tuple[float, float]:
    """Jaccard similarity of the word pairs of two texts, and their edit ratio (rapidfuzz, InDel), both 0 to 1."""
    return jaccard(word_pairs(one), word_pairs(other)), fuzz.ratio(one, other) / 100
