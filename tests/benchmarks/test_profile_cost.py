"""What a profile costs: writing the files of ops against converting them one by one,
and whole profiles from nothing.

pytest tests/benchmarks/test_profile_cost.py --benchmark-only -s                 # needs two quiet cores
pytest tests/benchmarks/test_profile_cost.py --benchmark-only -s -k one_by_one   # only the first part, which tolerates a busy machine
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.core.ops import Op
from hwnas.core.spaces import load_space
from hwnas.core.table import LatencyTable
from hwnas.devices.device import HOST, connect
from hwnas.export.convert import to_onnx, to_tflite
from hwnas.export.quantization import quantize_int8
from hwnas.export.timing import timing_file
from hwnas.nn.blocks import build, initialise

OPS = 8
ROUNDS = 11


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def convert(op: Op, runtime: str, dtype: str, path: Path) -> None:
    """Convert an op for its format, with the weights that ``timing_file`` gives it."""
    module, shape = build(op).eval(), (1, op.in_ch, op.size, op.size)
    initialise(module, torch.Generator().manual_seed(0))
    if runtime == "onnxruntime":
        to_onnx(module, shape, metadata={}, path=path)
        return
    model = to_tflite(module, shape)
    if dtype == "int8":
        inputs = np.random.default_rng(0).standard_normal(
            (4, op.size, op.size, op.in_ch), dtype=np.float32
        )
        model = quantize_int8(model, [inputs])
    path.write_bytes(model)


@pytest.mark.parametrize(
    ("runtime", "dtype"), [("litert", "fp32"), ("litert", "int8"), ("onnxruntime", "fp32")]
)
def test_writing_against_converting_one_by_one(
    benchmark: Any, tmp_path: Path, runtime: str, dtype: str, monkeypatch: Any
) -> None:
    """The time to make a file, and the latency of the files, which run in pairs, one
    after the other, in every round.
    """
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    space = [
        op
        for op in load_space("mobilenet_v3_like", resolution=224, classes=1000).ops
        if not op.pooled
    ]
    ops = space[:: len(space) // OPS][:OPS]
    paths = [
        tmp_path / f"{number}.{'onnx' if runtime == 'onnxruntime' else 'tflite'}"
        for number in range(OPS)
    ]
    convert(space[-1], runtime, dtype, paths[-1])  # the imports are not counted
    timing_file((space[-1],), runtime, dtype)
    converting_s = [
        seconds(lambda op=op, path=path: convert(op, runtime, dtype, path))
        for op, path in zip(ops, paths, strict=True)
    ]
    writing_s = [seconds(lambda op=op: timing_file((op,), runtime, dtype)) for op in ops]
    ratio = statistics.median(c / w for c, w in zip(converting_s, writing_s, strict=True))
    print(f"\n{runtime} {dtype}, {OPS} ops of mobilenet_v3_like at 224 px: ", end="")
    print(
        f"written in {statistics.mean(writing_s) * 1e3:.1f} ms each, converted in"
        f" {statistics.mean(converting_s):.2f} s, {ratio:.0f} x"
    )

    files = {("written", op.key): timing_file((op,), runtime, dtype) for op in ops}
    files |= {("converted", op.key): path for op, path in zip(ops, paths, strict=True)}
    makers = ("written", "converted")
    items = [
        {"id": f"{maker} {op.key}", "path": str(files[maker, op.key]), "round": number}
        for number in range(ROUNDS)
        for op in ops
        for maker in (makers if number % 2 else makers[::-1])  # each goes first in turn
    ]
    connection = connect(HOST)
    plan = {"runtime": runtime, "threads": 1, "cores": list(connection.cores(1)), "items": items}
    rows = benchmark.pedantic(
        lambda: list(connection.measure(plan, tmp_path)), rounds=1, iterations=1
    )
    ms: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "id" in row:
            ms[row["id"]].append(statistics.median(row["ms"]))
    ratios = [
        statistics.median(
            w / c for w, c in zip(ms[f"written {op.key}"], ms[f"converted {op.key}"], strict=True)
        )
        for op in ops
    ]
    print(
        f"  latency written / converted: median {statistics.median(ratios):.3f}, from"
        f" {min(ratios):.3f} to {max(ratios):.3f}"
    )
    assert ratio > 20 if dtype == "fp32" else ratio > 5
    assert abs(statistics.median(ratios) - 1) <= 0.02


def descent(pid: int) -> Iterator[int]:
    """The ids of a process and of all its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from descent(int(child))


def resident_bytes(pid: int) -> int:
    """The memory that a process occupies; pages shared with others count in full."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has ended
        return 0


@pytest.mark.parametrize(
    ("space", "limit_s"), [("proxylessnas", 180), ("proxylessnas_enlarged", 900)]
)
def test_a_whole_profile_from_nothing(
    benchmark: Any, tmp_path: Path, space: str, limit_s: float
) -> None:
    """LiteRT fp32 at 224 px, with an empty cache and the default settings: plan, build,
    measure and calibrate.
    """
    settings = {"space.name": space, "data.resolution": "224", "data.classes": "1000"}
    command = [sys.executable, "-m", "hwnas", "profile", "--out", str(tmp_path / "run"), "-q"]
    command += [part for key, value in settings.items() for part in ("-s", f"{key}={value}")]
    environment = os.environ | {"HWNAS_CACHE": str(tmp_path / "cache")}

    def profiled() -> tuple[int, int]:
        """The exit status, and the peak resident memory of all processes together."""
        peak_bytes, process = 0, subprocess.Popen(command, env=environment)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, sum(map(resident_bytes, descent(process.pid))))
            time.sleep(0.2)
        return process.returncode, peak_bytes

    start = time.time()
    status, peak_bytes = benchmark.pedantic(profiled, rounds=1, iterations=1)
    wall_s = time.time() - start
    assert status == 0
    files = sorted(
        (path.stat().st_mtime, path.stat().st_size)
        for path in (tmp_path / "cache").rglob("*.tflite")
    )
    began, built, size_bytes = files[0][0], files[-1][0], sum(size for _, size in files)
    table_path = tmp_path / "run" / "profile" / "table.json"
    table = LatencyTable.load(table_path)
    print(
        f"\n{space}: {len(table.entries)} ops in {wall_s:.0f} s, {peak_bytes / 1e9:.2f} GB"
        f" resident, files of {size_bytes / 1e9:.2f} GB"
    )
    print(
        f"  start and plan {began - start:.1f} s, build {built - began:.1f} s, measure"
        f" {table_path.stat().st_mtime - built:.0f} s"
    )
    noisy = sum(entry.noisy for entry in table.entries.values())
    held_out = table.calibration.held_out if table.calibration else None
    assert held_out is not None
    print(
        f"  {noisy} entries noisy; {held_out.networks} held-out networks: mean error"
        f" {held_out.mape:.1%}, largest {held_out.max_error:.1%}"
    )
    assert wall_s <= limit_s
    assert peak_bytes <= 2e9
