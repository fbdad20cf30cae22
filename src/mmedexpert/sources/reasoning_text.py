"""Reasoning sets of text alone: HuatuoGPT-o1's rows, and question, answer, reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import text_of
from mmedexpert.sources.rows import choices_of
from mmedexpert.sources.vqa_table import find_files, load_rows, make_record

# columns in order of choice
CHOSEN = ("answer_idx", "answer_label", "answer")
OPEN = (
    ("Open-ended Verifiable Question", "Question", "question", "prompt"),
    ("Ground-True Answer", "answer", "Answer", "Response", "response"),
)
REASONING = ("Complex_CoT", "reasoning", "thinking", "rationale")
FORMS = ("choice", "open")


def load(
    root: Path,
    out_dir: Path,
    *,
    files: str | Sequence[str],
    form: str = "choice",
    name: str = "",
    split: str = "train",
    license: str = "not stated",
) -> tuple[list[Record], Path, Bad]:
    """Records without images, image root (`root`) and bad rows of json, jsonl, csv, tsv or Parquet files.

    Source: HuatuoGPT-o1 (arXiv 2412.18925): Question, Complex_CoT, Response, in its demo with the choice that each
    question was made of; m1 and others: question, options, answer, reasoning. `form` choice takes a row's options
    where it has them, open never does. Raises UserError for files that are not there.
    """
    if form not in FORMS:
        raise UserError(f"reasoning_text: load.form is {form!r}: choose one of {', '.join(FORMS)}")

    def parse(row: Mapping[str, Any], record_id: str) -> Record:
        choices = choices_of(row.get("options")) if form == "choice" else []
        questions, answers = (("question", *OPEN[0]), CHOSEN) if choices else OPEN
        return make_record(
            record_id, (), _first(row, questions), choices, _first(row, answers), split=split, source="",
            license=license, reasoning=_first(row, REASONING),
        )  # fmt: skip

    return load_rows(root, out_dir, find_files(root, files), parse, name=name or "reasoning_text", id_column="id")


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    return next((text for column in columns if (text := text_of(row.get(column)).strip())), "")
