"""GMAI-Reasoning10K: choices about images of 95 public sets, as conversations, with or without reasoning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.sources.medr1 import TAGGED, gold_letter, parse_problem
from mmedexpert.sources.parquet import text_of
from mmedexpert.sources.vqa_table import find_files, images_of, load_rows, make_record

NEEDED = ("image", "conversations")
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL | re.IGNORECASE)
# ours: a last line that tells how to answer is no part of the last option
ASKS = "answer with|answer the question|please (?:answer|select|choose|provide|think)"
TAIL = re.compile(rf"\n\s*(?:{ASKS})[^\n]*\s*$", re.IGNORECASE)


def load(
    root: Path, out_dir: Path, *, files: str | Sequence[str] = "**/*.jsonl", split: str = "train"
) -> tuple[list[Record], Path, Bad]:
    """Records, image root and bad rows of `reasoning_mcq_rl` and `reasoning_mcq_sft` (JSON lines); images in `root`.

    Source: hub data set General-Medical-AI/GMAI-Reasoning10K (arXiv 2504.01886): image, conversations of {from, value};
    options stand in the question, the answer is a letter, alone or in `<answer>`. Written after its card, not run on
    the set. Raises UserError for a root without such files or columns.
    """

    def parse(row: Mapping[str, Any], record_id: str) -> Record:
        said = {text_of(turn.get("from")): text_of(turn.get("value")) for turn in _turns(row)}
        asked, replied = said.get("human", ""), said.get("gpt", "")
        question, options = parse_problem(TAIL.sub("", asked))
        thought = THOUGHT.search(replied)
        answer = replied if TAGGED.search(replied) else THOUGHT.sub("", replied).strip()
        return make_record(
            record_id, images_of(row.get("image"), out_dir), question, list(options.items()),
            gold_letter(answer, options), split=split, source="", license="not stated",
            reasoning=thought[1] if thought else "",
        )  # fmt: skip

    return load_rows(root, out_dir, find_files(root, files), parse, name="gmai_reasoning", needed=NEEDED)


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations are not one question and one reply")
    return turns
