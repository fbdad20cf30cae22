"""What models are called: no two of them share a row."""

from __future__ import annotations

import pytest
from test_config import composed

from mmedexpert.errors import UserError
from mmedexpert.names import distinct_names, trained_names


@pytest.mark.parametrize(
    ("names", "paths", "right"),
    [
        (["a", "b"], ["x/a", "x/b"], ["a", "b"]),
        (["model", "model"], ["a/model", "b/model"], ["a.model", "b.model"]),
        (["caci", "caci"], ["outputs/caci/caci-1", "outputs/caci/caci-2"], ["caci-1", "caci-2"]),
        (["model", "model"], ["x/a/model", "y/a/model"], ["x.a.model", "y.a.model"]),
        (["model", "model", "x"], ["a/model", "a/model", "x"], ["model", "model", "x"]),  # one model, twice
        (["model", "model", "a.model"], ["a/model", "b/model", "z/a.model"], ["{}.a.model", "{}.b.model", "a.model"]),
        (["base", "x"], ["somewhere/base", "x"], ["somewhere.base", "x"]),  # a row of that name is there already
        ([], [], []),
    ],
)
def test_namesakes_are_told_apart_by_their_paths(names, paths, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distinct_names(names, paths) == [name.format(tmp_path.name) for name in right]


def test_a_name_in_use_is_not_taken_again():
    assert distinct_names(["caci"], ["outputs/caci/caci-1"], taken=["caci"]) == ["caci-1"]


def test_the_models_of_a_pipeline_by_name():
    assert trained_names(composed("specialty=cardiology", "merge=ties")) == ["cardiology", "reasoner", "ties"]
    each = trained_names(composed("specialty.names=[a,b]", "gba.init=each", "merge=none"))
    assert each == ["a", "b", "reasoner-a", "reasoner-b"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["specialty.names=[base,pediatrics]"], ["merge.name=pediatrics"], ["merge.name=reasoner"],
        ["merge.name=majority"], ["benchmark=[slake,vqa_rad]", "benchmark.vqa_rad.name=slake"],
        ["specialty.names=[grpo]"],
    ],
)  # fmt: skip
def test_two_things_of_one_name_are_refused(overrides):
    with pytest.raises(UserError, match="two things"):
        composed(*overrides)


@pytest.mark.parametrize("override", ["merge.name=a/b", "gba.name=a/b", "specialty.names=[a/b]", "model.name=''"])
def test_a_name_must_fit_into_a_folder_name(override):
    with pytest.raises(UserError, match="folder"):
        composed(override)
