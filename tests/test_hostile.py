"""Hostile rows, responses and replies: a few hundred of each; ten thousand: experiments/faults/hostile.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "faults"))
import hostile


def test_nothing_crashes_and_nothing_is_miscounted(tmp_path):
    found = hostile.hostile(200, 1, tmp_path)
    assert {kind: one["wrong"] for kind, one in found.items()} == {
        kind: {} for kind in (*hostile.KINDS, *hostile.FILES)
    }
    assert all(sum(one["came_to"].values()) > 100 for one in found.values())
    assert found["parquet"]["came_to"]["usable"] > 0
    assert (
        found["body"]["came_to"]["read"] and found["row"]["came_to"]["usable"] and found["response"]["came_to"]["wrong"]
    )
