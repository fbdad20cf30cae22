"""Near-copies among traces: MinHash of word 3-grams proposes (`datasketch`), the ratio of `rapidfuzz` decides."""

from __future__ import annotations

from datasketch import MinHash, MinHashLSH
from rapidfuzz import fuzz

from mmedexpert.data.overlap import WORD
from mmedexpert.guidelines.cues import normal

SHINGLE, JACCARD = 3, 0.6  # ours: words a shingle, and what two texts must share of these for their ratio to be taken
RATIO = 90.0  # peers: m1 drops questions from 95 on; ours: a trace is longer, its copies differ in letters and numbers
PERMUTATIONS = 64  # ours: of two texts that share 0.8 of their shingles it finds 99 of 100 pairs


class Copies:
    """The traces kept so far, about 5 KB each."""

    def __init__(self, ratio: float = RATIO) -> None:
        self.ratio = ratio
        self._index = MinHashLSH(threshold=JACCARD, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._texts: list[tuple[str, str]] = []  # id and text
        self._empty = MinHash(PERMUTATIONS)

    def near(self, text: str) -> str | None:
        """The id of the first kept trace that is a near-copy of `text`."""
        folded = _folded(text)
        for place in sorted(self._index.query(self._signature(folded))):
            name, other = self._texts[place]
            if fuzz.ratio(folded, other, score_cutoff=self.ratio):
                return name
        return None

    def keep(self, name: str, text: str) -> None:
        """Remember a trace."""
        folded = _folded(text)
        self._index.insert(len(self._texts), self._signature(folded))
        self._texts.append((name, folded))

    def _signature(self, folded: str) -> MinHash:
        words = folded.split(" ")
        size = min(SHINGLE, len(words))
        signature = self._empty.copy()  # drawing the permutations anew takes longer than the rest
        signature.update_batch([" ".join(words[i : i + size]).encode() for i in range(len(words) - size + 1)])
        return signature


def _folded(text: str) -> str:
    return " ".join(WORD.findall(normal(text)))
