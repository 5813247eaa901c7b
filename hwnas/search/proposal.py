"""Proposes architectures within the budget, from a policy or at random."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hwnas.core.arch import Picks
from hwnas.core.space import Option, SearchSpace
from hwnas.search.budget import BATCH, distance, repair, tilt_policy
from hwnas.search.strategy import SearchContext

Policy = Mapping[str, np.ndarray]
"""Choice key -> probabilities [options]; choices are independent."""

SAMPLES = 4096
"""Architectures drawn at a time."""

ROUNDS = 50
"""Most rounds of drawing."""

MOVED = 128
"""Most architectures that are repaired into the budget."""


def one_hot(picks: Mapping[str, Option], space: SearchSpace) -> dict[str, np.ndarray]:
    """Gates that execute exactly ``picks``: choice key -> float64 [options]."""
    gates = {}
    for choice in space.choices:
        picked = choice.options.index(picks[choice.key])
        gates[choice.key] = np.eye(len(choice.options))[picked]
    return gates


def is_feasible(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Which architectures, int [N, choices], meet the target within the tolerance, and
    every limit: bool [N].
    """
    gap_N = np.abs(ctx.cost_model.costs(index_NC) / ctx.target - 1)
    within: np.ndarray = gap_N <= ctx.tolerance
    if ctx.limits is not None:
        within &= ctx.limits.feasible(index_NC)
    return within


def uniform_index(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform random architectures as option positions: int64 [count, choices]."""
    return np.stack(
        [rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1
    )


def policy_index(
    space: SearchSpace, policy: Policy, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Architectures drawn from a policy, as option positions: int64 [count, choices]."""
    columns = []
    for choice in space.choices:
        p = policy[choice.key]
        # ``choice`` demands a sum of exactly 1, which rounding may have missed.
        columns.append(rng.choice(len(p), size=count, p=p / p.sum()))
    return np.stack(columns, axis=1)


def gather_feasible(
    ctx: SearchContext, index_NC: np.ndarray, found: dict[bytes, np.ndarray]
) -> None:
    """Add the rows that are within the budget to ``found``, each architecture once.

    Rows that differ only in slots that are left out are the same architecture, so the
    keys are canonical rows.
    """
    if len(index_NC) == 0:
        return
    for row in index_NC[is_feasible(ctx, index_NC)]:
        found.setdefault(ctx.space.canonical(row).tobytes(), row)


def sample_feasible(ctx: SearchContext, count: int, rng: np.random.Generator) -> list[Picks]:
    """Up to ``count`` different architectures within the target's tolerance and the
    limits, drawn uniformly by rejection.

    If rejection finds too few, because few architectures meet the budget, these follow
    in order: samples of the uniform policy after ``tilt_policy``, tilted and uniform
    samples after ``repair``, and variations of all of these.
    """
    found: dict[bytes, np.ndarray] = {}
    for _ in range(ROUNDS):
        gather_feasible(ctx, uniform_index(ctx.space, SAMPLES, rng), found)
        if len(found) >= count:
            break
    if len(found) < count:
        uniform = {}
        for choice in ctx.space.choices:
            uniform[choice.key] = np.full(len(choice.options), 1 / len(choice.options))
        drawn_NC = policy_index(ctx.space, tilt_policy(ctx, uniform), SAMPLES, rng)
        gather_feasible(ctx, drawn_NC, found)
        # Repair is slow: spend it on the samples that have the least way to go.
        nearest_NC = drawn_NC[np.argsort(distance(ctx, drawn_NC), kind="stable")]
        _fill(ctx, nearest_NC[~is_feasible(ctx, nearest_NC)][:MOVED], count, rng, found)
    if len(found) < count:
        _fill(ctx, uniform_index(ctx.space, min(4 * count, MOVED), rng), count, rng, found)
    return [ctx.space.at(row) for row in list(found.values())[:count]]


def _fill(
    ctx: SearchContext,
    index_NC: np.ndarray,
    count: int,
    rng: np.random.Generator,
    found: dict[bytes, np.ndarray],
) -> None:
    """Add architectures to ``found`` until it has ``count``: the given ones after
    ``repair``, then variations of those found.

    A variation draws one to three choices again, on average. The first round of
    variations that yields nothing new is the last one.
    """
    for first in range(0, len(index_NC), BATCH):
        gather_feasible(ctx, repair(ctx, index_NC[first : first + BATCH]), found)
        if len(found) >= count:
            return
    if not found:
        return
    for _ in range(ROUNDS):
        before = len(found)
        parents_PC = np.array(list(found.values()))
        varied_NC = parents_PC[rng.integers(before, size=SAMPLES)]
        random_NC = rng.random(varied_NC.shape)
        changes_N1 = rng.integers(1, 4, size=(SAMPLES, 1))
        changed_NC = random_NC < changes_N1 / varied_NC.shape[1]
        drawn_NC = uniform_index(ctx.space, SAMPLES, rng)
        gather_feasible(ctx, np.where(changed_NC, drawn_NC, varied_NC), found)
        if len(found) >= count or len(found) == before:
            break


def propose_feasible(
    ctx: SearchContext, policy: Policy, count: int, best: Picks | None = None
) -> list[Picks]:
    """Up to ``count`` different architectures within the budget that are likely under a
    policy, the likeliest first.

    ``best`` (default: the argmax of every choice) comes first if it meets the budget.
    The others are drawn from the policy and from the policy after ``tilt_policy``. If
    these are too few, likely samples after ``repair``, variations of them, and random
    architectures follow.
    """
    keys = [choice.key for choice in ctx.space.choices]
    modes = []
    drawn = []
    for source in (policy, tilt_policy(ctx, policy)):
        drawn.append(policy_index(ctx.space, source, SAMPLES, ctx.rng))
        modes.append(np.array([[int(source[key].argmax()) for key in keys]]))
    first = modes[0] if best is None else ctx.space.index(best)[None]
    index_NC = np.concatenate([first, *modes, *drawn])

    # Samples of the tilted policy are also ranked by the policy itself.
    log_p_KN = [np.log(policy[key][index_NC[:, i]] + 1e-30) for i, key in enumerate(keys)]
    log_p_N = np.sum(log_p_KN, axis=0)
    log_p_N[0] = np.inf  # ``best`` stays first
    ranked_NC = index_NC[np.argsort(-log_p_N, kind="stable")]
    found: dict[bytes, np.ndarray] = {}
    gather_feasible(ctx, ranked_NC, found)
    if len(found) < count:
        _fill(ctx, ranked_NC[: min(4 * count, MOVED)], count, ctx.rng, found)
    if len(found) < count:
        others = sample_feasible(ctx, count, ctx.rng)
        gather_feasible(ctx, np.array([ctx.space.index(picks) for picks in others]), found)
    return [ctx.space.at(row) for row in list(found.values())[:count]]
