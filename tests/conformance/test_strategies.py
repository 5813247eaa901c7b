"""The built-in strategies pass the tests that third parties' strategies must pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.fairnas import FairNAS, FairNASConfig
from hwnas.search.fbnet import FBNet, FBNetConfig
from hwnas.search.pdarts import PDARTS, PDARTSConfig
from hwnas.search.progressive_shrinking import ProgressiveShrinking, ProgressiveShrinkingConfig
from hwnas.search.proxylessnas import ProxylessNAS, ProxylessNASConfig
from hwnas.search.random import RandomConfig, RandomSearch, RandomStandalone, RandomStandaloneConfig
from hwnas.search.spos import SPOS, SPOSConfig
from hwnas.search.tunas import TuNAS, TuNASConfig
from hwnas.testing import Problem, StrategyConformance, tiny_space

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


class TestTuNAS(StrategyConformance):
    steps = 800

    def strategy(self) -> TuNAS:
        return TuNAS(TuNASConfig(rl_lr=0.01))


class TestRandomSearch(StrategyConformance):
    """It learns nothing, so it finds the optimum by proposing the whole space."""

    steps = 1
    proposals = tiny_space().size

    def strategy(self) -> RandomSearch:
        return RandomSearch(RandomConfig())


class TestDARTS(StrategyConformance):
    """The latency weight is in units of its loss, which is 1 - accuracy here."""

    steps = 300
    proposals = 4

    def strategy(self) -> DARTS:
        return DARTS(DARTSConfig(alpha_lr=0.02, latency_weight=0.1))


class TestPDARTS(StrategyConformance):
    steps = 300
    proposals = 4

    def strategy(self) -> PDARTS:
        return PDARTS(PDARTSConfig(alpha_lr=0.02, latency_weight=0.1))


class TestProxylessNAS(StrategyConformance):
    """The loss of a ``Problem`` is 1 - accuracy, hence TuNAS's latency weight, 0.1."""

    steps = 500

    def strategy(self) -> ProxylessNAS:
        return ProxylessNAS(ProxylessNASConfig(alpha_lr=0.04, arch_every=1, latency_weight=0.1))


class TestProxylessNASFullPath(StrategyConformance):
    steps = 300

    def strategy(self) -> ProxylessNAS:
        return ProxylessNAS(
            ProxylessNASConfig(mode="full", alpha_lr=0.03, arch_every=1, latency_weight=0.1)
        )


class TestProxylessNASReinforce(StrategyConformance):
    steps = 300

    def strategy(self) -> ProxylessNAS:
        return ProxylessNAS(ProxylessNASConfig(gradient="reinforce", alpha_lr=0.03, arch_every=1))


class TestFBNet(StrategyConformance):
    steps = 600

    def strategy(self) -> FBNet:
        return FBNet(
            FBNetConfig(theta_lr=0.03, theta_every=1, latency_loss="absolute", latency_weight=0.1)
        )


class TestFBNetLikeliest(StrategyConformance):
    """With the paper's loss, which has no target."""

    steps = 400

    def strategy(self) -> FBNet:
        return FBNet(
            FBNetConfig(theta_lr=0.03, theta_every=1, latency_loss="fbnet", derive="likely")
        )


class TestRandomStandalone(StrategyConformance):
    """Its networks share no weights. It proposes those that it has trained, so it finds
    the optimum by training all within the budget.
    """

    steps = 222
    proposals = 222
    trainings = 20

    def strategy(self) -> RandomStandalone:
        return RandomStandalone(RandomStandaloneConfig(trainings=self.trainings))

    def test_finds_the_known_optimum(self) -> None:
        self.trainings = self.proposals
        super().test_finds_the_known_optimum()


class TestSPOS(StrategyConformance):
    """It evaluates at most 120 of the 222 architectures within the budget."""

    steps = 20

    def strategy(self) -> SPOS:
        return SPOS(SPOSConfig(generations=12, population=10, parents=5, mutations=5, crossovers=5))


class TestSPOSFair(TestSPOS):
    def strategy(self) -> SPOS:
        return SPOS(
            SPOSConfig(
                sampling="fair", generations=12, population=10, parents=5, mutations=5, crossovers=5
            )
        )


class TestFairNAS(StrategyConformance):
    """NSGA-II has its default size in the test of the optimum, and is short in the
    others.
    """

    steps = 20
    short = FairNASConfig(generations=4, population=20)

    def strategy(self) -> FairNAS:
        return FairNAS(self.short)

    def test_finds_the_known_optimum(self) -> None:
        self.short = FairNASConfig()
        super().test_finds_the_known_optimum()


class TestProgressiveShrinking(StrategyConformance):
    steps = 20

    def strategy(self) -> ProgressiveShrinking:
        return ProgressiveShrinking(
            ProgressiveShrinkingConfig(
                generations=12, population=10, parents=5, mutations=5, crossovers=5
            )
        )


def test_the_problem_is_hard_for_chance() -> None:
    """Eight random architectures within the budget rarely include the optimum, so
    finding it means something.
    """
    hits = 0
    for seed in range(5):
        problem = Problem(seed)
        ctx = problem.context(1)
        for trial in range(4):
            ctx.rng = np.random.default_rng([seed, trial])
            hits += problem.best in RandomSearch(RandomConfig()).propose(ctx, 8)
    assert hits <= 4
