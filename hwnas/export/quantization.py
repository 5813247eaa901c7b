"""Static int8 versions of float32 TFLite files, made by ai-edge-quantizer.

Graphs that quantise well (ai-edge-quantizer 0.10, LiteRT 2.3) have their activations
directly after a convolution or an addition, where they fuse. The quantizer has no int8
version of a separate RELU6, and XNNPACK leaves int8 RELU, HARD_SWISH and
AVERAGE_POOL_2D to kernels that are over ten times slower than its float ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hwnas.errors import ExportError
from hwnas.export.tflite_file import graph_ops, holds_data, inline_data

Ranges = dict[str, npt.NDArray[np.float32]]
"""``min`` and ``max`` of a tensor, in the format of the quantizer's calibration."""


def quantize_int8(
    model: bytes, calibration: Sequence[npt.NDArray[np.float32]], *, float_io: bool = False
) -> bytes:
    """Quantise a float32 TFLite file to static int8: activations per tensor, weights
    per output channel.

    ``calibration`` are images as the network sees them, float32 arrays [N, H, W, C].
    They determine the ranges of the activations.

    By default, the file takes and returns int8, at scales stored in it. A block is then
    timed without operators that it does not have inside a network: they add 2 % to an
    MBConv block of 32 channels at 56x56, and 50 % to a single 1x1 convolution. With
    ``float_io``, the file is a drop-in replacement for the float one, with a QUANTIZE
    at the input and a DEQUANTIZE at the output, and apps need not know the scales.

    Raises ExportError if the arrays do not fit the model, or if an operator has no int8
    version and would run in float32.
    """
    from ai_edge_quantizer import recipe

    key, input_name, shape_NHWC, output_count = _signature(model)
    images: list[npt.NDArray[np.float32]] = []
    for batch in calibration:
        # one image at a time: the file has batch size 1
        images += [image[None] for image in _checked(batch, shape_NHWC)]
    if not images:
        raise ExportError("int8 needs at least one calibration image")
    rules = recipe.static_wi8_ai8()
    if float_io:
        # a later rule overrides the earlier ones for the operators that it matches
        keep_float = {"regex": ".*", "algorithm_key": "no_quantize", "op_config": {}}
        rules += [{**keep_float, "operation": border} for border in ("INPUT", "OUTPUT")]
    samples = {key: [{input_name: image} for image in images]}
    with _quantizing():
        ranges = _activation_ranges(model, samples, rules)
    dequantized_outputs = output_count if float_io else 0
    return _quantized(model, ranges, rules, dequantized_outputs)


def quantize_int8_uncalibrated(model: bytes) -> bytes:
    """Quantise a file that is only timed: all activations are assumed to lie between -1
    and 1.

    The time of the kernels does not depend on the scales, and running the model to find
    them takes two thirds of the time of ``quantize_int8``. Inputs and outputs are int8.
    Raises ExportError if an operator has no int8 version.
    """
    from ai_edge_quantizer import recipe

    return _quantized(model, _assumed_ranges(model), recipe.static_wi8_ai8(), 0)


def _quantized(model: bytes, ranges: Any, rules: Any, dequantized_outputs: int) -> bytes:
    from ai_edge_quantizer import quantizer

    with _quantizing():
        work = quantizer.Quantizer(model, rules).quantize(ranges, enable_progress_report=False)
    # the quantizer puts data after the flatbuffer, which schema-based tools do not find
    quantized = inline_data(bytes(work.quantized_model))
    _require_int8(quantized, dequantized_outputs)
    return quantized


def _assumed_ranges(model: bytes) -> dict[str, Ranges]:
    """[-1, 1] for every tensor that is not a constant."""
    return {name: _ranges(-1.0, 1.0, rank) for name, rank in _activations(model).items()}


def _activations(model: bytes) -> dict[str, int]:
    """The tensors that are not constants: name -> number of dimensions."""
    from ai_edge_litert import schema_py_generated as schema

    parsed = schema.Model.GetRootAs(model)
    graph = parsed.Subgraphs(0)
    tensors = map(graph.Tensors, range(graph.TensorsLength()))
    return {
        tensor.Name().decode(): tensor.ShapeLength()
        for tensor in tensors
        if not holds_data(parsed, tensor)
    }


def _ranges(low: npt.ArrayLike, high: npt.ArrayLike, rank: int) -> Ranges:
    """A range in the quantizer's format: arrays with one value, and as many dimensions
    as the tensor.
    """
    shape = (1,) * rank
    return {"min": np.full(shape, low, np.float32), "max": np.full(shape, high, np.float32)}


def _activation_ranges(
    model: bytes, samples: dict[str, list[dict[str, Any]]], rules: Any
) -> dict[str, Ranges]:
    """The smallest and the largest value of each tensor over all samples.

    Quantizer.calibrate would start with the range of the first sample and move it by 5
    % towards each later one. After a few dozen images, the range would still be that of
    the first, and the others would be clipped.

    LiteRT's own counters record the extremes while the model runs. Copying every tensor
    to Python instead, as the quantizer does by default, takes eight times as long.
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(rules)
    mode = calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED
    observer = calibrator.Calibrator(
        model, num_threads=1, mode=mode, qsv_update_func=qsv_utils.min_max_update
    )
    observer.calibrate(samples, manager)
    observed = observer.get_model_qsvs()
    return {
        name: _ranges(observed[name]["min"], observed[name]["max"], rank)
        for name, rank in _activations(model).items()
        if name in observed
    }


def _require_int8(model: bytes, dequantized_outputs: int) -> None:
    """Raise ExportError if an operator other than the final DEQUANTIZE runs
    in float32.
    """
    ops = graph_ops(model)
    in_float = [op.name for op in ops if op.dtype == "FLOAT32"]
    if not ops:
        raise ExportError("The graph has no operators, so there is nothing to quantise")
    if in_float != ["DEQUANTIZE"] * dequantized_outputs:
        culprits = sorted(set(in_float) - {"DEQUANTIZE"}) or ["an input that is also an output"]
        raise ExportError(
            f"The quantizer has no int8 version of {', '.join(culprits)}, which would run in"
            " float32"
        )


def _signature(model: bytes) -> tuple[str, str, tuple[int, ...], int]:
    """The key of the signature, the name of its only input, the input's shape, and the
    number of outputs. Raises ExportError.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        with hushed_stderr():  # the first interpreter of a process prints a line about XNNPACK
            interpreter = Interpreter(model_content=model, num_threads=1)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"LiteRT cannot load this TFLite file: {first_line(error)}") from error
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        raise ExportError(
            f"The file has {len(signatures)} signatures; the quantizer needs exactly one"
        )
    [(key, tensors)] = signatures.items()
    shape = tuple(int(size) for size in interpreter.get_input_details()[0]["shape"])
    return key, tensors["inputs"][0], shape, len(tensors["outputs"])


def _checked(
    batch: npt.NDArray[np.float32], shape_NHWC: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    if batch.dtype != np.float32 or batch.shape[1:] != shape_NHWC[1:]:
        actual = f"{batch.dtype} {list(batch.shape)}"
        expected = f"float32 {['N', *shape_NHWC[1:]]}"
        raise ExportError(f"A calibration array is {actual}, but the model takes {expected}")
    return batch


@contextlib.contextmanager
def hushed_stderr() -> Iterator[None]:
    """Discard what native code writes to file descriptor 2. Loggers and redirects in
    Python do not see it.
    """
    # flushed before and after, so that Python's own messages are neither lost nor moved
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _quantizing() -> Iterator[None]:
    """Convert the quantizer's exceptions to ExportError. Hide its progress bars, and
    its warning that keeping all tensors takes memory.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), hushed_stderr():
            warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors")
            yield
    except Exception as error:  # it raises ValueError, RuntimeError and KeyError
        raise ExportError(f"The graph cannot be quantised: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The type of an exception, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
