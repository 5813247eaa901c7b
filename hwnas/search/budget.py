"""From anywhere in a space to its budget: by changes of one architecture, or by the
smallest change of a policy.

Both serve where the latency target and the limits are met too rarely for drawing and
rejecting. How far an architecture is from the budget is its relative latency gap beyond
the tolerance plus what it exceeds every limit by, relatively (``Limits.overruns``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwnas.core.space import SearchSpace
from hwnas.search.strategy import SearchContext

BATCH = 64
"""Architectures moved at once: bounds memory."""

PAIRS = 32
"""Pairs of changes that are priced exactly, of all that are estimated."""

PAIR_ROUNDS = 8
"""Pairs of changes that one architecture may make."""

SLOPES = 4
"""Times that a tilt takes prices anew where choices are coupled."""

STEEPEST, STEEPEST_LIMITED = 64.0, 1000.0
"""Bounds of a tilt, in nats for the largest difference in price between two options of
a choice; with limits, two tilts may have to outweigh each other.
"""

SPREAD = 0.5
"""Standard deviations kept between a tilted policy's expectation and a limit, so that
most of its samples meet the limit.
"""


def repair(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """The architectures int [N, choices], each moved into the budget or, where no
    change leads closer, as near as it got.

    In each round an architecture makes the change of one choice that brings it closest.
    Where none does, as when whatever helps one of two tables hurts the other, it makes
    two at once: all pairs are estimated by adding up what their changes do alone, and
    the best ``PAIRS`` of them are priced.
    """
    moves = _Moves.of(ctx.space)
    batches = [
        _moved(ctx, index_NC[first : first + BATCH], moves)
        for first in range(0, len(index_NC), BATCH)
    ]
    return np.concatenate(batches) if batches else index_NC


def distance(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """How far architectures are from the budget, relatively: float64 [N], at most 0 within it."""
    return _beyond(ctx, _offsets(ctx, index_NC))


@dataclass(frozen=True)
class _Moves:
    """The changes of one choice of a space: int64 [changes, choices], -1 where a choice
    stays; and all pairs that do not clash.
    """

    singles_KC: np.ndarray
    first_P: np.ndarray
    second_P: np.ndarray

    @classmethod
    def of(cls, space: SearchSpace) -> _Moves:
        options_C = np.array([len(choice.options) for choice in space.choices], dtype=np.int64)
        position_K = np.repeat(np.arange(len(options_C)), options_C)
        singles_KC = np.full((len(position_K), len(options_C)), -1, dtype=np.int64)
        singles_KC[np.arange(len(position_K)), position_K] = np.concatenate(
            [np.arange(count) for count in options_C]
        )
        return cls(singles_KC, *np.nonzero(position_K[:, None] < position_K))


def _made(changes_XC: np.ndarray, index_XC: np.ndarray) -> np.ndarray:
    return np.where(changes_XC < 0, index_XC, changes_XC)


def _moved(ctx: SearchContext, index_NC: np.ndarray, moves: _Moves) -> np.ndarray:
    """``repair`` of a batch."""
    now_NC, now_NM = index_NC.copy(), _offsets(ctx, index_NC)
    left_N, pairs_N = _beyond(ctx, now_NM), np.zeros(len(index_NC), dtype=np.int64)
    open_N = np.flatnonzero(left_N > 0)
    while len(open_N):
        next_NKC = _made(moves.singles_KC, now_NC[open_N, None])
        next_NKM = _offsets(ctx, next_NKC.reshape(-1, next_NKC.shape[-1])).reshape(
            *next_NKC.shape[:2], -1
        )
        next_NK = _beyond(ctx, next_NKM)
        better_N = []
        for i, n in enumerate(open_N):
            best = next_NK[i].argmin()
            row_C, row_M, left = next_NKC[i, best], next_NKM[i, best], next_NK[i, best]
            if left >= left_N[n] and pairs_N[n] < PAIR_ROUNDS:
                pairs_N[n] += 1
                row_C, row_M, left = _best_pair(ctx, now_NC[n], now_NM[n], next_NKM[i], moves)
            if left < left_N[n]:
                now_NC[n], now_NM[n], left_N[n] = row_C, row_M, left
                better_N.append(n)
        open_N = np.array([n for n in better_N if left_N[n] > 0], dtype=np.int64)
    return now_NC


def _best_pair(
    ctx: SearchContext, now_C: np.ndarray, now_M: np.ndarray, next_KM: np.ndarray, moves: _Moves
) -> tuple[np.ndarray, np.ndarray, float]:
    """Where the best two changes at once lead: option positions [choices], offsets, and
    how far that is from the budget.
    """
    beyond_P = _beyond(ctx, next_KM[moves.first_P] + (next_KM - now_M)[moves.second_P])
    likely_P = (
        np.argpartition(beyond_P, PAIRS)[:PAIRS]
        if len(beyond_P) > PAIRS
        else np.arange(len(beyond_P))
    )
    once_PC = _made(moves.singles_KC[moves.first_P[likely_P]], now_C)
    twice_PC = _made(moves.singles_KC[moves.second_P[likely_P]], once_PC)
    twice_PM = _offsets(ctx, twice_PC)
    left_P = _beyond(ctx, twice_PM)
    best = left_P.argmin()
    return twice_PC[best], twice_PM[best], float(left_P[best])


def _offsets(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Of architectures, float64 [N, 1 + limits]: latency / target - 1, and by what part
    they exceed each limit.
    """
    off_N = ctx.cost_model.costs(index_NC) / ctx.target - 1
    return (
        off_N[:, None]
        if ctx.limits is None
        else np.column_stack([off_N, ctx.limits.overruns(index_NC)])
    )


def _beyond(ctx: SearchContext, offsets_XM: np.ndarray) -> np.ndarray:
    """How far offsets [..., 1 + limits] are from the budget: [...]. Within it
    -tolerance to 0, the latency's gap deciding.
    """
    gap_X = np.abs(offsets_XM[..., 0]) - ctx.tolerance
    over_X = np.maximum(offsets_XM[..., 1:], 0).sum(axis=-1)
    beyond_X: np.ndarray = np.where(over_X > 0, np.maximum(gap_X, 0) + over_X, gap_X)
    return beyond_X


def tilt_policy(ctx: SearchContext, policy: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The policy bent until its expected latency is the target, and what is limited is
    in expectation below the limits.

        p'(i) ~ p(i) * exp(-mu * d E[latency] / d p(i) - sum over limits of nu_j * d
        E[value_j] / d p(i)),  nu_j >= 0

    Of all policies with these expectations it is the closest to the given one in
    relative entropy, where every choice's price is its own. Limits that the latency's
    tilt alone meets have nu_j = 0. Of a peak, the number of ops above the limit is what
    is tilted by. Where not all can be met, the latency is. ``mu`` is found by
    bisection, after ``_limited`` has found it together with ``nu``.
    """
    limited = _limited(ctx, policy) if ctx.limits is not None and ctx.limits.compiled else policy
    prices = ctx.cost_model.marginals(limited)

    def bent(mu: float) -> dict[str, np.ndarray]:
        logits = {
            key: np.log(p + 1e-12) - mu * (prices[key] - prices[key].mean())
            for key, p in limited.items()
        }
        weights = {key: np.exp(logit - logit.max()) for key, logit in logits.items()}
        return {key: weight / weight.sum() for key, weight in weights.items()}

    scale = 1 / max(max(float(np.ptp(price)) for price in prices.values()), 1e-12)
    low, high = -STEEPEST * scale, STEEPEST * scale
    for _ in range(40):
        middle = (low + high) / 2
        too_slow = float(ctx.cost_model.expected(bent(middle))) > ctx.target
        low, high = (middle, high) if too_slow else (low, middle)
    return bent((low + high) / 2)


def _limited(ctx: SearchContext, policy: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tilted policy for linear prices, taken anew ``SLOPES`` times at the policy
    found before, by minimising the dual

        sum over choices of log sum_i p(i) exp(-lambda . price(i))  +  lambda . (aims -
        what is fixed)

    over lambda = (mu, nu), whose gradient is how far the expectations are from the aims.
    """
    assert ctx.limits is not None
    sums = [
        (ctx.cost_model.additive_cost, ctx.target),
        *(each.as_sum for each in ctx.limits.compiled),
    ]
    sizes = [len(choice.options) for choice in ctx.space.choices]
    starts = np.cumsum([0, *sizes[:-1]])
    keys = [choice.key for choice in ctx.space.choices]
    log_p_K = np.log(np.concatenate([policy[key] for key in keys]) + 1e-12)
    current = dict(policy)
    for _ in range(SLOPES):
        p_K = np.concatenate([current[key] for key in keys])
        marginals = [additive_cost.marginals(current) for additive_cost, _ in sums]
        prices_KM = np.stack(
            [np.concatenate([each[key] for key in keys]) for each in marginals], axis=1
        )
        aims_M = np.array(
            [most - float(additive_cost.expected(current)) for additive_cost, most in sums]
        )
        sd_M = np.sqrt(_segments(p_K, prices_KM, starts)[1].diagonal())
        aims_M[1:] -= SPREAD * sd_M[1:]
        aims_M += p_K @ prices_KM
        p_K = _dual(log_p_K, prices_KM, aims_M, starts, sizes)
        current = dict(zip(keys, np.split(p_K, starts[1:]), strict=True))
    return current


def _dual(
    log_p_K: np.ndarray,
    prices_KM: np.ndarray,
    aims_M: np.ndarray,
    starts: np.ndarray,
    sizes: list[int],
) -> np.ndarray:
    """The tilted probabilities [options of all choices] at the minimum of the dual, by
    Newton's method projected on its bounds.
    """
    scale_M = np.maximum(
        (np.maximum.reduceat(prices_KM, starts) - np.minimum.reduceat(prices_KM, starts)).max(
            axis=0
        ),
        1e-12,
    )
    units_KM, goal_M = prices_KM / scale_M, aims_M / scale_M
    low_M = np.array([-STEEPEST_LIMITED, *[0.0] * (len(aims_M) - 1)])

    def at(tilt_M: np.ndarray) -> tuple[float, np.ndarray]:
        logit_K = log_p_K - units_KM @ tilt_M
        total_C = np.logaddexp.reduceat(logit_K, starts)
        return float(total_C.sum() + tilt_M @ goal_M), np.exp(logit_K - np.repeat(total_C, sizes))

    tilt_M = np.zeros(len(aims_M))
    value, p_K = at(tilt_M)
    for _ in range(60):
        expected_M, covariance_MM = _segments(p_K, units_KM, starts)
        slope_M = goal_M - expected_M
        free_M = ~((tilt_M <= low_M) & (slope_M > 0)) & ~(
            (tilt_M >= STEEPEST_LIMITED) & (slope_M < 0)
        )
        step_M = np.zeros(len(aims_M))
        step_M[free_M] = np.linalg.solve(
            covariance_MM[np.ix_(free_M, free_M)] + 1e-6 * np.eye(free_M.sum()), slope_M[free_M]
        )
        for shorter in 0.5 ** np.arange(20):
            next_M = np.clip(tilt_M - shorter * step_M, low_M, STEEPEST_LIMITED)
            next_value, next_p_K = at(next_M)
            if next_value < value:
                break
        if next_value >= value - 1e-9:
            break
        tilt_M, value, p_K = next_M, next_value, next_p_K
    return p_K


def _segments(
    p_K: np.ndarray, prices_KM: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Expectation [M] and covariance [M, M] of sums over choices of the prices [options
    of all choices, M] of independent picks.
    """
    mean_CM = np.add.reduceat(p_K[:, None] * prices_KM, starts)
    return mean_CM.sum(axis=0), (p_K[:, None] * prices_KM).T @ prices_KM - mean_CM.T @ mean_CM
