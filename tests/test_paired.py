"""Paired tests of two models on the same questions, Holm's adjustment and the spread over seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmedexpert.evaluation import stats as ours
from mmedexpert.evaluation.stats import (
    across_seeds,
    cluster_bootstrap_ci,
    half_width,
    holm,
    mcnemar_exact,
    paired_cluster_bootstrap,
)


def simulated(seed: int, images: int, per_image: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models whose verdicts depend on the image; the first is right more often by `gap`."""
    rng = np.random.default_rng(seed)
    rate = np.repeat(rng.beta(2, 2, images) * (1 - gap), per_image)
    return rng.random(rate.size) < rate + gap, rng.random(rate.size) < rate, np.repeat(np.arange(images), per_image)


def verdicts(wins: int, losses: int, both: int = 3, neither: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, False, True, False], [wins, losses, both, neither])
    return a, np.repeat([False, True, True, False], [wins, losses, both, neither])


# --- McNemar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (9, 2, 0.0654296875), (4, 4, 1.0), (1, 9, 0.021484375)],
)
def test_mcnemar_hand_worked(wins, losses, p):
    assert mcnemar_exact(*verdicts(wins, losses)) == pytest.approx(p, abs=1e-12)


def test_mcnemar_of_a_textbook_table():
    # Agresti, Categorical Data Analysis, table 10.1: 86 against 150 discordant pairs, z = -4.17
    p = mcnemar_exact(*verdicts(150, 86, 794, 570))
    assert p == pytest.approx(2 * stats.norm.sf(4.17), rel=0.35) and p < 1e-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_symmetric_and_ignores_agreement(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    p = mcnemar_exact(a, b)
    wins, losses = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    doubled = min(1.0, 2 * stats.binom.cdf(min(wins, losses), wins + losses, 0.5))
    assert 0 < p <= 1 and p == pytest.approx(doubled)
    assert mcnemar_exact(b, a) == pytest.approx(p)
    assert mcnemar_exact([*a, True, False], [*b, True, False]) == pytest.approx(p)


def test_mcnemar_refuses_scores_and_unequal_lengths():
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_exact([0.5, 1], [1, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_exact([math.nan, 1], [1, 1])
    with pytest.raises(ValueError, match="equally long"):
        mcnemar_exact([True], [True, False])


# --- paired bootstrap -------------------------------------------------------------------------------------------------


def test_paired_bootstrap_is_a_plain_loop_that_draws_the_same_images_for_both():
    a, b, clusters = simulated(0, images=40, per_image=4, gap=0.1)
    keep = np.random.default_rng(5).random(a.size) < 0.6  # images of different sizes
    a, b, clusters = a[keep], b[keep], clusters[keep]
    rng, names = np.random.default_rng(1), np.unique(clusters)
    rows = {name: np.flatnonzero(clusters == name) for name in names}
    draws = [np.concatenate([rows[n] for n in rng.choice(names, len(names))]) for _ in range(4000)]
    plain = [a[draw].mean() - b[draw].mean() for draw in draws]
    difference, low, high, p = paired_cluster_bootstrap(a, b, clusters, num_resamples=20_000)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.01)
    assert p == pytest.approx(2 * min(np.mean(np.array(plain) <= 0), np.mean(np.array(plain) >= 0)), abs=0.015)


def test_paired_interval_covers_at_its_level():
    covered = 0
    for seed in range(300):
        a, b, clusters = simulated(seed, images=60, per_image=3, gap=0.1)
        _, low, high, _ = paired_cluster_bootstrap(a, b, clusters, level=0.9, num_resamples=400)
        covered += low <= 0.1 <= high
    assert 0.85 <= covered / 300 <= 0.95


def test_no_difference_is_found_at_the_rate_of_alpha():
    # questions of one image agree: four copies each. McNemar, blind to images, finds differences that are not there.
    clustered = blind = 0
    for seed in range(300):
        a, b, clusters = simulated(seed, images=60, per_image=1, gap=0.0)
        a, b, clusters = (np.repeat(x, 4) for x in (a, b, clusters))
        clustered += paired_cluster_bootstrap(a, b, clusters, num_resamples=400)[3] < 0.05
        blind += mcnemar_exact(a, b) < 0.05
    assert clustered / 300 <= 0.09 and blind / 300 > 0.2


def test_pairing_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    b = rng.random(500) < 0.6
    a = b ^ (rng.random(500) < 0.04)
    _, low, high, _ = paired_cluster_bootstrap(a, b, np.arange(500))
    _, alone_low, alone_high = cluster_bootstrap_ci(a, np.arange(500))
    assert high - low < 0.6 * (alone_high - alone_low)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(2, 12), gap=st.sampled_from([0.0, 0.3]))
def test_paired_bootstrap_properties(seed, images, gap):
    a, b, clusters = simulated(seed, images, 3, gap)
    difference, low, high, p = paired_cluster_bootstrap(a, b, clusters, num_resamples=999)
    assert low <= high and 2 / 1000 <= p <= 1
    if p < 0.04:  # the p inverts the interval; between the two lie one resample and its interpolation
        assert low >= 0 or high <= 0
    if p > 0.06:
        assert low <= 0 <= high
    back = paired_cluster_bootstrap(b, a, clusters, num_resamples=999)
    assert back[0] == pytest.approx(-difference)
    copies = paired_cluster_bootstrap(np.tile(a, 3), np.tile(b, 3), np.tile(clusters, 3), num_resamples=999)
    assert copies == pytest.approx((difference, low, high, p))  # asking again adds no certainty
    assert paired_cluster_bootstrap(a, a, clusters, num_resamples=99) == (0, 0, 0, 1)


def test_paired_swap_mirrors_the_interval():
    a, b, clusters = simulated(3, 50, 2, 0.1)
    difference, low, high, p = paired_cluster_bootstrap(a, b, clusters, num_resamples=20_000)
    assert paired_cluster_bootstrap(b, a, clusters, num_resamples=20_000) == pytest.approx(
        (-difference, -high, -low, p),
        abs=0.015,  # one question is 0.01
    )


def test_paired_edge_cases():
    assert all(math.isnan(value) for value in paired_cluster_bootstrap([], [], []))
    difference, low, high, p = paired_cluster_bootstrap([1, 1, 0], [0, 0, 0], ["one"] * 3)
    assert difference == low == high == pytest.approx(2 / 3) and math.isnan(p)
    with pytest.raises(ValueError, match="equally long"):
        paired_cluster_bootstrap([1], [1, 0], ["a", "b"])
    with pytest.raises(ValueError, match="finite"):
        paired_cluster_bootstrap([1, math.inf], [1, 0], ["a", "b"])
    with pytest.raises(ValueError, match="level"):
        paired_cluster_bootstrap([1, 0], [1, 0], ["a", "b"], level=95)


# --- Holm and seeds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.6, 0.7, 0.01], [1.0, 1.0, 0.03]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm_hand_worked(raw, adjusted):
    assert holm(raw) == pytest.approx(adjusted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(raw):
    places = range(len(raw))
    subsets = [s for size in range(1, len(raw) + 1) for s in itertools.combinations(places, size)]
    closed = [max(min(1, len(s) * min(raw[j] for j in s)) for s in subsets if i in s) for i in places]
    assert holm(raw) == pytest.approx(closed)


def test_holm_leaves_out_tests_that_were_not_made():
    first, missing, last = holm([0.02, math.nan, 0.04])
    assert (first, last) == pytest.approx((0.04, 0.04)) and math.isnan(missing)
    with pytest.raises(ValueError, match="0, 1"):
        holm([0.1, 1.2])


def test_the_interval_over_seeds_is_students():
    """Of 1, 2, 3, 4: standard error 1.29 / 2, t of three degrees of freedom 3.182."""
    assert half_width([1, 2, 3, 4]) == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2)
    assert half_width([5.0]) is None and half_width([]) is None and half_width([2.0, 2.0]) == 0


def test_across_seeds():
    assert across_seeds([0.5, 0.6, 0.7]) == pytest.approx((0.6, 0.1, 3))
    mean, std, count = across_seeds([0.5])
    assert (mean, count) == (0.5, 1) and math.isnan(std)
    assert all(math.isnan(value) for value in across_seeds([])[:2])


def test_every_statistic_refuses_what_it_cannot_be_given():
    """One fault at a time, each in one argument alone; told in a sentence."""
    a, b, clusters = [1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0, 1, 2]
    shapes = "one-dimensional and equally long"
    for bad in (([a], b, clusters), (a, [b], clusters), (a, b[:2], clusters), (a, b, clusters[:2])):
        with pytest.raises(ValueError, match=f"^a, b and clusters must be {shapes}"):
            ours.paired_cluster_bootstrap(*bad)
    for bad in ((a, b[:2]), ([a], [b])):
        with pytest.raises(ValueError, match=f"^a and b must be {shapes}"):
            ours.mcnemar_exact(*bad)
    for bad in (([math.nan, 0, 1], b), (a, [0, 0, math.inf])):
        with pytest.raises(ValueError, match=r"^a and b must be finite"):
            ours.paired_cluster_bootstrap(*bad, clusters)
    for bad in (([0.5, 0, 1], b), (a, [0, 0, 2])):
        with pytest.raises(ValueError, match=r"^verdicts must be 0 or 1"):
            ours.mcnemar_exact(*bad)
    for level in (0.0, 1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"^level must be in \(0, 1\)"):
            ours.paired_cluster_bootstrap(a, b, clusters, level=level)
        with pytest.raises(ValueError, match=r"^level must"):
            ours.cluster_bootstrap_ci(a, clusters, level=level)
    for bad in ([-0.01, 0.5], [0.5, 1.01]):
        with pytest.raises(ValueError, match=r"^p values must lie in \[0, 1\]"):
            ours.holm(bad)


def test_the_edges_of_statistics():
    assert ours.mcnemar_exact([1, 0], [1, 0]) == 1.0  # nothing differs
    assert ours.mcnemar_exact([1, 0, 0], [0, 1, 0]) == 1.0  # one each way
    assert list(ours.holm([0.0, 1.0, 0.9])) == [0.0, 1.0, 1.0]
    mean, deviation, count = ours.across_seeds([])
    assert math.isnan(mean) and math.isnan(deviation) and count == 0
    mean, deviation, count = ours.across_seeds([0.5])
    assert mean == 0.5 and math.isnan(deviation) and count == 1
    assert ours.across_seeds([0.0, 1.0]) == (0.5, pytest.approx(0.5**0.5), 2)


def test_what_stands_for_no_word_in_a_bootstrap():
    """Seed 0; 2,000 resamples of an interval, 10,000 of a difference: other numbers would give other digits."""
    draw = np.random.default_rng(0)
    a, b = draw.random(40), draw.random(40)
    clusters = np.arange(40) // 2
    assert ours.cluster_bootstrap_ci(a, clusters) == ours.cluster_bootstrap_ci(
        a, clusters, level=0.95, num_resamples=2000, seed=0
    )
    strata = np.arange(40) % 2
    assert ours.macro_bootstrap_ci(a, clusters, strata) == ours.macro_bootstrap_ci(
        a, clusters, strata, level=0.95, num_resamples=2000, seed=0
    )
    given = {"level": 0.95, "num_resamples": 10_000, "seed": 0}
    assert ours.paired_cluster_bootstrap(a, b, clusters) == ours.paired_cluster_bootstrap(a, b, clusters, **given)
    wide = ours.paired_cluster_bootstrap(a, b, clusters, level=0.5)
    expected = np.quantile(_differences(a, b, clusters), [0.25, 0.75])
    assert wide[1:3] == pytest.approx(expected, abs=0.01)  # of a plain loop, so a tolerance


def _differences(a: np.ndarray, b: np.ndarray, clusters: np.ndarray) -> list[float]:
    rng, found, groups = np.random.default_rng(1), [], [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    for _ in range(4000):
        chosen = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        found.append(float((a - b)[chosen].mean()))
    return found
