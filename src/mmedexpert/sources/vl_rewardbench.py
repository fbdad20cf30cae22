"""VL-RewardBench: pairs of answers about images of all kinds, preferred by people; a general check of a judge."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import folded, record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import find_parquet, read_parquet, store_image, text_of

NEEDED = ("id", "query", "response", "image", "human_ranking")
GROUPS = {"rlaif": "hallucination", "rlhf": "hallucination", "hallucination": "hallucination", "mathverse": "reasoning",
          "mmmu": "reasoning"}  # fmt: skip
GENERAL = "general"  # all else


def load(root: Path, out_dir: Path) -> tuple[list[Record], Path, Bad]:
    """Records (`data.pairs`) with the one dimension overall, image root `out_dir/images`, and what was left out.

    Source: arXiv 2411.17451, MMInstruction/VL-RewardBench on the hub: `human_ranking` [0, 1] prefers the first answer,
    [1, 0] the second; the beginning of `id` says which of three groups a pair counts in. Some ids stand twice, on
    different pairs: the second is numbered.

    Raises UserError for a folder without its Parquet files, and a damaged one.
    """
    paths = find_parquet(root, "test")
    if not paths:
        raise UserError(f"{root} holds no test-*.parquet: give the folder as it was published")
    records: list[Record] = []
    bad: Bad = []
    taken: Counter[str] = Counter()
    for path in paths:
        for number, row in enumerate(read_parquet(path, NEEDED)):
            identity = f"vl-{text_of(row['id']).strip() or number}"
            taken[identity] += 1
            identity += f" ({taken[identity]})" if taken[identity] > 1 else ""
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
    name = text_of(row["id"]).strip().lower()
    group = next((group for start, group in GROUPS.items() if name.startswith(start)), GENERAL)
    return record_of(
        identity=identity, images=[store_image(row["image"], images)], question=row["query"],
        answers={"A": answers[0], "B": answers[1]}, labels={"overall": "A" if ranks == [0, 1] else "B"},
        source="VL-RewardBench", license="MIT", groups={"category": group},
    )  # fmt: skip
