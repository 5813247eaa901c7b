"""Whole networks, written by hwnas and converted by litert-torch and torch's exporter:
the latency of each file on this CPU.

pytest tests/benchmarks/test_written_files.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.core.arch import Architecture
from hwnas.core.spaces import darts_imagenet, nasbench201, published
from hwnas.devices.device import HOST, connect
from hwnas.export.convert import to_onnx, to_tflite
from hwnas.export.onnx_writer import write_onnx
from hwnas.export.tflite_writer import write_tflite
from hwnas.nn.network import network_of

ROUNDS = 15
SLOWER = 1.05
"""The largest ratio of a written file's time to a converted one's; they take turns."""


def sampled(space: Any) -> Architecture:
    arch: Architecture = space.decode(space.sample(np.random.default_rng(0)))
    return arch


NETWORKS: dict[str, Callable[[], Architecture]] = {
    "mobilenet_v2": lambda: published("mobilenet_v2"),
    "mobilenet_v3_large": lambda: published("mobilenet_v3_large"),
    "mobilenet_v4_conv_small": lambda: published("mobilenet_v4_conv_small"),
    "efficientnet_v2_b0": lambda: published("efficientnet_v2_b0"),
    "ssdlite320_mobilenet_v3_large": lambda: published(
        "ssdlite320_mobilenet_v3_large", resolution=320, classes=90
    ),
    "nasbench201": lambda: sampled(nasbench201()),
    "darts_imagenet": lambda: sampled(darts_imagenet()),
}


def files(name: str, runtime: str, folder: Path) -> dict[str, Path]:
    network = network_of(NETWORKS[name](), generator=torch.Generator().manual_seed(0)).eval()
    shape = (1, network.arch.in_channels, network.arch.resolution, network.arch.resolution)
    suffix = "tflite" if runtime == "litert" else "onnx"
    paths = {kind: folder / f"{kind}.{suffix}" for kind in ("written", "converted")}
    if runtime == "litert":
        paths["written"].write_bytes(write_tflite(network))
        paths["converted"].write_bytes(to_tflite(network, shape))
    else:
        paths["written"].write_bytes(write_onnx(network))
        outputs = ("logits", "codes") if network.arch.detector else ("logits",)
        to_onnx(network, shape, metadata={}, path=paths["converted"], output_names=outputs)
    return paths


@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
@pytest.mark.parametrize("name", NETWORKS)
def test_written_files_are_as_fast_as_converted_ones(
    benchmark: Any, tmp_path: Path, name: str, runtime: str
) -> None:
    paths = files(name, runtime, tmp_path)
    connection = connect(HOST)
    items = [
        {"id": kind, "path": str(path), "round": i}
        for i in range(ROUNDS)
        for kind, path in paths.items()
    ]
    plan = {"runtime": runtime, "threads": 1, "cores": list(connection.cores(1)), "items": items}
    rows = benchmark.pedantic(
        lambda: list(connection.measure(plan, tmp_path)), rounds=1, iterations=1
    )
    times = {
        kind: [statistics.median(row["ms"]) for row in rows if row.get("id") == kind]
        for kind in paths
    }
    least = {kind: min(values) for kind, values in times.items()}
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = least["written"] / least["converted"], middle["written"] / middle["converted"]
    shown = f"written {least['written']:.2f} ms, converted {least['converted']:.2f} ms"
    print(
        f"\n{name}, {runtime}: {shown}, ratio of the least {ratios[0]:.2f}, of the medians"
        f" {ratios[1]:.2f}"
    )
    assert min(ratios) < SLOWER  # one lucky or busy round only moves one of the two
