"""LiteRT's ``benchmark_model``: its command line, and what its output means. Nothing
here runs anything.

The tool (tflite/tools/benchmark in google-ai-edge/LiteRT, before that
tensorflow/lite/tools/benchmark) runs one model in one process and prints statistics,
never single times: count, min, max and average from the beginning, and in newer builds
the median. So an item's times here are one value for each of several processes: **the
median of a process's runs, or their average where an old build prints no median**. What
differs between processes (where memory lies, how weights are packed) is then in the
values' spread, as what differs between single runs is in the runner's. The tool's clock
counts whole microseconds; where those are more than 1 %, below ``FINE_US``, the average
of all runs but the slowest tells more than their median, and stands instead of it.

Each process warms up for ``WARMUP_MS``, ten times the runner's: a phone's clock is down
when a process starts.

Flags and output were read in benchmark_model.cc (``Run``, ``OnBenchmarkEnd``),
benchmark_tflite_model.cc (``Init`` for the sentences about delegates,
``LoadInputTensorData``, ``OutputSaver``) and stats_calculator.h (``OutputToStream``);
tests/devices/golden holds outputs of builds from 2018 to 2025.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwnas.errors import DeviceError

DELEGATES = {
    # said explicitly, or the tool does not say how much of the graph it took
    "xnnpack": ("--use_xnnpack=true",),
    "gpu": ("--use_gpu=true",),
    "nnapi": ("--use_nnapi=true",),
    "none": ("--use_xnnpack=false",),
}
"""What the model runs on, and the flags for it. ``none`` is TFLite's own kernels."""

WARMUP_MS = 50.0
WARMUP_RUNS = 2
RUNS = 5
"""The fewest runs of a process, so that one interruption does not make its median."""
FINE_US = 100.0
DEFAULTS = {"warmup_ms": WARMUP_MS, "min_ms": 20.0, "min_runs": 5, "max_runs": 200}
"""Of a plan, as deploy/runner.py has them but for the warm-up."""

ABIS = {
    (2, 183): "arm64-v8a",
    (1, 40): "armeabi-v7a",
    (2, 62): "x86_64",
    (1, 3): "x86",
    (2, 243): "riscv64",
}
"""ELF class and machine -> Android's name of it."""


class BenchmarkError(ValueError):
    """A process of benchmark_model that gave no time; the message says why, in its own
    words where it has any.
    """


@dataclass(frozen=True)
class Timing:
    """What one process measured."""

    ms: float
    runs: int
    delegated: bool | str


def processes(plan: dict[str, Any]) -> int:
    """How many processes give an item's times: the plan's ``min_runs``."""
    both = {**DEFAULTS, **plan}
    return int(min(both["min_runs"], both["max_runs"]))


def timing_flags(plan: dict[str, Any], delegate: str) -> list[str]:
    """The flags that are the same for all items of a plan. Its ``min_ms`` are shared
    out among an item's processes.
    """
    both = {**DEFAULTS, **plan}
    return [
        f"--num_threads={int(plan['threads'])}",
        f"--warmup_runs={WARMUP_RUNS}",
        f"--warmup_min_secs={both['warmup_ms'] / 1e3:.6f}",
        f"--num_runs={RUNS}",
        f"--min_secs={both['min_ms'] / 1e3 / processes(plan):.6f}",
        *DELEGATES[delegate],
    ]


def prediction_flags(shape: Sequence[int], delegate: str) -> list[str]:
    """The flags of one inference whose input is the file ``input`` and whose output
    goes into ``output``.

    The input's name need not be the model's (README.md of the tool, "Model input
    parameters"), so no name of a file's gets into a command.
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
    """The time that a process printed. Raises BenchmarkError where it failed, or
    printed something else.
    """
    if status != 0:
        raise BenchmarkError(complaint(lines, status))
    phases = [
        number for number, line in enumerate(lines) if "Running benchmark for at least" in line
    ]
    measured = (
        [line for line in lines[phases[-1] :] if re.search(r"\bcount=\d", line)]
        if len(phases) >= 2
        else []
    )
    told = {
        name: float(value)
        for name, value in re.findall(r"(\w+)=(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", "".join(measured[:1]))
    }
    us = next((told[name] for name in ("median", "avg", "curr") if name in told), None)
    if us is None:
        raise BenchmarkError(
            f"its output holds no statistics that hwnas knows; it ends in {_last(lines)!r}"
        )
    if us < FINE_US and told["count"] > 1 and {"avg", "max"} <= told.keys():
        us = (told["avg"] * told["count"] - told["max"]) / (told["count"] - 1)
    if us <= 0:
        raise BenchmarkError(
            "a run took less than the microsecond that the tool's clock counts:"
            f" {measured[0].strip()!r}"
        )
    return Timing(round(us / 1e3, 6), int(told["count"]), _delegated(lines, delegate))


def _delegated(lines: Sequence[str], delegate: str) -> bool | str:
    """Whether a delegate took the whole graph, as the tool says it: true, false, or "unknown"."""
    if delegate == "none":
        return False
    text = "\n".join(lines)
    said = re.findall(
        r"model graph will (be completely|be partially|not be) executed by the delegate", text
    )
    if said:
        return "be completely" in said
    # What TFLite itself says, of the delegates that it applies by default too.
    parts = re.findall(
        r"Replacing (\d+) out of (\d+) node\(s\) with delegate .*?yielding (\d+) partition", text
    )
    return (
        any(taken == nodes and pieces == "1" for taken, nodes, pieces in parts)
        if parts
        else "unknown"
    )


def complaint(lines: Sequence[str], status: int) -> str:
    """Why a process failed, in one sentence out of its output."""
    said = [
        re.sub(r"^(?:\S+ \S+ +\d+ +\d+ [EFIW] \S+ *: |ERROR: |error: )", "", line.strip())
        for line in lines
        if _is_complaint(line)
    ]
    why = "; ".join(dict.fromkeys(said))[:300] or _last(lines)
    if status > 128:
        return f"it died of signal {status - 128}: {why}"
    if status in (126, 127):
        return f"the phone cannot start it: {why}"
    return why


def _is_complaint(line: str) -> bool:
    wrong = (
        r"\bERROR\b|\berror\b|^\S+ \S+ +\d+ +\d+ [EF] |Failed|failed|not executable|not"
        r" found|[Pp]ermission|No such file|CANNOT LINK|denied"
    )
    return re.search(wrong, line) is not None and "Benchmarking failed" not in line


def _last(lines: Sequence[str]) -> str:
    kept = [line.strip() for line in lines if line.strip()]
    return kept[-1][:120] if kept else "nothing"


def abi(head: bytes) -> str | None:
    """Android's name for what the program that begins with these 20 bytes runs on; None
    where it is no program for Linux or Android.
    """
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[5] != 1:
        return None
    machine = int.from_bytes(head[18:20], "little")
    return ABIS.get((head[4], machine), f"machine {machine}")


def to_inputs(images_NHWC: np.ndarray, tensor: dict[str, Any]) -> bytes:
    """The bytes of N input tensors (TFLite's details of one) for images: float32,
    quantised where the tensor is int8, or pixels.

    Raises DeviceError where either images or the tensor are uint8, and not both.
    """
    dtype = np.dtype(tensor["dtype"])
    if dtype == np.uint8 and images_NHWC.dtype != np.uint8:
        raise DeviceError(
            f"this model takes uint8 images, pixels as they are, and these are {images_NHWC.dtype}:"
            " do not normalise them."
        )
    if images_NHWC.dtype == np.uint8:
        if dtype != np.uint8:
            raise DeviceError(
                f"the model takes {dtype} images, and these are uint8: normalise them first."
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
    """The bytes of the output tensors (TFLite's details of each) of one image, as the
    tool writes them one after another.
    """
    return sum(
        np.dtype(tensor["dtype"]).itemsize * int(np.prod(tensor["shape"])) for tensor in tensors
    )


def from_outputs(data: bytes, tensors: Sequence[dict[str, Any]]) -> np.ndarray:
    """Float32 [N, ...] of the bytes of N images' output tensors (TFLite's details of
    each), all of batch 1.

    Several tensors become one row per image, flattened one after another. Raises
    BenchmarkError where the bytes are not those of whole images.
    """
    size = output_bytes(tensors)
    if len(data) % size:
        raise BenchmarkError(
            f"{len(data)} bytes of outputs are no multiple of the {size} of one image"
        )
    rows, start, parts = np.frombuffer(data, np.uint8).reshape(-1, size), 0, []
    for tensor in tensors:
        end = start + output_bytes([tensor])
        values = (
            np.ascontiguousarray(rows[:, start:end])
            .view(tensor["dtype"])
            .reshape(-1, *tensor["shape"][1:])
        )
        if np.dtype(tensor["dtype"]).kind != "f":
            scale, zero_point = tensor["quantization"]
            values = (values.astype(np.float32) - zero_point) * scale
        parts.append(values.astype(np.float32))
        start = end
    return (
        parts[0]
        if len(parts) == 1
        else np.concatenate([part.reshape(len(rows), -1) for part in parts], axis=1)
    )
