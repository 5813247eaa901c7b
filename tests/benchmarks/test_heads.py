"""The anchor-free detector beside SSDLite on the same backbone: the latency of both files on
this CPU, by turns.

pytest tests/benchmarks/test_heads.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from hwnas.core.detection import with_detector
from hwnas.core.detector import DetectorSpec
from hwnas.core.fcos import FCOSSpec
from hwnas.core.published import published
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.devices.device import HOST, connect
from hwnas.export.tflite_detector import add_decoding
from hwnas.export.tflite_writer import write_heads
from hwnas.nn.detector import DetectionNetwork

ROUNDS = 25
RATIO = 1.1
"""The largest ratio of the two times, either way: the widths of ``fcos`` below were chosen so
that both detectors are as fast as each other.
"""
CHANNELS = {1: 48, 80: 64}
"""Number of classes -> the width of the anchor-free detector."""


def file_of(spec: DetectorSpec, classes: int, path: Path) -> Path:
    arch = with_detector(published("efficientnet_lite0"), classes, spec, resolution=192)
    network = DetectionNetwork(arch, generator=torch.Generator().manual_seed(0)).eval()
    path.write_bytes(add_decoding(write_heads(network), network))
    return path


@pytest.mark.parametrize("classes", CHANNELS)
def test_both_heads_are_as_fast(benchmark: Any, classes: int, tmp_path: Path) -> None:
    specs = {"ssdlite": SSDLiteSpec(), "fcos": FCOSSpec(channels=CHANNELS[classes])}
    paths = {}
    for name, spec in specs.items():
        paths[name] = file_of(spec, classes, tmp_path / f"{name}.tflite")
    items = []
    for turn in range(ROUNDS):
        for name, path in paths.items():
            items.append({"id": name, "path": str(path), "round": turn})
    connection = connect(HOST)
    plan = {
        "runtime": "litert",
        "threads": 1,
        "cores": list(connection.cores(1)),
        "min_ms": 20,
        "min_runs": 3,
        "items": items,
    }
    rows = benchmark.pedantic(
        lambda: list(connection.measure(plan, tmp_path)), rounds=1, iterations=1
    )
    ratios = []
    for summary in (min, statistics.median):
        times_ms = {}
        for name in specs:
            rounds = [statistics.median(row["ms"]) for row in rows if row.get("id") == name]
            times_ms[name] = summary(rounds)
        ratios.append(times_ms["fcos"] / times_ms["ssdlite"])
        print(f"\n{classes} classes, {summary.__name__} of rounds: {times_ms} ms, {ratios[-1]:.3f}")
    # one lucky or busy round only moves one of the two
    assert any(1 / RATIO < ratio < RATIO for ratio in ratios)
