"""ProxylessNAS's parts against closed forms: both gate gradients, the rescaling, the
losses, REINFORCE, the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.objective import AbsoluteObjective
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.errors import SpaceError, TargetError
from hwnas.search.proxylessnas import (
    ProxylessNAS,
    ProxylessNASConfig,
    draw_running,
    keep_mass,
    softmax_over,
)
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.testing import Problem
from tests.search import known_recorder
from tests.search.known_recorder import PROBLEM, KnownRecorder, fill, step_at

torch.set_num_threads(1)


def recorded_context(
    steps: int = 100, problem: Problem = PROBLEM
) -> tuple[SearchContext, KnownRecorder]:
    return known_recorder.recorded_context(steps, problem)


def prepared(
    ctx: SearchContext, alphas: Mapping[str, Any] | None = None, **options: Any
) -> ProxylessNAS:
    """A strategy that updates alpha in every step, with random or given alphas."""
    strategy = ProxylessNAS(ProxylessNASConfig(**{"arch_every": 1, "warmup": 0.0, **options}))
    strategy.setup(ctx)
    fill(strategy.alphas, alphas)
    return strategy


def step(strategy: ProxylessNAS, ctx: SearchContext, number: int = 50, draw: int = 0) -> Metrics:
    return step_at(strategy, ctx, number, draw)


def values(strategy: ProxylessNAS) -> dict[str, np.ndarray]:
    return {key: alpha.detach().numpy().copy() for key, alpha in strategy.alphas.values.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_two_path_step_by_hand() -> None:
    """alpha = (ln 3, 0, far below): p = (3/4, 1/4). With dL/dg = (1, -1): 1 * 3/4 * 1/4
    + (-1) * 1/4 * (-3/4) = 3/8, and -3/8.

    Adam's first step moves each by the rate, 0.1, against its gradient: 3 e^-0.1 +
    e^0.1 = 3.819683 instead of 4, so both then move up by 0.046127.
    """
    problem = Problem(0)
    problem.gains["s1.b0"] = np.array([-1.0, 1.0, 0.0, 0.0])
    ctx, recorder = recorded_context(problem=problem)
    strategy = prepared(
        ctx, {"s1.b0": [math.log(3), 0.0, -40.0, -41.0]}, alpha_lr=0.1, latency_weight=0.0
    )
    step(strategy, ctx)
    gates, probes = recorder.differentiated[0]
    assert {int(gates["s1.b0"].argmax()), *probes["s1.b0"]} == {0, 1}
    gradient = strategy.alphas.values["s1.b0"].grad
    assert gradient is not None
    assert np.allclose(gradient, [0.375, -0.375, 0, 0], atol=1e-15)
    assert np.allclose(
        values(strategy)["s1.b0"], [math.log(3) - 0.053873, 0.146127, -40, -41], atol=1e-6
    )


def slopes(
    options: dict[str, Any], loss: float, latency: float, target: float
) -> tuple[float, float]:
    """Derivatives of the combined loss by the cross-entropy and by the expected
    latency, by hand.
    """
    if options["latency_loss"] == "add_linear":
        return 1.0, 0.1 / target
    if options["latency_loss"] == "absolute":
        return 1.0, math.copysign(0.3 / target, latency - target)
    ratio = math.log(latency * 1000) / math.log(target * 1000)
    return 0.2 * ratio**0.3, 0.2 * loss * 0.3 * ratio**-0.7 / (latency * math.log(target * 1000))


@pytest.mark.parametrize("mode", ["two", "full"])
@pytest.mark.parametrize("latency_loss", ["absolute", "add_linear", "mul_log"])
def test_gradient_is_the_closed_form(mode: str, latency_loss: str) -> None:
    """sum_j dL/dg_j p_j (delta_ij - p_i) over the running options, and the same with
    dE[lat]/dp. Other options have 0, and a choice whose active option is skip has no
    gradient.
    """
    options = {"mode": mode, "latency_loss": latency_loss, "unit_ms": 1e-3}
    ctx, recorder = recorded_context()
    skipped = 0
    for draw in range(12):
        strategy = prepared(ctx, **options)
        before = values(strategy)
        metrics = step(strategy, ctx, draw=draw)
        gates, probes = recorder.differentiated[-1]
        active = {key: int(gate.argmax()) for key, gate in gates.items()}
        running = {key: [active[key], *probes[key]] for key in gates}
        p = {key: np.zeros(len(alpha)) for key, alpha in before.items()}
        for key, index in running.items():
            assert len(set(index)) == len(index) == (2 if mode == "two" else len(p[key]))
            assert sorted(gates[key].tolist()) == [0.0] * (len(p[key]) - 1) + [1.0]
            p[key][index] = softmax(before[key][index])
        assert metrics["held_out_loss"] == pytest.approx(1 - PROBLEM.quality(gates))
        by_loss, by_ms = slopes(
            options, metrics["held_out_loss"], float(ctx.cost_model.expected(p)), ctx.target
        )
        marginal_ms = ctx.cost_model.marginals(p)
        for choice in ctx.space.choices:
            key = choice.key
            gradient = strategy.alphas.values[key].grad
            if choice.options[active[key]] == "skip":
                skipped += 1
                assert gradient is None
                assert np.allclose(softmax(values(strategy)[key]), softmax(before[key]), atol=1e-15)
                continue
            by_gate = by_loss * -PROBLEM.gains[key] + by_ms * marginal_ms[key]
            expected = np.array(
                [
                    sum(
                        by_gate[j] * p[key][j] * ((i == j) - p[key][i]) for j in range(len(by_gate))
                    )
                    for i in range(len(by_gate))
                ]
            )
            assert gradient is not None
            assert np.allclose(gradient, expected, rtol=1e-9, atol=1e-14)
            assert np.abs(expected).max() > 1e-8
    assert skipped > 0


@settings(max_examples=60, deadline=None)
@given(
    alphas=st.lists(st.floats(-8, 8), min_size=5, max_size=5),
    alpha_lr=st.floats(1e-4, 3.0),
    draw=st.integers(0, 1000),
)
def test_a_two_path_update_leaves_other_probabilities_alone(
    alphas: list[float], alpha_lr: float, draw: int
) -> None:
    ctx, recorder = recorded_context()
    strategy = prepared(
        ctx,
        {choice.key: alphas[: len(choice.options)] for choice in ctx.space.choices},
        alpha_lr=alpha_lr,
    )
    before = {key: softmax(alpha) for key, alpha in values(strategy).items()}
    step(strategy, ctx, draw=draw)
    gates, probes = recorder.differentiated[0]
    moved = 0.0
    for key, alpha in values(strategy).items():
        after = softmax(alpha)
        pair = [int(gates[key].argmax()), *probes[key]]
        others = np.delete(np.arange(len(alpha)), pair)
        assert np.abs(after[others] - before[key][others]).max(initial=0.0) <= 1e-12
        assert after[pair].sum() == pytest.approx(before[key][pair].sum(), abs=1e-12)
        moved = max(moved, float(np.abs(np.log(after[pair] / before[key][pair])).max()))
    assert moved > 1e-6


def test_keep_mass_scales_by_the_old_over_the_new_sum() -> None:
    """(0, 0, 0) -> (1, -1, 0): both move by -log((e + 1/e) / 2) = -0.433781."""
    alpha = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    keep_mass(alpha, torch.zeros(3, dtype=torch.float64), [0, 1])
    assert alpha.tolist() == pytest.approx([0.566219, -1.433781, 0.0], abs=1e-6)
    assert torch.softmax(alpha, 0)[2] == pytest.approx(1 / 3, abs=1e-15)


def test_softmax_over_some_options() -> None:
    alpha = torch.tensor([math.log(3), 5.0, 0.0], dtype=torch.float64)
    assert softmax_over(alpha, [2, 0]).tolist() == pytest.approx([0.75, 0.0, 0.25])
    assert softmax_over(alpha, [0, 1, 2]).tolist() == pytest.approx(
        torch.softmax(alpha, 0).tolist()
    )


def test_pairs_are_distributed_as_drawn_without_replacement() -> None:
    """P({i, j}) = p_i p_j (1 / (1 - p_i) + 1 / (1 - p_j)); of the pair, i is active
    with p_i / (p_i + p_j).
    """
    p, draws = np.array([0.6, 0.3, 0.1]), 6000
    rng = np.random.default_rng(0)
    counts = np.zeros((3, 3))
    for _ in range(draws):
        # adding a constant to all alphas changes no probability
        counts[tuple(draw_running(np.log(p) + 2.0, "two", rng))] += 1
    for i in range(3):
        for j in range(3):
            expected = (
                0.0
                if i == j
                else p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) * p[i] / (p[i] + p[j])
            )
            # within four standard errors
            assert abs(counts[i, j] / draws - expected) <= 4 * math.sqrt(
                expected * (1 - expected) / draws
            )


def test_full_runs_everything_and_draws_the_active_from_the_policy() -> None:
    p, draws = np.array([0.6, 0.3, 0.1]), 4000
    rng = np.random.default_rng(0)
    drawn = [draw_running(np.log(p), "full", rng) for _ in range(draws)]
    assert all(sorted(running) == [0, 1, 2] for running in drawn)
    active = np.bincount([running[0] for running in drawn], minlength=3) / draws
    assert np.all(np.abs(active - p) < 4 * np.sqrt(p * (1 - p) / draws))


@pytest.mark.slow
def test_weights_are_trained_on_one_path_at_a_time() -> None:
    """Gates have exactly one 1 and otherwise exact zeros, and are drawn from
    softmax(alpha).
    """
    ctx, recorder = recorded_context()
    strategy = prepared(ctx, arch_every=1000)
    for draw in range(1500):
        step(strategy, ctx, draw=draw)
    for key, p in strategy.alphas.policy().items():
        gates = np.array([gates[key] for gates in recorder.trained])
        assert np.all((gates == 0) | (gates == 1))
        assert np.all(gates.sum(1) == 1)
        assert np.all(np.abs(gates.mean(0) - p) < 4 * np.sqrt(p * (1 - p) / len(gates)))
    assert recorder.differentiated == []


def test_skip_as_the_active_option_leaves_alpha_and_its_moments_alone() -> None:
    ctx, recorder = recorded_context()
    strategy = prepared(ctx, {"s1.b1": [0.0, 0.1, 0.2, 0.3, 20.0]}, alpha_lr=0.1)
    strategy.alphas.apply(
        {
            key: torch.ones(len(alpha), dtype=alpha.dtype)
            for key, alpha in strategy.alphas.values.items()
        }
    )
    before = values(strategy)
    step(strategy, ctx)
    assert recorder.differentiated[0][0]["s1.b1"].tolist() == [0, 0, 0, 0, 1]
    after, state = values(strategy), strategy.alphas.optimizer.state
    assert np.array_equal(after["s1.b1"], before["s1.b1"])
    assert float(state[strategy.alphas.values["s1.b1"]]["step"]) == 1
    assert float(state[strategy.alphas.values["s1.b0"]]["step"]) == 2
    assert not np.array_equal(after["s1.b0"], before["s1.b0"])


def test_schedule() -> None:
    """Of 1,600 steps, 400 train only weights, and so do the next 10, the paper's first
    joint epoch; then every 5th updates alpha.
    """
    ctx, recorder = recorded_context(steps=1600)
    strategy = ProxylessNAS(ProxylessNASConfig())
    strategy.setup(ctx)
    start = values(strategy)
    alpha_steps = [
        number for number in range(1600) if (setattr(ctx, "step", number), strategy.learns(ctx))[1]
    ]
    assert alpha_steps == list(range(414, 1600, 5))
    for number in (0, 399, 409, 413):
        step(strategy, ctx, number)
    assert all(np.array_equal(alpha, start[key]) for key, alpha in values(strategy).items())
    metrics = step(strategy, ctx, 414)
    assert len(recorder.differentiated) == 1
    assert len(recorder.trained) == 5
    assert {"held_out_loss", "entropy", "expected_ms"} <= metrics.keys()
    assert max(np.abs(alpha).max() for alpha in start.values()) < 5e-3  # N(0, 1e-3)
    assert np.std(np.concatenate(list(start.values()))) == pytest.approx(1e-3, rel=0.5)


def test_losses_by_hand() -> None:
    """CE 2 at 40 ms of 80: 0.2 * 2 * (3.688879 / 4.382027)^0.3 = 0.379862;  2 - 0.1 *
    0.5;  2 + 0.3 * 0.5.
    """
    expected = {"mul_log": 0.4 * (3.688879 / 4.382027) ** 0.3, "add_linear": 1.95, "absolute": 2.15}
    for name, value in expected.items():
        strategy = ProxylessNAS(ProxylessNASConfig(latency_loss=name))  # type: ignore[arg-type]
        assert strategy.with_latency(2.0, 40.0, 80.0) == pytest.approx(value, rel=1e-6)
    assert expected["mul_log"] == pytest.approx(0.379862, abs=1e-6)


@pytest.mark.parametrize("reward", ["objective", "proxylessnas"])
def test_reinforce_by_hand(reward: str) -> None:
    """grad = -mean over paths of (R - b) (onehot - p); b is the first mean, then b +
    0.99 (mean - b).
    """
    ctx, recorder = recorded_context()
    strategy = prepared(ctx, gradient="reinforce", reward=reward, alpha_lr=0.05)
    baseline = None
    for draw in range(3):
        p = {key: softmax(alpha) for key, alpha in values(strategy).items()}
        metrics = step(strategy, ctx, draw=draw)
        paths, multiple = recorder.evaluated[-1]
        assert len(paths) == multiple == 10
        rewards = []
        for path in paths:
            quality, latency = PROBLEM.quality(path), float(ctx.cost_model.expected(path))
            absolute = AbsoluteObjective().reward(quality, latency, ctx.target)
            rewards.append(
                absolute if reward == "objective" else quality * (ctx.target / latency) ** 0.1
            )
        mean = float(np.mean(rewards))
        baseline = mean if baseline is None else baseline + 0.99 * (mean - baseline)
        assert metrics["reward"] == pytest.approx(mean)
        assert strategy.baseline == pytest.approx(baseline)
        for key, alpha in strategy.alphas.values.items():
            assert alpha.grad is not None
            expected = -np.mean(
                [
                    (r - baseline) * (path[key] - p[key])
                    for r, path in zip(rewards, paths, strict=True)
                ],
                axis=0,
            )
            assert np.allclose(alpha.grad, expected, atol=1e-14)
            assert np.abs(expected).max() > 0
    assert recorder.differentiated == []


def test_open_resolutions_are_refused_if_several_options_run_at_once() -> None:
    stages = (SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5"),)),)
    space = MacroSpace(name="sizes", resolution=32, resolutions=(24, 32), classes=3, stages=stages)
    with pytest.raises(SpaceError, match=r"'resolution' of space sizes.*24, 32"):
        ProxylessNAS(ProxylessNASConfig()).check(space)
    ProxylessNAS(ProxylessNASConfig(gradient="reinforce")).check(space)
    ProxylessNAS(ProxylessNASConfig()).check(space.restrict({"resolution": [32]}))


def test_an_undefined_logarithm_is_refused_before_the_search() -> None:
    ctx, _ = recorded_context()
    strategy = ProxylessNAS(ProxylessNASConfig(latency_loss="mul_log", unit_ms=1000.0))
    with pytest.raises(TargetError, match="unit_ms"):
        strategy.setup(ctx)
