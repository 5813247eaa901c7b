"""DARTS's parts against closed forms: the gradient of alpha, the latency term, what it
asks of the super-net and when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Plugin
from hwnas.core.space import Choice, MacroSpace
from hwnas.errors import ConfigError, SpaceError
from hwnas.search import STRATEGIES
from hwnas.search.darts import DARTS, DARTSConfig
from hwnas.search.strategy import Gates, Metrics, Probes, SearchContext
from hwnas.testing import KnownWeights, Problem, searched, tiny_space

torch.set_num_threads(1)


class LoggedWeights(KnownWeights):
    """Known weights that log every call: (name, gates, order, skip dropout)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.log: list[tuple[str, dict[str, np.ndarray], int, float]] = []

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        self.log += [
            (
                "train",
                {key: np.asarray(gate).copy() for key, gate in path_gates.items()},
                0,
                skip_dropout,
            )
            for path_gates in gates
        ]
        return super().train(gates, split=split, teach=teach, skip_dropout=skip_dropout)

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        self.log.append(
            (
                "loss",
                {key: np.asarray(gate).copy() for key, gate in gates.items()},
                order,
                skip_dropout,
            )
        )
        return super().gate_gradients(gates, probes, order, skip_dropout)


def logged(strategy: DARTS, steps: int) -> tuple[LoggedWeights, SearchContext, list[Metrics]]:
    problem = Problem(0)
    ctx = problem.context(steps)
    ctx.weights = weights = LoggedWeights(problem)
    strategy.setup(ctx)
    return weights, ctx, searched(strategy, ctx, 0)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_gradient_of_alpha(factor: float) -> None:
    """d/dalpha_i = p_i (c_i - <p, c>) with c = -gain + latency_weight * sign(E/T - 1) *
    dE/dp / T.
    """
    problem = Problem(1)
    strategy = DARTS(DARTSConfig(init_std=0.5, latency_weight=0.3))
    ctx = problem.context(10)
    strategy.setup(ctx)
    ctx.rng = np.random.default_rng(5)
    strategy.begin(ctx, 0)
    p = {key: gate.copy() for key, gate in strategy.alphas.policy().items()}
    ctx.target = factor * float(problem.cost.expected(p))
    strategy.step(ctx)
    sign = 1.0 if factor < 1 else -1.0
    for key, marginal_ms in problem.cost.marginals(p).items():
        c = -problem.gains[key] + 0.3 * sign * marginal_ms / ctx.target
        gradient = strategy.alphas.values[key].grad
        assert gradient is not None
        assert np.allclose(gradient.numpy(), p[key] * (c - p[key] @ c), rtol=1e-9, atol=1e-12)


def test_the_optimiser_and_the_defaults_match_the_paper() -> None:
    strategy = DARTS(DARTSConfig())
    strategy.setup(Problem(0).context(10))
    (group,) = strategy.alphas.optimizer.param_groups
    assert isinstance(strategy.alphas.optimizer, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert strategy.config.order == 2
    assert (strategy.mixes_options, strategy.sharing) == (True, "separate")
    assert STRATEGIES.get("darts") is DARTS


def test_alpha_starts_near_uniform_and_depends_on_the_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        # with so small a rate, alpha keeps its initial values
        strategy, ctx = DARTS(DARTSConfig(alpha_lr=1e-12)), Problem(0).context(1)
        strategy.setup(ctx)
        searched(strategy, ctx, seed)
        drawn.append(torch.cat([alpha.detach() for alpha in strategy.alphas.values.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert 0.5e-3 < drawn[0].std() < 2e-3


@pytest.mark.parametrize("order", [1, 2])
def test_alpha_is_updated_first_then_the_weights_under_the_new_mixture(order: Any) -> None:
    strategy = DARTS(DARTSConfig(order=order, alpha_lr=0.1))
    weights, _, metrics = logged(strategy, 6)
    assert [(call, asked_order, dropout) for call, _, asked_order, dropout in weights.log] == 6 * [
        ("loss", order, 0.0),
        ("train", 0, 0.0),
    ]
    for (_, before, *_), (_, after, *_) in zip(weights.log[::2], weights.log[1::2], strict=True):
        assert all((gate > 0).all() for gate in before.values()), "every option runs"
        assert not np.allclose(before["s1.b0"], after["s1.b0"], rtol=1e-3)
    assert set(metrics[0]) == {"held_out_loss", "entropy", "expected_ms"}


def test_metrics() -> None:
    strategy = DARTS(DARTSConfig(alpha_lr=0.1))
    weights, ctx, metrics = logged(strategy, 5)
    last = weights.log[-1][1]
    assert metrics[-1]["entropy"] == pytest.approx(
        -sum((p * np.log(p)).sum() for p in last.values())
    )
    assert metrics[-1]["expected_ms"] == pytest.approx(float(ctx.cost_model.expected(last)))
    assert metrics[-1]["held_out_loss"] == pytest.approx(
        1 - weights.problem.quality(weights.log[-2][1])
    )
    uniform = sum(math.log(len(choice.options)) for choice in ctx.space.choices)
    assert metrics[-1]["entropy"] < uniform


def test_warm_up_trains_only_the_weights() -> None:
    weights, _, metrics = logged(DARTS(DARTSConfig(warmup=0.5)), 10)
    assert [call for call, *_ in weights.log] == 5 * ["train"] + 5 * ["loss", "train"]
    assert ["held_out_loss" in row for row in metrics] == 5 * [False] + 5 * [True]


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_the_expected_latency_meets_the_target(part: float) -> None:
    """From either side and whatever the qualities: the penalty is exact, not a
    trade-off.
    """
    problem = Problem(2)
    low, high = problem.cost.range()
    ctx = problem.context(400)
    ctx.target = low + part * (high - low)
    strategy = DARTS(DARTSConfig(alpha_lr=0.02))
    strategy.setup(ctx)
    metrics = searched(strategy, ctx, 0)
    assert abs(metrics[0]["expected_ms"] / ctx.target - 1) > 0.04
    late = np.array([row["expected_ms"] for row in metrics[-20:]])
    assert np.abs(late / ctx.target - 1).max() < 0.02


class SeveralResolutions(MacroSpace):
    """The tiny space with the resolution left open."""

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return (*super().choices, Choice("resolution", (128, 160), "resolution"))


def test_an_open_resolution_is_refused() -> None:
    DARTS(DARTSConfig()).check(tiny_space())
    open_space = SeveralResolutions.model_validate(tiny_space().model_dump())
    with pytest.raises(
        SpaceError,
        match=(
            r"darts .* 'resolution' of space tiny \(128, 160\) cannot be mixed: restrict it .*"
            r" tunas, spos"
        ),
    ):
        DARTS(DARTSConfig()).check(open_space)


def test_an_invalid_order_is_refused() -> None:
    assert Plugin(name="darts", order=1).options(DARTS.Config).order == 1  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="order"):
        Plugin(name="darts", order=3).options(DARTS.Config)  # type: ignore[call-arg]
