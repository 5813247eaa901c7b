"""Scoring architectures with a super-net: what is saved by running the blocks that
neighbours share only once.

pytest tests/benchmarks/test_scoring.py --benchmark-only -s

300 random networks of NAS-Bench-Macro, sorted by their blocks, as ``hwnas study rank``
scores them: BN statistics of 64 images of 32 px, logits of 64 others. Whole passes and
shared ones take turns, network by network, in one process and on one thread.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from hwnas.core.families import nasbench_macro
from hwnas.nn.bn import recalibrate
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import make_supernet
from hwnas.study.prefixes import Maps, Prefixes

NETWORKS = 300


def images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(64, 3, 32, 32, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(count)
    ]


def test_shared_passes_against_whole_ones(benchmark: Any) -> None:
    torch.set_num_threads(1)
    space = nasbench_macro()
    supernet = make_supernet(space, torch.Generator().manual_seed(0)).eval()
    estimating, evaluated = images(1, 1), images(1, 2)
    prefixes = Prefixes(Maps(estimating, evaluated))
    drawn = np.random.default_rng(0).choice(space.size, NETWORKS, replace=False)
    rows = sorted(
        tuple(
            int(digit)
            for digit in np.unravel_index(number, [len(choice.options) for choice in space.choices])
        )
        for number in drawn
    )

    def network(row: tuple[int, ...]) -> ClassificationNetwork:
        extracted = supernet.extract(space.at(row)).to(memory_format=torch.channels_last)
        assert isinstance(extracted, ClassificationNetwork)
        return extracted

    def measure() -> tuple[float, float]:
        whole = shared = 0.0
        for row in rows:
            begin = time.perf_counter()
            separate = network(row)
            recalibrate(separate, estimating)
            with torch.inference_mode():
                expected = [separate(x_NCHW) for x_NCHW in evaluated]
            middle = time.perf_counter()
            logits = prefixes.logits(network(row))
            whole, shared = whole + middle - begin, shared + time.perf_counter() - middle
            assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
        return whole, shared

    whole, shared = benchmark.pedantic(measure, rounds=1, iterations=1)
    print(
        f"\n{NETWORKS} networks: whole passes {whole:.1f} s, shared {shared:.1f} s, ratio"
        f" {whole / shared:.2f}"
    )
    assert shared < whole
