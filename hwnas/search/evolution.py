"""Evolution: finds architectures within the budget by mutating and crossing the best.

Guo, Zhang, Mu, Heng, Liu, Wei, Sun: "Single Path One-Shot Neural Architecture Search
with Uniform Sampling" (ECCV 2020, arXiv 1904.00420), algorithm 1; released code
megvii-model/SinglePathOneShot. With constraint C, population size P, top k and T
generations:

    P_0 = P random architectures in C
    for i in 0 .. T - 1:
        evaluate P_i by recalibrated accuracy;  Top = the best k of P_0 .. P_i
        P_{i+1} = n children of crossover(Top) in C, and m of mutation(Top, p) in C

Crossover takes every choice from one of two random parents. Mutation replaces every
choice of a random parent, with probability p, by a uniformly drawn one. Children
outside C and architectures already evaluated are rejected. Defaults are the paper's: T
= 20, P = 50, k = 10, n = m = 25, p = 0.1. At most 10 children are drawn for each one
needed (the bound of the code), then random architectures make up the rest.

Once-for-all's finder (Cai et al., ICLR 2020, arXiv 1908.09791;
mit-han-lab/once-for-all) is the same algorithm with ``generations = 501, population =
100, parents = 25, mutations = 50, crossovers = 50, resolution_mutation_probability =
0.5``. It queries an accuracy predictor, which answers instantly; here every
architecture is evaluated, and 50,000 evaluations take long.

*Differences from the papers*:

- The constraint is the target's tolerance on both sides, and every limit; the papers
  only bound the cost from above. The constraint may be so narrow that few children meet
  it. Children that miss it are then moved into the budget (``repair``) before random
  architectures make up the rest.
- Architectures are ranked by the objective at their latency, not only by accuracy;
  within the tolerance the two nearly agree.
- ``Top`` has distinct architectures: picks that differ only in left-out slots count as
  one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, Field

from hwnas.config import Section
from hwnas.core.arch import Picks
from hwnas.search.budget import repair
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import is_feasible, sample_feasible, uniform_index
from hwnas.search.strategy import SearchContext

TRIES = 10
"""Most children drawn for each child needed."""


class EvolutionConfig(Section):
    """SPOS's settings; the module docstring has those of once-for-all."""

    generations: int = Field(
        20, ge=1, le=1_000_000, description="populations evaluated, including the random first one"
    )
    population: int = Field(
        50, ge=1, le=1_000_000, description="random architectures in the first generation"
    )
    parents: int = Field(
        10, ge=1, le=1_000_000, description="number of best architectures that have children"
    )
    mutations: int = Field(
        25, ge=0, le=1_000_000, description="children by mutation in each later generation"
    )
    crossovers: int = Field(
        25, ge=0, le=1_000_000, description="children by crossover in each later generation"
    )
    mutation_probability: float = Field(
        0.1, gt=0, le=1, description="probability per choice that a mutation redraws it"
    )
    resolution_mutation_probability: float | None = Field(
        None, gt=0, le=1, description="the same for the resolution; default: mutation_probability"
    )


class Evolution(Finder):
    """SPOS's evolutionary search. All randomness is from ``ctx.rng``.

    Example:
        >>> Evolution(EvolutionConfig(generations=10)).find(ctx, 5)  # doctest: +SKIP
    """

    Config: ClassVar[type[BaseModel]] = EvolutionConfig

    def __init__(self, config: EvolutionConfig) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` of all generations by reward: fewer if fewer were found
        within the budget, none if random search finds none there.
        """
        config = self.config
        children = config.mutations + config.crossovers
        total = config.population + (config.generations - 1) * children
        with ctx.progress.task("evolution", total) as task:
            board = Leaderboard(ctx, task)
            generation = sample_feasible(ctx, config.population, ctx.rng)
            for number in range(config.generations):
                for picks in generation:
                    board.evaluate(picks)
                if not len(board) or number == config.generations - 1:
                    break
                generation = self._children(ctx, board)
        return board.best(count)

    def _children(self, ctx: SearchContext, board: Leaderboard) -> list[Picks]:
        """The next generation: new architectures within the budget, by mutation, by
        crossover and, if these are too few, by repair and at random.
        """
        mutations = self.config.mutations
        crossovers = self.config.crossovers
        parents = board.best(self.config.parents)
        parents_PC = np.array([ctx.space.index(picks) for picks in parents])
        children: dict[str, Picks] = {}
        _adopt(ctx, self._mutants(ctx, parents_PC, TRIES * mutations), mutations, board, children)
        _adopt(ctx, _crosses(ctx, parents_PC, TRIES * crossovers), crossovers, board, children)

        missing = mutations + crossovers - len(children)
        if missing:
            mutants_NC = self._mutants(ctx, parents_PC, missing)
            crosses_NC = _crosses(ctx, parents_PC, missing)
            bred_NC = np.concatenate([mutants_NC, crosses_NC])
            outside_NC = bred_NC[~is_feasible(ctx, bred_NC)]
            _adopt(ctx, repair(ctx, outside_NC), missing, board, children)

        missing = mutations + crossovers - len(children)
        if missing:
            # a whole generation: some may have been evaluated before
            random_picks = sample_feasible(ctx, mutations + crossovers, ctx.rng)
            rows = [ctx.space.index(picks) for picks in random_picks]
            _adopt(ctx, rows, missing, board, children)
        return list(children.values())

    def _mutants(self, ctx: SearchContext, parents_PC: np.ndarray, count: int) -> np.ndarray:
        """Mutations of random parents: option positions, int64 [count, choices]."""
        config = self.config
        p_C = np.full(len(ctx.space.choices), config.mutation_probability)
        if config.resolution_mutation_probability is not None:
            is_resolution_C = [choice.kind == "resolution" for choice in ctx.space.choices]
            p_C[is_resolution_C] = config.resolution_mutation_probability

        rows_NC = parents_PC[ctx.rng.integers(len(parents_PC), size=count)]
        is_mutated_NC = ctx.rng.random(rows_NC.shape) < p_C
        drawn_NC = uniform_index(ctx.space, count, ctx.rng)
        mutants_NC: np.ndarray = np.where(is_mutated_NC, drawn_NC, rows_NC)
        return mutants_NC


def _crosses(ctx: SearchContext, parents_PC: np.ndarray, count: int) -> np.ndarray:
    """Crossovers of two random parents: option positions, int64 [count, choices]."""
    first_NC, second_NC = parents_PC[ctx.rng.integers(len(parents_PC), size=(2, count))]
    from_first_NC = ctx.rng.random(first_NC.shape) < 0.5
    crosses_NC: np.ndarray = np.where(from_first_NC, first_NC, second_NC)
    return crosses_NC


def _adopt(
    ctx: SearchContext,
    rows: Sequence[np.ndarray] | np.ndarray,
    wanted: int,
    board: Leaderboard,
    children: dict[str, Picks],
) -> None:
    """Add up to ``wanted`` of the rows to ``children``, in order: those within the
    budget that are neither evaluated yet nor among the children.
    """
    # reshape: no rows at all are an array of shape [0]
    rows_NC = np.array(rows, dtype=np.int64).reshape(-1, len(ctx.space.choices))
    if len(rows_NC) == 0:
        return
    full = len(children) + wanted
    for row in rows_NC[is_feasible(ctx, rows_NC)]:
        if len(children) == full:
            return
        picks = ctx.space.at(row)
        identity = ctx.space.decode(picks).identity
        if identity not in board:
            children.setdefault(identity, picks)
