"""Statistics over a few seeds: interquartile mean, probability of improvement, bootstrap intervals (Agarwal et al. 2021).

https://arxiv.org/abs/2108.13264. scipy has a bootstrap, and would be a new dependency for it. Knows nothing of files.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


def interquartile_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Mean along the last axis, (..., S) -> (...), without the lowest and highest quarter, each rounded down to whole values.

    Equals scipy.stats.trim_mean. For three values or fewer it is the mean.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def bootstrap_interval(
    values: ArrayLike,
    resamples: int = RESAMPLES,
    statistic: Callable[..., NDArray[np.float64]] = interquartile_mean,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile interval of a statistic of S seeds, resampled with replacement, (..., S) -> (...), (...).

    The seeds of one environment are one stratum of Agarwal et al.'s bootstrap: only seeds within an environment are resampled.
    A seed is drawn with all points of its curve. With three seeds the interval is only a rough estimate.

    statistic: (resamples, S) -> (resamples,).
    """
    values = np.asarray(values, np.float64)
    seeds = values.shape[-1]
    draws = np.random.default_rng(0).integers(seeds, size=(resamples, seeds))
    points = values.reshape(-1, seeds)  # one point at a time: all at once would need (points, resamples, S) numbers
    low, high = np.transpose([np.percentile(statistic(point[draws]), INTERVAL) for point in points])
    return low.reshape(values.shape[:-1]), high.reshape(values.shape[:-1])


def improvement(ours: ArrayLike, theirs: ArrayLike) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run X of `ours`, (S,), and Y of `theirs`, (R,): the Mann-Whitney U statistic over S R."""
    return float(_improvements(np.asarray(ours, np.float64)[None], np.asarray(theirs, np.float64)[None])[0])


def improvement_interval(ours: ArrayLike, theirs: ArrayLike, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of `improvement`, with the runs of both sides resampled, each by itself."""
    generator = np.random.default_rng(0)
    drawn = []
    for values in (np.asarray(ours, np.float64), np.asarray(theirs, np.float64)):
        drawn.append(values[generator.integers(len(values), size=(resamples, len(values)))])
    low, high = np.percentile(_improvements(*drawn), INTERVAL)
    return float(low), float(high)


def _improvements(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, S), (N, R) -> (N,)."""
    difference = ours[:, :, None] - theirs[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((1, 2))
