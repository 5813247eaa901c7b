"""FBNet's parts against closed forms: temperature, mask, latency and loss of a sampled
mask, gradient, schedule, sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.errors import SpaceError, TargetError
from hwnas.search.fbnet import FBNet, FBNetConfig, gumbel_softmax, sample_policy_feasible
from hwnas.search.proposal import is_feasible
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.testing import Problem
from tests.search import known_recorder
from tests.search.known_recorder import PROBLEM, KnownRecorder, fill, step_at

torch.set_num_threads(1)


def recorded_context(
    steps: int = 900, problem: Problem = PROBLEM
) -> tuple[SearchContext, KnownRecorder]:
    return known_recorder.recorded_context(steps, problem)


def prepared(ctx: SearchContext, thetas: Mapping[str, Any] | None = None, **options: Any) -> FBNet:
    """A strategy that updates theta in every step, with random or given thetas."""
    strategy = FBNet(FBNetConfig(**{"theta_every": 1, "warmup": 0.0, **options}))
    strategy.setup(ctx)
    fill(strategy.thetas, thetas)
    return strategy


def step(strategy: FBNet, ctx: SearchContext, number: int = 450, draw: int = 0) -> Metrics:
    return step_at(strategy, ctx, number, draw)


def test_temperature_by_hand() -> None:
    """5 at the start, 5 e^-0.45 after 10 of 90 epochs, 5 e^-4.05 at the end; every
    epoch multiplies it by 0.956.
    """
    ctx, _ = recorded_context()
    strategy, temperatures = FBNet(FBNetConfig()), {}
    for number in (0, 10, 100, 900):
        ctx.step = number
        temperatures[number] = strategy.temperature(ctx)
    assert temperatures == pytest.approx(
        {0: 5.0, 10: 4.779987, 100: 3.188141, 900: 0.087112}, abs=1e-6
    )
    assert temperatures[10] / temperatures[0] == pytest.approx(0.956, abs=1e-4)


def test_mask_by_hand() -> None:
    """softmax((theta + G) / tau), with G = -log(-log u) as numpy draws it."""
    theta = {
        "a": torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64),
        "b": torch.tensor([0.5, 0.5], dtype=torch.float64),
    }
    masks = gumbel_softmax(theta, 2.5, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    for key, values in theta.items():
        weights = np.exp((values.numpy() + rng.gumbel(size=len(values))) / 2.5)
        assert np.allclose(masks[key], weights / weights.sum(), atol=1e-14)


@pytest.mark.parametrize("temperature", [5.0, 0.087])
def test_the_largest_entry_of_a_mask_is_a_draw_from_the_policy(temperature: float) -> None:
    """The Gumbel-max property, at any temperature; a low one makes masks nearly
    one-hot, a high one nearly uniform.
    """
    theta = {"a": torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)}
    rng, draws = np.random.default_rng(0), 3000
    masks = np.array([gumbel_softmax(theta, temperature, rng)["a"].numpy() for _ in range(draws)])
    p = torch.softmax(theta["a"], 0).numpy()
    frequency = np.bincount(masks.argmax(1), minlength=3) / draws
    assert np.all(np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / draws))
    assert (masks.max(1).mean() > 0.95) == (temperature < 1)
    assert (masks.max(1).mean() < 0.6) == (temperature > 1)


def test_losses_by_hand() -> None:
    """CE 1.5 at e^10 microseconds: 1.5 * 0.2 * 10^0.6 = 1.194321, not 1.5 * 0.2 * 0.6 *
    10;  1.5 + 0.3 * |22.026466 / 20 - 1|.
    """
    latency_ms = math.exp(10) / 1000
    assert FBNet(FBNetConfig(latency_loss="fbnet")).with_latency(
        1.5, latency_ms, 20.0
    ) == pytest.approx(1.194321, abs=1e-6)
    assert FBNet(FBNetConfig(latency_loss="absolute")).with_latency(
        1.5, latency_ms, 20.0
    ) == pytest.approx(1.530397, abs=1e-6)


def slopes(latency_loss: str, loss: float, latency: float, target: float) -> tuple[float, float]:
    """Derivatives of the combined loss by the cross-entropy and by the latency, by
    hand.
    """
    if latency_loss == "absolute":
        return 1.0, math.copysign(0.3 / target, latency - target)
    log = math.log(latency * 1000)
    return 0.2 * log**0.6, loss * 0.2 * 0.6 * log**-0.4 / latency


@pytest.mark.parametrize("latency_loss", ["absolute", "fbnet"])
def test_gradient_is_the_closed_form(latency_loss: str) -> None:
    """dL/dtheta_i = sum_j dL/dm_j m_j (delta_ij - m_i) / tau, with the latency of the
    sampled mask.
    """
    ctx, recorder = recorded_context()
    strategy = prepared(ctx, latency_loss=latency_loss)
    for draw in range(5):
        metrics = step(strategy, ctx, draw=draw)
        masks = {key: np.asarray(mask) for key, mask in recorder.differentiated[-1][0].items()}
        latency = float(ctx.cost_model.expected(masks))
        assert metrics["latency_ms"] == pytest.approx(latency)
        assert abs(latency / float(ctx.cost_model.expected(strategy.thetas.policy())) - 1) > 1e-3
        assert metrics["held_out_loss"] == pytest.approx(1 - PROBLEM.quality(masks))
        by_loss, by_ms = slopes(latency_loss, metrics["held_out_loss"], latency, ctx.target)
        marginal_ms, tau = ctx.cost_model.marginals(masks), 5 * math.exp(-0.045 * 45)
        for key, m in masks.items():
            by_mask = by_loss * -PROBLEM.gains[key] + by_ms * marginal_ms[key]
            expected = np.array(
                [
                    sum(by_mask[j] * m[j] * ((i == j) - m[i]) for j in range(len(m))) / tau
                    for i in range(len(m))
                ]
            )
            gradient = strategy.thetas.values[key].grad
            assert gradient is not None
            assert np.allclose(gradient, expected, rtol=1e-9, atol=1e-14)
            assert np.abs(expected).max() > 1e-6


def test_adam_decays_theta_where_there_is_no_gradient() -> None:
    """Without a gradient, Adam's first step is rate * sign(decay * theta): theta 2 ->
    1.99, -1 -> -0.99, and 0 stays.
    """
    problem = Problem(0)
    problem.gains = {key: np.zeros_like(gain) for key, gain in problem.gains.items()}
    ctx, _ = recorded_context(problem=problem)
    strategy = prepared(
        ctx, {"s1.b0": [2.0, -1.0, 0.0, 0.0]}, latency_loss="absolute", latency_weight=0.0
    )
    step(strategy, ctx)
    assert strategy.thetas.values["s1.b0"].tolist() == pytest.approx(
        [1.99, -0.99, 0.0, 0.0], abs=1e-6
    )


def test_weights_run_all_options_and_theta_gets_its_own_mask() -> None:
    ctx, recorder = recorded_context()
    strategy = prepared(ctx)
    for draw in range(3):
        step(strategy, ctx, draw=draw)
    masks = [*recorder.trained, *(gates for gates, _ in recorder.differentiated)]
    assert len(recorder.trained) == len(recorder.differentiated) == 3
    for key in PROBLEM.gains:
        weights = np.array([np.asarray(mask[key]) for mask in masks])
        assert np.all(weights > 0)
        assert np.allclose(weights.sum(1), 1)
        assert len({tuple(row) for row in weights.tolist()}) == 6
    assert all(
        isinstance(mask[key], torch.Tensor) and not mask[key].requires_grad
        for mask in masks
        for key in mask
    )


def test_schedule() -> None:
    """Of 900 steps (90 epochs), the first 100 train only weights; then one theta step
    follows every 4 weight steps.
    """
    ctx, recorder = recorded_context()
    strategy = FBNet(FBNetConfig())
    strategy.setup(ctx)
    theta_steps = []
    for number in range(900):
        ctx.step = number
        theta_steps += [number] if strategy.learns(ctx) else []
    assert theta_steps == list(range(103, 900, 4))
    for number in (0, 3, 99, 102):
        step(strategy, ctx, number)
    assert all(not theta.detach().any() for theta in strategy.thetas.values.values())
    assert recorder.differentiated == []
    metrics = step(strategy, ctx, 103)
    assert all(theta.detach().any() for theta in strategy.thetas.values.values())
    assert {
        "held_out_loss",
        "latency_ms",
        "temperature",
        "entropy",
        "expected_ms",
    } <= metrics.keys()


@pytest.mark.slow
def test_samples_are_distributed_like_the_policy_within_the_budget() -> None:
    """P(option | within the tolerance) by enumeration, against the first proposal of
    many draws.
    """
    ctx, _ = recorded_context()
    policy = prepared(ctx).thetas.policy()
    index_NC = PROBLEM.index_NC[is_feasible(ctx, PROBLEM.index_NC)]
    weights_N = np.prod(
        [policy[choice.key][index_NC[:, i]] for i, choice in enumerate(ctx.space.choices)], axis=0
    )
    draws, counts = 250, {choice.key: np.zeros(len(choice.options)) for choice in ctx.space.choices}
    for draw in range(draws):
        ctx.rng = np.random.default_rng(draw)
        first = ctx.space.index(sample_policy_feasible(ctx, policy, 1)[0])
        for key, option in zip(counts, first, strict=True):
            counts[key][option] += 1
    for i, count in enumerate(counts.values()):
        p = np.bincount(index_NC[:, i], weights_N, len(count)) / weights_N.sum()
        # within four standard errors
        assert np.all(np.abs(count / draws - p) <= 4 * np.sqrt(p * (1 - p) / draws))


@pytest.mark.parametrize("derive", ["sampled", "likely"])
def test_a_policy_that_misses_the_budget_still_gives_proposals_within_it(derive: str) -> None:
    """A policy that gives 96 % to one architecture, which is far too slow, still yields
    different architectures within the tolerance.
    """
    ctx, _ = recorded_context()
    strategy = prepared(ctx, derive=derive)
    with torch.no_grad():
        for choice in ctx.space.choices:
            slowest = PROBLEM.gains[choice.key].argmax()
            strategy.thetas.values[choice.key].copy_(6.0 * torch.eye(len(choice.options))[slowest])
    ctx.rng = np.random.default_rng(0)
    proposals = strategy.propose(ctx, 5)
    index_NC = np.array([ctx.space.index(picks) for picks in proposals])
    assert len(np.unique(index_NC, axis=0)) == 5
    assert np.all(is_feasible(ctx, index_NC))


def test_likely_proposals_begin_with_the_argmax() -> None:
    ctx, _ = recorded_context()
    strategy = prepared(ctx, derive="likely")
    with torch.no_grad():
        for choice in ctx.space.choices:
            strategy.thetas.values[choice.key].copy_(
                2.0 * torch.eye(len(choice.options))[choice.options.index(PROBLEM.best[choice.key])]
            )
    ctx.rng = np.random.default_rng(0)
    assert strategy.propose(ctx, 3)[0] == PROBLEM.best


def test_open_resolutions_are_refused() -> None:
    stages = (SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5"),)),)
    space = MacroSpace(name="sizes", resolution=32, resolutions=(24, 32), classes=3, stages=stages)
    with pytest.raises(SpaceError, match=r"'resolution' of space sizes.*24, 32"):
        FBNet(FBNetConfig()).check(space)
    FBNet(FBNetConfig()).check(space.restrict({"resolution": [32]}))


def test_an_undefined_logarithm_is_refused_before_the_search() -> None:
    ctx, _ = recorded_context()
    with pytest.raises(TargetError, match="unit_ms"):
        FBNet(FBNetConfig(latency_loss="fbnet", unit_ms=1000.0)).setup(ctx)
