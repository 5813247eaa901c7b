"""FairNAS: every step trains every option of every choice equally often.

Chu, Zhang, Xu: "FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural
Architecture Search" (ICCV 2021, arXiv 1907.01845), algorithm 1, strict fairness. Each
step, with m options at each of the L choices:

    permute the m options of each choice
    for k = 1 .. m:
        path k takes the k-th option of every permutation
        forward and backward pass on the *same* batch, adding up the gradients
    one update of the shared weights

After every step, each option has been trained exactly as often as any other option of
its choice. Then NSGA-II (``nsga2``) searches the trained super-net.

*Differences from the paper*:

- Choices may have different numbers of options here. There are as many paths as the
  largest choice has options. A choice with fewer options goes through as many fresh
  permutations as needed, the last one truncated: within a step, the counts of its
  options differ by at most one. If all choices have m options, this is exactly the
  paper's algorithm.
- A space may offer to skip slots, unlike the paper's; skip is then an option like any
  other.
- The differences of NSGA-II are listed in ``nsga2``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.search.nsga2 import NSGA2, NSGA2Config
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Metrics, SearchContext, Strategy


class FairNASConfig(NSGA2Config):
    """The options of NSGA-II; strict fairness has none."""


def fair_paths(space: SearchSpace, rng: np.random.Generator) -> list[Picks]:
    """The m paths of one strictly fair step; m is the most options of any choice.

    Each option of a choice with n options is on floor(m / n) or ceil(m / n) paths.
    """
    paths = max(len(choice.options) for choice in space.choices)
    columns = []
    for choice in space.choices:
        options = len(choice.options)
        # a choice with fewer options goes through several, and the last is truncated
        permutations = []
        for _ in range(math.ceil(paths / options)):
            permutations.append(rng.permutation(options))
        columns.append(np.concatenate(permutations)[:paths])
    return [space.at(row) for row in np.stack(columns, axis=1)]


class FairNAS(Strategy):
    """The FairNAS strategy: strict fairness, then NSGA-II. It has no own state."""

    Config: ClassVar[type[BaseModel]] = FairNASConfig
    supports_cells = True

    def __init__(self, config: FairNASConfig) -> None:
        self.config = config

    def setup(self, ctx: SearchContext) -> None:
        """Nothing to prepare."""

    def step(self, ctx: SearchContext) -> Metrics:
        """One update by the summed gradients of fair paths. Logs their mean cost."""
        paths = fair_paths(ctx.space, ctx.rng)
        metrics = ctx.train(*(one_hot(picks, ctx.space) for picks in paths))
        cost = float(np.mean([ctx.cost_model.cost(picks) for picks in paths]))
        return {**metrics, ctx.cost_model.unit.quantity: cost}

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best architectures of NSGA-II by reward."""
        return NSGA2(self.config).find(ctx, count)
