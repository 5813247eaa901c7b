"""From a policy, or from nothing, to architectures within the budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hwnas.core.arch import Picks
from hwnas.core.space import Option, SearchSpace
from hwnas.search.budget import BATCH, distance, repair, tilt_policy
from hwnas.search.strategy import SearchContext

Policy = Mapping[str, np.ndarray]
"""Choice key -> probabilities [options] of independent choices."""

SAMPLES = 4096
"""Architectures drawn at a time."""

ROUNDS = 50
"""Times that they are drawn, at most."""

MOVED = 128
"""Architectures moved into the budget, at most."""


def one_hot(picks: Mapping[str, Option], space: SearchSpace) -> dict[str, np.ndarray]:
    """Gates that execute exactly ``picks``: choice key -> float64 [options]."""
    return {
        choice.key: np.eye(len(choice.options))[choice.options.index(picks[choice.key])]
        for choice in space.choices
    }


def is_feasible(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Which of the indexed architectures [N, choices] meet the target within the
    tolerance, and every limit: bool [N].
    """
    within: np.ndarray = np.abs(ctx.cost_model.costs(index_NC) / ctx.target - 1) <= ctx.tolerance
    return within if ctx.limits is None else within & ctx.limits.feasible(index_NC)


def uniform_index(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform random architectures as option positions: int64 [count, choices]."""
    return np.stack(
        [rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1
    )


def policy_index(
    space: SearchSpace, policy: Policy, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Architectures drawn from a policy, as option positions: int64 [count, choices]."""
    drawn = [
        rng.choice(
            len(policy[choice.key]), size=count, p=policy[choice.key] / policy[choice.key].sum()
        )
        for choice in space.choices
    ]
    return np.stack(drawn, axis=1)


def gather_feasible(
    ctx: SearchContext, index_NC: np.ndarray, found: dict[bytes, np.ndarray]
) -> None:
    """Add the rows within the budget to ``found``, each architecture once: left-out
    slots differ in nothing but name.
    """
    for row in index_NC[is_feasible(ctx, index_NC)] if len(index_NC) else index_NC:
        found.setdefault(ctx.space.canonical(row).tobytes(), row)


def sample_feasible(ctx: SearchContext, count: int, rng: np.random.Generator) -> list[Picks]:
    """Up to ``count`` different architectures within the target's tolerance and the
    limits, uniform by rejection.

    Where the budget is so far out in the space that rejection finds too few, the rest
    are samples of the uniform policy ``tilt_policy`` into the budget, uniform and tilted
    samples moved ``repair``, and variations of all these.
    """
    found: dict[bytes, np.ndarray] = {}
    for _ in range(ROUNDS):
        gather_feasible(ctx, uniform_index(ctx.space, SAMPLES, rng), found)
        if len(found) >= count:
            break
    if len(found) < count:
        uniform = {
            choice.key: np.full(len(choice.options), 1 / len(choice.options))
            for choice in ctx.space.choices
        }
        drawn_NC = policy_index(ctx.space, tilt_policy(ctx, uniform), SAMPLES, rng)
        gather_feasible(ctx, drawn_NC, found)
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
    """Add architectures to ``found`` until it has ``count``: the given ones moved into
    the budget, then variations of those found.

    A variation draws one to three choices anew. These end with the first round that
    yields nothing new.
    """
    for first in range(0, len(index_NC), BATCH):
        gather_feasible(ctx, repair(ctx, index_NC[first : first + BATCH]), found)
        if len(found) >= count:
            return
    for _ in range(ROUNDS if found else 0):
        before = len(found)
        parents_PC = np.array(list(found.values()))
        varied_NC = parents_PC[rng.integers(before, size=SAMPLES)]
        changed_NC = (
            rng.random(varied_NC.shape) < rng.integers(1, 4, size=(SAMPLES, 1)) / varied_NC.shape[1]
        )
        gather_feasible(
            ctx, np.where(changed_NC, uniform_index(ctx.space, SAMPLES, rng), varied_NC), found
        )
        if len(found) >= count or len(found) == before:
            break


def propose_feasible(
    ctx: SearchContext, policy: Policy, count: int, best: Picks | None = None
) -> list[Picks]:
    """Up to ``count`` different architectures within the budget that a policy makes
    likely, the likeliest first.

    ``best`` (default: the argmax of every choice) leads where it meets the budget. The
    others are drawn from the policy and from its ``tilt_policy`` form; where both hold too
    few, likely samples moved ``repair``, variations of them and random
    architectures follow.
    """
    keys = [choice.key for choice in ctx.space.choices]
    centred = tilt_policy(ctx, policy)
    drawn = [policy_index(ctx.space, each, SAMPLES, ctx.rng) for each in (policy, centred)]
    modes = [np.array([[int(each[key].argmax()) for key in keys]]) for each in (policy, centred)]
    first = modes[0] if best is None else ctx.space.index(best)[None]
    index_NC = np.concatenate([first, *modes, *drawn])
    log_p_N = np.sum(
        [np.log(policy[key][index_NC[:, i]] + 1e-30) for i, key in enumerate(keys)], axis=0
    )
    log_p_N[0] = np.inf
    ranked = index_NC[np.argsort(-log_p_N, kind="stable")]
    found: dict[bytes, np.ndarray] = {}
    gather_feasible(ctx, ranked, found)
    if len(found) < count:
        _fill(ctx, ranked[: min(4 * count, MOVED)], count, ctx.rng, found)
    if len(found) < count:
        others = sample_feasible(ctx, count, ctx.rng)
        gather_feasible(ctx, np.array([ctx.space.index(picks) for picks in others]), found)
    return [ctx.space.at(row) for row in list(found.values())[:count]]
