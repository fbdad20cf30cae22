"""`merge.search`: points in order, merges in place equal to those on disk, thresholds found once, bad grids refused."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from test_merge_files import save_adapter, text_model

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.merging import stream
from mmedexpert.merging.apply import merge_adapters
from mmedexpert.merging.grams import Grams
from mmedexpert.merging.search import best_of, grid_points, merged_in_place
from mmedexpert.merging.stream import Stream, load_update

CONF = Path(__file__).parents[1] / "conf"
METHODS = sorted(path for path in CONF.glob("merge/*.yaml") if path.stem != "none")
N = 3  # two experts and a reasoner


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three adapters of it, the last with other targets."""
    root = tmp_path_factory.mktemp("merge")
    text_model().save_pretrained(root / "base")
    for i, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "up_proj"], ["q_proj"])):
        save_adapter(text_model(), root / str(i), i, target_modules=targets)
    return [root / "base", *(root / str(i) for i in range(N))]


def rule_of(path: Path) -> functools.partial[Any]:
    return instantiate(yaml.safe_load(path.read_text())["method"], _convert_="all")


def points_for(rule: functools.partial[Any]) -> list[dict[str, Any]]:
    """Two values of every density and scaling that a rule has; weights where it has neither."""
    grid: dict[str, list[Any]] = {name: [0.5, 0.8] for name in rule.keywords if name.endswith(("density", "scaling"))}
    return grid_points(grid or {"weights": [None, [1.0, 2.0, 0.5]]}, ("scaling", "expert_scaling", "reasoner_scaling"))


def grams_of(folders: list[Path]) -> Grams:
    """Gram matrices of two experts' inputs, made up."""
    shapes = load_update(folders[1], folders[0]).shapes
    for i in range(2):
        (folder := folders[0].parent / f"grams{i}").mkdir(exist_ok=True)
        inputs = {
            name: torch.randn(30, shape[1], generator=torch.Generator().manual_seed(i))
            for name, shape in shapes.items()
        }
        save_file({name: x.T @ x for name, x in inputs.items()}, folder / "0.safetensors")
    return Grams.load([folders[0].parent / f"grams{i}" for i in range(2)], spanned=False)


def merges(folders: list[Path], rule: functools.partial[Any], points: list[dict[str, Any]]) -> Iterator[Any]:
    model = text_model()
    updates = [load_update(folder, folders[0]) for folder in folders[1:]]
    for point in merged_in_place(model, updates, 2, rule, points, grams_of(folders)):
        yield point, {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_in_place_is_what_the_merge_writes(path: Path, folders: list[Path], tmp_path: Path) -> None:
    """So every rule of conf/merge is linear in its scalings."""
    rule = rule_of(path)
    seen = []
    for place, (point, weights) in enumerate(merges(folders, rule, points_for(rule))):
        out, (base, *parts) = tmp_path / str(place), folders
        merge_adapters(
            base, out, {"a": parts[0], "b": parts[1]}, {"r": parts[2]}, functools.partial(rule, **point),
            grams=grams_of(folders),
        )  # fmt: skip
        for name, written in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(weights[name], written, rtol=1e-5, atol=1e-6)
        seen.append(weights["model.layers.0.self_attn.q_proj.weight"])
    assert len(seen) >= 2
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_the_base_comes_back_also_after_an_error(folders: list[Path]) -> None:
    model = text_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    updates = [load_update(folder, folders[0]) for folder in folders[1:]]
    tries = merged_in_place(model, updates, 2, rule_of(CONF / "merge" / "ties.yaml"), [{"scaling": 9.0}])
    next(tries)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    tries.close()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_scalings_share_one_pass_and_densities_their_thresholds(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, called = [], []
    search, call = Stream._thresholds, stream.call_method
    monkeypatch.setattr(Stream, "_thresholds", lambda self, names: searched.append(names) or search(self, names))
    monkeypatch.setattr(stream, "call_method", lambda *a, **k: called.append(a[3]) or call(*a, **k))
    grid = {"reasoner_scaling": [0.5, 1.0, 2.0], "expert_scaling": [0.5, 1.0], "expert_weights": [None, [1, 2]]}
    points = grid_points(grid | {"expert_density": [0.5, 0.8]}, ("expert_scaling", "reasoner_scaling"))
    assert len(points) == 24 and len(list(merges(folders, rule_of(CONF / "merge" / "caci_vote.yaml"), points))) == 24
    tensors, densities, passes = 4, 2, 4  # q_proj and up_proj of two layers; weights times densities
    assert len(searched) == tensors * densities
    blocks = [name for name in called if name != "the settings"]
    assert len(blocks) == tensors * passes  # one block a tensor: each of 4 groups merges once for its 6 points


def test_grid_points_keep_what_shares_the_rest_together() -> None:
    points = grid_points({"scaling": [1, 2], "density": [0.5, 0.2], "weights": [None]}, ["scaling"])
    assert [(p["density"], p["scaling"]) for p in points] == [(0.5, 1), (0.5, 2), (0.2, 1), (0.2, 2)]


def test_the_first_of_equal_points_is_best() -> None:
    assert best_of([0.2, 0.7, 0.5, 0.7]) == 1


def test_a_value_the_rule_refuses_is_told_before_the_first_merge(folders: list[Path]) -> None:
    points = [{"vote": "mass"}, {"vote": "weight"}]
    with pytest.raises(UserError, match="vote"):
        next(merges(folders, rule_of(CONF / "merge" / "ties.yaml"), points))


def config(*overrides: str) -> Any:
    if not any(word.startswith("merge=") for word in overrides):
        overrides = ("merge=caci_vote", *overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", overrides=list(overrides)))


def test_search_is_off_by_default_and_typed() -> None:
    assert config().merge.search is None
    assert config("merge=ties", "merge.search={density: [0.5, 1], scaling: [1.0]}").merge.search == {
        "density": [0.5, 1],
        "scaling": [1.0],
    }
    assert config("merge.search={expert_weights: [null, [1, 2, 1, 1]]}").merge.search


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["merge.search={}"], ["merge.search", "empty"]),
        (["merge=none", "merge.search={scaling: [1]}"], ["merge=none"]),
        (["merge.search={density: [0.5]}"], ["merge.search.density", "expert_density"]),
        (["merge.search={_target_: [os.system]}"], ["merge.search._target_"]),
        (["merge.search={expert_density: 0.5}"], ["merge.search.expert_density", "list"]),
        (["merge.search={expert_density: []}"], ["merge.search.expert_density", "list"]),
        (["merge.search={expert_density: [0.5, 0]}"], ["merge.search.expert_density=0", "(0, 1]"]),
        (["merge.search={expert_density: [1.01]}"], ["1.01", "(0, 1]"]),
        (["merge.search={expert_density: [high]}"], ["high", "number"]),
        (["merge.search={expert_scaling: [nan]}"], ["merge.search.expert_scaling", "finite"]),
        (["merge.search={expert_weights: [[1, 2]]}"], ["2 numbers for 4 updates"]),
        (["merge.search={expert_weights: [1, 2, 1, 1]}"], ["list of 4 numbers"]),
        (["merge.search={expert_scaling: [1]}", "eval.split=val"], ["eval.split=test"]),
        (["merge=ties", "merge.method.density=1.5"], ["merge.method.density=1.5", "(0, 1]"]),
        (["merge=ties", "merge.method.weights=[1, 2]"], ["2 numbers for 5 updates"]),
        (["merge=ties", "merge.method.scaling=inf"], ["merge.method.scaling", "finite"]),
        (["merge.lora_rank=0"], ["merge.lora_rank=0"]),
    ],
)
def test_a_bad_grid_is_one_line_before_any_work(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_stage_searches_on_val_and_shows_what_it_did(outputs: Path) -> None:
    """A smoke pipeline, then two points; again nothing is done, and another grid is another run."""
    command = ["stage=caci", "merge=caci_vote", "merge.search={expert_scaling: [1.0, 0.5]}", "merge.lora_rank=4"]
    before = set((outputs / "caci").glob("caci_vote-*"))
    run(outputs, *command)
    (folder,) = set((outputs / "caci").glob("caci_vote-*")) - before
    rows = list(csv.DictReader((folder / "search.csv").open()))
    assert [row["expert_scaling"] for row in rows] == ["1.0", "0.5"] and [row["best"] for row in rows].count(
        "True"
    ) == 1
    best = max(rows, key=lambda row: float(row["macro_accuracy"]))
    metrics, manifest = (json.loads((folder / name).read_text()) for name in ("metrics.json", "manifest.json"))
    assert metrics["search/expert_scaling"] == float(best["expert_scaling"]) and metrics["search/points"] == 2
    assert manifest["search"]["split"] == "val" and 0 < metrics["energy_lost"] < 1
    records = [json.loads(line) for line in next(outputs.glob("data/*/records.jsonl")).read_text().splitlines()]
    split_of = {record["id"]: record["split"] for record in records}
    asked = [json.loads(line)["id"] for line in (folder / "search" / "0000.jsonl").read_text().splitlines()]
    assert len(asked) == 64 and {split_of[i] for i in asked} == {"val"}
    shown = json.loads((folder / "conflicts.json").read_text())
    assert {"rows", "columns", "cosines", "updates"} <= set(shown)
    assert len(shown["rows"]) == len(list(csv.DictReader((folder / "conflicts.csv").open()))) > 10
    assert 0 < metrics["sign_conflict_rate"] <= 1 and "layers/0/q_proj/sign_conflict_rate" in metrics
    for name in ("conflict_heatmap", "update_cosines"):
        assert (folder / f"{name}.png").is_file() and (folder / f"{name}.svg").is_file()
    assert (folder / "model" / "model.safetensors").is_file() and (folder / "adapter" / "adapter_config.json").is_file()

    run(outputs, *command)
    assert {folder} == set((outputs / "caci").glob("caci_vote-*")) - before
    run(outputs, "stage=caci", "merge=caci_vote", "merge.search={expert_scaling: [0.5]}")
    assert len(set((outputs / "caci").glob("caci_vote-*")) - before) == 2
