"""Merge rules on LoRA factors, against the same rules computed densely from their papers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedexpert.merging.low_rank import core_space, isotropic, knots, tsv, wudi
from mmedexpert.merging.methods import linear, ties

Factors = list[tuple[Tensor, Tensor]]
few = settings(max_examples=20, deadline=None)
ranks = st.lists(st.integers(1, 4), min_size=2, max_size=4)
RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    **{inner: functools.partial(core_space, inner=inner) for inner in ("linear", "ties", "tsv")},
    "knots": knots,
    "wudi": wudi,
}


def lora(*ranks: int, rows: int = 20, columns: int = 26, seed: int = 0, same_a: bool = False) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(max(ranks), columns, generator=generator)
    return [
        (
            first[:r] if same_a else torch.randn(r, columns, generator=generator),
            torch.randn(rows, r, generator=generator) * 0.1,
        )
        for r in ranks
    ]


def dense(factors: Factors) -> list[Tensor]:
    return [b.double() @ a.double() for a, b in factors]


def update(pair: tuple[Tensor, Tensor]) -> Tensor:
    a, b = pair
    assert a.dtype == b.dtype == torch.float32 and a.isfinite().all() and b.isfinite().all()
    return b.double() @ a.double()


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U and S V^T, the largest entry of every column of U positive: an even vote elects +1, which is no one's sign."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for i in range(len(s)):
        if max(u[:, i].tolist(), key=abs) < 0:
            u[:, i], vh[i] = -u[:, i], -vh[i]
    return u, s[:, None] * vh


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-5)


# --- every rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@few
@given(rank=st.integers(1, 6), seed=st.integers(0, 10_000), scale=st.sampled_from([1e-4, 1.0, 30.0]))
def test_one_adapter_comes_back(rule: Callable[..., tuple[Tensor, Tensor]], rank: int, seed: int, scale: float) -> None:
    ((a, b),) = lora(rank, seed=seed)
    got = rule([(a, b * scale)])
    assert got[0].shape[0] <= rank
    close(update(got) / scale, (b.double() @ a.double()))


@pytest.mark.parametrize("rule", [*RULES.values(), functools.partial(core_space, inner="iso")], ids=[*RULES, "iso"])
@few
@given(sizes=ranks, seed=st.integers(0, 10_000), same_a=st.booleans())
def test_rank_is_at_most_the_sum_and_scaling_multiplies(
    rule: Callable[..., tuple[Tensor, Tensor]], sizes: list[int], seed: int, same_a: bool
) -> None:
    factors = lora(*sizes, seed=seed, same_a=same_a)
    got = rule(factors)
    assert got[0].shape[0] == got[1].shape[1] <= (max(sizes) if same_a and rule is not knots else sum(sizes))
    close(update(rule(factors, scaling=0.3)), 0.3 * update(got))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@few
@given(order=st.permutations(range(3)), seed=st.integers(0, 10_000))
def test_order_of_the_adapters_does_not_matter(
    rule: Callable[..., tuple[Tensor, Tensor]], order: list[int], seed: int
) -> None:
    factors, weights = lora(2, 3, 2, seed=seed), [1.0, 2.0, 0.5]
    got = rule([factors[i] for i in order], [weights[i] for i in order])
    close(update(got), update(rule(factors, weights)))


@pytest.mark.parametrize("rule", [*RULES.values(), functools.partial(core_space, inner="iso")], ids=[*RULES, "iso"])
def test_zero_updates_are_harmless(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    zero = (torch.zeros(2, 26), torch.zeros(20, 2))
    assert update(rule([zero, zero])).abs().max() == 0
    untrained = (lora(2, seed=4)[0][0], torch.zeros(20, 2))
    got = update(rule([*lora(2, 3), untrained]))
    assert got.isfinite().all() and got.abs().max() > 0


@pytest.mark.parametrize("inner", ["tsv", "iso"])
def test_an_adapter_without_an_update_changes_no_sum(inner: str) -> None:
    factors, (a, b) = lora(2, 2), lora(2, seed=4)[0]
    want = update(core_space(factors, inner=inner))
    close(update(core_space([(a[:0], b[:, :0]), *factors], inner=inner)), want)
    if inner == "iso":
        close(update(core_space([(a, b * 0), *factors], inner=inner)), want)


def test_a_much_smaller_update_is_not_lost() -> None:
    ((a, b),), small = lora(3), (lora(2, seed=1)[0][0] * 1e-3, lora(2, seed=1)[0][1] * 1e-3)
    want = sum(dense([(a, b), small])) / 2
    got = update(core_space([(a, b), small], inner="linear"))
    part = got - dense([(a, b)])[0] / 2
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert float((part - dense([small])[0] / 2).norm() / dense([small])[0].norm()) < 0.1


def test_bad_input_is_refused() -> None:
    good = lora(2, 3)
    for rule in RULES.values():
        for factors in (
            [],
            [*good, (torch.zeros(2, 25), torch.zeros(20, 2))],
            [(torch.zeros(2, 26), torch.zeros(20, 3))],
        ):
            with pytest.raises(ValueError, match="factors"):
                rule(factors)
        with pytest.raises(ValueError, match="weights"):
            rule(good, [1.0])
    with pytest.raises(ValueError, match="inner"):
        core_space(good, inner="mean")
    with pytest.raises(ValueError, match="density"):
        knots(good, density=0.0)
    for bad in ({"ridge": 0.0}, {"weights": [1.0, -1.0]}):
        with pytest.raises(ValueError, match="ridge"):
            wudi(good, **bad)


# --- Core Space ------------------------------------------------------------------------------------------------------


@few
@given(sizes=ranks, seed=st.integers(0, 10_000), same_a=st.booleans())
def test_core_space_linear_is_the_mean_of_the_updates(sizes: list[int], seed: int, same_a: bool) -> None:
    factors, weights = lora(*sizes, seed=seed, same_a=same_a), [1.0, 3.0, 2.0, 0.5][: len(sizes)]
    close(update(core_space(factors, weights, inner="linear")), linear(dense(factors), weights))


@few
@given(seed=st.integers(0, 10_000), density=st.floats(0.3, 1.0), vote=st.sampled_from(["mass", "count"]))
def test_core_space_ties_is_ties_on_the_projected_updates(seed: int, density: float, vote: str) -> None:
    factors = lora(2, 3, 2, seed=seed)
    u, _ = signed_svd(torch.cat([b for _, b in factors], 1).double())
    v, _ = signed_svd(torch.cat([a for a, _ in factors]).double().T)
    cores = [u.T @ d @ v for d in dense(factors)]
    want = u @ ties(cores, [1, 2, 3], density, vote=vote) @ v.T
    close(update(core_space(factors, [1, 2, 3], inner="ties", density=density, vote=vote)), want)


def test_core_space_tsv_is_tsv_on_the_full_updates() -> None:
    """With equal ranks and a full stack, the core's 1/N share is each adapter's rank: the same as TSV-M outside."""
    factors = lora(3, 3, 3)
    triplets = [torch.linalg.svd(d, full_matrices=False) for d in dense(factors)]
    u, vh = torch.cat([u[:, :3] for u, _, _ in triplets], 1), torch.cat([vh[:3] for _, _, vh in triplets])
    s = torch.cat([s[:3] for _, s, _ in triplets])
    polar = []
    for matrix in (u, vh.T):
        p, _, q = torch.linalg.svd(matrix, full_matrices=False)
        polar.append(p @ q)
    close(update(core_space(factors, inner="tsv")), polar[0] @ s.diag() @ polar[1].T)


def test_tsv_of_orthogonal_updates_is_their_sum() -> None:
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    parts = [q[:, i : i + 2] @ torch.tensor([3.0, 1.0 + i]).double().diag() @ q[:, i : i + 2].T for i in (0, 2, 4)]
    torch.testing.assert_close(tsv(parts, None, [2, 2, 2]), sum(parts))
    torch.testing.assert_close(tsv(parts, [2.0, 1.0, 1.0], [2, 2, 2]), sum(parts) + parts[0])


@few
@given(sizes=ranks, seed=st.integers(0, 10_000))
def test_core_space_iso_has_equal_singular_values_with_their_mean(sizes: list[int], seed: int) -> None:
    factors = lora(*sizes, seed=seed)
    before = torch.linalg.svdvals(sum(dense(factors)))[: sum(sizes)]
    after = torch.linalg.svdvals(update(core_space(factors, inner="iso")))
    close(after[: sum(sizes)], before.mean().expand(sum(sizes)))
    assert after[sum(sizes) :].max() < 1e-5


def test_isotropic_does_not_invent_directions() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(isotropic([matrix], None), torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0]).double()))
    assert isotropic([matrix, matrix], [1.0, -1.0]).abs().max() == 0


# --- KnOTS -----------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 10_000), density=st.floats(0.3, 1.0), vote=st.sampled_from(["mass", "count"]))
def test_knots_is_ties_on_the_right_parts_of_the_dense_svd(seed: int, density: float, vote: str) -> None:
    factors = lora(2, 3, 2, seed=seed)
    u, svh = signed_svd(torch.cat(dense(factors), 1))
    parts = [svh[:7, i * 26 : (i + 1) * 26] for i in range(3)]
    close(update(knots(factors, [1, 2, 3], density, vote=vote)), u[:, :7] @ ties(parts, [1, 2, 3], density, vote=vote))


# --- WUDI ------------------------------------------------------------------------------------------------------------


def interference(merged: Tensor, tasks: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * ((merged - t) @ t.T).square().sum() / t.square().sum() for w, t in zip(weights, tasks, strict=True))


@few
@given(seed=st.integers(0, 10_000), same_a=st.booleans())
def test_wudi_is_the_minimum_of_the_papers_loss(seed: int, same_a: bool) -> None:
    factors, weights = lora(3, 2, 3, seed=seed, same_a=same_a), [1.0, 2.0, 0.5]
    tasks = dense(factors)
    merged = update(wudi(factors, weights, ridge=1e-9)).requires_grad_()
    loss = interference(merged, tasks, weights)
    (gradient,) = torch.autograd.grad(loss, merged)
    start = sum(tasks).requires_grad_()
    (before,) = torch.autograd.grad(interference(start, tasks, weights), start)
    assert loss.item() <= interference(start, tasks, weights).item()
    assert float(gradient.norm()) < 1e-3 * float(before.norm())


def test_wudi_of_updates_with_separate_inputs_is_their_sum_and_a_strong_ridge_stays_there() -> None:
    (a1, b1), (a2, b2) = lora(2, 2)
    a1, a2 = a1.clone(), a2.clone()
    a1[:, 13:], a2[:, :13] = 0, 0
    separate = [(a1, b1), (a2, b2)]
    close(update(wudi(separate, ridge=1e-9)), sum(dense(separate)))
    overlapping = lora(4, 4, 4, same_a=True)
    close(update(wudi(overlapping, ridge=1e9)), sum(dense(overlapping)))
    assert float((update(wudi(overlapping)) - sum(dense(overlapping))).norm()) > 0.1


@pytest.mark.parametrize("rule", [functools.partial(core_space, inner="ties"), knots], ids=["core_space", "knots"])
def test_updates_that_agree_are_averaged_or_added_up(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    one = lora(2)[0]
    close(update(rule([one, one])), dense([one])[0])
    close(update(rule([one, one], normalize=False)), 2 * dense([one])[0])


def test_core_space_is_tsv_and_weighs_the_updates_unless_told_otherwise() -> None:
    factors = lora(2, 3)
    close(update(core_space(factors)), update(core_space(factors, inner="tsv")))
    for inner in ("tsv", "iso"):
        even, weighed = (update(core_space(factors, w, inner=inner)) for w in (None, [1.0, 0.2]))
        assert not torch.allclose(even, weighed, atol=1e-3)
    close(update(core_space(factors, [1.0, 0.0], inner="iso")), isotropic([dense(factors)[0]], None))


def test_the_ridge_of_wudi_is_a_thousandth() -> None:
    factors = lora(2, 3)
    close(update(wudi(factors)), update(wudi(factors, ridge=1e-3)))
    assert not torch.allclose(update(wudi(factors)), update(wudi(factors, ridge=1.0)), atol=1e-3)
