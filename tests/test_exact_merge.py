"""`merge.exact`: updates below the rounding step of bf16 weights reach what is asked, however they are kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import deltas
from safetensors.torch import load_file, save_file
from test_caci_stage import TRAINED, weights_of
from test_merge_files import save_adapter, text_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmedexpert.errors import UserError
from mmedexpert.merging.apply import merge_adapters
from mmedexpert.merging.low_rank import core_space
from mmedexpert.merging.methods import linear, task_arithmetic, ties
from mmedexpert.merging.rule import Method
from mmedexpert.merging.search import merged_in_place
from mmedexpert.merging.stream import load_update
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.dense import DenseUpdate, update_in
from mmedexpert.models.lean import start_from_
from mmedexpert.schema import Config
from mmedexpert.stages import caci
from mmedexpert.stages.answering import from_folder
from mmedexpert.stages.common import Base
from mmedexpert.stages.evaluation import run as evaluate
from mmedexpert.stages.subjects import subjects_of

HALF = partial(ties, weights=None, density=0.5)
RULES: dict[str, Method] = {
    "linear": partial(linear, weights=[1.0, 3.0]), "task_arithmetic": partial(task_arithmetic, scaling=0.7),
    "core_space": core_space, "ties": HALF,
}  # fmt: skip
LOST = 2.0**-8  # of a squared norm: what bf16 factors or rows may lose


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    """A bf16 base and two adapters of it whose updates lie far below the rounding step of most of its weights."""
    text_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(text_model(), tmp_path / str(seed), seed)
        file = tmp_path / str(seed) / "adapter_model.safetensors"
        save_file({k: v * 5e-4 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    return [tmp_path / name for name in ("base", "1", "2")]


def off(found: Tensor, wanted: Tensor) -> float:
    """Squared norm of the difference, as a share of what is wanted."""
    return float((found.double() - wanted.double()).square().sum() / wanted.double().square().sum())


def by_hand(folders: list[Path], rule: Method) -> dict[str, Tensor]:
    """The rule on whole tensors, from a merge of the base in fp32."""
    base, *parts = folders
    whole = base.parent / "whole"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(whole)
    merge_adapters(whole, whole.parent / "merged", {p.name: p for p in parts}, {}, rule)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, whole.parent / "merged"))
    return {name: after[name] - before[name] for name in LoraAdapter.load(parts[0]).modules}


@pytest.mark.parametrize("name", RULES)
def test_what_is_kept_is_the_merge_and_the_model_has_lost_it(small: list[Path], name: str, tmp_path: Path) -> None:
    base, *parts = small
    wanted = by_hand(small, RULES[name])
    lost = merge_adapters(base, tmp_path / "model", {p.name: p for p in parts}, {}, RULES[name])
    assert merge_adapters(base, tmp_path / "exact", {p.name: p for p in parts}, {}, RULES[name], exact=True) == {}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    shares = [off(after[n].float() - before[n].float(), delta) for n, delta in wanted.items()]
    sizes = [float(delta.double().square().sum()) for delta in wanted.values()]
    share = sum(s * size for s, size in zip(shares, sizes, strict=True)) / sum(sizes)
    assert lost["rounding_lost"] == pytest.approx(share, rel=1e-3) and share > 0.3
    kept = update_in(tmp_path / "exact")
    assert type(kept) is (DenseUpdate if name == "ties" else LoraAdapter)
    assert kept.shapes.keys() == wanted.keys()
    assert all(off(kept.delta(n), delta) < LOST**2 for n, delta in wanted.items())


@pytest.mark.parametrize("name", ["core_space", "ties"])
def test_a_bf16_model_acts_by_what_is_kept(small: list[Path], name: str, tmp_path: Path) -> None:
    """On inputs along the update, and weights of 0: beside others what bf16 adds up would be rounded again."""
    base, *parts = small
    merge_adapters(base, tmp_path / "exact", {p.name: p for p in parts}, {}, RULES[name], exact=True)
    kept = update_in(tmp_path / "exact")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for n in kept.shapes:
        model.get_parameter(n).data.zero_()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start_from_(model, kept)
    for n in kept.shapes:
        delta = kept.delta(n)
        x = torch.linalg.svd(delta).Vh[0].to(torch.bfloat16)
        found = model.get_submodule(n.removesuffix(".weight"))(x[None])[0]
        assert off(found, delta @ x.float()) < LOST
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the weights stay the base's


def test_a_search_acts_by_the_whole_merge_and_leaves_the_base(small: list[Path]) -> None:
    base, *parts = small
    updates: list[Any] = [load_update(part, base) for part in parts]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    name = updates[0].modules[0]
    module = model.get_submodule(name.removesuffix(".weight"))
    x = torch.linalg.svd(updates[0].delta(name) + updates[1].delta(name)).Vh[0].to(torch.bfloat16)
    module.weight.data.zero_()
    kind = type(module)
    rule = partial(task_arithmetic, weights=None, scaling=1.0)
    points = [{"scaling": 2.0}, {"scaling": 6.0}]
    found = [module(x[None])[0] for _ in merged_in_place(model, updates, 2, rule, points, exact=True)]
    whole = (updates[0].delta(name) + updates[1].delta(name)) @ x.float()
    assert off(found[0], 2 * whole) < LOST and off(found[1], 6 * whole) < LOST
    assert not module(x[None]).any() and type(module) is kind


def test_a_truncated_or_foreign_update_is_told(small: list[Path], tmp_path: Path) -> None:
    base, *parts = small
    merge_adapters(base, tmp_path / "exact", {p.name: p for p in parts}, {}, HALF, exact=True)
    file = tmp_path / "exact" / "update.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(UserError, match=r"update\.safetensors"):
        update_in(tmp_path / "exact")
    file.write_bytes(data[:-2] + b"\xc0\x7f")  # NaN in bf16
    broken = update_in(tmp_path / "exact")
    with pytest.raises(UserError, match="NaN or Inf"):
        broken.delta(list(broken.shapes)[-1])
    text_model(seed=5).save_pretrained(tmp_path / "other")
    file.write_bytes(data)
    with pytest.raises(UserError, match="another base"):
        from_folder(tmp_path / "exact", Base(tmp_path / "other", "other"))


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["linear", "ties"])
def test_it_is_taught_and_asked_in_place_of_the_model(answering, merge):
    """In fp32, where both are the same: what the merge is, then what it learnt, then what answers."""
    told = [*TRAINED, f"merge={merge}", "merge.distil_steps=3", "data.source.test=6"]
    config, plain = answering(*told, "merge.exact=true"), answering(*told)
    ((run,), (without,)) = caci.run(config).values(), caci.run(plain).values()
    assert run.run_id != without.run_id and not (without.folder / "exact").exists()
    start = next(run.folder.parent.parent.glob(f"caci/{merge}-*/exact")).parent
    base, begun, learnt = (
        weights_of(Path(str(config.model.name_or_path))),
        update_in(start / "exact"),
        deltas(run.folder / "update"),
    )
    kept, other = update_in(run.folder / "exact"), weights_of(without.folder / "model")
    assert isinstance(kept, DenseUpdate) == (merge == "ties")
    for name, weight in weights_of(run.folder / "model").items():
        if name not in kept.shapes:
            assert torch.equal(weight, base[name])
            continue
        assert off(kept.delta(name), begun.delta(name) + learnt[name]) < LOST**2
        assert off(kept.delta(name), weight - base[name]) < LOST**2
        assert off(weight, other[name]) < 1e-4  # as it was without
    subject = next(s for s in subjects_of(config) if s.name == merge)
    assert subject.adapter == run.folder / "exact" and from_folder(run.folder, Base(subject.folder, "")).adapter
    told.append("eval.models=[" + merge + "]")
    found, wanted = (said(answering(*told, "stage=eval", f"merge.exact={exact}")) for exact in (True, False))
    assert found == wanted and len(found) > 10


def said(config: Config) -> list[str]:
    (done,) = evaluate(config).values()
    return [json.loads(line)["response"] for line in (done.folder / "predictions.jsonl").read_text().splitlines()]


def test_servers_cannot_have_a_merge_that_no_adapter_holds(answering):
    config = answering(
        *TRAINED, "merge=ties", "merge.exact=true", "stage=eval", "eval.models=[ties]", "engine=vllm",
        "engine.base_urls=[http://localhost:1]",
    )  # fmt: skip
    with pytest.raises(UserError, match="engine=transformers"):
        evaluate(config)
