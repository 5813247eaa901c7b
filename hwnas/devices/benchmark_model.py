"""LiteRT's ``benchmark_model``: its command line, and how to read its output. Nothing
here runs the tool.

The tool (tflite/tools/benchmark in google-ai-edge/LiteRT, formerly
tensorflow/lite/tools/benchmark) runs one model in one process. It prints statistics
instead of single times: count, min, max and average in all builds, and the median in
newer ones. An item is therefore timed in several processes, and its times are one value
per process: **the median of the process's runs, or their average if an old build prints
no median**. The spread of the values then includes whatever differs between processes,
such as memory layout and the packing of weights.

The tool's clock counts whole microseconds. Below ``FINE_US``, where one microsecond is
more than 1 %, the average of all runs but the slowest is more precise than the median
and replaces it.

Each process warms up for ``WARMUP_MS``, ten times as long as the runner does, because a
phone's clock rate is low when a process starts.

Flags and output were taken from benchmark_model.cc (``Run``, ``OnBenchmarkEnd``),
benchmark_tflite_model.cc (``Init`` for the sentences about delegates,
``LoadInputTensorData``, ``OutputSaver``) and stats_calculator.h (``OutputToStream``).
tests/devices/golden holds outputs of builds from 2018 to 2025.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwnas.devices.messages import excerpt
from hwnas.errors import DeviceError

DELEGATES = {
    # The default, but only with the flag does the tool print how much of the graph the
    # delegate took.
    "xnnpack": ("--use_xnnpack=true",),
    "gpu": ("--use_gpu=true",),
    "nnapi": ("--use_nnapi=true",),
    "none": ("--use_xnnpack=false",),
}
"""Name of a delegate -> the flags that select it. ``none`` is TFLite's own kernels."""

WARMUP_MS = 50.0
WARMUP_RUNS = 2
RUNS = 5
"""Minimum number of runs per process, so that one interruption does not move its median."""
FINE_US = 100.0
"""Times below this need more precision than the clock's whole microseconds."""
DEFAULTS = {"warmup_ms": WARMUP_MS, "min_ms": 20.0, "min_runs": 5, "max_runs": 200}
"""Defaults of a plan. The same as in deploy/runner.py except for the warm-up."""

ABIS = {
    (2, 183): "arm64-v8a",
    (1, 40): "armeabi-v7a",
    (2, 62): "x86_64",
    (1, 3): "x86",
    (2, 243): "riscv64",
}
"""(ELF class, ELF machine) -> Android's name for the instruction set."""


class BenchmarkError(ValueError):
    """A process of benchmark_model that gave no usable time. The message says why,
    quoting the tool if possible.
    """


@dataclass(frozen=True)
class Timing:
    """What one process measured. ``delegated``: whether a delegate ran the whole graph, or
    ``"unknown"``.
    """

    ms: float
    runs: int
    delegated: bool | str


def processes(plan: dict[str, Any]) -> int:
    """How many processes time an item: the plan's ``min_runs``."""
    filled = {**DEFAULTS, **plan}
    return int(min(filled["min_runs"], filled["max_runs"]))


def timing_flags(plan: dict[str, Any], delegate: str) -> list[str]:
    """The flags that all items of a plan share. The processes of an item divide the
    plan's ``min_ms`` among themselves.
    """
    filled = {**DEFAULTS, **plan}
    return [
        f"--num_threads={int(plan['threads'])}",
        f"--warmup_runs={WARMUP_RUNS}",
        f"--warmup_min_secs={filled['warmup_ms'] / 1e3:.6f}",
        f"--num_runs={RUNS}",
        f"--min_secs={filled['min_ms'] / 1e3 / processes(plan):.6f}",
        *DELEGATES[delegate],
    ]


def prediction_flags(shape: Sequence[int], delegate: str) -> list[str]:
    """The flags for one inference that reads its input from the file ``input`` and
    writes its output to the file ``output``.

    The name given to the input need not be the model's (README.md of the tool, "Model
    input parameters"). A constant keeps names out of model files out of the command.
    """
    return [
        "--num_threads=1",
        "--warmup_runs=0",
        "--warmup_min_secs=0",
        "--num_runs=1",
        "--min_secs=0",
        "--input_layer=image",
        f"--input_layer_shape={','.join(str(int(size)) for size in shape)}",
        "--input_layer_value_files=image:input",
        "--output_filepath=output",
        *DELEGATES[delegate],
    ]


def parse(lines: Sequence[str], status: int, delegate: str = "xnnpack") -> Timing:
    """Parse the output of a process. Raises BenchmarkError if the process failed or the
    output has an unknown format.
    """
    if status != 0:
        raise BenchmarkError(complaint(lines, status))
    line = _statistics_line(lines)
    statistics = {
        name: float(value)
        for name, value in re.findall(r"(\w+)=(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", line)
    }
    us = next((statistics[name] for name in ("median", "avg", "curr") if name in statistics), None)
    if us is None:
        raise BenchmarkError(
            "its output has no statistics in a format that hwnas knows; the last line is"
            f" {_last(lines)!r}"
        )

    runs = statistics["count"]
    if us < FINE_US and runs > 1 and {"avg", "max"} <= statistics.keys():
        us = (statistics["avg"] * runs - statistics["max"]) / (runs - 1)
    if us <= 0:
        raise BenchmarkError(
            "a run took less than one microsecond, the resolution of the tool's clock:"
            f" {line.strip()!r}"
        )
    return Timing(round(us / 1e3, 6), int(runs), _delegated(lines, delegate))


def _statistics_line(lines: Sequence[str]) -> str:
    """The statistics of the timed runs; empty if there are none."""
    phases = [
        number for number, line in enumerate(lines) if "Running benchmark for at least" in line
    ]
    # The first phase is the warm-up.
    if len(phases) < 2:
        return ""
    timed = [line for line in lines[phases[-1] :] if re.search(r"\bcount=\d", line)]
    return timed[0] if timed else ""


def _delegated(lines: Sequence[str], delegate: str) -> bool | str:
    """Whether a delegate runs the whole graph: true, false, or "unknown"."""
    if delegate == "none":
        return False
    text = "\n".join(lines)
    shares = re.findall(
        r"model graph will (be completely|be partially|not be) executed by the delegate", text
    )
    if shares:
        return "be completely" in shares

    # TFLite's own log, which also covers the delegates that it applies by default.
    replacements = re.findall(
        r"Replacing (\d+) out of (\d+) node\(s\) with delegate .*?yielding (\d+) partition", text
    )
    if not replacements:
        return "unknown"
    return any(
        replaced == nodes and partitions == "1" for replaced, nodes, partitions in replacements
    )


def complaint(lines: Sequence[str], status: int) -> str:
    """Why a process failed, in one sentence made from its output."""
    # without the prefixes of Android's log and of the tool
    complaints = [
        re.sub(r"^(?:\S+ \S+ +\d+ +\d+ [EFIW] \S+ *: |ERROR: |error: )", "", line.strip())
        for line in lines
        if _is_complaint(line)
    ]
    reason = excerpt("; ".join(dict.fromkeys(complaints))) or _last(lines)
    # A shell reports death by a signal as 128 + its number, and a program that cannot be
    # started as 126 or 127.
    if status > 128:
        return f"killed by signal {status - 128}: {reason}"
    if status in (126, 127):
        return f"the phone cannot start it: {reason}"
    return reason


def _is_complaint(line: str) -> bool:
    signs = (
        r"\bERROR\b|\berror\b|^\S+ \S+ +\d+ +\d+ [EF] |Failed|failed|not executable|not"
        r" found|[Pp]ermission|No such file|CANNOT LINK|denied"
    )
    return re.search(signs, line) is not None and "Benchmarking failed" not in line


def _last(lines: Sequence[str]) -> str:
    kept = [line.strip() for line in lines if line.strip()]
    return excerpt(kept[-1]) if kept else "nothing"


def abi(head: bytes) -> str | None:
    """The instruction set, by Android's name, of the program that begins with these 20
    bytes. None if it is not a program for Linux or Android.
    """
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[5] != 1:
        return None
    machine = int.from_bytes(head[18:20], "little")
    return ABIS.get((head[4], machine), f"machine {machine}")


def to_inputs(images_NHWC: np.ndarray, tensor: dict[str, Any]) -> bytes:
    """The bytes of N input tensors for N images. ``tensor`` is TFLite's details of the
    model's input.

    Float32 images are quantised for int8 tensors. Uint8 images are raw pixels and go
    unchanged to uint8 tensors. Raises DeviceError if only one of the two is uint8.
    """
    dtype = np.dtype(tensor["dtype"])
    if dtype == np.uint8 and images_NHWC.dtype != np.uint8:
        raise DeviceError(
            f"this model takes raw uint8 pixels, but these images are {images_NHWC.dtype}: do not"
            " normalise them."
        )
    if images_NHWC.dtype == np.uint8:
        if dtype != np.uint8:
            raise DeviceError(
                f"this model takes {dtype} images, but these are uint8: normalise them first."
            )
        return np.ascontiguousarray(images_NHWC).tobytes()
    if dtype.kind == "f":
        return images_NHWC.astype(dtype).tobytes()
    scale, zero_point = tensor["quantization"]
    limits = np.iinfo(dtype)
    quantised: np.ndarray = np.clip(
        np.round(images_NHWC / scale) + zero_point, limits.min, limits.max
    ).astype(dtype)
    return quantised.tobytes()


def output_bytes(tensors: Sequence[dict[str, Any]]) -> int:
    """The number of bytes that the tool writes for one image: the sizes of all output
    tensors (TFLite's details of each).
    """
    return sum(
        np.dtype(tensor["dtype"]).itemsize * int(np.prod(tensor["shape"])) for tensor in tensors
    )


def from_outputs(data: bytes, tensors: Sequence[dict[str, Any]]) -> np.ndarray:
    """Decode the output bytes of N images into float32 [N, ...]. ``tensors`` are TFLite's
    details of the outputs, all with batch size 1.

    If there are several tensors, each row holds all of them, flattened and concatenated.
    Raises BenchmarkError if the last image is incomplete.
    """
    size = output_bytes(tensors)
    if len(data) % size:
        raise BenchmarkError(
            f"got {len(data)} bytes of outputs, which is not a multiple of the {size} bytes of one"
            " image"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    start = 0
    parts: list[np.ndarray] = []
    for tensor in tensors:
        end = start + output_bytes([tensor])
        # view() needs contiguous memory, which a slice of columns is not
        column = np.ascontiguousarray(rows[:, start:end])
        values = column.view(tensor["dtype"]).reshape(-1, *tensor["shape"][1:])
        if np.dtype(tensor["dtype"]).kind != "f":
            scale, zero_point = tensor["quantization"]
            values = (values.astype(np.float32) - zero_point) * scale
        parts.append(values.astype(np.float32))
        start = end
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(len(rows), -1) for part in parts], axis=1)
