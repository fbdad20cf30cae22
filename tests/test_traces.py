"""DSA needs reasoning traces and says so before any work; rates and steps are the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from mmedexpert.checks import typed
from mmedexpert.data.record import Trace
from mmedexpert.data.records import load_records, save_records
from mmedexpert.errors import UserError
from mmedexpert.stages import dsa
from mmedexpert.stages.data import dataset

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
REAL = sorted(path.stem for path in CONF.glob("model/*.yaml") if path.stem not in ("tiny", "_qwen"))


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", overrides=list(overrides)))


SMALL = ("specialty=[pediatrics]", "data.source.train=10", "data.source.val=2", "data.source.test=2")


@pytest.fixture()
def untraced(tmp_path):
    """Overrides of a data set of ten training records, three of them without steps of thought."""
    outputs = f"paths.outputs={tmp_path}"
    config = composed("specialty=pediatrics", *SMALL[1:], outputs)
    data = dataset(config)
    records, root = load_records(data.folder)
    train = [i for i, record in enumerate(records) if record.split == "train" and "pediatrics" in record.specialties]
    assert len(train) == 10
    for i, trace in zip(train, (None, Trace("intuitive", ()), Trace("intuitive", (" ",))), strict=False):
        records[i] = replace(records[i], trace=trace)
    save_records(records, data.folder, root)
    return ["specialty=pediatrics", *SMALL[1:], outputs, "dsa.allow_untraced=false"]


@pytest.mark.parametrize(
    "words",
    [
        ["stage=pipeline"], ["stage=dsa"], ["stage=gba"], ["stage=gba", "gba.init=sft_all"],
        ["stage=gba", "gba.init=each"], ["stage=caci"], ["stage=eval"], ["stage=eval", "eval.models=[sft_all]"],
    ],
)  # fmt: skip
def test_every_stage_that_trains_experts_stops_before_any_work(untraced, tmp_path, monkeypatch, words):
    def work(*_, **__):
        raise AssertionError("a base was built or looked up")

    for stage in ("pretrain", "dsa", "gba", "caci", "evaluation"):
        monkeypatch.setattr(f"mmedexpert.stages.{stage}.base_of", work, raising=False)
    config = composed(*untraced, *words)
    with pytest.raises(UserError, match=r"3 of 10 training records .* no reasoning trace.*dsa\.allow_untraced=true"):
        instantiate(config.stage.run)(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_real_model_is_refused_and_the_tiny_one_told(untraced, capsys):
    left_to_the_model = untraced[:-1]
    with pytest.raises(UserError, match=r"3 of 10 training records"):
        dsa.ready(composed(*left_to_the_model, "model=qwen2_5_vl_7b"), ["pediatrics"])
    dsa.ready(composed(*left_to_the_model), ["pediatrics"])
    assert "3 of 10 training records of data phantom have no reasoning trace" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_way_out_and_what_needs_no_trace(untraced, monkeypatch):
    dsa.ready(composed(*untraced, "dsa.allow_untraced=true"), ["pediatrics"])
    config = composed(*untraced, "stage=gba", "gba.init=base")

    def reached(*_, **__):
        raise KeyError("the base")

    monkeypatch.setattr("mmedexpert.stages.gba.base_of", reached)
    with pytest.raises(KeyError, match="the base"):
        instantiate(config.stage.run)(config)


def test_allowing_it_is_no_part_of_an_experts_identity(untraced, monkeypatch):
    keys = []
    monkeypatch.setattr("mmedexpert.stages.dsa.stage_run", lambda config, stage, name, key, *_, **__: keys.append(key))
    monkeypatch.setattr("mmedexpert.stages.dsa.base_of", lambda config: type("Base", (), {"identity": "b"}))
    monkeypatch.setattr("mmedexpert.stages.dsa.ready", lambda *_: None)
    for words in (["dsa.allow_untraced=true"], [], ["dsa.checkpoint_every=7"], ["dsa.lr=0.5"]):
        dsa.expert(composed(*untraced, *words), "pediatrics", ["pediatrics"])
    assert keys[0] == keys[1] == keys[2] != keys[3]


# ---------------------------------------------------------------- rates and steps


def test_the_tiny_model_keeps_its_rates():
    config = composed()
    assert (config.dsa.lr, config.dsa.steps, config.gba.lr, config.gba.steps) == (3e-3, 120, 1e-3, 20)


@pytest.mark.parametrize("model", REAL)
def test_a_real_model_brings_the_peers_rates_and_the_command_line_wins(model):
    config = composed(f"model={model}")
    assert (config.dsa.lr, config.dsa.steps, config.gba.lr, config.gba.steps) == (1e-5, 200, 1e-5, 200)
    config = composed(f"model={model}", "dsa.lr=2e-4", "gba.steps=7")
    assert (config.dsa.lr, config.gba.steps, config.gba.lr) == (2e-4, 7, 1e-5)
