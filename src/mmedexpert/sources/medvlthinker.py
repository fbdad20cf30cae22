"""MedVLThinker's training sets: choices about figures (PMC-VQA) or of text alone (m23k), with their pass counts and
reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.table import alike
from mmedexpert.data.validation import Bad
from mmedexpert.sources.parquet import text_of
from mmedexpert.sources.rows import choices_of
from mmedexpert.sources.vqa_table import find_files, images_of, load_rows, make_record

NEEDED = ("question", "options", "answer_label")
LICENSES = {"pmc_vqa": "CC BY-SA", "pmc-vqa": "CC BY-SA"}  # as `pmc_vqa` has it


def load(
    root: Path, out_dir: Path, *, files: str | Sequence[str] = "**/*.parquet", split: str = "train"
) -> tuple[list[Record], Path, Bad]:
    """Records, image root and bad rows of the hub's Parquet files (or the same rows as jsonl).

    Source: UCSC-VLAA/MedVLThinker (arXiv 2508.02669): images, question, options (a JSON text), answer_label, answer,
    reasoning, dataset_name, dataset_index, hash, misc. Where answer_label and answer name two options, the row is bad.
    Raises UserError for a root without such files or columns.
    """

    def parse(row: Mapping[str, Any], record_id: str) -> Record:
        dataset, index = text_of(row.get("dataset_name")).strip(), text_of(row.get("dataset_index")).strip()
        label, told = text_of(row.get("answer_label")).strip(), text_of(row.get("answer")).strip()
        choices = choices_of(row.get("options"))
        if not choices:
            raise ValueError("it has no options")
        named = any(alike(text, told) for _, text in choices)  # else it explains, and the label alone tells
        return make_record(
            f"{dataset}-{index}" if dataset and index else record_id, images_of(row.get("images"), out_dir),
            text_of(row.get("question")), choices, f"{label}. {told}" if label and named else label, split=split,
            source="", license=LICENSES.get(dataset.casefold(), "not stated"),
            reasoning=text_of(row.get("reasoning")), groups={"dataset": dataset} if dataset else {},
        )  # fmt: skip

    return load_rows(root, out_dir, find_files(root, files), parse, name="medvlthinker", needed=NEEDED)
