"""What a search may ask of the weights that it trains, and of what evaluates architectures.

``hwnas.search.weights`` and ``hwnas.search.evaluator`` do it with a super-net,
``hwnas.search.cost_counter`` counts what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hwnas.core.arch import Picks
from hwnas.nn.shared import Gates, Probes

Metrics = dict[str, float]


class Evaluator(Protocol):
    """What evaluates architectures."""

    def evaluate(self, picks: Picks) -> float:
        """Recalibrated quality. See ``SearchContext.evaluate``."""


class SharedWeights(Protocol):
    """What trains the shared weights."""

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """One update on the next training batch. See ``SearchContext.train``."""

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Held-out qualities. See ``SearchContext.qualities``."""

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Held-out loss and its derivative by every gate. See ``SearchContext.loss``."""

    def remember_teacher(self, picks: Picks) -> None:
        """Keep the present weights as teacher. See ``SearchContext.remember_teacher``."""

    def grow(self, number: int) -> None:
        """Go on with another super-net. See ``SearchContext.grow``."""
