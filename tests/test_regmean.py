"""RegMean on LoRA updates: against least squares on the inputs themselves, streamed as whole, in a span as in full."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_stream import RANKS, SHAPES, TARGETS, whole_deltas, write_lora, write_model
from torch import Tensor

from mmedexpert.errors import UserError
from mmedexpert.merging import methods
from mmedexpert.merging.activations import regmean
from mmedexpert.merging.apply import low_rank_update, merge_adapters
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.grams import Grams, Span, energy
from mmedexpert.merging.stream import Stream, load_update
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.checkpoint import read_checkpoint

few = settings(max_examples=25, deadline=None)
Pair = tuple[Tensor, Tensor]
IN, OUT = 14, 9


def experts(n: int = 3, seed: int = 0, rank: int = 2) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank + i % 2, IN, generator=generator), torch.randn(OUT, rank + i % 2, generator=generator))
        for i in range(n)
    ]


def inputs(n: int = 3, seed: int = 0, tokens: int = 40, width: int = IN) -> list[Tensor]:
    """X [in, tokens] of each expert, of other directions and other sizes."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = [torch.randn(width, width, generator=generator) for _ in range(n)]
    return [3.0**i * shape @ torch.randn(width, tokens, generator=generator) for i, shape in enumerate(shapes)]


def product(pair: Pair) -> Tensor:
    return (pair[1] @ pair[0]).double()


def least_squares(tasks: list[Tensor], seen: list[Tensor], weights: list[float], ridge: float) -> Tensor:
    """argmin_M of the docstring by torch.linalg.lstsq on the stacked inputs, with rows for the ridge."""
    shares = [w / sum(weights) for w in weights]
    scale = [s / float((t @ x).square().sum()) for t, x, s in zip(tasks, seen, shares, strict=True)]
    system = sum(s * x @ x.T for s, x in zip(scale, seen, strict=True))
    pull = ridge * float(system.diagonal().mean()) * torch.eye(len(system)).double()
    mean = sum(s * t for s, t in zip(shares, tasks, strict=True))
    rows = [s**0.5 * x.T for s, x in zip(scale, seen, strict=True)] + [pull.sqrt()]
    wanted = [s**0.5 * (t @ x).T for s, t, x in zip(scale, tasks, seen, strict=True)] + [pull.sqrt() @ mean.T]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


@few
@given(
    seed=st.integers(0, 1000), n=st.integers(1, 4), tokens=st.sampled_from([5, 60]), ridge=st.sampled_from([1e-3, 0.3]),
    weighted=st.booleans(),
)  # fmt: skip
def test_it_is_the_least_squares_solution_on_the_inputs(
    seed: int, n: int, tokens: int, ridge: float, weighted: bool
) -> None:
    pairs, seen = experts(n, seed), [x.double() for x in inputs(n, seed, tokens)]
    weights = [1.0 + i for i in range(n)] if weighted else None
    found = regmean(pairs, [], grams=[x @ x.T for x in seen], ridge=ridge, expert_weights=weights)
    wanted = least_squares([product(p) for p in pairs], seen, weights or [1.0] * n, ridge)
    torch.testing.assert_close(product(found), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert len(found[0]) == found[1].shape[1] == sum(len(a) for a, _ in pairs)


def test_each_expert_weighs_by_its_own_output_and_units_do_not_matter() -> None:
    pairs, seen = experts(), inputs()
    found = product(regmean(pairs, [], grams=[x @ x.T for x in seen]))
    louder = [x * 10.0**i for i, x in enumerate(seen)]
    torch.testing.assert_close(
        product(regmean(pairs, [], grams=[x @ x.T for x in louder])), found, rtol=1e-4, atol=1e-4
    )
    assert float((found - sum(map(product, pairs)) / 3).norm()) > 0.1 * float(found.norm())  # and it is no mean


def test_one_expert_comes_back_and_much_ridge_is_the_mean() -> None:
    pairs, seen = experts(), inputs()
    grams = [x @ x.T for x in seen]
    torch.testing.assert_close(
        product(regmean(pairs[:1], [], grams=grams[:1])), product(pairs[0]), rtol=1e-5, atol=1e-5
    )
    mean = sum(map(product, pairs)) / 3
    torch.testing.assert_close(product(regmean(pairs, [], grams=grams, ridge=1e6)), mean, rtol=1e-4, atol=1e-4)
    zero = (torch.ones(2, IN), torch.zeros(OUT, 2)), (torch.zeros(0, IN), torch.zeros(OUT, 0))
    for idle in zero:  # has no say, not even in the mean
        found = regmean([pairs[0], idle], [], grams=grams[:2], ridge=0.5)
        torch.testing.assert_close(product(found), product(pairs[0]), rtol=1e-5, atol=1e-5)
        a, b = regmean([idle], [], grams=grams[:1])
        assert a.shape[1] == IN and len(b) == OUT and not (b @ a).any()


def test_where_experts_do_not_share_inputs_each_keeps_its_answers() -> None:
    """The point of it: on disjoint inputs nothing interferes, where a mean would halve both."""
    pairs = experts(2, rank=3)
    seen = [torch.zeros(IN, 20), torch.zeros(IN, 20)]
    seen[0][:7], seen[1][7:] = torch.randn(7, 20), torch.randn(7, 20)
    found = product(regmean(pairs, [], grams=[x @ x.T for x in seen], ridge=1e-6)).float()
    for pair, x in zip(pairs, seen, strict=True):
        torch.testing.assert_close(found @ x, product(pair).float() @ x, rtol=1e-2, atol=1e-2)


def test_reasoners_add_on_top_by_their_own_weights_and_scalings() -> None:
    pairs, seen, others = experts(), inputs(), experts(2, 7)
    grams = [x @ x.T for x in seen]
    alone = product(regmean(pairs, [], grams=grams))
    found = regmean(pairs, others, grams=grams, expert_scaling=0.7, reasoner_scaling=1.3, reasoner_weights=[1.0, 3.0])
    wanted = 0.7 * alone + 1.3 * (product(others[0]) + 3 * product(others[1])) / 4
    torch.testing.assert_close(product(found), wanted, rtol=1e-4, atol=1e-4)
    only = regmean([], others, reasoner_scaling=2.0)
    torch.testing.assert_close(product(only), product(others[0]) + product(others[1]), rtol=1e-5, atol=1e-5)


def test_bad_values_are_refused() -> None:
    pairs, grams = experts(2), [torch.eye(IN)] * 2
    for options, word in (
        ({"ridge": 0.0}, "ridge"),
        ({"expert_weights": [1.0, -0.5]}, "negative"),
        ({"expert_weights": [0.0, 0.0]}, "zero"),
        ({"expert_weights": [1.0]}, "weights"),
        ({"grams": grams[:1]}, "zip"),
    ):
        with pytest.raises(ValueError, match=word):
            regmean(pairs, [], **{"grams": grams, **options})
    with pytest.raises(ValueError, match="factors"):
        regmean([], [])


# --- the span --------------------------------------------------------------------------------------------------------


def spanned(stack: Tensor, seen: list[Tensor]) -> list[Tensor]:
    return [(stack.double() @ x.double()) @ (stack.double() @ x.double()).T for x in seen]


@few
@given(seed=st.integers(0, 1000), near=st.sampled_from([0.0, 1e-2, 1.0]))
def test_the_span_gives_the_full_solution_when_inputs_lie_in_it(seed: int, near: float) -> None:
    """`near`: how far the factors of the experts are from one another; they start equal in training."""
    pairs, extra = experts(3, seed, rank=3), experts(1, seed + 5)[0]
    first = pairs[0][0]
    pairs = [(first[:3] + near * a[:3], b[:, :3]) for a, b in pairs]
    stack = torch.cat([a for a, _ in pairs])
    basis = torch.linalg.svd(stack.double(), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(stack.double(), rtol=1e-5))
    seen = [basis.Vh[:rank].T @ x.double() for x in inputs(3, seed, width=rank)]
    full = product(regmean(pairs, [], grams=[x @ x.T for x in seen], ridge=1e-9))
    with_extra = torch.cat([stack, extra[0]])  # a reasoner's factors stand behind the experts'
    inside = regmean(pairs, [], grams=spanned(with_extra, seen), spanned=True, ridge=1e-9)
    for x in seen:
        torch.testing.assert_close(product(inside) @ x, full @ x, rtol=1e-2, atol=1e-3 * float((full @ x).abs().max()))
    off = inside[0].double() @ (torch.eye(IN).double() - basis.Vh[:rank].T @ basis.Vh[:rank])
    assert float(off.norm()) < 1e-4 * float(inside[0].norm())  # and its rows stay in the experts' span


def test_the_span_of_any_inputs_is_the_best_merge_inside_it() -> None:
    pairs, seen = experts(3), [x.double() for x in inputs()]
    stack = torch.cat([a for a, _ in pairs]).double()
    v = torch.linalg.qr(stack.T).Q
    found = product(regmean(pairs, [], grams=spanned(stack, seen), spanned=True, ridge=0.05))
    tasks = [product(p) @ v for p in pairs]
    wanted = least_squares(tasks, [v.T @ x for x in seen], [1.0] * 3, 0.05) @ v.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_span_is_orthonormal_and_leaves_out_what_is_rounding() -> None:
    a = torch.randn(3, IN).double()
    space = Span.of(torch.cat([a, a, 2 * a]))
    assert space.directions.shape == (IN, 3)
    torch.testing.assert_close(space.directions.T @ space.directions, torch.eye(3).double())
    assert Span.of(torch.zeros(0, IN)).directions.shape == (IN, 0)


# --- streamed --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def updates(tmp_path: Path) -> list[LoraAdapter]:
    return [LoraAdapter.load(write_lora(tmp_path / str(i), TARGETS[i], RANKS[i], i)) for i in range(3)]


def seen_at(name: str) -> list[Tensor]:
    """The inputs of a layer under the two experts."""
    return inputs(2, len(name), width=SHAPES[name][1])


def stored(folder: Path, updates: list[Any], span: bool) -> Grams:
    for i in range(2):
        found = {}
        for name in SHAPES:
            x = seen_at(name)[i].double()
            if span:
                x = torch.cat([u.factors(name)[0] for u in updates if name in u.shapes]).double() @ x
            found[name] = x @ x.T if span else (x @ x.T).float()
        (folder / f"g{i}").mkdir(parents=True)
        names = list(found)
        for number, some in enumerate((names[:1], names[1:])):  # as of two passes
            save_file({name: found[name] for name in some}, folder / f"g{i}" / f"{number}.safetensors")
    return Grams.load([folder / f"g{i}" for i in range(2)], spanned=span)


@pytest.mark.parametrize("span", [False, True])
def test_streaming_equals_the_rule_on_whole_tensors(tmp_path: Path, updates: list[LoraAdapter], span: bool) -> None:
    grams, rule = stored(tmp_path, updates, span), partial(regmean, reasoner_scaling=0.5, ridge=0.1)
    for block in (1, 200, 10**6):
        stream = Stream(updates, 2, rule, block=block, grams=grams)
        for name, (rows, columns) in SHAPES.items():
            none = (torch.zeros(0, columns), torch.zeros(rows, 0))
            pairs = [u.scaled_factors(name) if name in u.shapes else none for u in updates]
            x = [x.double() for x in seen_at(name)]
            if span:
                x = [torch.cat([a for a, _ in pairs]).double() @ one for one in x]
            a, b = rule(pairs[:2], pairs[2:], grams=[one @ one.T for one in x], spanned=span)
            merged = torch.cat([part for _, part in stream.blocks(name)])
            torch.testing.assert_close(merged, b @ a, rtol=1e-4, atol=1e-4)
            low, high, *_ = low_rank_update(stream, name, 100)
            torch.testing.assert_close(high @ low, merged, rtol=1e-4, atol=1e-4)  # a LoRA, exactly


def test_a_merge_of_files_is_base_plus_the_rule(tmp_path: Path, updates: list[LoraAdapter]) -> None:
    base = write_model(tmp_path / "base")
    grams = stored(tmp_path / "grams", updates, span=False)
    folders = [update.folder for update in updates]
    experts_, reasoners = {"a": folders[0], "b": folders[1]}, {"r": folders[2]}
    merge_adapters(base, tmp_path / "out", experts_, reasoners, regmean, grams=grams)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    stream = Stream([load_update(folder, base) for folder in folders], 2, regmean, grams=grams)
    for name in SHAPES:
        merged = torch.cat([part for _, part in stream.blocks(name)])
        torch.testing.assert_close(after[name].rows(), before[name].rows() + merged)


def test_without_gram_matrices_it_is_refused(tmp_path: Path, updates: list[LoraAdapter]) -> None:
    with pytest.raises(UserError, match=r"merge\.grams"):
        Stream(updates, 2, regmean)
    grams = stored(tmp_path, updates, span=False)
    grams.stored[1].pop("c.weight")
    with pytest.raises(UserError, match=r"c\.weight"):
        list(Stream(updates, 2, regmean, grams=grams).blocks("c.weight"))


# --- interference ----------------------------------------------------------------------------------------------------


def test_energy_is_that_of_the_outputs() -> None:
    (a, b), x = experts(1)[0], inputs(1)[0].double()
    assert energy(a.double(), b, x @ x.T) == pytest.approx(float((product((a, b)) @ x).square().sum()))


RULES: dict[str, Any] = {
    "linear": methods.linear,
    "ties": partial(methods.ties, weights=None, density=0.5),
    "winner_take_all": partial(methods.winner_take_all, expert_scaling=0.8),
    "regmean": partial(regmean, ridge=0.1),
}


@pytest.mark.parametrize("span", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_interference_is_that_of_the_activations(
    tmp_path: Path, updates: list[LoraAdapter], rule: Any, span: bool
) -> None:
    """Computed again from the inputs themselves; in the span from inputs projected on it."""
    conflicts = Conflicts(["expert/a", "expert/b", "reasoner"])
    stream = Stream(updates, 2, rule, block=300, conflicts=conflicts, grams=stored(tmp_path, updates, span))
    wanted: dict[str, list[float | None]] = {}
    for name in SHAPES:
        merged = torch.cat([part for _, part in stream.blocks(name)]).double()
        v = torch.linalg.qr(torch.cat([u.factors(name)[0] for u in updates if name in u.shapes]).double().T).Q
        wanted[name] = []
        for i, x in enumerate(seen_at(name)):
            x = v @ v.T @ x.double() if span else x.double()
            task = whole_deltas(updates, name)[i].double()
            off, own = float(((merged - task) @ x).square().sum()), float((task @ x).square().sum())
            wanted[name].append(off / own if name in updates[i].shapes else None)
    rows = {row["tensor"]: row for row in conflicts.table()}
    for name, values in wanted.items():
        for who, value in zip(("expert/a", "expert/b"), values, strict=True):
            assert rows[name][f"{who}/interference"] == (value and pytest.approx(value, rel=1e-3)), (name, who)
        told = [value for value in values if value is not None]
        assert rows[name]["interference"] == pytest.approx(sum(told) / len(told), rel=1e-3)
        assert rows[name]["reasoner/interference"] is None
    everything = [value for values in wanted.values() for value in values if value is not None]
    report = conflicts.report()
    assert report["interference"] == pytest.approx(sum(everything) / len(everything), rel=1e-3)
    assert report["expert/a/interference"] == pytest.approx(
        sum(v for v, _ in wanted.values() if v) / sum(v is not None for v, _ in wanted.values()), rel=1e-3
    )
    assert "reasoner/interference" not in report


def test_no_merge_interferes_less_on_the_whole(tmp_path: Path, updates: list[LoraAdapter]) -> None:
    """Sum over experts, without a reasoner: what RegMean minimises."""
    grams, found = stored(tmp_path, updates, span=False), {}
    for name, rule in {**RULES, "regmean": partial(regmean, ridge=1e-4)}.items():
        conflicts = Conflicts(["a", "b"])
        for _ in Stream(updates[:2], 2, rule, conflicts=conflicts, grams=grams).blocks("a.weight"):
            pass
        found[name] = conflicts.report()["interference"]
    assert found["regmean"] == min(found.values()) < 0.95 * min(v for k, v in found.items() if k != "regmean")


def test_reports_without_gram_matrices_tell_no_interference(updates: list[LoraAdapter]) -> None:
    conflicts = Conflicts(["a", "b", "c"])
    for _ in Stream(updates, 2, methods.linear, conflicts=conflicts).blocks("a.weight"):
        pass
    assert not any("interference" in name for name in conflicts.report())
    assert conflicts.table()[0]["interference"] is None
