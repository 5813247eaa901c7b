"""How well a score ranks: rank correlations, what is lost by trusting it, and how sure
one can be of either.

``score`` and ``truth`` are float [N], higher is better in both. With fewer than two
architectures, or where all are alike, a correlation is undefined and comes out as nan.

- ``kendall``: tau-b (Kendall 1945), (concordant - discordant) / sqrt((pairs - ties in
  a) * (pairs - ties in b)).
- ``over_macs``: tau of the score minus tau of the MACs of the same architectures. Its
  interval is of the difference, so it can tell a score from counting MACs where the
  intervals of the two taus overlap.
- ``sparse_kendall``: the same after the truth is cut into bins of ``threshold``, so
  that accuracies that differ by less than training noise mostly count as ties (Yu,
  Ranftl, Salzmann, arXiv 2003.04276; their code uses 0.001). The score is not cut.
- ``spearman`` (in ``core.statistics``): the correlation of ranks, ties sharing their mean rank.
- ``regret``: the best truth of all minus the best among the k best by the score.
- ``precision``: P@k, the part of the k best by the score that are among the k best by the truth.
- ``random_reaches``: p = 1 - (1 - r / n)^k, the probability that k random architectures
  of n hold one of rank r or better, r being the best rank (1 is best) among the k best
  by the score: what random search reaches at equal cost. Low is good (same authors).

Of one method against another, whose results on several seeds are float [M] and [N],
higher is better:

- ``wins``: 1 where a result of the first beats one of the second, 1/2 where they are
  equal, else 0; its mean is the probability that the first beats the second, U / (M N)
  with Mann and Whitney's U (1947), the "common language effect size" of McGraw and Wong
  (1992).
- ``mann_whitney``: the two-sided p-value of U, exact: over all ways to deal the M + N
  results to the two, ties sharing their mean rank.
- ``best_of_random``: random search exactly. Of k architectures, drawn with replacement
  from n, the one of the best ``choice`` is taken: the probability of each to be that
  one, ((b + t)^k - b^k) / n^k shared by the t that are tied, b being worse. The
  probability of one among the r best is then 1 - (1 - r / n)^k, as above.

*Differences from the papers*: ties in a score have no order, so ``precision`` shares
the seats at the edge among the tied, ``regret`` and ``random_reaches`` give them to the
worst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RankMetric = Callable[[np.ndarray, np.ndarray], float]
"""(score [N], truth [N]) -> number."""

TOP_PART = 0.1
"""The part of the architectures with the best truth that ``kendall_top`` looks at:
there a search has to decide.
"""


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Tau-b of two samples [N], in O(N log N).

    Example:
        >>> round(kendall(np.array([1, 2, 3]), np.array([1, 3, 2])), 9)
        0.333333333
    """
    return float(stats.kendalltau(a, b).statistic)


def binned(truth: np.ndarray, threshold: float) -> np.ndarray:
    """The bins of ``threshold`` that accuracies lie in: int64 [N]. A value that is a
    whole multiple but for rounding is in its own.
    """
    return np.floor(truth / threshold + 1e-6).astype(np.int64)


def sparse_kendall(score: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """Tau-b of a score with the binned truth."""
    return kendall(score, binned(truth, threshold))


def best_tenth(truth: np.ndarray) -> np.ndarray:
    """Positions of the tenth with the best truth, at least two, best first."""
    return np.argsort(-truth, kind="stable")[: max(2, int(len(truth) * TOP_PART))]


def kendall_top(score: np.ndarray, truth: np.ndarray) -> float:
    """Tau-b among the tenth with the best truth."""
    top = best_tenth(truth)
    return kendall(score[top], truth[top])


def regret(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """The best truth minus the best among the ``k`` architectures of highest score."""
    return float(truth.max() - truth[_chosen(score, truth, k)].max())


def precision(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Part of the ``k`` best by score that are among the ``k`` best by truth; expected,
    where ties leave it open.

    Example:
        >>> precision(np.array([3.0, 2.0, 2.0, 1.0]), np.array([4.0, 3.0, 2.0, 1.0]), 2)
        0.75
    """
    k = min(k, len(truth))
    return float((_seats(score, k) * _seats(truth, k)).sum() / k)


def random_reaches(score: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Probability that ``k`` random architectures hold one at least as good as the best
    of the ``k`` of highest score.
    """
    best = truth[_chosen(score, truth, k)].max()
    rank = int((truth >= best).sum())
    return float(1 - (1 - rank / len(truth)) ** k)


def rank_sum(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Scores [N] combined: the sum of their ranks (1 is lowest, ties share the mean),
    float [N]; no scale counts more than another.
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
    """The percentile interval of a metric over architectures that are drawn anew, with replacement.

    None where fewer than half of the resamples have a value: there were too few
    architectures, or too few that differ. (``scipy.stats.bootstrap`` has no interval as
    soon as one resample has no value.)
    """
    draws = rng.integers(len(truth), size=(resamples, len(truth)))
    found = np.array([metric(score[index], truth[index]) for index in draws])
    found = found[np.isfinite(found)]
    if len(found) * 2 <= resamples:
        return None
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which results [M] of a method beat which [N] of another, a half where they are
    equal: float [M, N].

    Example:
        >>> wins(np.array([2.0, 3.0]), np.array([1.0, 2.0])).mean()
        0.875
    """
    difference = a[:, None] - b[None, :]
    won: np.ndarray = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    return won


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p-value of Mann and Whitney's test of two samples [M] and [N].

    The number of subsets of each size and rank sum is counted, one result after
    another; ranks are doubled, so that those of ties are integers, too. Twice the
    smaller tail, at most 1.

    Example:
        >>> mann_whitney(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
        0.1
    """
    doubled = np.rint(2 * stats.rankdata(np.concatenate([a, b]))).astype(np.int64)
    # Python's integers: there are more ways than 64 bits hold
    counts = [[0] * (int(doubled.sum()) + 1) for _ in range(len(a) + 1)]
    counts[0][0] = 1
    for rank in doubled.tolist():
        for size in range(len(a), 0, -1):
            fewer, these = counts[size - 1], counts[size]
            counts[size] = [
                ways + (fewer[total - rank] if total >= rank else 0)
                for total, ways in enumerate(these)
            ]
    found, ways = int(doubled[: len(a)].sum()), counts[len(a)]
    smaller = min(sum(ways[: found + 1]), sum(ways[found:]))
    return min(1.0, 2 * smaller / sum(ways))


def best_of_random(choice: np.ndarray, k: int) -> np.ndarray:
    """The probability [n] of each architecture to be the best by ``choice`` [n] of
    ``k`` random ones, which may repeat.
    """
    _, inverse, tied = np.unique(choice, return_inverse=True, return_counts=True)
    upto = np.cumsum(tied) / len(choice)
    probability: np.ndarray = ((upto**k - (upto - tied / len(choice)) ** k) / tied)[inverse]
    return probability


def bootstrap_wins(
    won: np.ndarray, rng: np.random.Generator, resamples: int, confidence: float
) -> tuple[float, float]:
    """The percentile interval of the mean of ``wins`` [M, N], the seeds of both methods drawn anew.

    A single column stays, where ``scipy.stats.bootstrap`` refuses a sample of one.
    """
    rows, columns = (rng.integers(count, size=(resamples, count)) for count in won.shape)
    means = [
        float(won[np.ix_(row, column)].mean()) for row, column in zip(rows, columns, strict=True)
    ]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _chosen(score: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` highest scores; of those tied at the edge, the worst by truth."""
    chosen: np.ndarray = np.lexsort((truth, -score))[:k]
    return chosen


def _seats(values: np.ndarray, k: int) -> np.ndarray:
    """How much of a place among the ``k`` highest each has; those tied at the edge
    share what is left: float [N].
    """
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    seats: np.ndarray = above + tied * ((k - above.sum()) / tied.sum())
    return seats
