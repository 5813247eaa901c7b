"""TuNAS's parts against closed forms: the gradient, the hierarchy, warm-ups, rates, the
baseline, the optimiser, the entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Plugin
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.errors import ConfigError
from hwnas.search.strategy import Gates, Metrics
from hwnas.search.tunas import Controller, Sample, TuNAS, TuNASConfig
from hwnas.testing import KnownWeights, Problem, tiny_space

torch.set_num_threads(1)


def kernels_space() -> MacroSpace:
    """One decision: three kernels."""
    stages = (SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5", "cn_k7"),)),)
    return MacroSpace(name="kernels", resolution=8, classes=3, stages=stages)


def grads(controller: Controller) -> dict[str, np.ndarray]:
    return {
        name: np.zeros(len(logits)) if logits.grad is None else logits.grad.numpy()
        for name, logits in controller.logits.items()
    }


def sample_of(decided: dict[str, int]) -> Sample:
    return Sample({}, decided, None)


def test_gradient_of_one_decision() -> None:
    """d(-(R - b) log p_i) / d logits = (R - b) (p - onehot_i)."""
    controller = Controller(kernels_space())
    with torch.no_grad():
        controller.logits["s0.b0.kernel"].copy_(torch.tensor([0.3, -1.0, 0.7]))
    p = np.exp([0.3, -1.0, 0.7]) / np.exp([0.3, -1.0, 0.7]).sum()
    assert np.allclose(controller.probabilities()["s0.b0.kernel"], p)
    controller.update([sample_of({"s0.b0.kernel": 0})], [0.5], lr=0.0)
    assert np.allclose(grads(controller)["s0.b0.kernel"], 0)  # the first reward is its own baseline
    (advantage,) = controller.update([sample_of({"s0.b0.kernel": 2})], [0.9], lr=0.0)
    assert advantage > 0
    assert np.allclose(grads(controller)["s0.b0.kernel"], advantage * (p - np.eye(3)[2]))


def test_expected_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """REINFORCE summed over all outcomes: -dE[R]/dlogits = -(p * (R - E[R])), whatever
    the baseline.
    """
    controller = Controller(kernels_space())
    rewards, logits = np.array([0.2, 0.5, 0.9]), np.array([0.3, -1.0, 0.7])
    with torch.no_grad():
        controller.logits["s0.b0.kernel"].copy_(torch.from_numpy(logits))
    p = np.exp(logits) / np.exp(logits).sum()
    total = np.zeros(3)
    for i in range(3):
        controller.reward_sum, controller.reward_weight = 0.31, 0.5
        controller.update(
            [sample_of({"s0.b0.kernel": i})], [rewards[i]], lr=0.0, baseline_momentum=1.0
        )
        total += p[i] * grads(controller)["s0.b0.kernel"]
    assert np.allclose(total, -p * (rewards - p @ rewards))


def test_decisions_below_a_skip_have_no_gradient() -> None:
    space = tiny_space()
    controller = Controller(space)
    skipped = 0
    for seed in range(40):
        sample = controller.sample(np.random.default_rng(seed))
        assert sample.picks is not None
        controller.reward_sum, controller.reward_weight = 0.0, 1.0
        controller.update([sample], [1.0], lr=0.0)
        gradients = grads(controller)
        for key in ("s1.b1", "s2.b1"):
            below = [gradients[f"{key}.kernel"], gradients[f"{key}.expansion"]]
            assert np.abs(gradients[f"{key}.skip"]).max() > 0
            if sample.picks[key] == "skip":
                skipped += 1
                assert not np.any(below)
            else:
                assert np.all(np.abs(below) > 0)
    assert 20 < skipped < 60  # of 80 slots, about half


@pytest.mark.slow
def test_samples_are_distributed_like_the_policy() -> None:
    """Frequencies in a skippable slot: p(skip), and (1 - p(skip)) p(kernel)
    p(expansion).
    """
    controller = Controller(tiny_space())
    with torch.no_grad():
        for name, values in (
            ("skip", [0.5, -0.5]),
            ("kernel", [1.0, 0.0]),
            ("expansion", [0.0, 0.4]),
        ):
            controller.logits[f"s1.b1.{name}"].copy_(torch.tensor(values))
    expected = controller.option_probabilities()["s1.b1"]
    keep = 1 / (1 + math.exp(-1))
    assert expected[-1] == pytest.approx(1 - keep)
    assert expected[0] == pytest.approx(keep * (1 / (1 + math.exp(-1))) * (1 / (1 + math.exp(0.4))))
    rng = np.random.default_rng(0)
    counts = np.sum([controller.sample(rng).gates["s1.b1"] for _ in range(4000)], axis=0)
    # within four standard errors
    assert np.all(np.abs(counts / 4000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))
    assert controller.best()["s1.b1"] == "ir_k3_e6"


def test_warmed_up_decisions() -> None:
    """Kernels and skips become uniform mixtures, expansions and widths take their
    largest option, and none of them updates the policy.
    """
    controller = Controller(tiny_space())
    sample = controller.sample(np.random.default_rng(0), warmup_probability=1.0)
    assert sample.decided == {}
    assert sample.picks is None
    # options: k3e3, k5e3, k3e6, k5e6, skip
    assert sample.gates["s1.b0"].tolist() == [0, 0, 0.5, 0.5]
    assert sample.gates["s1.b1"].tolist() == [0, 0, 0.25, 0.25, 0.5]
    assert sample.gates["s1.width"].tolist() == [0, 1]
    before = controller.probabilities()
    controller.update([sample], [1.0], lr=1.0)
    controller.update([sample], [2.0], lr=1.0)
    for name, p in controller.probabilities().items():
        assert np.array_equal(p, before[name])


@pytest.mark.parametrize("widths", [(16, 24, 32), (32, 24, 16), (24, 32, 16)])
def test_warm_up_takes_the_largest_width_in_any_order(widths: tuple[int, ...]) -> None:
    space = MacroSpace(
        name="widths",
        resolution=8,
        classes=3,
        stages=(SpaceStage(widths=widths, slots=(("cn_k3",),)),),
    )
    sample = Controller(space).sample(np.random.default_rng(0), warmup_probability=1.0)
    assert sample.picks == {"s0.width": 32}


def test_widths_are_one_decision() -> None:
    """Every option can be drawn, and an update raises the probability of the option
    that was picked.
    """
    space = MacroSpace(
        name="widths",
        resolution=8,
        classes=3,
        stages=(SpaceStage(widths=(32, 16, 24), slots=(("cn_k3",),)),),
    )
    controller = Controller(space)
    seen = set()
    for seed in range(30):
        sample = controller.sample(np.random.default_rng(seed))
        assert sample.picks is not None
        controller.reward_sum, controller.reward_weight = 0.0, 1.0
        controller.update([sample], [1.0], lr=0.01)
        probabilities = controller.option_probabilities()["s0.width"]
        controller.update([sample], [2.0], lr=0.01)
        position = space.choices[0].options.index(sample.picks["s0.width"])
        assert controller.option_probabilities()["s0.width"][position] > probabilities[position]
        seen.add(sample.picks["s0.width"])
    assert seen == {16, 24, 32}


class Recorder(KnownWeights):
    """Known weights that record every request."""

    def __init__(self, steps: int, batch_size: int = 512) -> None:
        super().__init__(Problem(0))
        self.trained: list[Gates] = []
        self.scored: list[tuple[Gates, int]] = []
        self.ctx = replace(self.problem.context(steps, batch_size), weights=self)

    def train(self, gates: Sequence[Gates], **options: Any) -> Metrics:
        self.trained += gates
        return super().train(gates, **options)

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        self.scored += [(path_gates, multiple) for path_gates in gates]
        return super().qualities(gates, multiple)

    def step(self, strategy: TuNAS, number: int, draw: int = 0) -> Metrics:
        self.ctx.step, self.ctx.rng = number, np.random.default_rng([number, draw])
        return strategy.step(self.ctx)


@pytest.mark.slow
def test_warm_up_probability_falls_linearly() -> None:
    """p(t) = 1 - t / (0.25 T), per decision. Of T = 80: 1 at step 0, 0.6 at step 8, 0
    from step 20 on.
    """
    recorder, strategy = Recorder(80), TuNAS(TuNASConfig())
    strategy.setup(recorder.ctx)
    for number, expected in ((0, 1.0), (8, 0.6), (15, 0.25), (19, 0.05), (20, 0.0), (79, 0.0)):
        recorder.trained.clear()
        for draw in range(400):
            recorder.step(strategy, number, draw)
        gates = recorder.trained
        # within four standard errors; 1e-12 if a probability is 0 or 1
        mixed = np.mean([np.count_nonzero(gate["s1.b0"]) == 2 for gate in gates])
        assert abs(mixed - expected) <= 4 * math.sqrt(expected * (1 - expected) / 400) + 1e-12
        if number < 20:  # the policy does not move before the delay ends
            largest = np.mean([gate["s1.width"][-1] == 1 for gate in gates])
            p = expected + (1 - expected) / 2
            assert abs(largest - p) <= 4 * math.sqrt(p * (1 - p) / 400) + 1e-12


def test_nothing_is_learned_or_scored_during_the_delay() -> None:
    recorder, strategy = Recorder(80), TuNAS(TuNASConfig())
    strategy.setup(recorder.ctx)
    for number in range(20):
        recorder.step(strategy, number)
    assert recorder.scored == []
    assert all(np.ptp(p) == 0 for p in strategy.controller.probabilities().values())
    recorder.step(strategy, 20)
    recorder.step(strategy, 21)
    assert len(recorder.scored) == 2
    assert any(np.ptp(p) > 0 for p in strategy.controller.probabilities().values())
    # the architecture that was just trained
    assert [gates for gates, _ in recorder.scored] == recorder.trained[-2:]
    assert {multiple for _, multiple in recorder.scored} == {4}


def test_the_rate_ramps_up_tenfold() -> None:
    """3e-4 per 256 images, so at batch size 512: 6e-4 at a quarter of the steps, 6e-4 *
    sqrt(10) halfway from there, 6e-3 at the end.
    """
    recorder, strategy = Recorder(80), TuNAS(TuNASConfig())
    rates = {}
    for number in (0, 19, 20, 50, 80):
        recorder.ctx.step = number
        rates[number] = strategy.policy_lr(recorder.ctx)
    assert rates == pytest.approx({0: 0.0, 19: 0.0, 20: 6e-4, 50: 6e-4 * math.sqrt(10), 80: 6e-3})
    assert TuNAS(TuNASConfig(rl_lr=0.1, rl_lr_ramp=1.0)).policy_lr(recorder.ctx) == pytest.approx(
        0.1
    )


def test_reward_metrics() -> None:
    """The reward is Q - 0.1 |T / T0 - 1| of the architecture that was sampled."""
    recorder, strategy = Recorder(80), TuNAS(TuNASConfig())
    strategy.setup(recorder.ctx)
    metrics = recorder.step(strategy, 40)
    picks = {
        c.key: c.options[int(np.argmax(recorder.trained[0][c.key]))]
        for c in recorder.ctx.space.choices
    }
    latency = recorder.ctx.cost_model.cost(picks)
    assert metrics["latency_ms"] == pytest.approx(latency)
    assert metrics["reward"] == pytest.approx(
        metrics["quality"] - 0.1 * abs(latency / recorder.ctx.target - 1)
    )
    every = recorder.ctx.cost_model.costs(recorder.problem.index_NC)
    uniform = {
        choice.key: np.full(len(choice.options), 1 / len(choice.options))
        for choice in recorder.ctx.space.choices
    }
    skippable = np.array([0.125] * 4 + [0.5])  # skip is decided first
    weights = np.ones(len(every))
    for i, choice in enumerate(recorder.ctx.space.choices):
        weights *= (skippable if "skip" in choice.options else uniform[choice.key])[
            recorder.problem.index_NC[:, i]
        ]
    assert metrics["expected_ms"] == pytest.approx(weights @ every, rel=1e-3)


def test_baseline_is_a_zero_debiased_average() -> None:
    """Rewards 1, 2, 4 at momentum 0.9 give (0.1, 0.29, 0.661) / (0.1, 0.19, 0.271)."""
    controller = Controller(kernels_space())
    advantages = [
        controller.update([sample_of({"s0.b0.kernel": 0})], [reward], 0.0, baseline_momentum=0.9)[0]
        for reward in (1.0, 2.0, 4.0)
    ]
    assert advantages == pytest.approx([0.0, 2 - 0.29 / 0.19, 4 - 0.661 / 0.271])


def test_adam_without_momentum_by_hand() -> None:
    """v <- 0.999 v + 0.001 g^2

    logits <- logits - lr g / (sqrt(v / (1 - 0.999^t)) + 1e-8)
    """
    controller = Controller(kernels_space())
    logits, v = np.zeros(3), np.zeros(3)
    ema, weight = 0.0, 0.0
    rng = np.random.default_rng(0)
    for t in range(1, 30):
        i, reward, lr = int(rng.integers(3)), float(rng.random()), 0.01 * t
        controller.update([sample_of({"s0.b0.kernel": i})], [reward], lr)
        ema, weight = 0.95 * ema + 0.05 * reward, 0.95 * weight + 0.05
        p = np.exp(logits) / np.exp(logits).sum()
        g = (reward - ema / weight) * (p - np.eye(3)[i])
        v = 0.999 * v + 0.001 * g**2
        logits = logits - lr * g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert np.allclose(controller.logits["s0.b0.kernel"].detach().numpy(), logits, atol=1e-9)
    assert np.ptp(logits) > 0.1


def test_entropy_bonus_pulls_towards_uniform() -> None:
    controller = Controller(kernels_space())
    with torch.no_grad():
        controller.logits["s0.b0.kernel"].copy_(torch.tensor([3.0, 0.0, 0.0]))
    before = float(controller.entropy().detach())
    for _ in range(20):
        # equal rewards: no advantage
        controller.update([sample_of({"s0.b0.kernel": 0})], [1.0], 0.05, entropy_weight=0.1)
    assert float(controller.entropy().detach()) > before + 0.1


def test_entropy_at_the_start() -> None:
    """Three plain slots of ln 2 + ln 2, two skippable ones of ln 2 + (ln 2 + ln 2) / 2,
    and one width of ln 2.
    """
    space = tiny_space()
    ln2 = math.log(2)
    assert float(Controller(space).entropy().detach()) == pytest.approx(
        3 * 2 * ln2 + 2 * (ln2 + 0.5 * 2 * ln2) + ln2
    )


def test_entropy_is_that_of_the_distinct_architectures() -> None:
    """-sum p log p over all options of a skippable slot, at random logits: the sum over
    the hierarchy is exact.
    """
    stages = (
        SpaceStage(
            widths=(8,),
            slots=(
                ("ir_k3_e3",),
                ("ir_k3_e3", "ir_k5_e3", "ir_k7_e3", "ir_k3_e6", "ir_k5_e6", "ir_k7_e6", "skip"),
            ),
        ),
    )
    controller = Controller(MacroSpace(name="one", resolution=8, classes=3, stages=stages))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for logits in controller.logits.values():
            logits.normal_(generator=generator)
    p = controller.option_probabilities()["s0.b1"]
    assert p.sum() == pytest.approx(1.0)
    assert float(controller.entropy().detach()) == pytest.approx(float(-(p * np.log(p)).sum()))


def test_options_that_do_not_form_a_grid_stay_one_decision() -> None:
    stages = (
        SpaceStage(widths=(8,), slots=(("ir_k3_e3",), ("ds_k3", "ir_k3_e6", "ir_k5_e3", "skip"))),
    )
    controller = Controller(MacroSpace(name="odd", resolution=8, classes=3, stages=stages))
    assert {name: len(logits) for name, logits in controller.logits.items()} == {
        "s0.b1.skip": 2,
        "s0.b1.option": 3,
    }
    gates = controller.sample(np.random.default_rng(0), warmup_probability=1.0).gates["s0.b1"]
    assert gates == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_warm_up_must_not_outlast_the_delay() -> None:
    with pytest.raises(ConfigError, match="must not outlast rl_delay"):
        Plugin(name="tunas", warmup=0.3).options(TuNAS.Config)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="did you mean 'rl_delay'"):
        Plugin(name="tunas", rl_dely=0.3).options(TuNAS.Config)  # type: ignore[call-arg]
    Plugin(name="tunas", warmup=0.3, rl_delay=0.3).options(TuNAS.Config)  # type: ignore[call-arg]


def test_without_warm_up_every_step_trains_one_path_and_scores_it() -> None:
    recorder, strategy = Recorder(40), TuNAS(TuNASConfig(warmup=0.0, rl_delay=0.0))
    strategy.setup(recorder.ctx)
    for number in range(40):
        recorder.step(strategy, number)
    assert all(np.count_nonzero(gate) == 1 for gates in recorder.trained for gate in gates.values())
    assert len(recorder.scored) == 40


def test_the_argmax_of_every_decision_leads_the_proposals_if_it_meets_the_budget() -> None:
    """Not the likeliest options: skipping a block is likelier than any single form of
    it, but keeping it is likelier than skipping it.
    """
    problem = Problem(0)
    strategy = TuNAS(TuNASConfig())
    ctx = problem.context(1)
    strategy.setup(ctx)
    controller = strategy.controller
    with torch.no_grad():
        for name, logits in controller.logits.items():
            if name.endswith(".skip"):
                logits.copy_(torch.tensor([math.log(0.6), math.log(0.4)]))
    best = controller.best()
    options = controller.option_probabilities()
    likeliest = {
        choice.key: choice.options[int(options[choice.key].argmax())]
        for choice in ctx.space.choices
    }
    assert best != likeliest
    ctx.target, ctx.tolerance = ctx.cost_model.cost(best), 0.9
    assert abs(ctx.cost_model.cost(likeliest) / ctx.target - 1) < 0.9
    proposals = strategy.propose(ctx, 5)
    assert proposals[0] == best
    assert len(proposals) == 5
    ctx.target, ctx.tolerance = 2 * ctx.cost_model.cost(best), 0.1
    assert best not in strategy.propose(ctx, 5)
