"""Is this installation fit to work? What ``hwnas doctor`` looks at."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from hwnas.errors import HwnasError
from hwnas.resources import resource_path

PACKAGES = {
    "torch": "search and training",
    "torchvision": "image folders",
    "timm": "optimisers",
    "ai-edge-quantizer": "int8 export",
    "ai-edge-litert": "TFLite export, running TFLite files",
    "onnx": "ONNX export",
    "onnxruntime": "running ONNX files",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    good: bool
    text: str


def examine() -> list[Finding]:
    """All findings, in the order of their importance."""
    found = [
        Finding(
            "python",
            sys.version_info >= (3, 11),
            f"{sys.version.split()[0]} (3.11 or later is needed)",
        )
    ]
    found += [_package(name, purpose) for name, purpose in PACKAGES.items()]
    found += [
        Finding(f"{name}/", resource_path(name).is_dir(), str(resource_path(name)))
        for name in ("configs", "deploy", "latency_tables")
    ]
    if all(finding.good for finding in found):
        found.append(_torch())
    if found[-1].good:
        found += [_runtime("litert"), _runtime("onnxruntime")]
    found.append(_cores())
    found.append(
        Finding(
            "clock",
            True,
            f"governor {_governor()} ('performance' measures best; 'unknown' on virtual machines)",
        )
    )
    return found


def _package(name: str, purpose: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"needed for {purpose}: pip install {name}")


def _torch() -> Finding:
    try:
        import torch
        import torchvision
    # a torchvision of another build fails with RuntimeError, a missing library with OSError
    except Exception as error:
        return Finding(
            "torch works",
            False,
            f"torch and torchvision do not import together ({error}): install matching versions",
        )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return Finding(
        "torch works",
        True,
        f"torchvision {torchvision.__version__}, {torch.get_num_threads()} threads, {gpu}",
    )


def _runtime(runtime: Literal["litert", "onnxruntime"]) -> Finding:
    """Write one block, and time it in the runner's own process."""
    from hwnas.config import DeviceConfig
    from hwnas.core.ops import Op
    from hwnas.devices.session import Item, Schedule, Session
    from hwnas.export.timing import bench_of
    from hwnas.progress import Progress

    op = Op.parse("mbconv-h8-i8-o8-m24-k3-relu-id")
    try:
        with TemporaryDirectory() as folder:
            bench = bench_of(DeviceConfig(runtime=runtime), Path(folder), Progress())
            session = Session(
                bench,
                [Item(op.key, runtime, bench.build((op,), runtime, "fp32"), (op,))],
                Schedule(),
            )
            session.run("timing one block")
    except HwnasError as error:
        return Finding(f"{runtime} runs", False, str(error))
    [runs_ms] = session.rounds(op.key)
    return Finding(f"{runtime} runs", True, f"one block in {min(runs_ms):.4f} ms")


def _cores() -> Finding:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return Finding(
        "cores",
        True,
        f"{len(cores) or os.cpu_count()} usable, load {os.getloadavg()[0]:.1f} (measure on a quiet"
        " machine)",
    )


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else "unknown"
