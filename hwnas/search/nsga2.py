"""NSGA-II: finds architectures within the budget with the best trade-offs of accuracy,
latency and parameters.

Deb, Pratap, Agarwal, Meyarivan: "A fast and elitist multiobjective genetic algorithm:
NSGA-II" (IEEE TEC 6(2), 2002), as FairNAS (Chu, Zhang, Xu: ICCV 2021, arXiv 1907.01845)
uses it to search a trained super-net; run by Optuna's ``NSGAIISampler``:

    maximise accuracy,  minimise latency,  minimise parameters
    subject to  |latency / target - 1| <= tolerance  and every limit

An architecture that meets the constraints dominates one that does not. Of two that do
not, the one with the smaller sum of violations dominates. All others are compared by
the three objectives, then by crowding distance.

*Differences from the paper*:

- The population (50) and the probabilities of crossover (0.9), swapping (0.5) and
  mutation (1 / choices) are Optuna's defaults, and the 40 generations are ours.
  FairNAS's settings are not used.
- The cost objective is latency; FairNAS has multiply-adds.
- The first generation is random *within the budget*.
- An architecture outside the budget is not evaluated, because its rank does not depend
  on its accuracy, which is recorded as 0. With a narrow tolerance these are the
  majority, so a run needs far fewer evaluations than it tries architectures.
- The result is not the Pareto front but the evaluated architectures within the budget,
  ranked by reward: of equally accurate ones, the latency decides. The front is among
  them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.strategy import SearchContext


class NSGA2Config(Section):
    """The size of the run: Optuna's default population; the generations are ours."""

    generations: int = Field(
        40, ge=1, le=1_000_000, description="populations, including the random first one"
    )
    population: int = Field(50, ge=2, le=1_000_000, description="architectures per generation")


class NSGA2(Finder):
    """Optuna's NSGA-II through its ask-and-tell interface, seeded from ``ctx.rng``.

    Example:
        >>> NSGA2(NSGA2Config(generations=10)).find(ctx, 5)  # doctest: +SKIP
    """

    Config: ClassVar[type[BaseModel]] = NSGA2Config

    def __init__(self, config: NSGA2Config) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` of all evaluated architectures by reward. Empty if random
        search finds none within the budget.
        """
        first = sample_feasible(ctx, self.config.population, ctx.rng)
        if not first:
            return []
        params = AdditiveCost.of_ops(ctx.space, lambda op: op.params)
        total = self.config.generations * self.config.population
        with (
            _study(self.config.population, int(ctx.rng.integers(2**31))) as study,
            ctx.progress.task("NSGA-II", total) as task,
        ):
            board = Leaderboard(ctx, task)
            for picks in first:
                study.enqueue_trial(picks)
            for _ in range(total):
                evaluated = len(board)
                trial = study.ask()
                picks = {}
                for choice in ctx.space.choices:
                    picks[choice.key] = trial.suggest_categorical(choice.key, choice.options)

                index_NC = ctx.space.index(picks)[None]
                for name, excess in _excess(ctx, index_NC).items():
                    trial.set_constraint(name, excess)
                # an infeasible trial ranks by its violations, whatever its quality
                quality = board.evaluate(picks).quality if is_feasible(ctx, index_NC)[0] else 0.0
                study.tell(trial, [quality, ctx.cost_model.cost(picks), params.cost(picks)])

                # the leaderboard advances the bar for new architectures only
                if len(board) == evaluated:
                    task.advance()
        return board.best(count)


def _excess(ctx: SearchContext, index_NC: np.ndarray) -> dict[str, float]:
    """Constraint -> relative excess of one architecture [1, choices]; at most 0 if the
    constraint is met.
    """
    gap = abs(float(ctx.cost_model.costs(index_NC)[0]) / ctx.target - 1)
    excesses = {"target": gap - ctx.tolerance}
    if ctx.limits is not None:
        for i, excess in enumerate(ctx.limits.excess(index_NC)[0]):
            excesses[f"limit {i}"] = float(excess)
    return excesses


@contextmanager
def _study(population: int, seed: int) -> Iterator[Any]:
    """An in-memory study; Optuna's log is silent while it is open."""
    # imported here because it takes a second, which only this search should wait for
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        yield optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
