"""The base that comes with the package is the one that was scored, and is as good as it was."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from test_config import composed
from test_unread import told

from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.stages import pretrain
from mmedexpert.unread import parts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ship():
    sys.path.insert(0, str(ROOT / "experiments" / "base"))
    yield importlib.import_module("ship")
    sys.path.pop(0)


def test_the_tiny_model_starts_from_it_unless_it_is_taught_here() -> None:
    config = composed("stage=dsa", "specialty=cardiology")
    assert pretrain.base_of(config).folder == pretrain.SHIPPED and "pretrain" not in parts(config)
    assert "pretrain" in parts(composed("stage=dsa", "specialty=cardiology", "model.shipped=null"))
    assert "pretrain" in parts(composed("stage=pretrain"))


def test_another_file_in_its_place_is_refused(monkeypatch, tmp_path) -> None:
    config = composed("stage=dsa", "specialty=cardiology")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(pretrain, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match=r"model\.shipped=null"):
        pretrain.base_of(config)


def test_lessons_settings_are_told_to_be_unread() -> None:
    with pytest.raises(UserError, match=r"pretrain\.lr is not read here.*model\.shipped=null"):
        told("stage=dsa", "specialty=cardiology", "pretrain.lr=1")


def test_it_is_as_good_as_when_it_was_shipped(ship) -> None:
    """Right answers by what lessons need and perspective, and measurements, on fewer lessons of the same kind."""
    told = json.loads((pretrain.SHIPPED / "scores.json").read_text(encoding="utf-8"))["scores"]
    found = ship.scores(pretrain.SHIPPED, each=18)
    for needs in PERSPECTIVES:
        for perspective in PERSPECTIVES:
            assert found[needs][perspective] >= told[needs][perspective] - 0.2, (needs, perspective)
    total = {
        name: sum(of[n][p] for n in PERSPECTIVES for p in PERSPECTIVES) for name, of in (("now", found), ("then", told))
    }
    assert total["now"] >= total["then"] - 1.0
    assert "| bayesian |" in ship.table(found)
