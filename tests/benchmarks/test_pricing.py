"""The speed of cost models: architectures per second, and the time for the expected
latency's gradient relative to a super-net step, in one run.

pytest tests/benchmarks/test_pricing.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hwnas.core.cost import CostModel
from hwnas.core.limits import ActivationLimit, Limits, MacsLimit
from hwnas.core.spaces import load_space
from hwnas.core.table import LatencyTable
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.proposal import one_hot, uniform_index
from hwnas.testing import synthetic_table

ENLARGED = "proxylessnas_enlarged"


@cache
def cost_model(name: str, resolution: int = 224, classes: int = 1000) -> CostModel:
    space = load_space(name, resolution=resolution, classes=classes)
    return CostModel.of_table(space, synthetic_table(space))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["proxylessnas", ENLARGED])
def test_architectures_costed_per_second(benchmark: Any, name: str) -> None:
    torch.set_num_threads(1)
    cost = cost_model(name)
    index_NC = uniform_index(cost.space, 100_000, np.random.default_rng(0))
    benchmark(lambda: cost.costs(index_NC))
    rate = len(index_NC) / benchmark.stats.stats.median
    print(f"\n{rate:,.0f} architectures of {name} costed per second")
    assert rate > 100_000


def test_architectures_checked_against_three_limits_per_second(benchmark: Any) -> None:
    cost = cost_model(ENLARGED)
    others = [
        MacsLimit(kind="macs", max_macs=10**9),
        ActivationLimit(kind="activation_bytes", max_bytes=10**7),
    ]
    limits = Limits(cost.space, others, LatencyTable.load)
    index_NC = uniform_index(cost.space, 100_000, np.random.default_rng(0))
    benchmark(lambda: (cost.costs(index_NC) <= 1000.0) & limits.feasible(index_NC))
    rate = len(index_NC) / benchmark.stats.stats.median
    print(
        f"\n{rate:,.0f} architectures of {ENLARGED} checked against latency, MACs and peak memory"
        " per second"
    )
    assert rate > 100_000


def test_the_gradient_of_expected_latency_against_a_super_net_step(benchmark: Any) -> None:
    """On one core; a step is a forward and backward pass of one sampled path, for 64
    images of 32 pixels.
    """
    torch.set_num_threads(1)
    cost = cost_model(ENLARGED, resolution=32, classes=10)
    space, rng = cost.space, np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    supernet: Any = MacroSupernet(space, generator)
    supernet = supernet.to(memory_format=torch.channels_last)
    x_NCHW = torch.randn(64, 3, 32, 32, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 10, (64,), generator=generator)
    logits = {
        choice.key: torch.zeros(len(choice.options), dtype=torch.float64, requires_grad=True)
        for choice in space.choices
    }

    def step() -> None:
        supernet.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(x_NCHW, one_hot(space.sample(rng), space)), y).backward()

    def gradient() -> None:
        cost.expected({key: logit.softmax(0) for key, logit in logits.items()}, torch).backward()

    step(), gradient()
    pairs = [
        (seconds(step), statistics.median(seconds(gradient) for _ in range(5))) for _ in range(15)
    ]
    step_s, gradient_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    benchmark(gradient)
    print(
        f"\nexpected latency, forward and backward: {gradient_s * 1e3:.2f} ms; step:"
        f" {step_s * 1e3:.0f} ms; {gradient_s / step_s:.2%}"
    )
    assert gradient_s <= 0.05 * step_s
