"""Interquartile mean and bootstrap interval: by hand-worked literals, and scipy where it is installed."""

import numpy as np
import pytest

from fastppo.analysis.statistics import bootstrap_interval, improvement, improvement_interval, interquartile_mean


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([7.0], 7.0),
        ([0.0, 1.0, 5.0], 2.0),  # a quarter of three is none
        ([100.0, 2.0, 4.0, -100.0], 3.0),  # one off each end
        ([5.0, 1.0, 2.0, 3.0, 1000.0], 10.0 / 3.0),  # a quarter of five is one: 2, 3, 5
        ([0, 0, 1, 2, 3, 4, 90, 99], 2.5),  # two off each end: 1, 2, 3, 4
    ],
)
def test_interquartile_mean(values, mean):
    """Worked by hand; outliers do not move it."""
    assert interquartile_mean(values) == pytest.approx(mean)


def test_interquartile_mean_is_scipys_trim_mean():
    """The oracle of Agarwal et al.'s own code, for every number of seeds, row by row."""
    stats = pytest.importorskip("scipy.stats")
    for seeds in range(1, 12):
        values = np.random.default_rng(seeds).normal(size=(3, seeds))
        assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=-1))


def test_bootstrap_interval():
    """Of 0 and 1 a resampled mean is 0, 1/2 or 1 with 1/4, 1/2, 1/4: the interval is all of it. Of equal values it is nothing.

    Of one 1 and nine 0 the interquartile mean (of the middle six, two off each end) is above 0 when at least three of ten draws
    are the 1, binomial with probability 0.0702, and above 1/6 when at least four are, 0.0128: the 97.5th percentile is 1/6.
    Of 0, 0 and 1 all three draws are the 1 with 1/27 = 0.037: in a 95 % interval, in none of 90 %.
    """
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([5.0, 5.0, 5.0]) == (5.0, 5.0)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
    assert bootstrap_interval([0.0, 0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0] * 9 + [1.0]) == pytest.approx((0.0, 1.0 / 6.0))


def test_bootstrap_of_a_curve():
    """Each point has an interval of its own, whatever the shape; shifting the curves by a constant shifts it.

    Of 0 and 1 a mean is 0, 1/2 or 1; of 10 and 30 it is 10, 20 or 30; each end is drawn with 1/4.
    """
    low, high = bootstrap_interval([[0.0, 1.0], [10.0, 30.0]])
    assert low.tolist() == [0.0, 10.0]
    assert high.tolist() == [1.0, 30.0]
    values = np.random.default_rng(0).normal(size=(3, 4, 7))
    low, high = bootstrap_interval(values, resamples=200)
    assert low.shape == high.shape == (3, 4)
    shifted = bootstrap_interval(values + 5.0, resamples=200)
    assert shifted[0] == pytest.approx(low + 5.0)
    assert shifted[1] == pytest.approx(high + 5.0)
    assert (low < interquartile_mean(values)).all()
    assert (interquartile_mean(values) < high).all()


def test_bootstrap_of_another_statistic():
    """The mean of 0, 0, 0 and 100 is 25, its interquartile mean 0; a resampled mean is 0 with 0.32, 75 or more with 0.05."""
    low, high = bootstrap_interval([0.0, 0.0, 0.0, 100.0], statistic=lambda rows: rows.mean(-1))
    assert (low, high) == (0.0, 75.0)
    assert bootstrap_interval([0.0, 0.0, 0.0, 100.0])[0] == 0.0


def test_probability_of_improvement():
    """By hand: of the pairs of 2 and 4 with 1, 2 and 3, four are above, one is below, one is equal. A tie is a half."""
    assert improvement([2.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(4.5 / 6)
    assert improvement([1.0, 2.0, 3.0], [2.0, 4.0]) == pytest.approx(1.5 / 6)
    assert improvement([5.0], [5.0]) == 0.5
    # two draws of 0 and 1 against 0.5 are both below, one, or none, with 1/4, 1/2, 1/4
    assert improvement_interval([0.0, 1.0], [0.5]) == (0.0, 1.0)
    assert improvement_interval([2.0, 3.0, 4.0], [0.0, 1.0, 1.0]) == (1.0, 1.0)


def test_against_scipy():
    """The Mann-Whitney statistic, and the percentile bootstrap, whose random numbers are others."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0.5, size=9), generator.normal(size=7)
    assert improvement(ours, theirs) == pytest.approx(stats.mannwhitneyu(ours, theirs).statistic / 63)
    drawn = stats.bootstrap((ours,), lambda rows, axis: interquartile_mean(rows), method="percentile", n_resamples=10_000)
    assert bootstrap_interval(ours) == pytest.approx(tuple(drawn.confidence_interval), abs=0.05)
    drawn = stats.bootstrap(
        (ours, theirs),
        lambda x, y, axis: (
            np.array([improvement(a, b) for a, b in zip(x, y, strict=True)]) if x.ndim > 1 else improvement(x, y)
        ),
        method="percentile",
        n_resamples=2_000,
    )
    assert improvement_interval(ours, theirs) == pytest.approx(tuple(drawn.confidence_interval), abs=0.05)
