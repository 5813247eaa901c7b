"""The few statistics that tell a result from noise: means with standard errors, Welch's
test of two of them, rank correlations.

Successive steps of a training are alike, so the mean of n of them has a larger error
than n independent values would. Their *block means* are nearly independent once a block
is longer than that likeness lasts (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461,
1989).

Of many networks that were judged on the same images the best are better there than
elsewhere: part of what they were chosen for is noise. With a noise of variance v in a
spread of variance s^2, the best of many owe v / s standard units of their selection to
it (regression to the mean), times the *selection intensity*: the mean of the largest k
of N normal deviates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

LEVEL = 0.05
"""Probability at which a difference counts as told from noise."""

NO_AP = 0.0005
"""An AP that reads as 0.0 %."""

BLOCKS, FEWEST_BLOCKS, BLOCK_STEPS = 8, 3, 4
"""A part of a training is cut into at most 8 blocks of 4 steps or more; a short one
into 3: of 2, no error can be told.
"""


class Average(BaseModel):
    """A mean with its standard error, of ``count`` independent values: block means, or networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    error: float
    count: int


class Difference(BaseModel):
    """A difference of two means with its standard error, and the two-sided p-value of
    Welch's t-test.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    error: float
    p_value: float = Field(ge=0, le=1)

    @property
    def positive(self) -> bool:
        """Whether it is above 0 by more than noise."""
        return self.value > 0 and self.p_value < LEVEL

    @property
    def negative(self) -> bool:
        """Whether it is below 0 by more than noise."""
        return self.value < 0 and self.p_value < LEVEL


def average(values: Sequence[float], least_variance: float = 0.0) -> Average:
    """The mean of two or more independent values. ``least_variance`` is a variance that
    each is known to have at least.

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
    """The mean of three or more successive values of a training, with the error of its
    block means.
    """
    count = max(FEWEST_BLOCKS, min(BLOCKS, len(values) // BLOCK_STEPS))
    blocks = np.array_split(np.asarray(values, dtype=np.float64), count)
    of_blocks = average([float(block.mean()) for block in blocks])
    return of_blocks.model_copy(update={"mean": float(np.mean(values))})


def welch(first: Average, second: Average, offset: float = 0.0) -> Difference:
    """``second`` minus ``first`` minus ``offset``, by Welch's t-test. Two exact means
    are equal or are not.

    B. L. Welch, Biometrika 34, 28 (1947).
    """
    value = second.mean - first.mean - offset
    error = math.hypot(first.error, second.error)
    if error == 0.0:
        return Difference(value=value, error=0.0, p_value=float(value == 0.0))
    moved = (second.mean - offset, second.error * math.sqrt(second.count), second.count)
    resting = (first.mean, first.error * math.sqrt(first.count), first.count)
    test = stats.ttest_ind_from_stats(*moved, *resting, equal_var=False)
    return Difference(value=value, error=error, p_value=float(test.pvalue))


def below(found: Average, level: float) -> bool:
    """Whether a mean is below ``level`` by more than noise: a one-sided t-test."""
    if found.error == 0.0:
        return found.mean < level
    return bool(stats.t.sf((level - found.mean) / found.error, found.count - 1) < LEVEL)


def better_than_guessing(right: int, total: int, chance: float) -> bool:
    """Whether ``right`` of ``total`` answers are more than guesses that are right with
    probability ``chance``: a binomial test.
    """
    if chance >= 1:
        return False
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
    return abs(round(float(scores.mean()), 12))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two samples [N]; nan, without scipy's warning,
    where all values of one are alike.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation as documents hold it: none of fewer than three pairs,
    or where all of one side are alike.
    """
    found = spearman(a, b)
    return found if len(a) > 2 and math.isfinite(found) else None
