"""Model files that are only timed: blocks and sampled networks with random weights, cached by what they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from hwnas import __version__
from hwnas.core import arch, graph, ir, ops
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.document import content_sha256, file_sha256, write_atomic
from hwnas.errors import ConfigError
from hwnas.export import block_writer, onnx_writer, quantization, tflite_file, tflite_writer
from hwnas.export.quantization import quantize_int8_uncalibrated
from hwnas.nn import blocks, detector, network
from hwnas.nn.network import network_of


def cache_folder() -> Path:
    """``$HWNAS_CACHE``, else ``~/.cache/hwnas``; emptying it costs only time."""
    return Path(os.environ.get("HWNAS_CACHE", "~/.cache/hwnas")).expanduser()


def timing_file(timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None) -> Path:
    """The model file of a chain of ops for a runtime (``litert`` or ``onnxruntime``) and dtype (``fp32`` or ``int8``).

    A network with a detector, or of cells, is no chain, and is given as its architecture. Files are made on first use and kept under
    the ops' keys.
    Inputs and outputs are channels-last for LiteRT, and int8 for int8. ``folder`` (default: ``cache_folder``) is where.
    """
    path = timing_path(timed, runtime, dtype, folder)
    if not path.exists():
        _make(_architecture(timed), runtime, dtype, path)
    return path


def timing_path(timed: Sequence[Op] | Architecture, runtime: str, dtype: str, folder: Path | None = None) -> Path:
    """Where ``timing_file`` keeps a file, which need not be there yet."""
    if (runtime, dtype) not in {("litert", "fp32"), ("litert", "int8"), ("onnxruntime", "fp32")}:
        raise ConfigError(f"device.runtime = {runtime!r} with device.dtype = {dtype!r} is not supported: onnxruntime runs fp32 only.")
    built = _architecture(timed)
    ops = timed.ops() if isinstance(timed, Architecture) else timed
    taps = [f"tap{tap}" for tap in built.detector.taps] if built.detector is not None else []
    parts = [*(op.key for op in ops), *taps, *(step.key for step in built.graph)]
    name = ops[0].key if len(ops) == 1 else "net-" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    suffix = "onnx" if runtime == "onnxruntime" else "tflite"
    return (folder or cache_folder()) / f"{runtime}-{dtype}-{_makers(runtime, dtype)}" / f"{name}.{suffix}"


def _architecture(timed: Sequence[Op] | Architecture) -> Architecture:
    if isinstance(timed, Architecture):
        return timed
    return Architecture(name="timing", in_channels=timed[0].in_ch, blocks=tuple(timed))


@cache
def _makers(runtime: str, dtype: str) -> str:
    """A hash of everything that shapes a timing file beside its ops: our own modules, and the packages that write it."""
    modules = (
        arch,
        graph,
        ir,
        *ops.MODULES,
        blocks,
        detector,
        network,
        block_writer,
        onnx_writer,
        quantization,
        tflite_file,
        tflite_writer,
    )
    packages = {"onnxruntime": ("onnx",), "litert": ("ai-edge-quantizer",) if dtype == "int8" else ()}[runtime]
    sources = [file_sha256(str(module.__file__)) for module in modules]
    return content_sha256([__version__, *sources, *map(version, packages)])[:16]


def _make(built: Architecture, runtime: str, dtype: str, path: Path) -> None:
    made = network_of(built, generator=torch.Generator().manual_seed(0)).eval()
    alone = len(built.ops()) == 1
    if runtime == "onnxruntime":
        model = onnx_writer.write_op(built.blocks[0], made.blocks[0]) if alone else onnx_writer.write_onnx(made)
    else:
        model = tflite_writer.write_op(built.blocks[0], made.blocks[0]) if alone else tflite_writer.write_tflite(made)
    write_atomic(path, quantize_int8_uncalibrated(model) if dtype == "int8" else model)
