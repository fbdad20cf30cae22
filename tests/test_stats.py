"""Cluster bootstrap intervals against a plain resampling loop, and their edge cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedexpert.evaluation.stats import cluster_bootstrap_ci, macro_bootstrap_ci


def questions(seed: int, images: int = 40, per_image: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts that agree within an image, image names, and one of three specialties per image."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat([f"image-{i}" for i in range(images)], per_image)
    correct = rng.random(images * per_image) < np.repeat(rng.random(images), per_image)
    return correct, clusters, np.repeat(rng.choice(["adult", "brain", "child"], images), per_image)


def naive_macro(correct: np.ndarray, clusters: np.ndarray, strata: np.ndarray, resamples: int) -> tuple[float, float]:
    """Resamples images within each stratum by picking rows; every image is in one stratum."""
    rng = np.random.default_rng(1)
    values = []
    rows = {name: np.flatnonzero(clusters == name) for name in np.unique(clusters)}
    members = {s: np.unique(clusters[strata == s]) for s in np.unique(strata)}
    for _ in range(resamples):
        draws = [[rows[name] for name in rng.choice(names, len(names))] for names in members.values()]
        values.append(np.mean([correct[np.concatenate(draw)].mean() for draw in draws]))
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def test_intervals_match_a_plain_resampling_loop() -> None:
    correct, clusters, strata = questions(0)
    for groups, interval in (
        (np.zeros(len(correct)), cluster_bootstrap_ci(correct, clusters, num_resamples=20_000)),
        (strata, macro_bootstrap_ci(correct, clusters, strata, num_resamples=20_000)),
    ):
        mean, low, high = interval
        assert mean == pytest.approx(np.mean([correct[groups == s].mean() for s in np.unique(groups)]))
        assert (low, high) == pytest.approx(naive_macro(correct, clusters, groups, 4000), abs=0.01)


def test_one_question_per_image_is_the_binomial_interval() -> None:
    correct = np.arange(400) % 4 != 0
    mean, low, high = cluster_bootstrap_ci(correct, np.arange(400), num_resamples=20_000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half), abs=0.004)


def test_the_interval_covers_at_its_level() -> None:
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rates = rng.beta(2, 1, 60)
        correct = rng.random((60, 3)) < rates[:, None]
        _, low, high = cluster_bootstrap_ci(correct.ravel(), np.repeat(np.arange(60), 3), num_resamples=400, level=0.9)
        covered += low <= 2 / 3 <= high
    assert 0.84 <= covered / 300 <= 0.95


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), copies=st.integers(2, 4), images=st.integers(1, 12))
def test_asking_the_same_image_again_adds_no_certainty(seed: int, copies: int, images: int) -> None:
    correct, clusters, strata = questions(seed, images, per_image=2)
    once = cluster_bootstrap_ci(correct, clusters, num_resamples=200)
    again = cluster_bootstrap_ci(np.tile(correct, copies), np.tile(clusters, copies), num_resamples=200)
    assert again == pytest.approx(once)
    mean, low, high = macro_bootstrap_ci(correct, clusters, strata, num_resamples=200)
    assert 0 <= low <= high <= 1 and 0 <= mean <= 1


def test_an_image_in_two_strata_is_drawn_whole() -> None:
    # Every image has one question in each stratum, right in one exactly where it is wrong in the other: the macro
    # accuracy is 0.5 in every draw that keeps images whole, and only in those.
    verdict = np.random.default_rng(0).random(30) < 0.4
    correct, clusters = np.concatenate([verdict, ~verdict]), np.tile(np.arange(30), 2)
    assert macro_bootstrap_ci(correct, clusters, np.repeat(["a", "b"], 30)) == pytest.approx((0.5, 0.5, 0.5))


def test_a_rare_stratum_never_goes_missing() -> None:
    correct, clusters = np.array([1, 0, 1] + [0] * 500), np.arange(503)
    mean, low, high = macro_bootstrap_ci(correct, clusters, ["rare"] * 3 + ["common"] * 500)
    assert mean == pytest.approx(1 / 3) and low == 0 and high == pytest.approx(0.5)


def test_same_seed_same_interval() -> None:
    correct, clusters, _ = questions(3)
    assert cluster_bootstrap_ci(correct, clusters, seed=5) == cluster_bootstrap_ci(correct, clusters, seed=5)
    assert cluster_bootstrap_ci(correct, clusters, seed=5) != cluster_bootstrap_ci(correct, clusters, seed=6)


def test_a_higher_level_is_wider() -> None:
    correct, clusters, _ = questions(3)
    _, low, high = cluster_bootstrap_ci(correct, clusters, level=0.95)
    _, wide_low, wide_high = cluster_bootstrap_ci(correct, clusters, level=0.99)
    assert wide_low < low < high < wide_high


def test_edge_cases() -> None:
    assert all(math.isnan(value) for value in cluster_bootstrap_ci([], []))
    assert all(math.isnan(value) for value in macro_bootstrap_ci([], [], []))
    assert cluster_bootstrap_ci([1, 0, 1, 1], ["one"] * 4) == (0.75, 0.75, 0.75)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        cluster_bootstrap_ci([1, 0], ["a"])
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap_ci([1, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="level"):
        cluster_bootstrap_ci([1, 0], ["a", "b"], level=95)
