"""Intervals and correlations: what a figure of a few hundred clips may be held to."""

import math
from collections.abc import Callable

import numpy as np

NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %, for 95 % intervals
RESAMPLES = 1000
BOOTSTRAP_SEED = 0


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion (E. B. Wilson, 1927), which holds near 0 and 1 too.

    Args:
        right: successes, of `count` trials, at least one.
    """
    z, share = NORMAL_QUANTILE, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    reach = z * spread / (1 + z * z / count)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int) -> np.ndarray:
    """`statistic` of resampled clips, always with the same draws.

    Args:
        statistic: from indices (count,) into the clips, drawn with replacement, to a number; NaN
            where it is undefined.

    Returns:
        float64 (`RESAMPLES`,).
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return np.array([statistic(rng.integers(count, size=count)) for _ in range(RESAMPLES)])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval between the percentiles of bootstrapped values; NaN if none is defined."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing their mean rank.

    Args:
        a, b: (n,). NaN is returned where all values of either are equal.
    """
    ranks = [_ranks(np.asarray(values)) for values in (a, b)]
    centered = [rank - rank.mean() for rank in ranks]
    length = math.sqrt((centered[0] ** 2).sum() * (centered[1] ** 2).sum())
    return float(centered[0] @ centered[1] / length) if length else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1 on."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
