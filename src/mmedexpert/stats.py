"""Confidence intervals for accuracies whose questions share images."""

import numpy as np
from numpy.typing import ArrayLike

Interval = tuple[float, float, float]


def cluster_bootstrap_ci(
    correct: ArrayLike, clusters: ArrayLike, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Accuracy and its percentile bootstrap interval, resampling whole clusters (images), not questions.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; clustering as lmms-eval's `cluster_key`.

    Args:
        correct: `[n]` verdicts (bool) or scores in [0, 1].
        clusters: `[n]` labels; questions with the same label are drawn together.

    Returns:
        `(mean, low, high)`, the mean over questions. Three NaN for n = 0; with a single cluster nothing can vary, so
        the interval collapses onto the mean and says nothing about certainty.

    Raises:
        ValueError: lengths differ, a score is not finite, or the level is not in (0, 1).
    """
    strata = np.zeros(np.asarray(correct).shape, dtype=int)
    return macro_bootstrap_ci(correct, clusters, strata, level=level, num_resamples=num_resamples, seed=seed)


def macro_bootstrap_ci(
    correct: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Macro accuracy (mean of the strata's accuracies) and its stratified cluster-bootstrap interval.  # ours

    Clusters are resampled within each stratum, as many as it has. A cluster with questions in several strata is
    drawn whole, among the clusters that touch the same set of strata: questions on one image stay together, every
    stratum keeps its number of clusters, and none is ever empty. A cluster alone in its set is thus always drawn.

    Args:
        correct, clusters: as in `cluster_bootstrap_ci`.
        strata: `[n]` labels (specialties). Give a question that belongs to several strata once for each, with the
            same cluster label.

    Returns:
        `(mean, low, high)`; edge cases as in `cluster_bootstrap_ci`.

    Raises:
        ValueError: as `cluster_bootstrap_ci`.
    """
    scores = np.asarray(correct, dtype=float)
    labels, groups = np.asarray(clusters), np.asarray(strata)
    if scores.ndim != 1 or labels.shape != scores.shape or groups.shape != scores.shape:
        raise ValueError("correct, clusters and strata must be one-dimensional and equally long")
    if not np.isfinite(scores).all():
        raise ValueError("correct must be finite")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if scores.size == 0:
        return (np.nan, np.nan, np.nan)

    # One row per cluster: its sum of scores in each stratum, then its number of questions in each, [C, 2 S].
    cluster_names, cluster = np.unique(labels, return_inverse=True)
    stratum_names, stratum = np.unique(groups, return_inverse=True)
    shape = (len(cluster_names), len(stratum_names))
    cell, size = cluster * shape[1] + stratum, shape[0] * shape[1]
    sums = np.bincount(cell, weights=scores, minlength=size).reshape(shape)
    counts = np.bincount(cell, minlength=size).reshape(shape)
    table = np.hstack([sums, counts])

    rng = np.random.default_rng(seed)
    resampled = np.zeros((num_resamples, table.shape[1]))
    for signature in np.unique(counts > 0, axis=0):
        members = table[((counts > 0) == signature).all(1)]
        # Equal rows are interchangeable, so drawing clusters is a multinomial draw over the distinct rows:
        # the same distribution at a fraction of the cost, since most images carry one question.
        rows, repeats = np.unique(members, axis=0, return_counts=True)
        resampled += rng.multinomial(len(members), repeats / len(members), size=num_resamples) @ rows

    macro = (resampled[:, : shape[1]] / resampled[:, shape[1] :]).mean(1)
    low, high = np.quantile(macro, [(1 - level) / 2, (1 + level) / 2])
    return float((sums.sum(0) / counts.sum(0)).mean()), float(low), float(high)
