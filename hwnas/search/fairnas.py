"""FairNAS: every option of every choice is trained equally often, in every single step.

Chu, Zhang, Xu: "FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural
Architecture Search" (ICCV 2021, arXiv 1907.01845), algorithm 1, strict fairness. Per
step, with m options at each of the L choices:

    permute the m options of each choice; path k takes the k-th option of every
    permutation (k = 1 .. m) for the m paths: forward and backward on the *same* batch,
    gradients added up one update of the weights

so after every step each option has been trained exactly as often as any other of its
choice. Then NSGA-II (``nsga2``) searches the trained super-net.

*Differences from the paper*:

- Choices may have different numbers of options here. There are as many paths as the
  largest choice has options; a choice with fewer, n, goes through as many fresh
  permutations as it takes, the last one cut: within a step its options are trained
  equally often or differ by one. Where all have m options this is the paper exactly.
- A space may offer to skip slots, which the paper's does not; skipping is then an
  option like any other.
- NSGA-II's own differences are listed in ``nsga2``.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import BaseModel

from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.search.nsga2 import NSGA2, NSGA2Config
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Metrics, SearchContext, Strategy


class FairNASConfig(NSGA2Config):
    """Strict fairness has no options; these are NSGA-II's."""


def fair_paths(space: SearchSpace, rng: np.random.Generator) -> list[Picks]:
    """The paths of one strictly fair step: as many as the largest choice has options.

    Each option of a choice with n options is on floor(m / n) or ceil(m / n) of the m paths.
    """
    most = max(len(choice.options) for choice in space.choices)
    columns = []
    for choice in space.choices:
        count = len(choice.options)
        columns.append(
            np.concatenate([rng.permutation(count) for _ in range(-(-most // count))])[:most]
        )
    return [space.at(row) for row in np.stack(columns, axis=1)]


class FairNAS(Strategy):
    """Strict fairness, then NSGA-II. It has no state of its own."""

    Config: ClassVar[type[BaseModel]] = FairNASConfig
    cells = True

    def __init__(self, config: FairNASConfig) -> None:
        self.config = config

    def setup(self, ctx: SearchContext) -> None:
        """Nothing to prepare."""

    def step(self, ctx: SearchContext) -> Metrics:
        """One update by the summed gradients of a fair set of paths. The cost is their mean."""
        paths = fair_paths(ctx.space, ctx.rng)
        metrics = ctx.train(*(one_hot(picks, ctx.space) for picks in paths))
        return {
            **metrics,
            ctx.cost_model.unit.quantity: float(
                np.mean([ctx.cost_model.cost(picks) for picks in paths])
            ),
        }

    def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
        """The best of NSGA-II by reward."""
        return NSGA2(self.config).find(ctx, count)
