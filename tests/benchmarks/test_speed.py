"""Ratios that the design rests on, each measured side by side in one run.

pytest tests/benchmarks/test_speed.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hwnas.core.cost import CostModel
from hwnas.core.spaces import mobile32, proxylessnas, published
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.devices.device import HOST, connect
from hwnas.export.tflite import quantize_int8, to_tflite
from hwnas.export.tflite_writer import write_op, write_tflite
from hwnas.nn.blocks import build
from hwnas.nn.network import Network
from hwnas.nn.supernet import Supernet
from hwnas.search.strategy import one_hot, uniform_index


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_writing_a_block_against_converting_it(benchmark: Any) -> None:
    op = proxylessnas().ops[20]
    module = build(op).eval()
    to_tflite(module, (1, op.in_ch, op.size, op.size))  # the converter's import is not counted
    converted = statistics.median(seconds(lambda: to_tflite(module, (1, op.in_ch, op.size, op.size))) for _ in range(3))
    benchmark(lambda: write_op(op, module))
    print(f"\nconverting {op.key}: {converted * 1e3:.0f} ms; writing it: {benchmark.stats.stats.median * 1e3:.2f} ms")


def test_super_net_step_against_the_same_networks_alone(benchmark: Any) -> None:
    """CIFAR-10-sized batches, the same eight architectures, interleaved, forward and backward."""
    space, rng = mobile32(), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    supernet: Any = Supernet(space, generator)
    supernet = supernet.to(memory_format=torch.channels_last)
    picks = [space.sample(rng) for _ in range(8)]
    alone: list[Any] = [Network(space.decode(each), generator=generator) for each in picks]
    alone = [network.to(memory_format=torch.channels_last) for network in alone]
    x_NCHW = torch.randn(64, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (64,), generator=generator)

    def step(module: Any, *gates: Any) -> None:
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(x_NCHW, *gates), y).backward()

    def ratio() -> float:
        shared = sum(seconds(lambda each=each: step(supernet, one_hot(each, space))) for each in picks)  # type: ignore[misc]
        return shared / sum(seconds(lambda network=network: step(network)) for network in alone)  # type: ignore[misc]

    ratio()
    ratios = [ratio() for _ in range(5)]
    benchmark.pedantic(lambda: step(supernet, one_hot(picks[0], space)), rounds=3)
    print(f"\nsuper-net step / stand-alone step: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def test_architectures_priced_per_second(benchmark: Any) -> None:
    space = proxylessnas()
    header = TableHeader(
        device="formula", cpu="none", machine="none", runtime="none", runtime_version="none", dtype="fp32", threads=1, cores="unknown",
        governor="unknown", layout="NHWC", batch=1, date="unknown", space=space.name,
    )  # fmt: skip
    calibration = Calibration(intercept_ms=0.0, slope=1.0, networks=0)
    table = LatencyTable(header=header, entries={op.key: Entry(ms=op.macs / 1e7) for op in space.ops}, calibration=calibration)
    cost, index_NC = CostModel(space, table), uniform_index(space, 100_000, np.random.default_rng(0))
    benchmark(lambda: cost.latencies_ms(index_NC))
    print(f"\n{len(index_NC) / benchmark.stats.stats.median:,.0f} architectures of {space.name} priced per second")


@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet_b1", "proxylessnas_mobile"])
def test_int8_against_fp32_on_this_cpu(benchmark: Any, tmp_path: Path, name: str) -> None:
    network = Network(published(name), generator=torch.Generator().manual_seed(0)).eval()
    model = write_tflite(network)
    image = np.random.default_rng(0).standard_normal((1, 224, 224, 3), dtype=np.float32)
    (tmp_path / "fp32.tflite").write_bytes(model)
    (tmp_path / "int8.tflite").write_bytes(quantize_int8(model, [image], float_io=True))
    connection = connect(HOST)
    items = [{"id": kind, "path": str(tmp_path / f"{kind}.tflite"), "round": i} for i in range(9) for kind in ("fp32", "int8")]
    plan = {"runtime": "litert", "threads": 1, "cores": list(connection.cores(1)), "items": items}
    rows = benchmark.pedantic(lambda: list(connection.measure(plan, tmp_path)), rounds=1, iterations=1)
    ms = {kind: statistics.median(statistics.median(row["ms"]) for row in rows if row.get("id") == kind) for kind in ("fp32", "int8")}
    print(f"\n{name}: fp32 {ms['fp32']:.2f} ms, int8 {ms['int8']:.2f} ms, int8 / fp32 = {ms['int8'] / ms['fp32']:.2f}")
    assert ms["int8"] < ms["fp32"]
