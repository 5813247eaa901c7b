"""Statistics that separate results from noise: means with standard errors, Welch's test
of two means, rank correlations.

Successive training steps are correlated, so the mean of n of them has a larger error
than the mean of n independent values. Their *block means* are nearly independent once a
block is longer than the correlation time (Flyvbjerg and Petersen, J. Chem. Phys. 91,
461, 1989).

If many networks are evaluated on the same images, the best of them score better there
than on other images, because part of what they were selected for is noise (regression
to the mean). If the scores have variance s^2, of which v is noise, the best of many owe
v / s times the *selection intensity* to noise: the mean of the largest k of N standard
normal deviates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

LEVEL = 0.05
"""Significance level: a difference with a smaller p-value is not put down to noise."""

NO_AP = 0.0005
"""Below this, an AP is displayed as 0.0 %."""

BLOCKS = 8
"""Most blocks that part of a training run is divided into."""
BLOCK_STEPS = 4
"""Fewest steps of a block, unless the run is too short for that."""
FEWEST_BLOCKS = 3
"""Two blocks would leave one degree of freedom, too few to estimate an error."""


class Average(BaseModel):
    """A mean of ``count`` independent values (block means, or networks), with its
    standard error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    error: float
    count: int


class Difference(BaseModel):
    """A difference of two means, with its standard error and the two-sided p-value of
    Welch's t-test.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    error: float
    p_value: float = Field(ge=0, le=1)

    @property
    def positive(self) -> bool:
        """Whether it is significantly above 0."""
        return self.value > 0 and self.p_value < LEVEL

    @property
    def negative(self) -> bool:
        """Whether it is significantly below 0."""
        return self.value < 0 and self.p_value < LEVEL


def average(values: Sequence[float], least_variance: float = 0.0) -> Average:
    """The mean of two or more independent values. ``least_variance`` is a known lower
    bound on the variance of each value.

    Example:
        >>> average([1.0, 3.0])
        Average(mean=2.0, error=1.0, count=2)
    """
    array = np.asarray(values, dtype=np.float64)
    variance = max(float(array.var(ddof=1)), least_variance)
    return Average(
        mean=float(array.mean()), error=math.sqrt(variance / len(array)), count=len(array)
    )


def block_average(values: Sequence[float]) -> Average:
    """The mean of three or more successive values of a training run, with the
    standard error of its block means.
    """
    count = max(FEWEST_BLOCKS, min(BLOCKS, len(values) // BLOCK_STEPS))
    blocks = np.array_split(np.asarray(values, dtype=np.float64), count)
    block_means = average([float(block.mean()) for block in blocks])
    # Blocks may differ in length by one, so the mean of their means is not exact.
    return block_means.model_copy(update={"mean": float(np.mean(values))})


def welch(first: Average, second: Average, offset: float = 0.0) -> Difference:
    """``second`` minus ``first`` minus ``offset``, with Welch's t-test
    (B. L. Welch, Biometrika 34, 28, 1947).

    Without any error, the p-value is 1 if the difference is 0, else 0.
    """
    value = second.mean - first.mean - offset
    error = math.hypot(first.error, second.error)
    if error == 0.0:
        return Difference(value=value, error=0.0, p_value=float(value == 0.0))
    # scipy expects standard deviations of the values, not standard errors of the means.
    shifted = (second.mean - offset, second.error * math.sqrt(second.count), second.count)
    baseline = (first.mean, first.error * math.sqrt(first.count), first.count)
    test = stats.ttest_ind_from_stats(*shifted, *baseline, equal_var=False)
    return Difference(value=value, error=error, p_value=float(test.pvalue))


def below(mean: Average, level: float) -> bool:
    """Whether a mean is significantly below ``level``, by a one-sided t-test."""
    if mean.error == 0.0:
        return mean.mean < level
    return bool(stats.t.sf((level - mean.mean) / mean.error, mean.count - 1) < LEVEL)


def better_than_guessing(right: int, total: int, chance: float) -> bool:
    """Whether ``right`` correct answers out of ``total`` are significantly more than
    guessing achieves, with probability ``chance`` each, by a binomial test.
    """
    if chance >= 1:
        return False
    # sf(k) is the probability of more than k, so k is one less.
    return bool(stats.binom.sf(right - 1, total, chance) < LEVEL)


def selection_intensity(chosen: int, total: int) -> float:
    """The expected mean of the largest ``chosen`` of ``total`` standard normal
    deviates, by Blom's approximation.

    Example:
        >>> selection_intensity(8, 8), round(selection_intensity(1, 8), 2)
        (0.0, 1.43)
    """
    ranks = np.arange(1, min(chosen, total) + 1)
    scores = stats.norm.isf((ranks - 0.375) / (total + 0.25))
    # If all are chosen, the mean is 0 up to rounding: make it exactly 0, and not -0.
    return abs(round(float(scores.mean()), 12))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two samples [N]; NaN, without scipy's warning, if
    all values of one sample are equal.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation as stored in documents: None for fewer than three
    pairs, or if all values of one sample are equal.
    """
    correlation = spearman(a, b)
    # Two pairs always correlate by 1 or -1, which says nothing.
    return correlation if len(a) > 2 and math.isfinite(correlation) else None
