"""Statistics over a few seeds: interquartile mean and bootstrap interval (Agarwal et al. 2021). Knows nothing of files.

https://arxiv.org/abs/2108.13264
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000  # of the bootstrap


def interquartile_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Mean along the last axis, (..., S) -> (...), without the lowest and highest quarter, each rounded down to whole values.

    Equals scipy.stats.trim_mean. For three values or fewer it is the mean.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def bootstrap_interval(values: ArrayLike, resamples: int = RESAMPLES) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile interval of the interquartile mean of S seeds, resampled with replacement, (..., S) -> (...), (...).

    The seeds of one environment are one stratum of Agarwal et al.'s bootstrap: only seeds within an environment are resampled.
    A seed is drawn with all points of its curve. With three seeds the interval is only a rough estimate.
    """
    values = np.asarray(values, np.float64)
    seeds = values.shape[-1]
    draws = np.random.default_rng(0).integers(seeds, size=(resamples, seeds))
    points = values.reshape(-1, seeds)  # one point at a time: all at once would need (points, resamples, S) numbers
    low, high = np.transpose([np.percentile(interquartile_mean(point[draws]), (2.5, 97.5)) for point in points])
    return low.reshape(values.shape[:-1]), high.reshape(values.shape[:-1])
