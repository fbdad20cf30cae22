"""stage=caci on a model that answers: the merged weights against the rule in plain torch, and the search on val."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, deltas
from transformers import AutoModelForImageTextToText

from mmedexpert.data.records import load_records
from mmedexpert.schema import Config
from mmedexpert.stages import caci, dsa, gba
from mmedexpert.stages.data import dataset

NAMES = ["pediatrics", "oncology_surgery", "brain_sensory"]
TRAINED = [f"specialty.names=[{','.join(NAMES)}]", "dsa.lr=0.02", "gba.lr=0.01", "gba.warmup_ratio=0"]
NAME = "model.language_model.layers.1.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]


@dataclass
class Merged:
    config: Config
    folder: Path
    base: Weights
    experts: list[Weights]  # in the order of specialty.names
    update: Weights  # the reasoner's RL update alone

    def found(self) -> Weights:
        return weights_of(self.folder / "model")


def weights_of(folder: Path) -> Weights:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return {name: p.detach() for name, p in model.named_parameters()}


def merge(config: Config) -> Merged:
    (run,) = caci.run(config).values()
    experts, (reasoner,) = dsa.run(config), gba.run(config).values()
    return Merged(
        config, run.folder, weights_of(Path(str(config.model.name_or_path))),
        [deltas(experts[name].folder / "adapter") for name in config.specialty.names],
        deltas(reasoner.folder / "update"),
    )  # fmt: skip


def kept(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries of a tensor, a share of `density` of them."""
    count = int(density * delta.numel())
    smallest = delta.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def rule(experts: list[torch.Tensor], reasoner: torch.Tensor, method: dict[str, Any]) -> torch.Tensor:
    """conf/merge/caci_vote.yaml's formula, written out entry by entry over stacked deltas."""
    weights = torch.tensor(method["expert_weights"] or [1.0] * len(experts))
    trimmed = [kept(delta, method["expert_density"]) for delta in experts]
    guided = kept(reasoner, method["reasoner_density"])
    votes = [w * d / d.norm() for w, d in zip(weights, trimmed, strict=True)]
    vote = sum(votes) + guided / guided.norm()
    sign = torch.where(vote >= 0, 1.0, -1.0)
    total, mass = torch.zeros_like(reasoner), torch.zeros_like(reasoner)
    for w, delta in zip(weights, trimmed, strict=True):
        agrees = delta * sign > 0
        total += torch.where(agrees, w * delta, 0.0)
        mass += torch.where(agrees, w, 0.0)
    mean = total / torch.where(mass == 0, 1.0, mass)
    return method["expert_scaling"] * mean + method["reasoner_scaling"] * torch.where(guided * sign > 0, guided, 0.0)


@pytest.fixture(scope="module")
def merged(answering) -> Merged:
    return merge(
        answering(
            *TRAINED, "merge.method.expert_weights=[1,3,0.5]", "merge.method.expert_density=0.6",
            "merge.method.reasoner_density=0.35", "merge.method.expert_scaling=0.9",
            "merge.method.reasoner_scaling=1.7",
        )
    )  # fmt: skip


def test_the_updates_are_worth_merging(merged):
    for one in [*merged.experts, merged.update]:
        assert all(float(delta.norm()) > 1e-2 for delta in one.values())
    flat = [torch.cat([d.flatten() for d in one.values()]) for one in [*merged.experts, merged.update]]
    cosines = [float(torch.cosine_similarity(flat[0], other, dim=0)) for other in flat[1:]]
    assert max(cosines) < 0.99


def test_the_merge_is_base_plus_the_rule_on_experts_and_the_reasoners_update(merged):
    found, method = merged.found(), dict(merged.config.merge.method or {})
    assert found.keys() == merged.base.keys()
    for name, weight in merged.base.items():
        if name not in merged.update:
            assert torch.equal(found[name], weight), name
            continue
        wanted = weight + rule([one[name] for one in merged.experts], merged.update[name], method)
        off = (found[name] - wanted).abs() > 1e-5
        assert off.float().mean() < 1e-3, name  # a tie at the threshold may fall either way


def test_another_input_would_be_another_merge(merged):
    """So the test above sees the order of the experts, each value, and which of the reasoner's adapters is merged."""
    method = dict(merged.config.merge.method or {})
    name = next(iter(merged.update))
    experts, update = [one[name] for one in merged.experts], merged.update[name]
    (reasoner,) = gba.run(merged.config).values()
    whole = deltas(reasoner.folder / "adapter")[name]
    own = rule(experts, update, method)
    others = [rule([experts[i] for i in (1, 0, 2)], update, method), rule(experts, whole, method)]
    for key, value in {"expert_weights": None, "expert_density": 0.8, "reasoner_density": 0.8, "expert_scaling": 1.0,
                       "reasoner_scaling": 1.0}.items():  # fmt: skip
        others.append(rule(experts, update, method | {key: value}))
    for other in others:
        assert ((own - other).abs() > 1e-5).float().mean() > 0.05


def test_linear_is_the_mean_of_experts_and_update(answering):
    merged = merge(answering(*TRAINED, "merge=linear"))
    for name in merged.update:
        wanted = merged.base[name] + (sum(one[name] for one in merged.experts) + merged.update[name]) / 4
        torch.testing.assert_close(merged.found()[name], wanted, rtol=1e-4, atol=1e-5)


def test_the_search_asks_validation_questions_and_takes_the_best_point(answering):
    """Two scalings: one keeps the model, one breaks it. Accuracies are counted by hand from the answers."""
    config = answering(*TRAINED, "merge.search={expert_scaling: [40.0, 0.5]}", "data.source.val=8")
    merged = merge(config)
    records, image_root = load_records(dataset(config).folder)
    gold = {record.id: record.answer for record in records}
    plain = Plain(config.model.name_or_path, image_root)
    points = list(csv.DictReader((merged.folder / "search.csv").open()))
    assert [float(point["expert_scaling"]) for point in points] == [40.0, 0.5]
    for place, point in enumerate(points):
        lines = (merged.folder / "search" / f"{place:04d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert sorted(row["id"] for row in rows) == sorted(f"{name}-val-{i:03d}" for name in NAMES for i in range(8))
        right = [row["response"].endswith(f"<answer>{gold[row['id']]}</answer>") for row in rows]
        assert float(point["macro_accuracy"]) == pytest.approx(sum(right) / len(right), abs=1e-4)
        method = dict(config.merge.method or {}) | {"expert_scaling": float(point["expert_scaling"])}
        update = {n: rule([one[n] for one in merged.experts], merged.update[n], method) for n in merged.update}
        record_of = {record.id: record for record in records}
        said = plain.greedy(update, [(record_of[row["id"]], row["perspective"]) for row in rows], 32)
        same = [text == row["response"] for text, row in zip(said, rows, strict=True)]
        assert place == 0 or sum(same) >= len(same) - 2
    assert [point["best"] for point in points] == ["False", "True"]
    assert float(points[1]["macro_accuracy"]) > float(points[0]["macro_accuracy"])
    best = update[NAME]  # of the last point
    assert ((merged.found()[NAME] - merged.base[NAME] - best).abs() > 1e-5).float().mean() < 1e-3
