"""The streaming merge: equal to the rule on whole tensors for any block size, exact thresholds, bytes left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.merging import low_rank, methods
from mmedexpert.merging.apply import low_rank_update, merge_adapters
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.rule import declare, declared
from mmedexpert.merging.select import RadixSelect
from mmedexpert.merging.sparsify import kept_ranks
from mmedexpert.merging.stream import Stream, load_update
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.checkpoint import read_checkpoint

SHAPES = {"a.weight": (37, 24), "b.weight": (24, 37), "c.weight": (8, 24)}
REST = {"norm.weight": (24,), "conv.weight": (6, 3, 2, 2)}
TARGETS = (("a.weight", "b.weight"), ("a.weight", "c.weight"), ("a.weight", "b.weight", "c.weight"))
RANKS = (4, 3, 6)


def numbers(shape: tuple[int, ...], seed: int, whole: bool = False) -> Tensor:
    """Normal numbers, or few different whole ones: products of these are exact in any order, and tie."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def write_lora(folder: Path, targets: tuple[str, ...], rank: int, seed: int, whole: bool = False) -> Path:
    folder.mkdir(parents=True)
    factors = {}
    for i, name in enumerate(targets):
        rows, columns = SHAPES[name]
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = numbers((rank, columns), seed * 100 + 2 * i, whole)
        factors[f"{stem}.lora_B.weight"] = numbers((rows, rank), seed * 100 + 2 * i + 1, whole)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 2 * rank, "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_model(folder: Path, change: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for i, (name, shape) in enumerate({**SHAPES, **REST}.items()):
        tensors[name] = (numbers(shape, i) + change * numbers(shape, 50 * seed + i)).to(dtype)
    tensors["embed.weight"] = numbers((10, 24), 99).to(dtype)
    tensors["embed.weight"][3, 5] = -0.0
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(params=["lora", "lora with ties", "whole models", "both"])
def updates(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    """Three updates; the base lies in `tmp_path / "base"`."""
    base = write_model(tmp_path / "base")
    folders = []
    for i in range(3):
        folder = tmp_path / f"update{i}"
        if "lora" in request.param or (request.param == "both" and i):
            folders.append(write_lora(folder, TARGETS[i], RANKS[i], i, whole="ties" in request.param))
        else:
            folders.append(write_model(folder, 0.01 * (i + 1), i + 1))
    return [load_update(folder, base) for folder in folders]


def whole_deltas(updates: list[Any], name: str) -> list[Tensor]:
    shape = next(update.shapes[name] for update in updates if name in update.shapes)
    return [u.reader(name)(0, shape[0]) if name in u.shapes else torch.zeros(shape) for u in updates]


def kth_largest(values: Tensor, rank: int) -> float:
    return float(values.abs().flatten().sort(descending=True).values[rank - 1])


DENSE: dict[str, Callable[..., Tensor]] = {
    "linear": partial(methods.linear, weights=[1.0, 2.0, 3.0]),
    "task_arithmetic": partial(methods.task_arithmetic, scaling=0.3),
    "ties": partial(methods.ties, weights=None, density=[0.2, 0.5, 1.0]),
    "ties count": partial(methods.ties, weights=None, density=0.3, vote="count", normalize=False),
    "ties global": partial(methods.ties, weights=None, density=0.2, scope="global"),
    "breadcrumbs": partial(methods.breadcrumbs, weights=None, density=0.6, gamma=0.1),
    "dare_linear": partial(methods.dare_linear, weights=None, density=0.5, seed=3),
    "dare_ties": partial(methods.dare_ties, weights=None, density=0.5, seed=3),
    "della": partial(methods.della, weights=None, density=0.5, epsilon=0.2, seed=3),
    "ram": partial(methods.ram, r=0.5),
    "caci": partial(
        methods.caci, expert_weights=[1.0, 2.0], reasoner_weights=None, expert_density=0.4, reasoner_density=0.7,
        expert_scaling=1.0, reasoner_scaling=0.5,
    ),
    "winner_take_all": partial(methods.winner_take_all, reasoner_scaling=0.5),
}  # fmt: skip


def whole_tensor_rule(rule: partial, updates: list[Any], name: str) -> Tensor:
    """The rule on full deltas, with thresholds (all equals kept) that a sort finds."""
    deltas, options = whole_deltas(updates, name), rule.keywords
    extra: dict[str, Any] = {}
    code = rule.func.__code__.co_varnames
    if "thresholds" in code:
        shares = options.get("density", [0.4, 0.4, 0.7])
        shares = shares if isinstance(shares, list) else [shares] * 3
        scope = options.get("scope", "tensor")
        extra["thresholds"] = []
        for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
            values = deltas[i].flatten()
            if scope == "global":
                values = torch.cat([whole_deltas(updates, n)[i].flatten() for n in update.shapes])
            start, stop = kept_ranks(len(values), share, options.get("gamma", 0.0), scope)
            low = kth_largest(values, stop)
            extra["thresholds"].append((low, kth_largest(values, start + 1)) if "gamma" in options else low)
    if "name" in code:
        extra["name"] = name
    return rule(deltas[:2], deltas[2:], **extra) if declared(rule).apart else rule(deltas, **extra)


@pytest.mark.parametrize("rule", DENSE.values(), ids=DENSE)
def test_blocks_of_any_size_equal_the_rule_on_whole_tensors(updates: list[Any], rule: partial) -> None:
    for block in (1, 3 * 24 * 5, 10**6):
        stream = Stream(updates, 2, rule, block=block)
        for name in stream.names:
            rows = list(stream.blocks(name))
            assert [row for row, _ in rows] == list(range(0, stream.shape(name)[0], len(rows[0][1])))
            merged, want = torch.cat([part for _, part in rows]), whole_tensor_rule(rule, updates, name)
            if rule.func is methods.caci or block != 10**6:  # norms, and products of other shapes, round differently
                torch.testing.assert_close(merged, want, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(merged, want)


@pytest.mark.parametrize("rule", DENSE.values(), ids=DENSE)
def test_exact_deltas_give_equal_bits_for_any_block_size(tmp_path: Path, rule: partial) -> None:
    if rule.func is methods.caci:
        rule = partial(rule, equalize_vote=False)
    folders = [write_lora(tmp_path / str(i), TARGETS[i], RANKS[i], i, whole=True) for i in range(3)]
    updates = [LoraAdapter.load(folder) for folder in folders]
    for block in (1, 200, 1000):
        stream = Stream(updates, 2, rule, block=block)
        for name in stream.names:
            merged = torch.cat([part for _, part in stream.blocks(name)])
            assert torch.equal(merged, whole_tensor_rule(rule, updates, name)), (name, block)


def test_of_untied_updates_the_rules_own_trim_is_the_same(tmp_path: Path) -> None:
    updates = [LoraAdapter.load(write_lora(tmp_path / str(i), TARGETS[i], RANKS[i], i)) for i in range(3)]
    for rule in (DENSE["ties"], DENSE["breadcrumbs"], DENSE["caci"]):
        for name in SHAPES:
            merged = torch.cat([part for _, part in Stream(updates, 2, rule, block=500).blocks(name)])
            deltas = whole_deltas(updates, name)
            want = rule(deltas[:2], deltas[2:]) if rule is DENSE["caci"] else rule(deltas)
            torch.testing.assert_close(merged, want, rtol=1e-5, atol=1e-6)


def test_no_rule_sees_more_than_a_block(tmp_path: Path) -> None:
    seen = []

    def rule(deltas: list[Tensor], first_row: int = 0, name: str = "") -> Tensor:
        seen.append((first_row, [delta.numel() for delta in deltas]))
        return deltas[0]

    declare(rule, "deltas", "place")

    updates = [LoraAdapter.load(write_lora(tmp_path / str(i), ("a.weight",), 2, i)) for i in range(4)]
    merged = torch.cat([part for _, part in Stream(updates, 4, rule, block=4 * 24 * 10).blocks("a.weight")])
    assert merged.shape == (37, 24)
    assert seen[1:] == [(0, [240] * 4), (10, [240] * 4), (20, [240] * 4), (30, [168] * 4)]  # the first tries the rule


LOW_RANK: dict[str, Callable[..., Any]] = {
    "core_space": partial(low_rank.core_space, inner="ties", density=0.5),
    "knots": partial(low_rank.knots, density=0.5),
    "wudi": low_rank.wudi,
}


@pytest.mark.parametrize("rule", LOW_RANK.values(), ids=LOW_RANK)
def test_rules_on_factors_stream_their_product(tmp_path: Path, rule: Callable[..., Any]) -> None:
    updates = [LoraAdapter.load(write_lora(tmp_path / str(i), TARGETS[i], RANKS[i], i)) for i in range(3)]
    conflicts = Conflicts(list("abc"))
    stream = Stream(updates, 2, rule, block=200, conflicts=conflicts)
    for name, (rows, columns) in SHAPES.items():
        none = (torch.zeros(0, columns), torch.zeros(rows, 0))
        a, b = rule([u.scaled_factors(name) if name in u.shapes else none for u in updates])
        merged = torch.cat([part for _, part in stream.blocks(name)])
        torch.testing.assert_close(merged, b @ a, rtol=1e-5, atol=1e-5)
        a, b, total, kept = low_rank_update(stream, name, 1000)
        torch.testing.assert_close(b @ a, merged, rtol=1e-5, atol=1e-5)
        assert total == kept == pytest.approx(float(merged.square().sum()), rel=1e-4)
        cut_a, cut_b, total, kept = low_rank_update(stream, name, 2)
        left = torch.linalg.svdvals(merged.double())[2:].square().sum()
        assert len(cut_a) == 2 and total - kept == pytest.approx(float(left), rel=1e-4)
        assert float((cut_b @ cut_a - merged).double().square().sum()) == pytest.approx(float(left), rel=1e-3)
    assert conflicts.report()["merged_norm"] > 0


@pytest.mark.parametrize(("rule", "rank"), [("linear", 13), ("ties", 13), ("ties", 2)])
def test_low_rank_output_is_nearly_the_best(tmp_path: Path, rule: str, rank: int) -> None:
    updates = [LoraAdapter.load(write_lora(tmp_path / str(i), TARGETS[i], RANKS[i], i)) for i in range(3)]
    stream = Stream(updates, 2, DENSE[rule], block=300)
    for name in SHAPES:
        merged = torch.cat([part for _, part in stream.blocks(name)])
        a, b, total, kept = low_rank_update(stream, name, rank)
        assert len(a) == b.shape[1] <= rank and total == pytest.approx(float(merged.square().sum()), rel=1e-5)
        best = float(torch.linalg.svdvals(merged)[:rank].square().sum())
        assert kept <= best * (1 + 1e-5) and kept > 0.97 * best
        error = float((b @ a - merged).square().sum())
        assert error == pytest.approx(total - kept, rel=1e-2, abs=1e-4 * total)
        if rule == "linear":
            assert kept == pytest.approx(total, rel=1e-5)
    with pytest.raises(ValueError, match="rank"):
        low_rank_update(stream, "a.weight", 0)


# --- radix select ----------------------------------------------------------------------------------------------------

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.floats(-(2.0**-126), 2.0**-126, width=32, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001192092896, 2.0**-149, 3.4028234663852886e38]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.data())
def test_radix_select_is_the_kth_largest(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    search = RadixSelect(ranks)
    parts = x.split(data.draw(st.integers(1, len(values))))
    for part in parts:
        search.first(part)
    for part in parts:
        search.second(part)
    want = [float(x.abs().kthvalue(len(x) - rank + 1).values) for rank in ranks]
    assert search.result() == want


@pytest.mark.parametrize("kind", ["normal", "constant", "tied", "narrow"])
def test_radix_select_of_many(kind: str) -> None:
    x = torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "constant": torch.full_like(x, -0.3), "tied": x.round(), "narrow": 1 + 1e-6 * x}[kind]
    search = RadixSelect([1, 4000, 20000, 25000])
    for show in (search.first, search.second):
        for block in x.split(7):
            show(block)
    assert search.result() == [kth_largest(x, 1), kth_largest(x, 4000), kth_largest(x, 20000), 0.0]
    with pytest.raises(ValueError, match="from 1"):
        RadixSelect([0])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "whole models"])
def test_all_other_bytes_are_the_bases(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = write_model(tmp_path / "base", dtype=dtype)
    if kind == "lora":
        experts = {"x": write_lora(tmp_path / "x", ("a.weight",), 2, 1)}
    else:
        experts = {"x": write_model(tmp_path / "x", 0.1, 1, dtype=dtype)}
    merge_adapters(base, tmp_path / "out", experts, {}, methods.linear)
    before, after = (read_checkpoint(tmp_path / name) for name in ("base", "out"))
    old, new = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "out"))
    assert before.keys() == after.keys() and len(old) == len(new)
    changed = set()
    for name, tensor in before.items():
        place = slice(tensor.offset, tensor.offset + tensor.size)
        if old[place] != new[place]:
            changed.add(name)
    first = min(tensor.offset for tensor in before.values())
    assert old[:first] == new[:first]
    assert changed == ({"a.weight"} if kind == "lora" else {*SHAPES, *REST})
    if kind == "whole models":  # the mean of one model is that model
        merged, model = load_file(tmp_path / "out" / "model.safetensors"), load_file(experts["x"] / "model.safetensors")
        for name in model:
            torch.testing.assert_close(merged[name], model[name], rtol=0, atol=0 if dtype != torch.float32 else 1e-6)


def test_a_merge_under_way_does_not_look_finished(tmp_path: Path) -> None:
    base, expert = write_model(tmp_path / "base"), write_lora(tmp_path / "x", ("a.weight", "b.weight"), 2, 1)
    seen = []

    def rule(deltas: list[Tensor], first_row: int = 0, name: str = "") -> Tensor:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if name == "b.weight":
            raise KeyboardInterrupt
        return deltas[0]

    declare(rule, "deltas", "place")

    with pytest.raises(KeyboardInterrupt):
        merge_adapters(base, tmp_path / "out", {"x": expert}, {}, rule)
    assert seen[-1] == ["base", "out.partial", "x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x"]


def test_whole_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, other = write_model(tmp_path / "base"), write_model(tmp_path / "other", 0.1, 1)
    tensors = {name: t.clone() for name, t in load_file(other / "model.safetensors").items()}

    def attempt(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, other / "model.safetensors")
        with pytest.raises(UserError, match=message):
            merge_adapters(base, tmp_path / "out", {"x": other}, {}, methods.linear)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]

    attempt({k: t for k, t in tensors.items() if k != "b.weight"}, r"lacks 1 tensors, such as b\.weight")
    attempt(tensors | {"extra.weight": torch.ones(2)}, r"has beyond it 1 tensors, such as extra\.weight")
    attempt(tensors | {"b.weight": torch.ones(24, 36)}, r"b\.weight is \[24, 36\]")
    attempt(tensors | {"b.weight": torch.full((24, 37), float("nan"))}, r"b\.weight in .*other.* NaN")
    attempt(tensors | {"b.weight": torch.ones(24, 37, dtype=torch.int8)}, "quantised")
    whole = (base / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"other/model\.safetensors"):
        merge_adapters(base, tmp_path / "out", {"x": other}, {}, methods.linear)
    save_file(tensors, other / "model.safetensors")
    (other / "mmedexpert.json").write_text('{"base_fingerprint": "another"}')
    with pytest.raises(UserError, match="another base"):
        merge_adapters(base, tmp_path / "out", {"x": other}, {}, methods.linear)


def test_merging_imports_no_training_library() -> None:
    code = (
        "import sys, mmedexpert.merging.apply; "
        "print([m for m in ('transformers', 'peft', 'lightning', 'hydra', 'datasets', 'wandb') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
