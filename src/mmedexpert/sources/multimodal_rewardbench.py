"""Multimodal RewardBench: pairs of a right and a wrong answer in eight categories; a general check of a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import folded, record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import text_of
from mmedexpert.sources.unpack import read_objects

FILE = "all_data.json"
NEEDED = ("ID", "Text", "Image", "Output1", "Output2", "Better", "Category")


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records (`data.pairs`) with the one dimension overall, image root (`root`), and what was left out.

    Source: arXiv 2502.14191, facebookresearch/multimodal_rewardbench@b4b92cd (CC BY-NC): `all_data.json` as its
    download script leaves it, images beside it; `Better` is Output1 or Output2. Safety and reasoning are counted in two
    halves each, by the beginning of `ID`.

    Raises UserError where the file is missing or damaged.
    """
    path = next((one for one in (root / FILE, root / "data" / FILE) if one.is_file()), None)
    if path is None:
        raise UserError(f"{root} holds no {FILE}: give the folder that its download script has filled")
    records: list[Record] = []
    bad: Bad = []
    for where, row in read_objects(path, NEEDED):
        try:
            records.append(_parse(row))
        except ValueError as error:
            bad.append((where, str(error)))
    kept, copies = folded(records)
    return kept, path.parent, bad + copies


def _parse(row: Any) -> Record:
    if not isinstance(row, dict):
        raise ValueError("the row is no object")
    better, identity = row.get("Better"), text_of(row.get("ID")).strip()
    if better not in ("Output1", "Output2") or not identity:
        raise ValueError(f"Better is {better!r}: Output1 or Output2 is needed, and an ID")
    image = text_of(row.get("Image")).strip()
    return record_of(
        identity=f"mm-{identity}", images=[image] if image else [], question=row.get("Text"),
        answers={"A": row.get("Output1"), "B": row.get("Output2")},
        labels={"overall": "A" if better == "Output1" else "B"}, source="Multimodal RewardBench",
        license="CC BY-NC 4.0",
        groups={"category": category_of(identity, text_of(row.get("Category")).strip())},
    )  # fmt: skip


def category_of(identity: str, category: str) -> str:
    """The category as it is counted: safety and reasoning in halves."""
    if category == "safety":
        return "safety/bias" if identity.lower().startswith("pairs") else "safety/toxicity"
    if category == "reasoning":
        return "reasoning/math" if identity.lower().startswith("math") else "reasoning/coding"
    return category
