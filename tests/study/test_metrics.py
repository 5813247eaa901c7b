"""Rank metrics against scipy, and against ties that are worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata, spearmanr

from hwnas.study import metrics

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 40)), min_size=2, max_size=60)


@given(PAIRS)
def test_kendall_and_spearman_are_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(metrics.kendall(a, b)) and math.isnan(metrics.spearman(a, b))
        return
    assert metrics.kendall(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)
    assert metrics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_kendall_is_scipys_where_there_are_many() -> None:
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
    assert metrics.kendall(score, truth) == pytest.approx(4 / 6)  # one pair of six is the wrong way round
    assert metrics.sparse_kendall(score, truth, 1e-3) == pytest.approx(5 / math.sqrt(6 * 5))  # that pair is a tie now
    assert metrics.sparse_kendall(score, truth, 1e-5) == metrics.kendall(score, truth)


def test_a_bin_does_not_depend_on_rounding() -> None:
    accuracies = np.array([k / 1000 for k in range(1001)])
    assert metrics.binned(accuracies, 1e-3).tolist() == list(range(1001))  # 0.009 / 0.001 is 8.999...


def test_regret_precision_and_random_by_hand() -> None:
    truth, score = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    assert metrics.regret(score, truth, 1) == pytest.approx(0.1)
    assert metrics.regret(score, truth, 5) == 0
    assert metrics.precision(score, truth, 2) == 0.5  # chosen: the second and the fourth
    assert metrics.random_reaches(score, truth, 2) == pytest.approx(1 - (1 - 2 / 5) ** 2)  # the best chosen is second of five


def test_ties_at_the_edge_are_shared_or_count_against_the_score() -> None:
    truth, score = np.array([4.0, 3.0, 2.0, 1.0]), np.array([3.0, 2.0, 2.0, 1.0])
    assert metrics.precision(score, truth, 2) == 0.75  # the first, and half a seat of the second
    flat = np.zeros(4)
    assert metrics.precision(flat, truth, 2) == 0.5
    assert metrics.regret(flat, truth, 1) == 3
    assert metrics.random_reaches(flat, truth, 1) == 1


@given(PAIRS, st.integers(1, 60))
def test_precision_is_the_mean_over_orders_of_the_ties(pairs: list[tuple[int, int]], k: int) -> None:
    score, truth = np.array(pairs, dtype=float).T
    k, rng, found = min(k, len(truth)), np.random.default_rng(0), []
    for _ in range(100):
        chosen, best = (set(np.lexsort((rng.random(len(truth)), -values))[:k]) for values in (score, truth))
        found.append(len(chosen & best) / k)
    assert metrics.precision(score, truth, k) == pytest.approx(np.mean(found), abs=0.25)
    assert metrics.precision(truth, truth + 0.01 * np.arange(len(truth)), len(truth)) == 1


def test_ranks_add_up_whatever_the_scales() -> None:
    a, b = np.array([0.1, 0.2, 0.2]), np.array([3e9, 1e9, 2e9])
    assert metrics.mean_ranks(a).tolist() == rankdata(a).tolist() == [1, 2.5, 2.5]
    assert metrics.rank_sum([a, b]).tolist() == [4, 3.5, 4.5]


def test_the_top_tenth_is_of_the_truth() -> None:
    truth = np.arange(40.0)
    score = np.where(truth >= 36, -truth, truth)
    assert metrics.best_tenth(truth).tolist() == [39, 38, 37, 36]
    assert metrics.kendall_top(score, truth) == -1


def test_the_interval_holds_the_value_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=200)
    score = truth + rng.normal(size=200)
    found = [metrics.bootstrap(metrics.kendall, score, truth, np.random.default_rng(0), 400, 0.95) for _ in range(2)]
    assert found[0] == found[1] is not None
    assert found[0][0] < metrics.kendall(score, truth) < found[0][1]
    assert 0.05 < found[0][1] - found[0][0] < 0.2  # scipy's standard error for tau at this size is about 0.035


def test_the_interval_covers_the_true_tau_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(2), 0
    true_tau = 2 / math.pi * math.asin(0.6)  # of a bivariate normal with correlation 0.6
    for _ in range(100):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=80).T
        low, high = metrics.bootstrap(metrics.kendall, a, b, rng, 100, 0.9) or (1, 0)
        covered += low <= true_tau <= high
    assert 80 <= covered <= 98


def test_without_differences_there_is_no_interval() -> None:
    assert metrics.bootstrap(metrics.kendall, np.ones(9), np.arange(9.0), np.random.default_rng(0), 50, 0.95) is None
