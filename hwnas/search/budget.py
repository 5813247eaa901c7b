"""Moves into the budget of a search: ``repair`` changes single architectures,
``tilt_policy`` makes the smallest change of a policy.

Both are for budgets that random architectures meet too rarely for rejection sampling.
An architecture's distance from the budget is its relative latency gap beyond the
tolerance, plus the relative overrun of every limit (``Limits.overruns``).

"Latency" stands for the cost that the budget is about; it may be a counted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwnas.core.space import SearchSpace
from hwnas.search.strategy import SearchContext

BATCH = 64
"""Architectures repaired at once; bounds memory."""

PAIRS = 32
"""Pairs of changes whose cost is computed exactly, out of all that are estimated."""

PAIR_ROUNDS = 8
"""Most pairs of changes that one architecture may make."""

SLOPES = 4
"""How often a tilt linearises the costs, which are not linear if choices are coupled."""

STEEPEST = 64.0
"""Bound of a tilt, in nats for the largest difference in cost between two options of a
choice.
"""

STEEPEST_LIMITED = 1000.0
"""The same with limits: wider, as two tilts may have to outweigh each other."""

SAFETY_STDS = 0.5
"""Standard deviations between a tilted policy's expectation and a limit, so that most
of its samples meet the limit.
"""


def repair(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Move architectures, int [N, choices], into the budget, or as close to it as
    greedy changes lead.

    In each round, every architecture makes the change of one choice that brings it
    closest. If no single change helps (with two tables, what helps one may hurt the
    other), it makes two at once: the effect of every pair is estimated as the sum of
    its two changes' effects, and the best ``PAIRS`` are computed exactly.
    """
    if len(index_NC) == 0:
        return index_NC
    moves = _Moves.of(ctx.space)
    batches = []
    for first in range(0, len(index_NC), BATCH):
        batches.append(_repair_batch(ctx, index_NC[first : first + BATCH], moves))
    return np.concatenate(batches)


def distance(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Relative distance of architectures, int [N, choices], from the budget: float64
    [N], at most 0 within it.
    """
    return _distances(ctx, _offsets(ctx, index_NC))


@dataclass(frozen=True)
class _Moves:
    """All changes of one choice, and all pairs of them that change different choices.

    ``singles_KC``: int64 [changes, choices], -1 for choices that stay. ``first_P`` and
    ``second_P``: the changes of each pair, int64 [pairs].
    """

    singles_KC: np.ndarray
    first_P: np.ndarray
    second_P: np.ndarray

    @classmethod
    def of(cls, space: SearchSpace) -> _Moves:
        options_C = np.array([len(choice.options) for choice in space.choices], dtype=np.int64)
        position_K = np.repeat(np.arange(len(options_C)), options_C)
        option_K = np.concatenate([np.arange(count) for count in options_C])
        singles_KC = np.full((len(position_K), len(options_C)), -1, dtype=np.int64)
        singles_KC[np.arange(len(position_K)), position_K] = option_K
        first_P, second_P = np.nonzero(position_K[:, None] < position_K)
        return cls(singles_KC, first_P, second_P)


def _apply(changes_XC: np.ndarray, index_XC: np.ndarray) -> np.ndarray:
    """Architectures after changes; -1 leaves a choice as it is."""
    return np.where(changes_XC < 0, index_XC, changes_XC)


def _repair_batch(ctx: SearchContext, index_NC: np.ndarray, moves: _Moves) -> np.ndarray:
    """``repair`` of one batch."""
    current_NC = index_NC.copy()
    current_NM = _offsets(ctx, index_NC)
    distance_N = _distances(ctx, current_NM)
    pairs_N = np.zeros(len(index_NC), dtype=np.int64)
    active_N = np.flatnonzero(distance_N > 0)
    while len(active_N):
        next_NKC = _apply(moves.singles_KC, current_NC[active_N, None])
        flat_XM = _offsets(ctx, next_NKC.reshape(-1, next_NKC.shape[-1]))
        next_NKM = flat_XM.reshape(*next_NKC.shape[:2], -1)
        next_NK = _distances(ctx, next_NKM)

        improved_N = []
        for i, n in enumerate(active_N):
            k = next_NK[i].argmin()
            best_C = next_NKC[i, k]
            best_M = next_NKM[i, k]
            best = next_NK[i, k]
            # Pairs cost far more than single changes, so they come second, and not often.
            # A space with one choice has none.
            may_pair = len(moves.first_P) > 0 and pairs_N[n] < PAIR_ROUNDS
            if best >= distance_N[n] and may_pair:
                pairs_N[n] += 1
                best_C, best_M, best = _best_pair(
                    ctx, current_NC[n], current_NM[n], next_NKM[i], moves
                )
            if best < distance_N[n]:
                current_NC[n] = best_C
                current_NM[n] = best_M
                distance_N[n] = best
                improved_N.append(n)
        # An architecture that no change has improved is stuck for good.
        active_N = np.array([n for n in improved_N if distance_N[n] > 0], dtype=np.int64)
    return current_NC


def _best_pair(
    ctx: SearchContext,
    current_C: np.ndarray,
    current_M: np.ndarray,
    next_KM: np.ndarray,
    moves: _Moves,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The result of the best two changes at once: the architecture [choices], its
    offsets [1 + limits], and its distance from the budget.
    """
    estimated_P = _distances(ctx, next_KM[moves.first_P] + (next_KM - current_M)[moves.second_P])
    likely_P = np.arange(len(estimated_P))
    if len(estimated_P) > PAIRS:
        likely_P = np.argpartition(estimated_P, PAIRS)[:PAIRS]
    once_PC = _apply(moves.singles_KC[moves.first_P[likely_P]], current_C)
    twice_PC = _apply(moves.singles_KC[moves.second_P[likely_P]], once_PC)
    twice_PM = _offsets(ctx, twice_PC)
    distance_P = _distances(ctx, twice_PM)
    best = distance_P.argmin()
    return twice_PC[best], twice_PM[best], float(distance_P[best])


def _offsets(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Offsets of architectures from the budget, float64 [N, 1 + limits]: latency /
    target - 1, and the relative overrun of each limit.
    """
    latency_N = ctx.cost_model.costs(index_NC) / ctx.target - 1
    if ctx.limits is None:
        return latency_N[:, None]
    return np.column_stack([latency_N, ctx.limits.overruns(index_NC)])


def _distances(ctx: SearchContext, offsets_XM: np.ndarray) -> np.ndarray:
    """Distances [...] from the budget of offsets [..., 1 + limits].

    Within the budget only the latency gap counts, which is -tolerance to 0.
    """
    gap_X = np.abs(offsets_XM[..., 0]) - ctx.tolerance
    overrun_X = np.maximum(offsets_XM[..., 1:], 0).sum(axis=-1)
    # A negative gap must not make up for an overrun.
    distance_X: np.ndarray = np.where(overrun_X > 0, np.maximum(gap_X, 0) + overrun_X, gap_X)
    return distance_X


def tilt_policy(ctx: SearchContext, policy: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tilt a policy until its expected latency is the target, and the expectation of
    everything limited is below its limit.

        p'(i) ~ p(i) * exp(-mu * d E[latency] / d p(i)
                           - sum over limits of nu_j * d E[value_j] / d p(i)),  nu_j >= 0

    If the costs of the choices add up, this is the policy with these expectations that
    is closest to the given one in relative entropy. A limit that the latency's tilt
    meets by itself has nu_j = 0. A limit on a peak is replaced by the number of ops
    above it. If not everything can be met, the latency is. ``_limited`` finds ``mu``
    together with ``nu``; a bisection then makes ``mu`` exact.
    """
    base = policy
    if ctx.limits is not None and ctx.limits.compiled:
        base = _tilt_with_limits(ctx, policy)
    costs = ctx.cost_model.marginals(base)

    def tilted(mu: float) -> dict[str, np.ndarray]:
        probabilities = {}
        for key, p in base.items():
            # 1e-12: an option of probability 0 must stay finite.
            logits = np.log(p + 1e-12) - mu * (costs[key] - costs[key].mean())
            weights = np.exp(logits - logits.max())
            probabilities[key] = weights / weights.sum()
        return probabilities

    largest_difference = max(float(np.ptp(cost)) for cost in costs.values())
    scale = 1 / max(largest_difference, 1e-12)
    low = -STEEPEST * scale
    high = STEEPEST * scale
    # 40 halvings leave 2^-40 of the interval.
    for _ in range(40):
        middle = (low + high) / 2
        if float(ctx.cost_model.expected(tilted(middle))) > ctx.target:
            low = middle
        else:
            high = middle
    return tilted((low + high) / 2)


def _tilt_with_limits(
    ctx: SearchContext, policy: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tilted policy by latency and limits, with linearised costs.

    The costs are linearised ``SLOPES`` times, each time at the policy found last. Every
    time the dual

        sum over choices of log sum_i p(i) exp(-lambda . cost(i))  +  lambda . aims

    is minimised over lambda = (mu, nu); its gradient is the aims minus the
    expectations. Aims are targets of the variable part of the costs.
    """
    assert ctx.limits is not None
    # Sums of costs, each with the value that its expectation should have (the target)
    # or stay below (the limits).
    sums = [(ctx.cost_model.additive_cost, ctx.target)]
    sums += [limit.as_sum for limit in ctx.limits.compiled]
    sizes = [len(choice.options) for choice in ctx.space.choices]
    starts = np.cumsum([0, *sizes[:-1]])
    keys = [choice.key for choice in ctx.space.choices]

    def concatenated(by_choice: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([by_choice[key] for key in keys])

    log_p_K = np.log(concatenated(policy) + 1e-12)
    current = dict(policy)
    for _ in range(SLOPES):
        p_K = concatenated(current)
        marginals = [additive_cost.marginals(current) for additive_cost, _ in sums]
        costs_KM = np.stack([concatenated(marginal) for marginal in marginals], axis=1)
        gaps = [most - float(additive_cost.expected(current)) for additive_cost, most in sums]
        aims_M = np.array(gaps)
        _, covariance_MM = _moments(p_K, costs_KM, starts)
        aims_M[1:] -= SAFETY_STDS * np.sqrt(covariance_MM.diagonal())[1:]
        aims_M += p_K @ costs_KM
        p_K = _minimise_dual(log_p_K, costs_KM, aims_M, starts, sizes)
        current = dict(zip(keys, np.split(p_K, starts[1:]), strict=True))
    return current


def _minimise_dual(
    log_p_K: np.ndarray,
    costs_KM: np.ndarray,
    aims_M: np.ndarray,
    starts: np.ndarray,
    sizes: list[int],
) -> np.ndarray:
    """The tilted probabilities [options of all choices] at the minimum of the dual, by
    Newton's method projected on its bounds.
    """
    # In units of the largest difference between two options of a choice, milliseconds
    # and MACs have tilts of the same size.
    range_CM = np.maximum.reduceat(costs_KM, starts) - np.minimum.reduceat(costs_KM, starts)
    scale_M = np.maximum(range_CM.max(axis=0), 1e-12)
    scaled_KM = costs_KM / scale_M
    goal_M = aims_M / scale_M
    # The latency is to be met from both sides, limits only from below.
    low_M = np.zeros(len(aims_M))
    low_M[0] = -STEEPEST_LIMITED

    def dual(tilt_M: np.ndarray) -> tuple[float, np.ndarray]:
        logit_K = log_p_K - scaled_KM @ tilt_M
        total_C = np.logaddexp.reduceat(logit_K, starts)
        return float(total_C.sum() + tilt_M @ goal_M), np.exp(logit_K - np.repeat(total_C, sizes))

    tilt_M = np.zeros(len(aims_M))
    value, p_K = dual(tilt_M)
    for _ in range(60):
        expected_M, covariance_MM = _moments(p_K, scaled_KM, starts)
        slope_M = goal_M - expected_M
        # Tilts at a bound that the slope would push beyond it stay there.
        at_low_M = (tilt_M <= low_M) & (slope_M > 0)
        at_high_M = (tilt_M >= STEEPEST_LIMITED) & (slope_M < 0)
        free_M = ~at_low_M & ~at_high_M
        # 1e-6: two limits on the same thing make the covariance singular.
        hessian = covariance_MM[np.ix_(free_M, free_M)] + 1e-6 * np.eye(free_M.sum())
        step_M = np.zeros(len(aims_M))
        step_M[free_M] = np.linalg.solve(hessian, slope_M[free_M])

        # Halve the step until the dual falls.
        for fraction in 0.5 ** np.arange(20):
            next_M = np.clip(tilt_M - fraction * step_M, low_M, STEEPEST_LIMITED)
            next_value, next_p_K = dual(next_M)
            if next_value < value:
                break
        if next_value >= value - 1e-9:
            break
        tilt_M, value, p_K = next_M, next_value, next_p_K
    return p_K


def _moments(
    p_K: np.ndarray, costs_KM: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Expectation [M] and covariance [M, M] of the summed costs of independent picks,
    one per choice, for costs [options of all choices, M].
    """
    weighted_KM = p_K[:, None] * costs_KM
    mean_CM = np.add.reduceat(weighted_KM, starts)
    return mean_CM.sum(axis=0), weighted_KM.T @ costs_KM - mean_CM.T @ mean_CM
