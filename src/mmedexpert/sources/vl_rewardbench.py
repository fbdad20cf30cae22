"""VL-RewardBench: pairs of answers about images of all kinds, preferred by people; a general check of a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import folded, record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import find_parquet, read_parquet, store_image, text_of

NEEDED = ("id", "query", "response", "image", "human_ranking", "query_source")
GROUPS = {
    "WildVision": "general", "POVID": "hallucination", "RLAIF-V": "hallucination", "RLHF-V": "hallucination",
    "MMMU-Pro": "reasoning", "MathVerse": "reasoning",
}  # fmt: skip
OTHER = "other"


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records (`data.pairs`) with the one dimension overall, image root `out_dir/images`, and what was left out.

    Source: arXiv 2411.17451, MMInstruction/VL-RewardBench on the hub: `human_ranking` [0, 1] prefers the first answer,
    [1, 0] the second; `query_source` names one of six sets in three groups (183, 749 and 318 of 1,250 pairs).

    Raises UserError for a folder without its Parquet files, and a damaged one.
    """
    paths = find_parquet(root, "test")
    if not paths:
        raise UserError(f"{root} holds no test-*.parquet: give the folder as it was published")
    records: list[Record] = []
    bad: Bad = []
    for path in paths:
        for number, row in enumerate(read_parquet(path, NEEDED)):
            identity = f"vl-{text_of(row['id']).strip() or number}"
            try:
                records.append(_parse(row, identity, out_dir / "images"))
            except ValueError as error:
                bad.append((identity, f"{path.name}: {error}"))
    kept, copies = folded(records)
    return kept, out_dir / "images", bad + copies


def _parse(row: Any, identity: str, images: Path) -> Record:
    answers, ranks = row["response"], row["human_ranking"]
    if not isinstance(answers, list) or len(answers) != 2 or ranks not in ([0, 1], [1, 0]):
        raise ValueError(f"it has no two answers ranked [0, 1] or [1, 0]: {str(ranks)[:40]}")
    group = next((name for key, name in GROUPS.items() if key.lower() in text_of(row["query_source"]).lower()), OTHER)
    return record_of(
        identity=identity, images=[store_image(row["image"], images)], question=row["query"],
        answers={"A": answers[0], "B": answers[1]}, labels={"overall": "A" if ranks == [0, 1] else "B"},
        source="VL-RewardBench", license="MIT", groups={"category": group},
    )  # fmt: skip
