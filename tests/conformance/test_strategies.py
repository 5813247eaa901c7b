"""The built-in strategies pass what third parties' strategies have to pass."""

from __future__ import annotations

import numpy as np
import torch

from hwnas.search.random import RandomConfig, RandomSearch
from hwnas.search.tunas import TuNAS, TuNASConfig
from hwnas.testing import Problem, StrategyConformance, tiny_space

torch.set_num_threads(1)


class TestTuNAS(StrategyConformance):
    steps = 800

    def strategy(self) -> TuNAS:
        return TuNAS(TuNASConfig(rl_lr=0.01))


class TestRandomSearch(StrategyConformance):
    """It learns nothing, so it finds the optimum by proposing everything that it can."""

    steps = 1
    proposals = tiny_space().size

    def strategy(self) -> RandomSearch:
        return RandomSearch(RandomConfig())


def test_the_problem_is_hard_for_chance() -> None:
    """Eight random architectures within the budget rarely hold the optimum, so finding it means something."""
    hits = 0
    for seed in range(5):
        problem = Problem(seed)
        ctx = problem.context(1)
        for trial in range(4):
            ctx.rng = np.random.default_rng([seed, trial])
            hits += problem.best in RandomSearch(RandomConfig()).propose(ctx, 8)
    assert hits <= 4
