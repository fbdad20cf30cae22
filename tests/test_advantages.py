"""Group-relative and guideline-based advantages against plain numpy, and the properties GBA rests on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedexpert.training.advantages import group_relative, guideline_based, perspective_terms, within_perspectives

K = 4


def reference(rewards: np.ndarray, scale: str) -> np.ndarray:
    """TRL's formula, NaN-aware, one completion at a time."""
    out = np.zeros_like(rewards)
    for b, group in enumerate(rewards):
        present = group[~np.isnan(group)]
        spread = {"group": present, "batch": rewards[~np.isnan(rewards)]}.get(scale)
        std = 1.0 if spread is None else (np.std(spread, ddof=1) if len(spread) > 1 else 0.0) + 1e-4
        for i, reward in enumerate(group):
            out[b, i] = 0.0 if np.isnan(reward) else (reward - present.mean()) / std
    return out


def random_rewards(seed: int, groups: int, size: int, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(groups, size))
    rewards[rng.random(rewards.shape) < missing] = np.nan
    return rewards


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 4),
    size=st.integers(1, 8),
    missing=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_group_relative_is_trls_formula(seed: int, groups: int, size: int, missing: float, scale: Any) -> None:
    rewards = random_rewards(seed, groups, size, missing)
    with np.errstate(all="ignore"):
        expected = reference(rewards, scale)
    actual = group_relative(torch.from_numpy(rewards), scale)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_group_relative_by_hand() -> None:
    advantages = group_relative(torch.tensor([[0, 1, 1, 0]]))
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[-expected, expected, expected, -expected]]))


@settings(max_examples=50, deadline=None)
@given(
    value=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 9),
    scale=st.sampled_from(["group", "batch", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_rewards_give_exact_zeros(value: float, size: int, scale: Any, dtype: torch.dtype) -> None:
    rewards = torch.full((2, size), value, dtype=dtype)
    rewards[1] = torch.linspace(0, 1, size, dtype=dtype)
    assert torch.equal(group_relative(rewards, scale)[0], torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_completion_or_no_reward_gives_zeros(scale: Any) -> None:
    assert torch.equal(group_relative(torch.tensor([[3.0], [5.0]]), scale), torch.zeros(2, 1))
    assert torch.equal(group_relative(torch.full((2, 3), math.nan), scale), torch.zeros(2, 3))


def test_missing_rewards_change_nothing_for_the_others() -> None:
    with_missing = group_relative(torch.tensor([[0.0, math.nan, 1.0, 0.3, math.nan]]))
    without = group_relative(torch.tensor([[0.0, 1.0, 0.3]]))
    assert torch.equal(with_missing[:, [0, 2, 3]], without)
    assert torch.equal(with_missing[:, [1, 4]], torch.zeros(1, 2))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from(["group", "batch", "none"]), extra=st.floats(0, 5))
def test_zero_weights_are_plain_grpo_bit_for_bit(seed: int, scale: Any, extra: float) -> None:
    outcome = torch.from_numpy(random_rewards(seed, 3, 6, 0.1)).float()
    outcome[0] = 0.7
    adherence = torch.from_numpy(random_rewards(seed + 1, 18, K, 0.1)).float().reshape(3, 6, K)
    advantages = guideline_based(outcome, adherence, [0.0] * K, scale=extra, reward_scale=scale)
    assert torch.equal(bits(advantages), bits(group_relative(outcome, scale)))
    without_scale = guideline_based(outcome, adherence, [1.0] * K, scale=0.0, reward_scale=scale)
    assert torch.equal(bits(without_scale), bits(advantages))


def design_formula(
    outcome: np.ndarray, adherence: np.ndarray, weights: list[float], scale: float, gate: np.ndarray, reward_scale: str
) -> np.ndarray:
    """The formula of docs/usage.md, one completion at a time."""
    parts = [reference(adherence[:, :, k], reward_scale) for k in range(len(weights))]
    out = reference(outcome, reward_scale)
    for b in range(len(outcome)):
        style = []
        for i in range(outcome.shape[1]):
            asked = [k for k in range(len(weights)) if not np.isnan(adherence[b, i, k])]
            style.append(gate[b, i] * sum(weights[k] * parts[k][b, i] for k in asked) / max(len(asked), 1))
        out[b] += scale * (np.array(style) - np.mean(style))
    return out


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    weights=st.lists(st.floats(0, 3), min_size=K, max_size=K),
    scale=st.floats(0, 2),
    gated=st.booleans(),
    asked=st.sampled_from(["all", "own", "some"]),
    reward_scale=st.sampled_from(["group", "batch", "none"]),
)
def test_guideline_based_is_the_design_formula(
    seed: int, weights: list[float], scale: float, gated: bool, asked: str, reward_scale: Any
) -> None:
    rng = np.random.default_rng(seed)
    outcome, adherence = rng.random((3, 8)), rng.random((3, 8, K))
    if asked == "own":
        adherence[:, np.arange(8)[:, None] * K // 8 != np.arange(K)] = np.nan
    elif asked == "some":
        adherence[rng.random(adherence.shape) < 0.4] = np.nan
    gate = rng.random((3, 8)) < 0.5 if gated else np.ones((3, 8), dtype=bool)
    with np.errstate(all="ignore"):
        expected = design_formula(outcome, adherence, weights, scale, gate, reward_scale)
    actual = guideline_based(
        torch.from_numpy(outcome),
        torch.from_numpy(adherence),
        weights,
        scale=scale,
        gate=torch.from_numpy(gate) if gated else None,
        reward_scale=reward_scale,
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_guideline_based_by_hand() -> None:
    """Four completions under two perspectives, one of four answers wrong: every number on paper."""
    outcome = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    nan = math.nan
    adherence = torch.tensor([[[1.0, nan], [0.0, nan], [nan, 1.0], [nan, 0.5]]], dtype=torch.float64)
    actual = guideline_based(outcome, adherence, [1.0, 2.0], scale=0.5, gate=outcome == 1.0)
    first, second = 0.5 / (math.sqrt(0.5) + 1e-4), 0.25 / (math.sqrt(0.125) + 1e-4)
    style = np.array([first, 0.0, 2 * second, -2 * second])  # the wrong answer's style is gated away
    base = np.array([0.25, -0.75, 0.25, 0.25]) / (0.5 + 1e-4)
    np.testing.assert_allclose(actual[0].numpy(), base + 0.5 * (style - style.mean()), rtol=1e-12)


def test_weights_are_multipliers_of_their_own_terms_alone() -> None:
    """An arm of an ablation changes the terms whose weight it changes: nothing is normalised by the others."""
    adherence = torch.rand(2, 8, K, dtype=torch.float64)
    every = perspective_terms(adherence, [1.0] * K)
    for k in range(K):
        alone = perspective_terms(adherence, [float(i == k) for i in range(K)])
        assert torch.equal(alone[..., k], every[..., k])
        assert torch.equal(alone.sum(2), alone[..., k])
    torch.testing.assert_close(perspective_terms(adherence, [3.0] * K), 3 * every)
    torch.testing.assert_close(perspective_terms(adherence, [1.0] * K, scale=0.5), 0.5 * every)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.4]))
def test_style_sums_to_zero_in_every_group_behind_the_gate(seed: int, missing: float) -> None:
    adherence = torch.from_numpy(random_rewards(seed, 3 * 8, K, missing)).reshape(3, 8, K)
    gate = torch.from_numpy(np.random.default_rng(seed).random((3, 8)) < 0.5)
    terms = perspective_terms(adherence, [1.0, 0.5, 2.0, 1.0], gate=gate)
    torch.testing.assert_close(terms.sum(1), torch.zeros(3, K, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_gate_leaves_a_wrong_answer_no_style_of_its_own() -> None:
    """Behind the gate a wrong answer gets the same centre whatever its style was."""
    outcome, adherence = torch.rand(1, 6), torch.rand(1, 6, K)
    gate = torch.tensor([[True, False] * 3])
    terms = perspective_terms(adherence, [1.0] * K, gate=gate)
    assert torch.equal(terms[0, 1], terms[0, 3]) and torch.equal(terms[0, 1], terms[0, 5])
    assert not torch.equal(terms[0, 0], terms[0, 2])
    assert torch.equal(guideline_based(outcome, adherence, [1.0] * K, gate=torch.zeros(1, 6)), group_relative(outcome))


def test_prompted_completions_are_normalised_within_their_own_perspective() -> None:
    # Six completions: the first three prompted as perspective 0, the rest as perspective 1.
    scores = torch.rand(1, 6)
    adherence = torch.full((1, 6, 2), math.nan)
    adherence[0, :3, 0], adherence[0, 3:, 1] = scores[0, :3], scores[0, 3:]
    terms = perspective_terms(adherence, [1.0, 1.0])  # each already centred: nothing is left to centre
    torch.testing.assert_close(terms[:, :3, 0], group_relative(scores[:, :3]))
    torch.testing.assert_close(terms[:, 3:, 1], group_relative(scores[:, 3:]))
    torch.testing.assert_close(terms[:, 3:, 0], torch.zeros(1, 3))
    torch.testing.assert_close(terms[:, :3, 1], torch.zeros(1, 3))


def test_what_a_completion_was_asked_shares_one_weight() -> None:
    """Free completions are scored on all K perspectives: the mean of the K terms, as strong as one prompted term."""
    scores = torch.rand(2, 6, 1, dtype=torch.float64)
    free = guideline_based(torch.zeros(2, 6, dtype=torch.float64), scores.expand(2, 6, K), [1.0] * K)
    torch.testing.assert_close(free, group_relative(scores[..., 0]))


@pytest.mark.parametrize("weights", [[-1.0, 1, 1, 1], [math.nan, 1, 1, 1], [math.inf, 1, 1, 1], [1.0, 1, 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        guideline_based(torch.rand(2, 6), torch.rand(2, 6, K), weights)


def test_bad_shapes_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards"):
        group_relative(torch.rand(4))
    with pytest.raises(ValueError, match="scale"):
        group_relative(torch.rand(2, 4), "prompt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outcome"):
        guideline_based(torch.rand(2, 5), torch.rand(2, 6, K), [1.0] * K)
    with pytest.raises(ValueError, match="adherence"):
        perspective_terms(torch.rand(6, K), [1.0] * K)
    with pytest.raises(ValueError, match="gate"):
        perspective_terms(torch.rand(2, 6, K), [1.0] * K, gate=torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_outcomes_compared_within_a_perspective_are_its_own_groups(scale: Any) -> None:
    """The completions of each perspective are a group by themselves, times its weight; the others do not matter."""
    rewards = torch.from_numpy(random_rewards(3, 2, 8))
    asked, weights = [0, 0, 1, 1, 2, 2, 2, 0], (1.0, 2.0, 0.0)
    found = within_perspectives(rewards, asked, weights, scale)
    for place, weight in enumerate(weights):
        columns = [i for i, name in enumerate(asked) if name == place]
        torch.testing.assert_close(found[:, columns], weight * group_relative(rewards[:, columns], scale))
    whole = guideline_based(rewards, torch.full((2, 8, 3), math.nan), weights, reward_scale=scale, asked=asked)
    torch.testing.assert_close(whole, found)
    with pytest.raises(ValueError, match="3 completions were asked for, 8 have rewards"):
        within_perspectives(rewards, [0, 1, 2], weights)


def test_a_perspective_that_is_mostly_right_is_not_paid_for_being_asked() -> None:
    """Compared within the question it is; within the perspective its right answers are worth nothing special."""
    rewards = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    adherence = torch.full((1, 4, 2), math.nan)
    assert guideline_based(rewards, adherence, (1.0, 1.0))[0, 0] > 0
    assert guideline_based(rewards, adherence, (1.0, 1.0), asked=[0, 0, 1, 1])[0].tolist()[:2] == [0.0, 0.0]
