"""Merge rules: hand-computed cases, properties, parity with an independent numpy TIES, validation."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedexpert.merging import caci, dare_linear, dare_ties, linear, methods, task_arithmetic, ties
from mmedexpert.merging.apply import call_method
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.methods import drop, trim

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


# --- configs and conflict statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(set(CONF.glob("*.yaml")) - {CONF / "none.yaml"}), ids=lambda f: f.stem)
def test_every_merge_config_names_a_rule_and_runs(file: Path) -> None:
    assert file.read_text().startswith("# ")
    config = yaml.safe_load(file.read_text())
    assert config["name"] == file.stem
    method = dict(config["method"])
    module, _, name = method.pop("_target_").rpartition(".")
    assert module == methods.__name__ and method.pop("_partial_") is True
    merged = call_method(functools.partial(getattr(methods, name), **method), randn(6, 5), randn(6, 5, n=1), "w")
    assert merged.shape == (6, 5) and merged.isfinite().all() and merged.count_nonzero() > 0


def test_conflicts_by_hand() -> None:
    # column: + -, + +, + 0, 0 0, - -  -> three overlaps, one conflict, chance 1/2
    a, b = torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0]), torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0])
    conflicts = Conflicts(["a", "b"])
    conflicts.add([a, b], torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0]))
    report = conflicts.report()
    assert report["sign_conflict_rate"] == pytest.approx(1 / 3)
    assert report["sign_conflict_chance"] == 0.5
    assert report["mean_cosine"] == pytest.approx(-1 / math.sqrt(15 * 3))
    assert report["a/norm"] == pytest.approx(math.sqrt(15)) and report["merged_norm"] == pytest.approx(math.sqrt(15))
    assert report["a/kept_share"] == 1 and report["b/kept_share"] == pytest.approx(2 / 3)


def test_conflict_of_independent_updates_is_at_chance() -> None:
    deltas = randn(200, 200, n=5)
    conflicts = Conflicts(list("abcde"))
    for rows in (slice(0, 80), slice(80, 200)):  # adds up over tensors
        conflicts.add([d[rows] for d in deltas], linear([d[rows] for d in deltas], None))
    report = conflicts.report()
    assert report["sign_conflict_chance"] == 1 - 2**-4
    assert report["sign_conflict_rate"] == pytest.approx(1 - 2**-4, abs=0.01)
    assert abs(report["mean_cosine"]) < 0.01
