"""Known weights that record every request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hwnas.search.alphas import Alphas
from hwnas.search.strategy import Gates, Metrics, Probes, SearchContext, Strategy
from hwnas.testing import KnownWeights, Problem

PROBLEM = Problem(0)


class KnownRecorder(KnownWeights):
    """Records gates: ``trained``, ``evaluated`` with the multiple of the batch, and
    ``differentiated`` with their probes.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.trained: list[Gates] = []
        self.evaluated: list[tuple[list[Gates], int]] = []
        self.differentiated: list[tuple[Gates, dict[str, list[int]]]] = []

    def train(self, gates: Sequence[Gates], **options: Any) -> Metrics:
        self.trained += gates
        return super().train(gates, **options)

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        self.evaluated.append((list(gates), multiple))
        return super().qualities(gates, multiple)

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        self.differentiated.append((gates, {key: list(options) for key, options in probes.items()}))
        return super().gate_gradients(gates, probes, order, skip_dropout)


def recorded_context(steps: int, problem: Problem = PROBLEM) -> tuple[SearchContext, KnownRecorder]:
    """A search context of ``problem``, and the recorder that serves as its weights."""
    ctx, recorder = problem.context(steps), KnownRecorder(problem)
    ctx.weights = recorder
    return ctx, recorder


def fill(alphas: Alphas, given: Mapping[str, Any] | None = None) -> None:
    """Set the architecture parameters to ``given``, and to random values where none are
    given.
    """
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for key, alpha in alphas.values.items():
            alpha.copy_(torch.as_tensor((given or {}).get(key, rng.normal(size=len(alpha)))))


def step_at(strategy: Strategy, ctx: SearchContext, number: int, draw: int = 0) -> Metrics:
    """Run step ``number``; ``draw`` selects one of several generators for it."""
    ctx.step, ctx.rng = number, np.random.default_rng([number, draw])
    return strategy.step(ctx)
