"""How well a score ranks architectures: rank correlations, what is lost by trusting the
score, and how certain these numbers are.

``score`` and ``truth`` are float [N]; higher is better in both. With fewer than two
architectures, or if all values are equal, a correlation is undefined and is nan.

- ``kendall``: tau-b (Kendall 1945), (concordant - discordant) / sqrt((pairs - ties in
  a) * (pairs - ties in b)).
- ``over_macs``: tau of the score minus tau of the MACs of the same architectures. The
  interval is that of the difference, so it can tell a score from counting MACs even if
  the intervals of the two taus overlap.
- ``sparse_kendall``: tau after the truth is cut into bins of ``threshold``, so that
  accuracies that differ by less than training noise mostly count as ties (Yu, Ranftl,
  Salzmann, arXiv 2003.04276; their code uses 0.001). The score is not binned.
- ``spearman`` (in ``core.statistics``): the correlation of ranks; ties share their mean
  rank.
- ``regret``: the best truth minus the best truth among the k best by the score.
- ``precision``: P@k, the part of the k best by the score that are among the k best by
  the truth.
- ``random_reaches``: p = 1 - (1 - r / n)^k, where r is the best true rank (1 is best)
  among the k best by the score. It is the probability that k random architectures of n
  contain one of rank r or better: what random search reaches at equal cost. Low is good
  (same authors).

For two methods whose results over several seeds are float [M] and [N], higher is better:

- ``wins``: 1 where a result of the first method beats one of the second, 1/2 where they
  are equal, else 0. Its mean is the probability that the first beats the second, U / (M
  N) with Mann and Whitney's U (1947), the "common language effect size" of McGraw and
  Wong (1992).
- ``mann_whitney``: the exact two-sided p-value of U, over all ways to deal the M + N
  results to the two methods; ties share their mean rank.
- ``best_of_random``: random search, exactly. Of k architectures, drawn with replacement
  from n, the one with the best ``choice`` is taken. An architecture is chosen with
  probability ((b + t)^k - b^k) / n^k / t, where t architectures are tied with it
  (itself included) and b are worse. The probability of one of the r best is then 1 - (1
  - r / n)^k, as above.

*Differences from the papers*: ties in a score have no order. ``precision`` shares the
places at the edge among the tied architectures; ``regret`` and ``random_reaches`` give
them to the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RankMetric = Callable[[np.ndarray, np.ndarray], float]
"""A function (score [N], truth [N]) -> number."""

TOP_PART = 0.1
"""The part of the architectures, best truth first, that ``kendall_top`` looks at: those
that a search has to choose among.
"""


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Tau-b of two samples [N], in O(N log N).

    Example:
        >>> round(kendall(np.array([1, 2, 3]), np.array([1, 3, 2])), 9)
        0.333333333
    """
    return float(stats.kendalltau(a, b).statistic)


def binned(truth: np.ndarray, threshold: float) -> np.ndarray:
    """The bins of width ``threshold`` that accuracies fall into: int64 [N]."""
    # 0.043 / 0.001 comes out just below 43; such a value belongs to bin 43.
    return np.floor(truth / threshold + 1e-6).astype(np.int64)


def sparse_kendall(score: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """Tau-b of a score with the binned truth; both [N]."""
    return kendall(score, binned(truth, threshold))


def best_tenth(truth: np.ndarray) -> np.ndarray:
    """The indices of the tenth with the best truth, at least two, best first."""
    return np.argsort(-truth, kind="stable")[: max(2, int(len(truth) * TOP_PART))]


def kendall_top(score: np.ndarray, truth: np.ndarray) -> float:
    """Tau-b among the tenth with the best truth."""
    top = best_tenth(truth)
    return kendall(score[top], truth[top])


def regret(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """The best truth minus the best among the ``k`` architectures of highest score."""
    return float(truth.max() - truth[_chosen(score, truth, k)].max())


def precision(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """The part of the ``k`` best by score that are among the ``k`` best by truth; its
    expected value if ties leave the order open.

    Example:
        >>> precision(np.array([3.0, 2.0, 2.0, 1.0]), np.array([4.0, 3.0, 2.0, 1.0]), 2)
        0.75
    """
    k = min(k, len(truth))
    return float((_seats(score, k) * _seats(truth, k)).sum() / k)


def random_reaches(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """The probability that ``k`` random architectures contain one at least as good as
    the best of the ``k`` with the highest score.
    """
    best = truth[_chosen(score, truth, k)].max()
    rank = int((truth >= best).sum())
    return float(1 - (1 - rank / len(truth)) ** k)


def rank_sum(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Several scores [N] combined by the sum of their ranks (1 is lowest, ties share
    their mean rank), float [N]. By ranks, because scores differ in scale.
    """
    total: np.ndarray = stats.rankdata(scores, axis=1).sum(axis=0)
    return total


def bootstrap(
    metric: RankMetric,
    score: np.ndarray,
    truth: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
    confidence: float,
) -> tuple[float, float] | None:
    """The percentile interval of a metric over architectures resampled with replacement.

    None unless more than half of the resamples have a value: there are too few
    architectures, or too few that differ. (``scipy.stats.bootstrap`` gives no interval
    as soon as one resample has no value.)
    """
    draws = rng.integers(len(truth), size=(resamples, len(truth)))
    values = np.array([metric(score[index], truth[index]) for index in draws])
    values = values[np.isfinite(values)]
    if len(values) * 2 <= resamples:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which results [M] of a method beat which results [N] of another: 1 for a win, 1/2
    for a tie, 0 for a loss, float [M, N].

    Example:
        >>> wins(np.array([2.0, 3.0]), np.array([1.0, 2.0])).mean()
        0.875
    """
    difference = a[:, None] - b[None, :]
    won: np.ndarray = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    return won


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """The exact two-sided p-value of Mann and Whitney's test of two samples [M] and [N]:
    twice the smaller tail, at most 1.

    Dynamic programming over the results counts the subsets of each size and rank sum.

    Example:
        >>> mann_whitney(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
        0.1
    """
    # Doubled, so that the mean ranks of ties are integers as well.
    doubled = np.rint(2 * stats.rankdata(np.concatenate([a, b]))).astype(np.int64)
    # counts[size][total] is the number of subsets of that size and rank sum. The counts
    # are Python integers, because they can exceed 64 bits.
    counts = [[0] * (int(doubled.sum()) + 1) for _ in range(len(a) + 1)]
    counts[0][0] = 1
    for rank in doubled.tolist():
        # From large to small, so that no subset contains a result twice.
        for size in range(len(a), 0, -1):
            without, smaller = counts[size], counts[size - 1]
            counts[size] = without[:rank] + [
                ways + smaller[total] for total, ways in enumerate(without[rank:])
            ]
    observed = int(doubled[: len(a)].sum())
    ways = counts[len(a)]
    tail = min(sum(ways[: observed + 1]), sum(ways[observed:]))
    return min(1.0, 2 * tail / sum(ways))


def best_of_random(choice: np.ndarray, k: int) -> np.ndarray:
    """The probability of each architecture of being the best by ``choice`` [n] of ``k``
    random ones, drawn with replacement: float [n].
    """
    _, inverse, tied = np.unique(choice, return_inverse=True, return_counts=True)
    up_to = np.cumsum(tied) / len(choice)
    below = up_to - tied / len(choice)
    probability: np.ndarray = ((up_to**k - below**k) / tied)[inverse]
    return probability


def bootstrap_wins(
    won: np.ndarray, rng: np.random.Generator, resamples: int, confidence: float
) -> tuple[float, float]:
    """The percentile interval of the mean of ``wins`` [M, N], with the seeds of both
    methods resampled.

    A single column stays as it is, whereas ``scipy.stats.bootstrap`` rejects a sample of
    one.
    """
    rows = rng.integers(won.shape[0], size=(resamples, won.shape[0]))
    columns = rng.integers(won.shape[1], size=(resamples, won.shape[1]))
    means = []
    for row, column in zip(rows, columns, strict=True):
        means.append(float(won[np.ix_(row, column)].mean()))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _chosen(score: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """The indices of the ``k`` highest scores; among those tied at the edge, the worst by
    truth.
    """
    chosen: np.ndarray = np.lexsort((truth, -score))[:k]
    return chosen


def _seats(values: np.ndarray, k: int) -> np.ndarray:
    """Each value's share of a place among the ``k`` highest, float [N]: 1, 0, or an equal
    share for those tied at the edge.
    """
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    seats: np.ndarray = above + tied * ((k - above.sum()) / tied.sum())
    return seats
