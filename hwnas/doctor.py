"""Checks of an installation, for ``hwnas doctor``."""

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
    "timm": "optimizers",
    "ai-edge-quantizer": "int8 export",
    "ai-edge-litert": "TFLite export, running TFLite files",
    "onnx": "ONNX export",
    "onnxruntime": "running ONNX files",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    good: bool
    text: str


def examine() -> list[Finding]:
    """All findings, the most important first."""
    python = f"{sys.version.split()[0]} (3.11 or later is needed)"
    findings = [Finding("python", sys.version_info >= (3, 11), python)]
    for name, purpose in PACKAGES.items():
        findings.append(_package(name, purpose))
    for name in ("configs", "deploy", "latency_tables"):
        path = resource_path(name)
        findings.append(Finding(f"{name}/", path.is_dir(), str(path)))
    # what follows needs the packages, and would only repeat that they are missing
    complete = all(finding.good for finding in findings)
    if complete:
        findings.append(_torch())
    if complete and findings[-1].good:
        findings += [_runtime("litert"), _runtime("onnxruntime")]
    findings.append(_cores())
    findings.append(
        Finding(
            "clock",
            True,
            f"governor {_governor()} ('performance' measures best; 'unknown' on virtual machines)",
        )
    )
    return findings


def _package(name: str, purpose: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"needed for {purpose}: pip install {name}")


def _torch() -> Finding:
    try:
        import torch
        import torchvision
    # A torchvision built for another torch raises RuntimeError, a missing library OSError.
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
    """Export one block and time it in the runner's own process."""
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
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # on Linux only
        count = len(os.sched_getaffinity(0)) or count
    load, _, _ = os.getloadavg()
    return Finding("cores", True, f"{count} usable, load {load:.1f} (measure on a quiet machine)")


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else "unknown"
