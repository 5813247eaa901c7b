"""Rank metrics against scipy, and against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, kendalltau, mannwhitneyu, permutation_test, spearmanr

from hwnas.core.statistics import spearman
from hwnas.study import metrics

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 40)), min_size=2, max_size=60)


@given(PAIRS)
def test_kendall_and_spearman_are_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(metrics.kendall(a, b)) and math.isnan(spearman(a, b))
        return
    assert metrics.kendall(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_kendall_is_scipys_for_many_values() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=3000)
    b = np.round(a + rng.normal(size=3000), 1)
    assert metrics.kendall(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)


def test_tau_b_by_hand() -> None:
    # of six pairs three agree, one (2 3, 3 2) disagrees, a ties one and b another
    a, b = np.array([1, 2, 2, 3]), np.array([1, 1, 3, 2])
    assert metrics.kendall(a, b) == pytest.approx((3 - 1) / math.sqrt((6 - 1) * (6 - 1)))


def test_sparse_tau_counts_near_ties_as_ties() -> None:
    truth, score = np.array([0.911, 0.9112, 0.9126, 0.930]), np.array([2.0, 1.0, 3.0, 4.0])
    assert metrics.binned(truth, 1e-3).tolist() == [911, 911, 912, 930]
    # one pair of six is the wrong way round
    assert metrics.kendall(score, truth) == pytest.approx(4 / 6)
    # that pair is a tie now
    assert metrics.sparse_kendall(score, truth, 1e-3) == pytest.approx(5 / math.sqrt(6 * 5))
    assert metrics.sparse_kendall(score, truth, 1e-5) == metrics.kendall(score, truth)


def test_a_bin_does_not_depend_on_rounding() -> None:
    accuracies = np.array([k / 1000 for k in range(1001)])
    # 0.009 / 0.001 is 8.999...
    assert metrics.binned(accuracies, 1e-3).tolist() == list(range(1001))


def test_regret_precision_and_random_by_hand() -> None:
    truth, score = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    assert metrics.regret(score, truth, 1) == pytest.approx(0.1)
    assert metrics.regret(score, truth, 5) == 0
    assert metrics.precision(score, truth, 2) == 0.5  # chosen: the second and the fourth
    # the best chosen is second of five
    assert metrics.random_reaches(score, truth, 2) == pytest.approx(1 - (1 - 2 / 5) ** 2)


def test_ties_at_the_edge_are_shared_or_count_against_the_score() -> None:
    truth, score = np.array([4.0, 3.0, 2.0, 1.0]), np.array([3.0, 2.0, 2.0, 1.0])
    assert metrics.precision(score, truth, 2) == 0.75  # the first, and half of the tied second
    flat = np.zeros(4)
    assert metrics.precision(flat, truth, 2) == 0.5
    assert metrics.regret(flat, truth, 1) == 3
    assert metrics.random_reaches(flat, truth, 1) == 1


@given(PAIRS, st.integers(1, 60))
def test_precision_is_the_mean_over_orders_of_the_ties(
    pairs: list[tuple[int, int]], k: int
) -> None:
    score, truth = np.array(pairs, dtype=float).T
    k, rng, precisions = min(k, len(truth)), np.random.default_rng(0), []
    for _ in range(100):
        chosen, best = (
            set(np.lexsort((rng.random(len(truth)), -values))[:k]) for values in (score, truth)
        )
        precisions.append(len(chosen & best) / k)
    assert metrics.precision(score, truth, k) == pytest.approx(np.mean(precisions), abs=0.25)
    assert metrics.precision(truth, truth + 0.01 * np.arange(len(truth)), len(truth)) == 1


def test_ranks_add_up_whatever_the_scales() -> None:
    a, b = np.array([0.1, 0.2, 0.2]), np.array([3e9, 1e9, 2e9])
    assert metrics.rank_sum([a, b]).tolist() == [4, 3.5, 4.5]


def test_the_top_tenth_is_of_the_truth() -> None:
    truth = np.arange(40.0)
    score = np.where(truth >= 36, -truth, truth)
    assert metrics.best_tenth(truth).tolist() == [39, 38, 37, 36]
    assert metrics.kendall_top(score, truth) == -1


def test_the_interval_contains_the_value_and_is_reproducible() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=200)
    score = truth + rng.normal(size=200)
    intervals = [
        metrics.bootstrap(metrics.kendall, score, truth, np.random.default_rng(0), 400, 0.95)
        for _ in range(2)
    ]
    assert intervals[0] == intervals[1] is not None
    assert intervals[0][0] < metrics.kendall(score, truth) < intervals[0][1]
    # scipy's standard error for tau at this size is about 0.035
    assert 0.05 < intervals[0][1] - intervals[0][0] < 0.2


@pytest.mark.slow
def test_the_interval_covers_the_true_tau_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(2), 0
    true_tau = 2 / math.pi * math.asin(0.6)  # of a bivariate normal with correlation 0.6
    for _ in range(100):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=80).T
        low, high = metrics.bootstrap(metrics.kendall, a, b, rng, 100, 0.9) or (1, 0)
        covered += low <= true_tau <= high
    assert 80 <= covered <= 98


def test_without_differences_there_is_no_interval() -> None:
    assert (
        metrics.bootstrap(
            metrics.kendall, np.ones(9), np.arange(9.0), np.random.default_rng(0), 50, 0.95
        )
        is None
    )


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=14, unique=True), st.data())
def test_mann_whitney_is_scipys_without_ties(values: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(values) - 1))
    a, b = np.array(values[:cut], dtype=float), np.array(values[cut:], dtype=float)
    reference = mannwhitneyu(a, b, method="exact")
    assert metrics.wins(a, b).sum() == reference.statistic
    assert metrics.mann_whitney(a, b) == pytest.approx(reference.pvalue, abs=1e-12)
    assert metrics.mann_whitney(b, a) == pytest.approx(reference.pvalue, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [([3, 3, 5, 9], [3, 4, 4]), ([1, 1, 2], [2, 2, 3, 3, 3]), ([1, 2, 2, 7, 7], [2, 2, 7, 9, 9])],
)
def test_mann_whitney_with_ties_is_scipys_over_all_permutations(
    a: list[float], b: list[float]
) -> None:
    def u(x: np.ndarray, y: np.ndarray) -> float:
        return float(mannwhitneyu(x, y, method="asymptotic").statistic)

    reference = permutation_test(
        (a, b), u, permutation_type="independent", n_resamples=np.inf, alternative="two-sided"
    )
    assert metrics.mann_whitney(np.array(a), np.array(b)) == pytest.approx(
        reference.pvalue, abs=1e-12
    )


def test_superiority_and_its_p_value_by_hand() -> None:
    a, b = np.array([2.0, 3.0]), np.array([1.0, 2.0])
    assert metrics.wins(a, b).tolist() == [[1.0, 0.5], [1.0, 1.0]]
    # ranks 2.5, 4 and 1, 2.5: of the six pairs of ranks, two have the sum 6.5 (4 with
    # either 2.5) and none has a larger one; 2 x 2 / 6
    assert metrics.mann_whitney(a, b) == pytest.approx(4 / 6)
    assert metrics.mann_whitney(a, a) == 1
    five = np.arange(5.0)
    assert metrics.mann_whitney(five, five + 10) == pytest.approx(2 / 252)


def test_best_of_random_by_hand() -> None:
    choice = np.array([0.9, 0.8, 0.8, 0.1])
    assert metrics.best_of_random(choice, 1).tolist() == [0.25] * 4
    # of two draws, the best wins unless neither is it, 1 - (3/4)^2; the worst only if
    # drawn twice, 1/16; the tied ones share the rest
    assert metrics.best_of_random(choice, 2) == pytest.approx([7 / 16, 4 / 16, 4 / 16, 1 / 16])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 40))
def test_random_search_reaches_a_rank_with_the_papers_probability(
    values: list[int], k: int
) -> None:
    choice = np.array(values, dtype=float)
    probability = metrics.best_of_random(choice, k)
    for value in choice:
        r = int((choice >= value).sum())
        assert probability[choice >= value].sum() == pytest.approx(1 - (1 - r / len(choice)) ** k)


@pytest.mark.slow
def test_the_interval_over_seeds_agrees_with_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 12), rng.normal(0, 1, 10)
    low, high = metrics.bootstrap_wins(metrics.wins(a, b), np.random.default_rng(1), 4000, 0.9)
    reference = bootstrap((a, b), lambda x, y: float(mannwhitneyu(x, y).statistic) / 120, confidence_level=0.9, n_resamples=2000,
                      method="percentile", vectorized=False, rng=np.random.default_rng(2))  # fmt: skip
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.03)
    assert metrics.bootstrap_wins(np.full((3, 1), 0.25), rng, 50, 0.9) == (0.25, 0.25)
