"""Evolution: finds architectures within the budget by mutating and crossing the best so far.

Guo, Zhang, Mu, Heng, Liu, Wei, Sun: "Single Path One-Shot Neural Architecture Search
with Uniform Sampling" (ECCV 2020, arXiv 1904.00420), algorithm 1; released code
megvii-model/SinglePathOneShot. With constraint C, population P, top k and T
generations:

    P_0 = random architectures in C
    for i in 0 .. T - 1:
        evaluator P_i by recalibrated accuracy;  Top = the best k of P_0 .. P_i
        P_{i+1} = n children of crossover(Top) in C, and m of mutation(Top, p) in C

Crossover takes every choice from one of two random parents; mutation replaces every
choice of one with probability p by a uniform one. Children outside C, and architectures
evaluated before, are rejected. Defaults are the paper's: T = 20, P = 50, k = 10, n = m =
25, p = 0.1; at most 10 children are drawn for each that is wanted (the code's bound),
then random architectures fill up.

Once-for-all's finder (Cai et al., ICLR 2020, arXiv 1908.09791;
mit-han-lab/once-for-all) is the same algorithm with ``generations = 501, population =
100, parents = 25, mutations = 50, crossovers = 50, resolution_mutation_probability =
0.5``. It asks an accuracy predictor, which answers at once; here every architecture is
evaluated, and 50,000 evaluations are many.

*Differences from the papers*:

- The constraint is the target's tolerance on both sides, and every limit, where the
  papers bound cost from above only. It may be so narrow that few children meet it;
  children that miss are then moved into the budget (``repair``) before random
  architectures fill up.
- Ranked by the objective at the architecture's latency, not by accuracy alone; within
  the tolerance they nearly agree.
- ``Top`` has distinct architectures: picks that differ in left-out slots only are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.arch import Picks
from hwnas.search.budget import repair
from hwnas.search.finder import Finder, Leaderboard
from hwnas.search.proposal import is_feasible, sample_feasible, uniform_index
from hwnas.search.strategy import SearchContext

TRIES = 10
"""Children drawn for each that is wanted."""


class EvolutionConfig(BaseModel):
    """SPOS's settings; those of once-for-all are in the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generations: int = Field(
        20, ge=1, description="populations evaluated, the random first one counted"
    )
    population: int = Field(50, ge=1, description="random architectures in the first generation")
    parents: int = Field(10, ge=1, description="best architectures so far that have children")
    mutations: int = Field(25, ge=0, description="children by mutation in each later generation")
    crossovers: int = Field(25, ge=0, description="children by crossover in each later generation")
    mutation_probability: float = Field(
        0.1, gt=0, le=1, description="probability per choice that a mutation draws it anew"
    )
    resolution_mutation_probability: float | None = Field(
        None, gt=0, le=1, description="the same for the resolution; default: mutation_probability"
    )


class Evolution(Finder):
    """SPOS's evolutionary search. Randomness from ``ctx.rng`` only.

    Example:
        >>> Evolution(EvolutionConfig(generations=10)).find(ctx, 5)      # doctest: +SKIP
    """

    Config: ClassVar[type[BaseModel]] = EvolutionConfig

    def __init__(self, config: EvolutionConfig) -> None:
        self.config = config

    def find(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best ``count`` of all generations. Fewer where the budget leaves fewer,
        none where random search finds none.
        """
        config = self.config
        total = config.population + (config.generations - 1) * (
            config.mutations + config.crossovers
        )
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
        crossover, and random ones for want of these.
        """
        mutations, crossovers = self.config.mutations, self.config.crossovers
        parents_PC = np.array([ctx.space.index(picks) for picks in board.best(self.config.parents)])
        children: dict[str, Picks] = {}
        _adopt(ctx, self._mutants(ctx, parents_PC, TRIES * mutations), mutations, board, children)
        _adopt(ctx, _crosses(ctx, parents_PC, TRIES * crossovers), crossovers, board, children)
        missing = mutations + crossovers - len(children)
        if missing:
            bred_NC = np.concatenate(
                [self._mutants(ctx, parents_PC, missing), _crosses(ctx, parents_PC, missing)]
            )
            _adopt(
                ctx,
                repair(ctx, bred_NC[~is_feasible(ctx, bred_NC)]),
                missing,
                board,
                children,
            )
        missing = mutations + crossovers - len(children)
        if missing:
            strangers = sample_feasible(ctx, mutations + crossovers, ctx.rng)
            _adopt(ctx, [ctx.space.index(picks) for picks in strangers], missing, board, children)
        return list(children.values())

    def _mutants(self, ctx: SearchContext, parents_PC: np.ndarray, count: int) -> np.ndarray:
        """Random parents, each choice drawn anew with its probability: int64 [count, choices]."""
        p, p_resolution = (
            self.config.mutation_probability,
            self.config.resolution_mutation_probability,
        )
        p_C = [
            p if choice.kind != "resolution" or p_resolution is None else p_resolution
            for choice in ctx.space.choices
        ]
        rows_NC = parents_PC[ctx.rng.integers(len(parents_PC), size=count)]
        mutated: np.ndarray = np.where(
            ctx.rng.random(rows_NC.shape) < p_C, uniform_index(ctx.space, count, ctx.rng), rows_NC
        )
        return mutated


def _crosses(ctx: SearchContext, parents_PC: np.ndarray, count: int) -> np.ndarray:
    """Each choice from one of two random parents: int64 [count, choices]."""
    first_NC, second_NC = parents_PC[ctx.rng.integers(len(parents_PC), size=(2, count))]
    crossed: np.ndarray = np.where(ctx.rng.random(first_NC.shape) < 0.5, first_NC, second_NC)
    return crossed


def _adopt(
    ctx: SearchContext,
    rows: Sequence[np.ndarray] | np.ndarray,
    wanted: int,
    board: Leaderboard,
    children: dict[str, Picks],
) -> None:
    """Add up to ``wanted`` of the rows to ``children``, in order: those within the
    budget, not evaluated before and not there yet.
    """
    rows_NC = np.array(rows, dtype=np.int64).reshape(-1, len(ctx.space.choices))
    full = len(children) + wanted
    for row in rows_NC[is_feasible(ctx, rows_NC)] if len(rows_NC) else rows_NC:
        if len(children) == full:
            return
        picks = ctx.space.at(row)
        identity = ctx.space.decode(picks).identity
        if identity not in board:
            children.setdefault(identity, picks)
