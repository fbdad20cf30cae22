"""Guideline statements that apply to a question: found by specialty and terms, handed to the teacher.

BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework") by `bm25s`; the project's own guidelines,
and any file of statements that a user adds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import yaml

from mmedexpert.errors import UserError
from mmedexpert.guidelines import guidelines
from mmedexpert.guidelines.cues import normal

KEYS = ("id", "text", "specialty", "source", "licence")
OWN = "mmedexpert:"  # ids of the project's own guidelines begin with it
ANY = "any"  # the specialty of a statement that applies in every one
# ours: words that stand in every question, and would make any statement look related to it
COMMON = frozenset(
    """ct mri pet ray film scan routine tissue follow minute beat sampling class acute adult patient year old man woman
    male female boy girl child presents history examination following show shown image picture figure most
    likely which what who whom why how when would should this these diagnosis option answer question normal
    above below up more less under over cm mm mg ml min day week month hour time large small right left finding
    suggest advised has have had been his her he she from after before than between into per""".split()
)
# ours: whose question a guideline of our own is; as `sources/phantom/families.py` has it for drawn pictures
SPECIALTIES = {
    "ctr_newborn": "pediatrics", "heart_rate_infant": "pediatrics", "midline_shift": "brain_sensory",
    "cup_disc": "brain_sensory", "lung_nodule": "oncology_surgery", "aortic_diameter": "oncology_surgery",
}  # fmt: skip
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index, whatever the level of the others
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Statement:
    """One statement of a guideline. `specialty` is a name, or `any`; `source` names organisation or paper, and year."""

    id: str
    text: str
    source: str
    specialty: str = ANY
    licence: str = ""


class Statements:
    """Statements to search: the project's own guidelines, then those of `files` (`read_statements`).

    `min_score`: BM25 score (k1 1.5, b 0.75) below which none applies. # ours: over the nine own guidelines 1.7 is two
    words in common that are rare together ("abdominal aorta", "midline shift"), and not "heart rate" in a vital sign.
    """

    def __init__(self, files: Sequence[Path] = (), *, own: bool = True, min_score: float = 1.7) -> None:
        self.min_score = min_score
        self.all: tuple[Statement, ...] = (*(own_statements() if own else ()), *_read_all(files))
        self._terms = [terms(one.text) for one in self.all]
        self._index = bm25s.BM25(k1=1.5, b=0.75)
        if self.all:
            self._index.index(self._terms, show_progress=False)

    def for_question(self, question: str, specialty: str | Sequence[str], k: int = 3) -> list[Statement]:
        """Up to `k` statements of a specialty (or several, or of `any`) that score at least `min_score`, best first;
        equal scores by id."""
        wanted = {ANY, *([specialty] if isinstance(specialty, str) else specialty)}
        asked = sorted({term for term in terms(question) if term in self._index.vocab_dict}) if self.all else []
        if not asked or k < 1:
            return []
        scores = self._index.get_scores(asked)
        ranked = sorted(
            (-round(float(score), 4), one.id, place)
            for place, (score, one) in enumerate(zip(scores, self.all, strict=True))
            if one.specialty in wanted and score >= self.min_score
        )
        return [self.all[place] for _, _, place in ranked[:k]]


def own_statements() -> list[Statement]:
    """The guidelines of `guidelines.yaml` as sentences: what was measured, in whom, and what follows."""
    return [
        Statement(
            f"{OWN}{key}",
            f"{one.finding[0].upper()}{one.finding[1:]}, {one.population}: {one.recommendation} "
            f"From low to high: {', '.join(one.labels)}.",
            one.source,
            SPECIALTIES.get(key, "adult_medicine"),
            "facts; wording Apache-2.0",
        )
        for key, one in guidelines().items()
    ]


def read_statements(path: Path) -> list[Statement]:
    """The statements of a YAML file, a list of {id, text, specialty, source, licence}; specialty `any` for all.

    Raises UserError that names file, entry and key for what is not of this form.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"statements {path} cannot be read ({error.strerror}): correct the path") from error
    except (yaml.YAMLError, ValueError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"statements {path} are no YAML ({told}): mend the file") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"statements {path} hold no list: write - {{{', '.join(KEYS)}}}")
    return [_statement(row, f"statements {path}, entry {number}") for number, row in enumerate(rows, start=1)]


def _read_all(files: Sequence[Path]) -> list[Statement]:
    found: dict[str, Statement] = {}
    for path in files:
        for one in read_statements(path):
            if one.id in found or one.id.startswith(OWN):
                raise UserError(f"statements {path}: the id {one.id!r} is taken: give it another")
            found[one.id] = one
    return list(found.values())


def _statement(row: Any, where: str) -> Statement:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no mapping: give {', '.join(KEYS)}")
    if unknown := sorted(str(key) for key in row if key not in KEYS):
        raise UserError(f"{where}: {unknown[0]!r} is none of {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no {key}, or it is no text: give it")
    if not terms(row["text"]):
        raise UserError(f"{where}: its text has no word to find it by: name the finding")
    return Statement(**{key: " ".join(row[key].split()) for key in KEYS})


def terms(text: str) -> list[str]:
    """The words of a text that tell what it is about: British and American spelling and plural folded, no numbers."""
    words = (_singular(word) for word in _WORD.findall(normal(text)))
    return [word for word in words if word not in COMMON and word not in bm25s.stopwords.STOPWORDS_EN]


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if len(word) > 4 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
