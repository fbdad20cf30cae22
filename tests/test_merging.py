"""Merge rules: hand-computed cases, properties, parity with an independent numpy TIES, validation."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedexpert.merging.methods import (
    breadcrumbs,
    caci,
    dare_linear,
    dare_ties,
    della,
    linear,
    overlap_counts,
    ram,
    task_arithmetic,
    ties,
    winner_take_all,
)
from mmedexpert.merging.rule import declared
from mmedexpert.merging.sparsify import crumbs, drop, kept_ranks, trim, uniform

CONF = Path(__file__).parents[1] / "conf" / "merge"
few = settings(max_examples=40, deadline=None)


def randn(*shape: int, n: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def numpy_ties(
    deltas: list[np.ndarray], weights: list[float], density: list[float], vote: str, normalize: bool, scaling: float
) -> np.ndarray:
    """TIES entry by entry, from the table of rules and not from the code under test."""
    columns = []
    for delta, d in zip(deltas, density, strict=True):
        flat = delta.reshape(-1).astype(np.float64)
        k = max(1, int(d * flat.size))
        kept = np.zeros_like(flat)
        order = sorted(range(flat.size), key=lambda i, flat=flat: -abs(flat[i]))[:k]
        kept[order] = flat[order]
        columns.append(kept)
    out = np.zeros(columns[0].size)
    for e in range(out.size):
        votes = [w * c[e] for w, c in zip(weights, columns, strict=True)]
        ballot = sum(votes) if vote == "mass" else sum(np.sign(v) for v in votes)
        sign = 1 if ballot >= 0 else -1
        agreeing = [(v, w) for v, w in zip(votes, weights, strict=True) if v * sign > 0]
        total, mass = sum(v for v, _ in agreeing), sum(w for _, w in agreeing)
        out[e] = total / (mass if normalize and mass != 0 else 1)
    return scaling * out.reshape(deltas[0].shape)


# --- TIES ------------------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    # column: sum 1 -> +, only 3 agrees; sum -2 -> -, only -5; sum 3 -> +, both, the zero is not counted; tie -> +
    a, b = torch.tensor([3.0, 3.0, 1.0, 2.0, 0.0]), torch.tensor([-2.0, -5.0, 2.0, -2.0, 4.0])
    assert ties([a, b], [1, 1], 1.0).tolist() == [3, -5, 1.5, 2, 4]
    assert ties([a, b], [1, 1], 1.0, normalize=False).tolist() == [3, -5, 3, 2, 4]
    assert ties([a, b], [1, 1], 1.0, scaling=0.5).tolist() == [1.5, -2.5, 0.75, 1, 2]
    # weight 3 on a turns the second vote (9 - 5) and the third mean (3 * 1 + 2) / 4
    assert ties([a, b], [3, 1], 1.0).tolist() == [3, 3, 1.25, 2, 4]


def test_ties_vote_count_differs_from_mass() -> None:
    deltas = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-5.0])]
    assert ties(deltas, None, 1.0, vote="mass").item() == -5
    assert ties(deltas, None, 1.0, vote="count").item() == 1


def test_ties_negative_weight_votes_with_the_other_sign() -> None:
    deltas = [torch.tensor([1.0]), torch.tensor([4.0])]  # votes 2 and -4: minus wins with -4 over mass -1
    assert ties(deltas, [2, -1], 1.0).item() == 4


def test_ties_where_nobody_agrees_is_zero() -> None:
    assert ties([torch.zeros(4), torch.zeros(4)], None, 0.5).tolist() == [0, 0, 0, 0]


def test_trim_counts() -> None:
    delta = torch.tensor([[0.1, -4.0, 3.0], [-2.0, 0.5, 1.0]])
    assert trim(delta, 0.5).tolist() == [[0, -4, 3], [-2, 0, 0]]
    assert trim(delta, 0.66).count_nonzero() == 3  # int(3.96)
    assert trim(delta, 0.01).count_nonzero() == 1  # never less than one
    assert trim(delta, 0.5, "global").tolist() == [[0, -4, 3], [-2, 0, 1]]  # the authors' rule keeps one more
    assert torch.equal(trim(delta, 1.0, "global"), delta)
    equal = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert trim(equal, 0.5).count_nonzero() == 2
    assert trim(equal, 0.5, "global").count_nonzero() == 4


@few
@given(
    values=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 40)), elements=st.integers(-9, 9)),
    density=st.floats(0.01, 1.0),
)
def test_trim_keeps_exactly_the_largest(values: np.ndarray, density: float) -> None:
    delta = torch.from_numpy(values)
    kept = trim(delta, density)
    k = max(1, int(density * delta.numel()))
    largest = delta.abs().flatten().sort(descending=True).values[:k]
    assert torch.equal(kept.abs().flatten().sort(descending=True).values[:k], largest)
    assert kept.count_nonzero() == largest.count_nonzero()
    assert torch.equal(kept[kept != 0], delta[kept != 0])


@few
@given(
    n=st.integers(1, 6),
    shape=st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4)]),
    seed=st.integers(0, 10_000),
    vote=st.sampled_from(["mass", "count"]),
    normalize=st.booleans(),
    scaling=st.sampled_from([1.0, 0.3]),
    data=st.data(),
)
def test_ties_equals_numpy(
    n: int, shape: tuple[int, ...], seed: int, vote: str, normalize: bool, scaling: float, data: st.DataObject
) -> None:
    deltas = randn(*shape, n=n, seed=seed)
    weights = data.draw(st.lists(st.integers(1, 30).map(lambda w: w / 10), min_size=n, max_size=n))
    density = data.draw(st.lists(st.floats(0.05, 1), min_size=n, max_size=n))
    got = ties(deltas, weights, density, vote=vote, normalize=normalize, scaling=scaling)
    want = numpy_ties([d.numpy() for d in deltas], weights, density, vote, normalize, scaling)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


@few
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)), density=st.floats(0.1, 1))
def test_equal_weights_make_order_irrelevant(seed: int, order: list[int], density: float) -> None:
    deltas = randn(5, 8, n=4, seed=seed)
    shuffled = [deltas[i] for i in order]
    torch.testing.assert_close(ties(shuffled, None, density), ties(deltas, None, density))
    torch.testing.assert_close(linear(shuffled, None), linear(deltas, None))


def test_one_expert_comes_back_unchanged() -> None:
    (delta,) = randn(6, 7, n=1)
    roles = {"expert_density": 1.0, "reasoner_density": 1.0, "expert_scaling": 1.0, "reasoner_scaling": 1.0}
    alone = functools.partial(caci, expert_weights=None, reasoner_weights=None, **roles)
    for merged in (
        ties([delta], None, 1.0),
        linear([delta], [2.0]),
        task_arithmetic([delta], None),
        dare_ties([delta], None, 1.0),
        dare_linear([delta], None, 1.0),
        della([delta], None, 1.0, 0.0),
        breadcrumbs([delta], None, 1.0, 0.0),
        ram([delta]),
        alone([delta], []),
        alone([], [delta]),
    ):
        torch.testing.assert_close(merged, delta)


def test_scaling_all_weights_changes_nothing_when_normalised() -> None:
    deltas = randn(9, 4)
    torch.testing.assert_close(ties(deltas, [2, 4, 6], 0.5), ties(deltas, [1, 2, 3], 0.5))
    torch.testing.assert_close(linear(deltas, [2, 4, 6]), linear(deltas, [1, 2, 3]))


def test_inputs_are_not_changed() -> None:
    deltas = randn(5, 5)
    before = [d.clone() for d in deltas]
    for merge in (ties, dare_ties, dare_linear):
        merge(deltas, None, 0.5)
    caci_default()(deltas[:2], deltas[2:])
    assert all(map(torch.equal, deltas, before))


# --- linear, task arithmetic, DARE -----------------------------------------------------------------------------------


def test_linear_and_task_arithmetic_by_hand() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])]
    assert linear(deltas, [3, 1]).tolist() == [2, 1]
    assert task_arithmetic(deltas, [3, 1], scaling=0.5).tolist() == [4, 2]


def test_dare_with_given_masks() -> None:
    deltas = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-4.0, 1.0, 1.0])]
    masks = [torch.tensor([True, False, True]), torch.tensor([True, True, False])]
    assert dare_linear(deltas, None, 0.5, masks=masks).tolist() == [-6, 2, 6]
    assert dare_ties(deltas, None, 0.5, masks=masks).tolist() == [-8, 2, 6]
    with pytest.raises(ValueError, match="masks"):
        dare_ties(deltas, None, 0.5, masks=masks[:1])


def test_dare_is_seeded_by_seed_name_and_place_and_keeps_the_expectation() -> None:
    ones = [torch.ones(200, 200), torch.ones(200, 200)]
    first, second = drop(ones, [0.25, 0.5], seed=1, name="a")
    assert set(first.unique().tolist()) == {0.0, 4.0} and set(second.unique().tolist()) == {0.0, 2.0}
    assert first.mean() == pytest.approx(1, abs=0.05) and second.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(first, drop(ones, [0.25, 0.5], seed=1, name="a")[0])
    assert not torch.equal(first, drop(ones, [0.25, 0.5], seed=2, name="a")[0])
    assert not torch.equal(first, drop(ones, [0.25, 0.5], seed=1, name="b")[0])
    same = drop(ones, 0.25, seed=1)
    assert not torch.equal(same[0], same[1])


# --- CACI ------------------------------------------------------------------------------------------------------------


def caci_default(**changes: object) -> functools.partial[Tensor]:
    values = {"expert_weights": None, "reasoner_weights": None, "expert_density": 1.0, "reasoner_density": 1.0}
    return functools.partial(caci, **values | {"expert_scaling": 1.0, "reasoner_scaling": 1.0} | changes)


def test_caci_by_hand() -> None:
    experts = [torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0])]  # both of norm 5: votes sum to [1.4, 0.2]
    reasoner = torch.tensor([0.0, -0.1])  # norm 0.1: votes [0, -1], and so turns the second sign
    merge = caci_default(expert_scaling=2.0, reasoner_scaling=3.0)
    torch.testing.assert_close(merge(experts, [reasoner]), torch.tensor([2 * 3.5, 2 * -3 + 3 * -0.1]))
    unequal = caci_default(expert_scaling=2.0, reasoner_scaling=3.0, equalize_vote=False)
    torch.testing.assert_close(unequal(experts, [reasoner]), torch.tensor([2 * 3.5, 2 * 4.0]))


def test_caci_hears_a_reasoner_twenty_times_smaller_and_keeps_its_size() -> None:
    *experts, reasoner = randn(80, 80, n=5)
    reasoner = reasoner / 20
    agreed = caci_default(expert_scaling=0.0)(experts, [reasoner])
    deaf = caci_default(expert_scaling=0.0, equalize_vote=False)(experts, [reasoner])
    assert set((agreed / reasoner).round(decimals=4).abs().unique().tolist()) == {0.0, 1.0}  # true values or nothing
    heard, unheard = (float((x != 0).float().mean()) for x in (agreed, deaf))
    assert unheard < 0.53 and heard > 0.62


def test_caci_without_reasoners_and_equalising_is_ties() -> None:
    experts = randn(11, 13, n=4)
    merge = caci_default(expert_density=0.4, expert_weights=[1, 2, 1, 3], equalize_vote=False)
    torch.testing.assert_close(merge(experts, []), ties(experts, [1, 2, 1, 3], 0.4))


@few
@given(seed=st.integers(0, 10_000), gap=st.floats(1e-3, 1e3))
def test_caci_election_ignores_the_norm_of_each_update(seed: int, gap: float) -> None:
    experts, (reasoner,) = randn(6, 6, n=3, seed=seed), randn(6, 6, n=1, seed=seed + 1)
    merge = caci_default(expert_density=0.7, reasoner_density=0.7, expert_scaling=0.0)
    torch.testing.assert_close(merge(experts, [reasoner * gap]) / gap, merge(experts, [reasoner]))


def test_winner_take_all_by_hand() -> None:
    experts = [torch.tensor([1.0, -3.0, 0.0, 2.0]), torch.tensor([-2.0, 1.0, 0.0, -2.0])]
    reasoners = [torch.tensor([0.1, 0.0, 0.2, 0.0]), torch.tensor([-0.3, 0.1, 0.0, 0.0])]
    merged = winner_take_all(experts, reasoners, expert_scaling=2.0, reasoner_scaling=10.0)
    torch.testing.assert_close(merged, torch.tensor([-4.0 - 3.0, -6.0 + 1.0, 2.0, 4.0]))  # a tie: the first
    torch.testing.assert_close(winner_take_all(experts, []), torch.tensor([-2.0, -3.0, 0.0, 2.0]))
    torch.testing.assert_close(winner_take_all([], reasoners), torch.tensor([-0.3, 0.1, 0.2, 0.0]))


def test_caci_zero_updates_are_harmless() -> None:
    (expert,) = randn(4, 4, n=1)
    merged = caci_default(expert_density=0.5)([expert, torch.zeros(4, 4)], [torch.zeros(4, 4)])
    torch.testing.assert_close(merged, trim(expert, 0.5))
    assert caci_default()([torch.zeros(3)], [torch.zeros(3)]).tolist() == [0, 0, 0]


# --- validation ------------------------------------------------------------------------------------------------------

LIST_RULES = {
    "ties": functools.partial(ties, density=0.5),
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "dare_ties": functools.partial(dare_ties, density=0.5),
    "dare_linear": functools.partial(dare_linear, density=0.5),
    "della": functools.partial(della, density=0.5, epsilon=0.1),
    "breadcrumbs": functools.partial(breadcrumbs, density=0.5, gamma=0.1),
    "caci": lambda deltas, weights: caci_default(expert_weights=weights)(deltas, []),
}


@pytest.mark.parametrize("rule", LIST_RULES.values(), ids=LIST_RULES)
def test_bad_deltas_and_weights_are_refused(rule: functools.partial[Tensor]) -> None:
    two = randn(3, n=2)
    for deltas, weights in (
        ([], None),
        ([torch.zeros(2), torch.zeros(3)], None),
        (two, [1.0]),
        (two, [1.0, math.nan]),
        (two, [1.0, math.inf]),
    ):
        with pytest.raises(ValueError, match=r"deltas|weights"):
            rule(deltas, weights=weights)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan, [0.5, 0.0], [0.5]])
def test_bad_density_is_refused(density: float | list[float]) -> None:
    two = randn(3, n=2)
    for merge in (ties, dare_ties, dare_linear):
        with pytest.raises(ValueError, match="densit"):
            merge(two, None, density)
    for role in ("expert_density", "reasoner_density"):
        with pytest.raises(ValueError, match="densit"):
            caci_default(**{role: density})(two, two)


def test_weights_that_sum_to_zero_are_refused_only_when_normalised() -> None:
    two = randn(3, n=2)
    for refused in (
        lambda: ties(two, [1, -1], 0.5),
        lambda: linear(two, [1, -1]),
        lambda: dare_ties(two, [0, 0], 0.5),
        lambda: caci_default(reasoner_weights=[0, 0])(two, two),
    ):
        with pytest.raises(ValueError, match="sum to zero"):
            refused()
    torch.testing.assert_close(task_arithmetic(two, [1, -1]), two[0] - two[1])
    assert ties(two, [1, -1], 1.0, normalize=False).isfinite().all()


def test_unknown_scope_and_vote_are_refused() -> None:
    with pytest.raises(ValueError, match="scope"):
        ties(randn(3), None, 0.5, scope="layer")
    with pytest.raises(ValueError, match="vote"):
        ties(randn(3), None, 0.5, vote="frequency")


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(set(CONF.glob("*.yaml")) - {CONF / "none.yaml"}), ids=lambda f: f.stem)
def test_every_merge_config_names_a_rule_and_runs(file: Path) -> None:
    assert file.read_text().startswith("# ") and "arXiv" in file.read_text()
    config = yaml.safe_load(file.read_text())
    assert config["name"] == file.stem
    method = dict(config["method"])
    module, _, name = method.pop("_target_").rpartition(".")
    assert method.pop("_partial_") is True
    rule = getattr(importlib.import_module(module), name)
    experts, reasoners = randn(6, 5), randn(6, 5, n=1, seed=1)
    parameters, takes = inspect.signature(rule).parameters, declared(rule)
    if takes.low_rank:
        experts, reasoners = ([(d[:2], d[:, :2]) for d in role] for role in (experts, reasoners))
    merged = rule(experts, reasoners, **method) if takes.apart else rule([*experts, *reasoners], **method)
    merged = merged[1] @ merged[0] if takes.low_rank else merged
    assert merged.shape == (6, 5) and merged.isfinite().all() and merged.count_nonzero() > 0
    assert not set(method) - set(parameters) and "arXiv" in (rule.__doc__ or "")


# --- blocks, permutations, scale -------------------------------------------------------------------------------------

BLOCK_RULES = [
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "ram", "caci",
    "winner_take_all",
]  # fmt: skip


@few
@given(
    rule=st.sampled_from(BLOCK_RULES),
    cuts=st.lists(st.integers(1, 11), max_size=3).map(lambda c: [0, *sorted(set(c)), 12]),
    density=st.floats(0.2, 0.8),
    vote=st.sampled_from(["mass", "count"]),
    seed=st.integers(0, 10_000),
)
def test_blocks_of_rows_give_what_the_whole_gives(
    rule: str, cuts: list[int], density: float, vote: str, seed: int
) -> None:
    deltas = randn(12, 7, n=4, seed=seed)
    deltas[3] = deltas[3] / 20
    trimmed = [trim(d, density) for d in deltas]
    lowest = [float(t[t != 0].abs().min()) for t in trimmed]
    middle = [crumbs(d, density, 0.1) for d in deltas]
    bounds = [(float(m[m != 0].abs().min()), float(m.abs().max())) for m in middle]
    norms = [float(t.norm()) for t in trimmed]
    counts = sum(overlap_counts([d[i:j] for d in deltas], 1.0) for i, j in itertools.pairwise(cuts))
    named = {"seed": seed, "name": "w"}
    calls: dict[str, tuple[Callable[..., Tensor], dict[str, object]]] = {
        "linear": (functools.partial(linear, weights=[1, 2, 3, 4]), {}),
        "task_arithmetic": (functools.partial(task_arithmetic, scaling=0.3), {}),
        "ties": (functools.partial(ties, weights=None, density=density, vote=vote), {"thresholds": lowest}),
        "dare_linear": (functools.partial(dare_linear, weights=None, density=density, **named), {}),
        "dare_ties": (functools.partial(dare_ties, weights=None, density=density, vote=vote, **named), {}),
        "della": (functools.partial(della, weights=None, density=density, epsilon=0.1, vote=vote, **named), {}),
        "breadcrumbs": (
            functools.partial(breadcrumbs, weights=None, density=density, gamma=0.1),
            {"thresholds": bounds},
        ),
        "ram": (functools.partial(ram, epsilon=1.0, r=0.5, alpha=2.0), {"counts": counts}),
        "caci": (
            lambda deltas, **k: caci_default(expert_density=density, reasoner_density=density, vote=vote, **k)(
                deltas[:3], deltas[3:]
            ),
            {"thresholds": lowest, "norms": norms},
        ),
        "winner_take_all": (lambda deltas, **k: winner_take_all(deltas[:3], deltas[3:], reasoner_scaling=0.5), {}),
    }
    call, measured = calls[rule]
    parts = []
    for i, j in itertools.pairwise(cuts):
        first = {"first_row": i} if rule.startswith(("dare", "della")) else {}
        parts.append(call([d[i:j] for d in deltas], **measured, **first))
    torch.testing.assert_close(torch.cat(parts), call(deltas))


@few
@given(
    seed=st.integers(0, 10_000),
    order=st.permutations(range(4)),
    density=st.floats(0.1, 1),
    vote=st.sampled_from(["mass", "count"]),
)
def test_order_of_the_deltas_does_not_matter(seed: int, order: list[int], density: float, vote: str) -> None:
    deltas = randn(5, 8, n=4, seed=seed)
    weights, densities = [1.0, 2.0, 0.5, 3.0], [density, 1.0, density, 0.5]

    def shuffle(values: list) -> list:
        return [values[i] for i in order]

    for rule in (
        lambda d, w, p: ties(d, w, p, vote=vote),
        lambda d, w, p: breadcrumbs(d, w, p, 0.05),
        lambda d, w, p: ram(d, epsilon=1.0, alpha=2.0),
        lambda d, w, p: caci_default(expert_weights=w, expert_density=p, vote=vote)(d, []),
    ):
        got = rule(shuffle(deltas), shuffle(weights), shuffle(densities))
        torch.testing.assert_close(got, rule(deltas, weights, densities))


def test_weights_of_a_role_move_its_vote_and_nothing_else() -> None:
    experts, (reasoner,) = randn(30, 30), randn(30, 30, n=1, seed=5)
    out = {
        w: caci_default(expert_scaling=0.0, reasoner_weights=[w], expert_density=0.5)(experts, [reasoner])
        for w in (0.01, 1.0, 1e6)
    }
    agreeing = [int((merged != 0).sum()) for merged in out.values()]
    assert agreeing == sorted(agreeing) and agreeing[0] < agreeing[2] == reasoner.numel()
    assert set((out[1.0] / reasoner).round(decimals=4).abs().unique().tolist()) == {0.0, 1.0}


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_kept_ranks_by_hand() -> None:
    assert kept_ranks(10, 0.25) == (0, 2) and kept_ranks(10, 0.01) == (0, 1)
    assert kept_ranks(10, 0.25, scope="global") == (0, 3) and kept_ranks(10, 1.0, scope="global") == (0, 10)
    assert kept_ranks(100, 0.9, 0.01) == (1, 91) and kept_ranks(100, 0.9, 0.5) == (10, 100)
    for bad in ({"density": 0.0}, {"density": 0.5, "gamma": 1.0}, {"density": 0.5, "scope": "layer"}):
        with pytest.raises(ValueError, match=r"density|scope"):
            kept_ranks(10, **bad)


def test_breadcrumbs_by_hand() -> None:
    delta = torch.tensor([[9.0, -1.0, 2.0, -3.0, 0.5]])
    assert crumbs(delta, 0.6, 0.2).tolist() == [[0, -1, 2, -3, 0]]
    assert crumbs(delta, 0.6, 0.2, (1.0, 3.0)).tolist() == [[0, -1, 2, -3, 0]]
    assert breadcrumbs([delta, delta], [1, 2], [0.6, 0.4], 0.2, scaling=0.5).tolist() == [[0, -0.5, 3, -4.5, 0]]


def test_ram_by_hand() -> None:
    # first: both (mean 3), then a alone twice, b alone once, and nobody: a has 1 shared to 2 unique, b 1 to 1
    a, b = torch.tensor([4.0, 2.0, -1.0, 0.0, 0.05]), torch.tensor([2.0, 0.0, 0.0, 6.0, 0.0])
    assert overlap_counts([a, b], 0.1).tolist() == [[1, 2], [1, 1]]
    assert ram([a, b], r=0.0, epsilon=0.1).tolist() == [3, 2, -1, 6, 0]
    got = ram([a, b], r=0.5, alpha=0.75, epsilon=0.1, scaling=2.0)
    torch.testing.assert_close(got, 2 * torch.tensor([3.0, 2 * 1.25, -1.25, 6 * 1.375, 0.0]))
    given = ram([a, b], r=0.5, alpha=9.0, epsilon=0.1, counts=torch.tensor([[4, 1], [0, 7]]))
    torch.testing.assert_close(given, torch.tensor([3.0, 6.0, -3.0, 6.0, 0.0]))
    with pytest.raises(ValueError, match="alpha"):
        ram([a, b], alpha=-1.0)


def test_della_keeps_the_large_more_often() -> None:
    delta = torch.arange(1.0, 102.0).repeat(4000, 1)[:, torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    (kept,) = drop([delta], 0.6, epsilon=0.3)
    share = (kept != 0).float().mean(0)[delta[0].argsort()]
    torch.testing.assert_close(share, torch.linspace(0.3, 0.9, 101), atol=0.04, rtol=0)
    assert kept.mean() == pytest.approx(float(delta.mean()), rel=0.01)  # divided by its own probability
    assert torch.equal(della([delta], None, 0.6, 0.0), dare_ties([delta], None, 0.6))
    for epsilon in (0.6, 0.5, -0.1, [0.1, 0.1]):
        with pytest.raises(ValueError, match="epsilon"):
            della([delta], None, 0.6, epsilon)


def test_random_masks_are_uniform_and_uncorrelated() -> None:
    like = torch.empty(400, 500)
    u = uniform(like, "0:w:0")
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - like.numel() / 64) ** 2 / (like.numel() / 64)).sum()) < 110  # chi2 of 63, p = 0.0002
    others = [u.roll(1, 0), u.roll(1, 1), u.roll(256, 1), uniform(like, "0:w:1"), uniform(like, "0:v:0")]
    for other in others:
        r = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
        assert abs(float(r)) < 5 / like.numel() ** 0.5
    assert u.unique().numel() > 0.99 * like.numel()
    row_means = u.mean(1)
    assert float(row_means.std()) == pytest.approx((1 / 12 / 500) ** 0.5, rel=0.2)
    assert torch.equal(u[7:9], uniform(like[7:9], "0:w:0", first_row=7))


def test_random_masks_are_the_hash_of_row_and_column() -> None:
    """Against plain integers: a merge must be repeatable on another machine, device and version."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x31848BAB % 2**32
        return x ^ x >> 14

    digest = hashlib.sha256(b"3:w:1").digest()
    row_key, column_key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    want = [
        [(mix((mix(row ^ row_key) + mix(column ^ column_key)) % 2**32) >> 8) / 2**24 for column in range(5)]
        for row in range(70_000, 70_003)
    ]
    assert uniform(torch.empty(3, 5), "3:w:1", first_row=70_000).tolist() == want


RANDOM = {
    "dare_linear": functools.partial(dare_linear, weights=None, density=0.5),
    "dare_ties": functools.partial(dare_ties, weights=None, density=0.5),
    "della": functools.partial(della, weights=None, density=0.5, epsilon=0.2),
}


@pytest.mark.parametrize("rule", list(RANDOM.values()), ids=list(RANDOM))
def test_a_random_rule_drops_by_its_seed_its_name_and_its_masks(rule: functools.partial[Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.randn(6, 8, generator=draw) for _ in range(2)]
    first = rule(deltas, seed=1, name="a")
    assert torch.equal(first, rule(deltas, seed=1, name="a"))
    assert not torch.equal(first, rule(deltas, seed=2, name="a"))
    assert not torch.equal(first, rule(deltas, seed=1, name="b"))
    assert torch.equal(rule(deltas), rule(deltas, seed=0, name="", first_row=0))  # what stands for no word
    whole = [torch.ones(6, 8, dtype=torch.bool)] * 2
    assert torch.equal(rule(deltas, seed=1, masks=whole), rule(deltas, seed=2, masks=whole))
    none = rule(deltas, masks=[torch.zeros(6, 8, dtype=torch.bool)] * 2)
    assert torch.equal(none, torch.zeros(6, 8))


def test_della_normalises_only_where_it_is_told_to() -> None:
    deltas = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    whole = {"masks": [torch.ones(1, 2, dtype=torch.bool)] * 2, "epsilon": 0.0}
    mean = della(deltas, None, 1.0, **whole)
    assert torch.allclose(mean, torch.tensor([[2.0, 3.0]]))
    assert torch.allclose(della(deltas, None, 1.0, normalize=False, **whole), torch.tensor([[4.0, 6.0]]))
    with pytest.raises(ValueError, match="sum to zero"):
        della(deltas, [1.0, -1.0], 1.0, **whole)


def test_ram_as_published_unless_told_otherwise() -> None:
    """r 0.1, alpha 0.2; and the counts that are given, not those of the block."""
    deltas = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])]
    assert torch.equal(ram(deltas), ram(deltas, r=0.1, alpha=0.2, epsilon=1e-5, scaling=1.0))
    assert torch.allclose(ram(deltas), torch.tensor([1.0, 1.02, 1.02, 1.02]))  # 1 + 0.1 * min(1/1 or 1/2, 0.2)
    given = torch.tensor([[0, 4], [1, 10]])
    assert torch.allclose(ram(deltas, counts=given), torch.tensor([1.0, 1.0, 1.01, 1.01]))
    ram(deltas, r=0.0, alpha=0.0, epsilon=0.0)  # each may be zero


def test_caci_votes_as_told_and_by_the_norms_it_is_given() -> None:
    experts = [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])]
    options = {
        "expert_weights": None, "reasoner_weights": None, "expert_density": 1.0, "reasoner_density": 1.0,
        "expert_scaling": 1.0, "reasoner_scaling": 1.0,
    }  # fmt: skip
    mass = caci(experts, [], equalize_vote=False, vote="mass", **options)
    count = caci(experts, [], equalize_vote=False, vote="count", **options)
    assert mass[0] == 3.0 and count[0] == -1.0  # one large value against two small ones
    assert caci(experts, [], norms=[1.0, 1.0, 1.0], **options)[0] == 3.0
    assert caci(experts, [], norms=[9.0, 1.0, 1.0], **options)[0] == -1.0
