"""The demo, from an empty run folder, with three seeds: is the budget met, is the
promise kept, and how much time and memory does it take?

pytest tests/benchmarks/test_quickstart.py --benchmark-only -s        # eight to fifteen minutes on two cores
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hwnas.document import read_bytes
from hwnas.search.result import SearchResult
from hwnas.verdict import Verdict

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart(benchmark: Any, tmp_path: Path, seed: int) -> None:
    command = [
        sys.executable,
        "-m",
        "hwnas",
        "run",
        str(QUICKSTART),
        "--out",
        str(tmp_path),
        "-q",
        "-s",
        f"seed={seed}",
    ]
    start = time.monotonic()
    done = benchmark.pedantic(subprocess.run, args=(command,), rounds=1, iterations=1)
    seconds, peak_gb = (
        time.monotonic() - start,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    )
    search = SearchResult.load(tmp_path / "search" / "search.json")
    verdict = Verdict.load(tmp_path / "validate" / "verdict.json")
    fp32, int8 = (
        next(file for file in verdict.files if file.dtype == dtype) for dtype in ("fp32", "int8")
    )
    assert (
        fp32.predicted_ms is not None
        and fp32.latency_error is not None
        and verdict.drift is not None
    )
    print(
        f"\nseed {seed}: {seconds:.0f} s, largest process {peak_gb:.2f} GB;"
        f" {'passed' if verdict.passed else 'FAILED'}"
    )
    print(
        f"  target {search.target:.4f} ms; predicted {fp32.predicted_ms:.4f} ms"
        f" ({fp32.predicted_ms / search.target - 1:+.1%})"
    )
    print(
        f"  measured {fp32.measured_ms:.4f} ms ({fp32.measured_ms / fp32.predicted_ms - 1:+.1%} of"
        f" predicted as it is, drift {verdict.drift - 1:+.1%}, {fp32.latency_error:+.1%} at the"
        " profiled speed)"
    )
    print(
        f"  top-1 {verdict.metrics['accuracy']:.2%} in PyTorch, {fp32.metrics['accuracy']:.2%}"
        f" fp32, {int8.metrics['accuracy']:.2%} int8"
    )
    print(f"  int8 / fp32 latency {int8.measured_ms / fp32.measured_ms:.2f}")
    assert done.returncode == 0
    assert abs(fp32.predicted_ms / search.target - 1) <= 0.02
    assert abs(fp32.latency_error) <= 0.05
    assert int8.measured_ms < fp32.measured_ms and int8.loss <= 0.02
    assert b"<html" in read_bytes(tmp_path / "report" / "report.html")
