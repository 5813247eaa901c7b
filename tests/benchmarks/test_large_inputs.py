"""What large inputs cost, each in a process of its own: comparing two tables of 100,000
ops, showing and planning a search of the largest space, and a report on 2 x 50,000 rows
of metrics.

pytest tests/benchmarks/test_large_inputs.py --benchmark-only -s
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.core.spaces import SPACES, load_space
from hwnas.resources import resource_path
from tests.commands import run
from tests.conftest import write_tiny

QUICKSTART = "configs/quickstart.toml"
LARGEST = "mobilenet_v3_like"
OPS = 100_000
COMPARING_SECONDS = 10
SPACE_BYTES = 100e6
PLAN_BYTES = 300e6
ROWS = 50_000
REPORT_BYTES = 400e6


MEASURED = """
import sys, time
from hwnas.cli import main
try:
    main()
except SystemExit as exit_:
    assert not exit_.code
status = open("/proc/self/status").read()
peak_kb = status.partition("VmHWM:")[2].split()[0]
print(time.process_time(), peak_kb, file=sys.stderr)
"""
"""A command that says at the end what it took. The system's ``ru_maxrss`` would count the
memory of the process that started it as well.
"""


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU seconds of a process, and its largest resident size."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s ({self.cpu_seconds:.1f} s of CPU),"
            f" peak of {self.peak_bytes / 1e6:.0f} MB"
        )


def cost_of(arguments: Sequence[str]) -> Cost:
    """Run ``hwnas`` with these arguments. It must succeed."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    begun_at = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    seconds = time.monotonic() - begun_at
    cpu_seconds, peak_kb = done.stderr.split()[-2:]
    return Cost(seconds, float(cpu_seconds), 1024 * int(peak_kb))


def write_table(path: Path, rng: np.random.Generator) -> None:
    """A table of many blocks with made-up latencies."""
    shipped = resource_path("latency_tables/amd-epyc-2core/fbnet-litert-fp32-1t.json")
    widths = range(8, 208, 8)
    blocks = product(
        (7, 14, 28, 56, 112), widths, widths, (3, 4, 6), (3, 5, 7), ("relu", "relu6", "hswish")
    )
    entries: dict[str, dict[str, float]] = {}
    for size, in_ch, out_ch, expansion, kernel, act in blocks:
        if len(entries) == OPS:
            break
        key = f"mbconv-h{size}-i{in_ch}-o{out_ch}-m{expansion * in_ch}-k{kernel}-{act}"
        ms = float(rng.uniform(0.1, 5))
        entries[key] = {
            "ms": ms,
            "p10_ms": 0.9 * ms,
            "p90_ms": 1.1 * ms,
            "rounds": 3,
            "runs": 100,
            "spread": 0.02,
        }
    content = json.loads(shipped.read_text()) | {"entries": entries}
    path.write_text(json.dumps(content))


def test_tables_of_100_000_ops_are_compared_in_seconds(benchmark: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        write_table(path, rng)
    arguments = ["table", "compare", *map(str, paths)]
    cost = benchmark.pedantic(cost_of, args=(arguments,), rounds=1, iterations=1)
    print(f"\ntable compare, {OPS:,} ops: {cost}")
    assert cost.cpu_seconds < COMPARING_SECONDS


def test_a_space_is_shown_without_pytorch(benchmark: Any) -> None:
    arguments = ["space", LARGEST]
    cost = benchmark.pedantic(cost_of, args=(arguments,), rounds=1, iterations=1)
    print(f"\nspace: {cost}")
    assert cost.peak_bytes < SPACE_BYTES


def test_the_largest_space_is_planned_without_pytorch(benchmark: Any, tmp_path: Path) -> None:
    largest = max(SPACES, key=lambda name: load_space(name).architectures)
    assert largest == LARGEST
    overrides = ["-s", f"space.name={largest}", "-s", "data.resolution=224"]
    arguments = ["run", QUICKSTART, *overrides, "--plan", "-q", "--out", str(tmp_path / "run")]
    cost = benchmark.pedantic(cost_of, args=(arguments,), rounds=1, iterations=1)
    print(f"\nrun --plan -q, {largest}: {cost}")
    assert cost.peak_bytes < PLAN_BYTES


def write_rows(path: Path, metrics: Sequence[str], rng: np.random.Generator) -> None:
    with path.open("w") as file:
        for step in range(ROWS):
            row = {"step": step, **{name: float(rng.random()) for name in metrics}}
            file.write(json.dumps(row) + "\n")


def test_a_report_of_many_rows_needs_little_memory(benchmark: Any, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(["run", str(write_tiny(tmp_path)), "--out", str(root), "-q"])
    arguments = ["report", str(root), "--fresh", "-q"]
    before = cost_of(arguments)
    rng = np.random.default_rng(0)
    searched = ("loss", "train_accuracy", "quality", "latency_ms", "reward", "entropy")
    write_rows(root / "search" / "metrics.jsonl", searched, rng)
    write_rows(root / "train" / "metrics.jsonl", ("loss", "train_accuracy"), rng)

    after = benchmark.pedantic(cost_of, args=(arguments,), rounds=1, iterations=1)
    print(f"\nreport of a small run: {before}\n... of 2 x {ROWS:,} rows: {after}")
    assert after.peak_bytes < REPORT_BYTES
