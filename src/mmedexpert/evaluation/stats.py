"""Confidence intervals for accuracies whose questions share images, and tests of two models on the same questions."""

from collections.abc import Sequence

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
        resampled += _resampled_sums(table[((counts > 0) == signature).all(1)], num_resamples, rng)

    macro = (resampled[:, : shape[1]] / resampled[:, shape[1] :]).mean(1)
    low, high = np.quantile(macro, [(1 - level) / 2, (1 + level) / 2])
    return float((sums.sum(0) / counts.sum(0)).mean()), float(low), float(high)


def paired_cluster_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float, float]:
    """Mean difference a - b on the same questions, its percentile interval, and a two-sided p of no difference.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 13 and 15.4 (achieved significance level
    from the interval); the same clusters are drawn for both models. p inverts the interval, so that p < 1 - level says
    what the interval says; at least 2 / (num_resamples + 1), for a bootstrap cannot show less.  # ours

    Args:
        a, b: `[n]` verdicts (bool) or scores in [0, 1] of two models, in the same order of questions.
        clusters: `[n]` labels as in `cluster_bootstrap_ci`.

    Returns:
        `(difference, low, high, p)`. Four NaN for n = 0. With a single cluster nothing can vary: the interval collapses
        onto the difference, and p is NaN.

    Raises:
        ValueError: as `cluster_bootstrap_ci`.
    """
    first, second, labels = np.asarray(a, dtype=float), np.asarray(b, dtype=float), np.asarray(clusters)
    if first.ndim != 1 or second.shape != first.shape or labels.shape != first.shape:
        raise ValueError("a, b and clusters must be one-dimensional and equally long")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a and b must be finite")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if first.size == 0:
        return (np.nan, np.nan, np.nan, np.nan)

    _, cluster = np.unique(labels, return_inverse=True)
    # One row per cluster: its sum of differences and its number of questions, [C, 2].
    table = np.stack([np.bincount(cluster, weights=first - second), np.bincount(cluster)], axis=1)
    difference = float(table[:, 0].sum() / first.size)
    if len(table) == 1:
        return (difference, difference, difference, np.nan)
    sums = _resampled_sums(table, num_resamples, np.random.default_rng(seed))
    differences = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return difference, float(low), float(high), min(1.0, 2 * (float(rarer) + 1) / (num_resamples + 1))


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided exact p that two models are equally often right where only one of them is.

    Source: McNemar, Psychometrika 12 (1947), with the binomial distribution in place of its approximation. Takes
    questions as independent: where they share images, `paired_cluster_bootstrap` is the safer judge.

    Args:
        a, b: `[n]` verdicts (bool) of two models, in the same order of questions.

    Returns:
        p in (0, 1]; 1 where the models never disagree, and for n = 0.

    Raises:
        ValueError: lengths differ, or a verdict is neither 0 nor 1.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim != 1 or second.shape != first.shape:
        raise ValueError("a and b must be one-dimensional and equally long")
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("verdicts must be 0 or 1")
    from scipy.stats import binomtest  # a second that only reports need

    wins, losses = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, so that the chance of any false finding in the family stays below alpha.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979). Ours, because scipy has no family-wise correction and
    statsmodels is a heavy dependency for one running maximum.

    Returns:
        The adjusted values, in the order given. A NaN (a test that could not be made) stays NaN and does not count.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    made = np.flatnonzero(~np.isnan(p))
    if ((p[made] < 0) | (p[made] > 1)).any():
        raise ValueError("p values must lie in [0, 1]")
    order = made[np.argsort(p[made], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted.tolist()


def across_seeds(values: ArrayLike) -> tuple[float, float, int]:
    """Mean, sample standard deviation (n - 1) and number of one model's results under several training seeds.

    How much training varies; how much the choice of questions varies is `cluster_bootstrap_ci`, and is reported apart.

    Returns:
        `(mean, std, n)`; std is NaN for n = 1, both are NaN for n = 0.
    """
    scores = np.asarray(values, dtype=float)
    mean = float(scores.mean()) if scores.size else np.nan
    return mean, float(scores.std(ddof=1)) if scores.size > 1 else np.nan, int(scores.size)


def half_width(values: ArrayLike) -> float | None:
    """Half the 95% interval of a mean over training seeds, by Student's t; None for fewer than two values.

    Source: Student, Biometrika 6 (1908).
    """
    scores = np.asarray(values, dtype=float)
    if scores.size < 2:
        return None
    from scipy.stats import t  # a second that only reports need

    return float(t.ppf(0.975, scores.size - 1) * scores.std(ddof=1) / scores.size**0.5)


def student_p(values: ArrayLike) -> float | None:
    """Two-sided p of a mean over training seeds being 0, by Student's t; None for fewer than two values, or equal ones.

    Source: Student, Biometrika 6 (1908).
    """
    scores = np.asarray(values, dtype=float)
    if scores.size < 2 or not scores.std():
        return None
    from scipy.stats import ttest_1samp  # a second that only reports need

    return float(ttest_1samp(scores, 0.0).pvalue)


def detectable(seeds: int) -> float:
    """The true difference that a paired comparison over so many seeds finds in four of five tries, as a multiple of
    half its 95% interval: (t_0.975 + t_0.8) / t_0.975.  # ours: the usual power of 80%"""
    from scipy.stats import t

    return float(1 + t.ppf(0.8, seeds - 1) / t.ppf(0.975, seeds - 1))


def _resampled_sums(rows: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Column sums of `num_resamples` draws of C rows with replacement from `[C, k]`: `[num_resamples, k]`.

    Equal rows are interchangeable, so drawing rows is a multinomial draw over the distinct ones: the same distribution
    at a fraction of the cost, since most images carry one question.
    """
    distinct, repeats = np.unique(rows, axis=0, return_counts=True)
    return rng.multinomial(len(rows), repeats / len(rows), size=num_resamples) @ distinct
