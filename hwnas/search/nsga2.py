"""NSGA-II: finds the architectures within the budget that trade accuracy, latency and
parameters best.

Deb, Pratap, Agarwal, Meyarivan: "A fast and elitist multiobjective genetic algorithm:
NSGA-II" (IEEE TEC 6(2), 2002), as FairNAS (Chu, Zhang, Xu: ICCV 2021, arXiv 1907.01845)
uses it to search a trained super-net, by Optuna's ``NSGAIISampler``:

    maximise accuracy,  minimise latency,  minimise parameters
    subject to  |latency / target - 1| <= tolerance  and every limit

An architecture that meets the constraints dominates one that does not; of two that do
not, the one that exceeds them by less in sum dominates; all others compare by the three
objectives, then by crowding distance.

*Differences from the paper*:

- Population (50), crossover (0.9), swapping (0.5) and mutation (1 / choices) are
  Optuna's defaults, and 40 generations are ours; FairNAS's settings are not used.
- The cost objective is latency, where FairNAS has multiply-adds.
- The first generation is random *within the budget*.
- An architecture outside the budget is not evaluated: its rank does not depend on its
  accuracy, which is entered as 0. At a narrow tolerance this is most of them, so a run
  costs far fewer evaluations than it tries architectures.
- The answer is not the Pareto front, but all evaluated architectures within the budget by
  reward: of equally accurate ones the budget decides, and the front is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.strategy import SearchContext


class NSGA2Config(BaseModel):
    """Size of the run: Optuna's population, and generations that are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generations: int = Field(40, ge=1, description="populations, the random first one counted")
    population: int = Field(50, ge=2)


class NSGA2(Finder):
    """Optuna's NSGA-II by ask and tell, seeded from ``ctx.rng``.

    Example:
        >>> NSGA2(NSGA2Config(generations=10)).find(ctx, 5)      # doctest: +SKIP
    """

    Config: ClassVar[type[BaseModel]] = NSGA2Config

    def __init__(self, config: NSGA2Config) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` by reward of all that were evaluated. None where random
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
                trial, evaluated = study.ask(), len(board)
                picks = {
                    choice.key: trial.suggest_categorical(choice.key, choice.options)
                    for choice in ctx.space.choices
                }
                index_NC = ctx.space.index(picks)[None]
                for name, excess in _excess(ctx, index_NC).items():
                    trial.set_constraint(name, excess)
                quality = board.evaluate(picks).quality if is_feasible(ctx, index_NC)[0] else 0.0
                study.tell(trial, [quality, ctx.cost_model.cost(picks), params.cost(picks)])
                task.advance(
                    1 - (len(board) - evaluated)
                )  # the leaderboard counts what is new to it
        return board.best(count)


def _excess(ctx: SearchContext, index_NC: np.ndarray) -> dict[str, float]:
    """By how much one architecture [1, choices] exceeds each constraint, relatively; at
    most 0 where it is met.
    """
    off = abs(float(ctx.cost_model.costs(index_NC)[0]) / ctx.target - 1)
    limits = [] if ctx.limits is None else ctx.limits.excess(index_NC)[0]
    return {"target": off - ctx.tolerance} | {
        f"limit {i}": float(excess) for i, excess in enumerate(limits)
    }


@contextmanager
def _study(population: int, seed: int) -> Iterator[Any]:
    """A study in memory, with Optuna's log silent meanwhile. Optuna takes a second to
    import, so only those who search wait for it.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        yield optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
