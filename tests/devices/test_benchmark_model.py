"""benchmark_model's output, as builds from eight years have printed it, and the flags
that it is given.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.devices import benchmark_model as tool
from hwnas.errors import DeviceError
from hwnas.resources import resource_path

GOLDEN = Path(__file__).parent / "golden"


def lines(name: str) -> list[str]:
    return (GOLDEN / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "delegate", "ms", "runs", "delegated"),
    [
        ("2018-cpu", "none", 66.7676, 15, False),
        ("2020-cpu-profiling", "none", 33.2094, 50, False),
        ("2020-gpu", "gpu", 119.375, 50, True),
        ("2021-tiny", "xnnpack", 0.069678, 14192, "unknown"),
        ("2022-nnapi-logcat", "nnapi", 12.1676, 75, False),
        ("2023-cpu", "xnnpack", 116.066, 50, "unknown"),
        ("2.20-plain-kernels", "none", 1239.807, 50, False),
        ("2.20-xnnpack-partly", "xnnpack", 899.281, 50, False),
        ("2025-phone-xnnpack", "xnnpack", 576.856, 50, True),
        ("2025-phone-gpu", "gpu", 307.968, 50, True),
        ("2025-phone-int4", "xnnpack", 42.419, 24, False),
        ("2025-compiled-model", "xnnpack", 0.942, 1054, "unknown"),
    ],
)
def test_golden(name: str, delegate: str, ms: float, runs: int, delegated: bool | str) -> None:
    """The timed runs, not the warm-up before them: their median if it is printed,
    otherwise their average.
    """
    timing = tool.parse(lines(name), 0, delegate)
    assert timing.ms == pytest.approx(ms, rel=1e-6)
    assert (timing.runs, timing.delegated) == (runs, delegated)


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("2022-xnnpack-refused", 1, "Failed to apply XNNPACK delegate."),
        ("2020-not-executable", 126, "the phone cannot start it: /system/bin/sh: ./benchmark_model: not executable: 64-bit ELF file"),
        (
            "2025-phone-int8-refused", 1,
            "tensorflow/lite/kernels/batch_matmul.cc:353 (lhs_data->type == kTfLiteFloat32 && rhs_data->type == kTfLiteInt8) || "
            "lhs_data->type == rhs_data->type was not true.; Node number 57 (BATCH_MATMUL) failed to prepare.; Failed to allocate tensors!",
        ),
        ("2023-cpu", 139, "killed by signal 11: INFO: Inference timings in us: Init: 530, First inference: 124020, Warmup (avg): 117225"),
    ],
)  # fmt: skip
def test_failures_in_the_tools_own_words(name: str, status: int, why: str) -> None:
    with pytest.raises(tool.BenchmarkError) as caught:
        tool.parse(lines(name), status)
    assert str(caught.value).startswith(why)


def test_a_gpu_that_cannot_compile_the_model() -> None:
    with pytest.raises(
        tool.BenchmarkError, match=r"^Failed to build program executable - Build program failure"
    ):
        tool.parse(lines("2024-gpu-refused"), 1)


@pytest.mark.parametrize(
    "output",
    [
        [],
        ["\x00\xff garbage", "count=7"],
        lines("2023-cpu")[:8],  # only the warm-up
        lines("2023-cpu")[:9],  # the timed runs are announced, but none follow
        [
            "Running benchmark for at least 1",
            "count=1 curr=5",
            "Running benchmark for at least 1",
            "count=0",
        ],
    ],
)
def test_what_does_not_parse(output: list[str]) -> None:
    """Status 0 without a result is an error, never a time."""
    with pytest.raises(tool.BenchmarkError):
        tool.parse(output, 0)


def test_runs_that_all_took_the_same_time() -> None:
    output = [
        "Running benchmark for at least 1",
        "count=2 curr=9(all same)",
        "Running benchmark for at least 5",
    ]
    assert (
        tool.parse([*output, "INFO: count=5 curr=41(all same) p5=41 median=41 p95=41"], 0).ms
        == 0.041
    )
    assert tool.parse([*output, "count=5 curr=41(all same)"], 0) == tool.Timing(0.041, 5, "unknown")
    with pytest.raises(tool.BenchmarkError, match="less than one microsecond"):
        tool.parse([*output, "count=5 curr=0(all same) p5=0 median=0 p95=0"], 0)


def test_times_finer_than_the_tools_clock() -> None:
    """Nine runs of 4 or 5 us and one that was interrupted: the average resolves tenths,
    and leaves out the slowest run.
    """
    times_us = [4, 5, 4, 5, 4, 5, 4, 5, 4, 900]
    phase = "Running benchmark for at least 1"
    statistics = f"count=10 first=4 curr=900 min=4 max=900 avg={sum(times_us) / 10} std=268"
    before = [phase, "count=1 curr=9", phase]
    assert tool.parse([*before, f"{statistics} p5=4 median=5 p95=900"], 0).ms == pytest.approx(
        40 / 9 / 1e3, rel=1e-3
    )
    assert tool.parse([*before, "count=1 max=7 avg=7"], 0).ms == 0.007
    with pytest.raises(tool.BenchmarkError):
        tool.parse([*before, "count=2 max=70 avg=7"], 0)


def test_timing_flags() -> None:
    """The processes divide the plan's minimum time; each does the full warm-up."""
    plan = {"threads": 4, "min_ms": 100.0, "min_runs": 4, "warmup_ms": 30.0}
    assert tool.processes(plan) == 4
    assert tool.timing_flags(plan, "gpu") == [
        "--num_threads=4",
        "--warmup_runs=2",
        "--warmup_min_secs=0.030000",
        "--num_runs=5",
        "--min_secs=0.025000",
        "--use_gpu=true",
    ]
    assert tool.processes({"threads": 1}) == 5
    assert tool.processes({"threads": 1, "min_runs": 7, "max_runs": 3}) == 3


def test_prediction_flags() -> None:
    """They contain no text from a file."""
    flags = tool.prediction_flags(np.array([1, 32, 32, 3]), "xnnpack")
    assert (
        "--input_layer_shape=1,32,32,3" in flags
        and "--input_layer_value_files=image:input" in flags
    )
    assert "--output_filepath=output" in flags and "--use_xnnpack=true" in flags


def elf_header(bits: int, machine: int) -> bytes:
    return b"\x7fELF" + bytes([bits, 1]) + bytes(12) + machine.to_bytes(2, "little")


def test_abi() -> None:
    assert tool.abi(elf_header(2, 183)) == "arm64-v8a"
    assert tool.abi(elf_header(1, 40)) == "armeabi-v7a"
    assert tool.abi(elf_header(2, 62)) == "x86_64"
    assert tool.abi(elf_header(2, 8)) == "machine 8"
    assert tool.abi(b"#!/bin/sh\necho this is a script\n") is None
    assert tool.abi(b"\x7fELF") is None


def runner() -> Any:
    """deploy/runner.py, which quantises for the host."""
    specification = importlib.util.spec_from_file_location(
        "runner", resource_path("deploy") / "runner.py"
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_quantises_like_the_runner() -> None:
    images = np.random.default_rng(0).normal(0, 2, (3, 4, 4, 2)).astype(np.float32)
    entry = {"dtype": np.int8, "quantization": (0.02, -7), "shape": np.array([1, 4, 4, 2])}
    data = tool.to_inputs(images, entry)
    reference = runner()
    assert data == reference.quantise(images, entry).tobytes()
    back = tool.from_outputs(data, [entry])
    assert back.shape == images.shape and back.dtype == np.float32
    assert np.array_equal(back, reference.dequantise(reference.quantise(images, entry), entry))
    float_entry = {"dtype": np.float32, "quantization": (0.0, 0), "shape": np.array([1, 4, 4, 2])}
    assert np.array_equal(
        tool.from_outputs(tool.to_inputs(images, float_entry), [float_entry]), images
    )


def test_several_outputs_become_a_row_per_image() -> None:
    floats = {"dtype": np.float32, "quantization": (0.0, 0), "shape": np.array([1, 2, 2])}
    integers = {"dtype": np.int8, "quantization": (0.5, 1), "shape": np.array([1, 3])}
    images = [
        np.arange(4, dtype="<f4").tobytes() + np.array([1, 3, -1], np.int8).tobytes(),
        np.ones(4, "<f4").tobytes() + b"\1\1\1",
    ]
    rows = tool.from_outputs(b"".join(images), [floats, integers])
    assert rows.dtype == np.float32 and rows.tolist() == [
        [0, 1, 2, 3, 0, 1, -1],
        [1, 1, 1, 1, 0, 0, 0],
    ]
    with pytest.raises(
        tool.BenchmarkError,
        match="37 bytes of outputs, which is not a multiple of the 19 bytes of one",
    ):
        tool.from_outputs(b"".join(images)[:-1], [floats, integers])


def test_pixels_are_passed_on_unchanged() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    assert (
        tool.to_inputs(pixels[:, :, ::-1], {"dtype": np.uint8, "quantization": (1 / 255, 0)})
        == pixels[:, :, ::-1].tobytes()
    )
    with pytest.raises(
        DeviceError,
        match=("this model takes raw uint8 pixels, but these images are float32: do not normalise"),
    ):
        tool.to_inputs(pixels / np.float32(255), {"dtype": np.uint8, "quantization": (1 / 255, 0)})
    with pytest.raises(
        DeviceError,
        match="this model takes float32 images, but these are uint8: normalise them first",
    ):
        tool.to_inputs(pixels, {"dtype": np.float32})
