"""What a search may ask of the weights that it trains, and of the evaluator.

``hwnas.search.weights`` and ``hwnas.search.evaluator`` implement these protocols by a
super-net. ``hwnas.search.cost_counter`` wraps them to count the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hwnas.core.arch import Picks
from hwnas.core.gates import Gates, Probes

Metrics = dict[str, float]


class Evaluator(Protocol):
    """Evaluates architectures."""

    def evaluate(self, picks: Picks) -> float:
        """Quality in 0..1 with recalibrated BN. See ``SearchContext.evaluate``."""


class SharedWeights(Protocol):
    """Trains the shared weights."""

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """One update on the next training batch. See ``SearchContext.train``."""

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Held-out qualities in 0..1. See ``SearchContext.qualities``."""

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Held-out loss and its derivative by the gates. See ``SearchContext.loss``."""

    def remember_teacher(self, picks: Picks) -> None:
        """Copy the current weights as the teacher. See
        ``SearchContext.remember_teacher``.
        """

    def grow(self, number: int) -> None:
        """Continue with another super-net. See ``SearchContext.grow``."""
