"""Statistics against scipy on known numbers, and by simulation: false positives are no
more frequent than stated.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hwnas.core.statistics import (
    LEVEL,
    Average,
    average,
    below,
    better_than_guessing,
    block_average,
    selection_intensity,
    welch,
)

FIRST = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
SECOND = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 31.4]


def test_welch_on_known_numbers() -> None:
    """Two samples of fifteen, with t = 2.947 and p = 0.0065."""
    difference = welch(average(FIRST), average(SECOND))
    expected = stats.ttest_ind(SECOND, FIRST, equal_var=False)
    assert difference.value / difference.error == pytest.approx(expected.statistic)
    assert difference.p_value == pytest.approx(expected.pvalue)
    assert (expected.statistic, expected.pvalue) == (
        pytest.approx(2.947, abs=0.001),
        pytest.approx(0.0065, abs=1e-4),
    )
    assert average(FIRST).error == pytest.approx(float(stats.sem(FIRST)))
    assert difference.positive and not difference.negative
    opposite = welch(average(SECOND), average(FIRST))
    assert opposite.negative and opposite.p_value == pytest.approx(difference.p_value)


def test_an_offset_is_subtracted_from_a_difference() -> None:
    difference = welch(average(FIRST), average(SECOND), offset=2.0)
    shifted = stats.ttest_ind([value - 2.0 for value in SECOND], FIRST, equal_var=False)
    assert difference.p_value == pytest.approx(shifted.pvalue)


def test_means_without_spread() -> None:
    """As if every network predicted the same class: equal means do not differ, and
    unequal ones differ beyond doubt.
    """
    exact = Average(mean=0.1, error=0.0, count=8)
    assert welch(exact, exact).p_value == 1.0
    assert welch(exact, exact.model_copy(update={"mean": 0.2})).positive
    assert below(exact, 0.11) and not below(exact, 0.1)


def test_a_known_minimum_variance_applies_where_it_is_larger() -> None:
    assert average([0.1, 0.1, 0.1], 0.03).error == pytest.approx(math.sqrt(0.03 / 3))
    assert average(FIRST, 0.03).error == average(FIRST).error


def test_below_is_the_one_sided_test() -> None:
    for level in (21.0, 21.5, 22.0, 22.5, 23.0):
        expected = stats.ttest_1samp(FIRST, level, alternative="less").pvalue < LEVEL
        assert below(average(FIRST), level) == expected
    assert below(average(FIRST), 23.0) and not below(average(FIRST), 21.0)


def test_better_than_guessing_is_the_binomial_test() -> None:
    for right in range(8, 20):
        expected = stats.binomtest(right, 100, 0.1, alternative="greater").pvalue < LEVEL
        assert better_than_guessing(right, 100, 0.1) == expected
    assert not better_than_guessing(15, 100, 0.1) and better_than_guessing(16, 100, 0.1)
    assert not better_than_guessing(100, 100, 1.0)


def test_rates_of_false_positives() -> None:
    """About one in twenty of two thousand pairs with equal means seems to differ,
    whatever their sizes and spreads.
    """
    rng = np.random.default_rng(0)
    pairs = [(average(rng.normal(0, 1, 8)), average(rng.normal(0, 3, 5))) for _ in range(2000)]
    differing = np.mean([welch(first, second).p_value < LEVEL for first, second in pairs])
    assert 0.035 < differing < 0.065
    better = np.mean(
        [better_than_guessing(int(rng.binomial(300, 0.1)), 300, 0.1) for _ in range(2000)]
    )
    assert 0.02 < better < LEVEL + 0.01


def test_block_means_allow_for_autocorrelation() -> None:
    """For an AR(1) series, the plain standard error is several times too small, and
    that of block means is about right.
    """
    rng = np.random.default_rng(1)
    plain, blocks = [], []
    for _ in range(600):
        noise, values = rng.normal(0, 1, 400), [0.0]
        for shock in noise:
            values.append(0.8 * values[-1] + shock)
        estimate = block_average(values[1:])
        blocks.append(abs(estimate.mean) / estimate.error > stats.t.ppf(0.975, estimate.count - 1))
        plain.append(abs(estimate.mean) / float(stats.sem(values[1:])) > 1.96)
    assert np.mean(plain) > 0.4
    assert 0.02 < np.mean(blocks) < 0.09


@pytest.mark.parametrize(("chosen", "total"), [(1, 8), (8, 160), (4, 25), (10, 10)])
def test_selection_intensity(chosen: int, total: int) -> None:
    rng = np.random.default_rng(2)
    best = np.sort(rng.normal(size=(4000, total)), axis=1)[:, -chosen:]
    assert selection_intensity(chosen, total) == pytest.approx(best.mean(), abs=0.03)
