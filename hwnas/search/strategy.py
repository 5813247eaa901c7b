"""The contract of a search method.

A strategy decides which gates the super-net runs under, and which architectures to propose in the end. It never sees an
optimiser step of the weights, a file, mixed precision or another process: the context owns those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import AbsoluteObjective, MnasObjective, PenalisedObjective
from hwnas.core.space import Option, SearchSpace

Metrics = dict[str, float]


@dataclass
class SearchContext:
    """What a strategy may use.

    ``train(gates)`` updates the shared weights on the next training batch; ``quality(gates, multiple)`` is the accuracy in
    0..1 on a held-out batch ``multiple`` times as large. ``rng`` is renewed for every step from (seed, step), which makes
    strategies resume exactly as long as they draw from nothing else.
    """

    space: SearchSpace
    cost: CostModel
    objective: AbsoluteObjective | MnasObjective | PenalisedObjective
    target_ms: float
    tolerance: float
    steps: int
    batch_size: int
    train: Callable[[Mapping[str, Any]], Metrics]
    quality: Callable[[Mapping[str, Any], int], float]
    step: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def reward(self, quality: float, latency_ms: float) -> float:
        """The objective at this context's target."""
        return self.objective.reward(quality, latency_ms, self.target_ms)


class Strategy(Protocol):
    """Four methods. ``Config`` holds the method's own options (the keys beside ``name`` in ``search.strategy``)."""

    Config: ClassVar[type[BaseModel]]

    def setup(self, ctx: SearchContext) -> None:
        """Called once, before the first step or a restored state."""

    def step(self, ctx: SearchContext) -> Metrics:
        """One step: usually one weight update, then one update of the method's own parameters."""

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """Up to ``count`` different architectures within the target's tolerance, best first."""

    def state_dict(self) -> dict[str, Any]:
        """The method's own state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


def one_hot(picks: Mapping[str, Option], space: SearchSpace) -> dict[str, np.ndarray]:
    """Gates that execute exactly ``picks``: choice key -> float64 [options]."""
    return {choice.key: np.eye(len(choice.options))[choice.options.index(picks[choice.key])] for choice in space.choices}


def within_target(ctx: SearchContext, index_NC: np.ndarray) -> np.ndarray:
    """Which of the indexed architectures [N, choices] meet the target within the tolerance: bool [N]."""
    within: np.ndarray = np.abs(ctx.cost.latencies_ms(index_NC) / ctx.target_ms - 1) <= ctx.tolerance
    return within


def uniform_index(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform random architectures as option positions: int64 [count, choices]."""
    return np.stack([rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1)


def towards_target(ctx: SearchContext, index_C: np.ndarray) -> np.ndarray:
    """The nearest architecture within the target's tolerance that single changes lead to, or the closest found.

    In each round the one change of one choice is made that brings the latency closest to the target.
    """
    current = index_C.copy()
    gap = abs(float(ctx.cost.latencies_ms(current[None])[0]) - ctx.target_ms)
    while gap > ctx.tolerance * ctx.target_ms:
        neighbours = []
        for position, choice in enumerate(ctx.space.choices):
            changed = np.repeat(current[None], len(choice.options), axis=0)
            changed[:, position] = np.arange(len(choice.options))
            neighbours.append(changed)
        index_NC = np.concatenate(neighbours)
        gaps = np.abs(ctx.cost.latencies_ms(index_NC) - ctx.target_ms)
        if gaps.min() >= gap:
            break
        current, gap = index_NC[gaps.argmin()], float(gaps.min())
    return current


def random_within(ctx: SearchContext, count: int, rng: np.random.Generator) -> list[Picks]:
    """Up to ``count`` different architectures within the target's tolerance, uniform by rejection.

    Where the target is so far out in the space that rejection finds too few, the rest are uniform samples moved
    ``towards_target``.
    """
    found: dict[tuple[int, ...], None] = {}
    for _ in range(50):
        index_NC = uniform_index(ctx.space, 4096, rng)
        found |= dict.fromkeys(tuple(int(i) for i in row) for row in index_NC[within_target(ctx, index_NC)])
        if len(found) >= count:
            break
    for row in uniform_index(ctx.space, 4 * count if len(found) < count else 0, rng):
        moved = towards_target(ctx, row)
        if within_target(ctx, moved[None])[0]:
            found[tuple(int(i) for i in moved)] = None
    return [ctx.space.at(row) for row in list(found)[:count]]
