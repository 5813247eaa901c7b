"""A search context over any space, whose weights record every request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import AbsoluteObjective
from hwnas.core.space import MacroSpace, SearchSpace, SpaceStage
from hwnas.search.strategy import Gates, Metrics, Probes, SearchContext, Strategy
from hwnas.testing import synthetic_table


@dataclass(frozen=True)
class Update:
    """One call of ``train``: option positions [paths, choices] of its one-hot gates."""

    index_PC: np.ndarray
    split: bool
    teach: bool


@dataclass
class Recorder:
    """Shared weights that record every request; ``quality`` is the accuracy of an
    architecture.
    """

    space: SearchSpace
    quality: Callable[[Picks], float] = lambda picks: 0.5
    updates: list[Update] = field(default_factory=list)
    teachers: list[tuple[int, Picks]] = field(default_factory=list)
    evaluated: list[Picks] = field(default_factory=list)

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        assert not skip_dropout
        for path_gates in gates:
            assert path_gates.keys() == {choice.key for choice in self.space.choices}
            assert all(
                sorted(gate) == [0.0] * (len(gate) - 1) + [1.0] for gate in path_gates.values()
            ), "every path is one-hot"
        index_PC = np.array(
            [
                [int(np.argmax(path_gates[choice.key])) for choice in self.space.choices]
                for path_gates in gates
            ]
        )
        self.updates.append(Update(index_PC, split, teach))
        return {"loss": 1.0}

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        raise AssertionError("nothing here scores batches")

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        raise AssertionError("nothing here differentiates")

    def evaluate(self, picks: Picks) -> float:
        self.evaluated.append(dict(picks))
        return self.quality(picks)

    def remember_teacher(self, picks: Picks) -> None:
        self.space.check(picks)
        self.teachers.append((len(self.updates), dict(picks)))

    def context(
        self, steps: int = 1, *, target_range: float = 0.45, tolerance: float = 0.02
    ) -> SearchContext:
        """A context with a target near the middle of the space's range, under the
        synthetic table.
        """
        cost = CostModel.of_table(self.space, synthetic_table(self.space))
        low, high = cost.range()
        target_ms = low + target_range * (high - low)
        return SearchContext(
            self.space,
            cost,
            AbsoluteObjective(),
            target_ms,
            tolerance,
            steps,
            64,
            weights=self,
            evaluator=self,
        )

    @property
    def trained(self) -> np.ndarray:
        """All trained paths as option positions: int [paths of all steps, choices]."""
        return np.concatenate([update.index_PC for update in self.updates])


def run_steps(
    strategy: Strategy, ctx: SearchContext, first: int = 0, last: int | None = None, seed: int = 0
) -> list[Metrics]:
    """Run the steps from ``first`` up to ``last`` as the search stage does."""
    metrics = []
    for number in range(first, ctx.steps if last is None else last):
        ctx.step, ctx.rng = number, np.random.default_rng([seed, number])
        metrics.append(strategy.step(ctx))
    return metrics


def elastic_space() -> MacroSpace:
    """A small version of once-for-all's space: two stages of 2 to 4 blocks, kernel {3,
    5, 7}, expansion {3, 4, 6}, three resolutions.
    """
    options = tuple(f"ir_k{kernel}_e{e}" for kernel in (3, 5, 7) for e in (3, 4, 6))
    stages = (
        SpaceStage(widths=(8,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), stride=2, depths=(2, 3, 4), slots=(options,) * 4),
        SpaceStage(widths=(24,), stride=2, depths=(2, 3, 4), slots=(options,) * 4),
    )
    return MacroSpace(
        name="elastic", resolution=32, resolutions=(16, 24, 32), classes=4, stages=stages
    )
