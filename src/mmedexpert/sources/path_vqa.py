"""PathVQA: yes/no and open questions on pathology images, from the hub's Parquet files."""

from __future__ import annotations

from pathlib import Path

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import HUB_SPLITS, find_parquet, load_vqa


def load(root: Path, out_dir: Path, *, split: str = "test") -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir/images`) and bad rows of `data/<split>-*.parquet`.

    Source: He et al. 2020 (arXiv 2003.10286), as published in flaviagiammarino/path-vqa (test: 6,719).
    Raises UserError for another split than train, val, test, and for missing, truncated or unknown files.
    """
    if split not in HUB_SPLITS:
        raise UserError(f"path_vqa has no split {split!r}: choose one of {', '.join(HUB_SPLITS)}")
    paths = find_parquet(root, HUB_SPLITS[split])
    if not paths:
        raise UserError(f"{root} holds no {HUB_SPLITS[split]}-*.parquet: give the folder of flaviagiammarino/path-vqa")
    return load_vqa(paths, out_dir, name="path_vqa", source="PathVQA", license="MIT", split=split)
