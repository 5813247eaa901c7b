"""Ratios on which the design rests, each measured side by side in one run.

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

from hwnas.core.spaces import proxylessnas, published
from hwnas.devices.device import HOST, connect
from hwnas.export.convert import to_tflite
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_writer import write_op, write_tflite
from hwnas.nn.blocks import build
from hwnas.nn.classifier import ClassificationNetwork


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_writing_a_block_against_converting_it(benchmark: Any) -> None:
    op = proxylessnas().ops[20]
    module = build(op).eval()
    to_tflite(module, (1, op.in_ch, op.size, op.size))  # the converter's import is not counted
    converted = statistics.median(
        seconds(lambda: to_tflite(module, (1, op.in_ch, op.size, op.size))) for _ in range(3)
    )
    benchmark(lambda: write_op(op, module))
    print(
        f"\nconverting {op.key}: {converted * 1e3:.0f} ms; writing it:"
        f" {benchmark.stats.stats.median * 1e3:.2f} ms"
    )


@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet_b1", "proxylessnas_mobile"])
def test_int8_against_fp32_on_this_cpu(benchmark: Any, tmp_path: Path, name: str) -> None:
    network = ClassificationNetwork(
        published(name), generator=torch.Generator().manual_seed(0)
    ).eval()
    model = write_tflite(network)
    image = np.random.default_rng(0).standard_normal((1, 224, 224, 3), dtype=np.float32)
    (tmp_path / "fp32.tflite").write_bytes(model)
    (tmp_path / "int8.tflite").write_bytes(quantize_int8(model, [image], float_io=True))
    connection = connect(HOST)
    items = [
        {"id": kind, "path": str(tmp_path / f"{kind}.tflite"), "round": i}
        for i in range(9)
        for kind in ("fp32", "int8")
    ]
    plan = {"runtime": "litert", "threads": 1, "cores": list(connection.cores(1)), "items": items}
    rows = benchmark.pedantic(
        lambda: list(connection.measure(plan, tmp_path)), rounds=1, iterations=1
    )
    ms = {
        kind: statistics.median(
            statistics.median(row["ms"]) for row in rows if row.get("id") == kind
        )
        for kind in ("fp32", "int8")
    }
    print(
        f"\n{name}: fp32 {ms['fp32']:.2f} ms, int8 {ms['int8']:.2f} ms, int8 / fp32 ="
        f" {ms['int8'] / ms['fp32']:.2f}"
    )
    assert ms["int8"] < ms["fp32"]
