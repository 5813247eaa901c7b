"""Static int8 forms of float32 TFLite files, made by ai-edge-quantizer.

What to write in a graph so that this works well (ai-edge-quantizer 0.10, LiteRT 2.3):
put activations after a convolution or an addition, where they fuse. A RELU6 on its own
has no int8 form in the quantizer, and XNNPACK leaves int8 RELU, HARD_SWISH and
AVERAGE_POOL_2D to kernels over ten times slower than its float ones.
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
from hwnas.export.tflite_file import graph_ops, holds_data, inlined

Ranges = dict[str, npt.NDArray[np.float32]]
"""``min`` and ``max`` of a tensor, in the form that the quantizer's calibration has."""


def quantize_int8(
    model: bytes, calibration: Sequence[npt.NDArray[np.float32]], *, float_io: bool = False
) -> bytes:
    """The static int8 form of a float32 TFLite file: activations per tensor, weights
    per output channel.

    ``calibration`` holds images as the net will see them, float32 arrays [N, H, W, C];
    they set the activation ranges. Without ``float_io`` the file takes and returns int8
    at the scales it names, so that a block is timed without operators it does not have
    inside a net: they add 2 % to an MBConv block of 32 channels at 56x56, and half as
    much again to a single 1x1 convolution. With it, the file is a drop-in for the float
    one, with one QUANTIZE at the entry and one DEQUANTIZE at the exit, and apps need
    not know the scales.

    Raises ExportError where the arrays do not fit the model, or where an operator has
    no int8 form and would run in float32 amid the others.
    """
    from ai_edge_quantizer import recipe

    key, input_name, shape_NHWC, output_count = _signature(model)
    images = [image[None] for batch in calibration for image in _checked(batch, shape_NHWC)]
    if not images:
        raise ExportError("int8 needs at least one calibration image")
    rules = recipe.static_wi8_ai8()
    if float_io:
        rules += [
            {"regex": ".*", "operation": border, "algorithm_key": "no_quantize", "op_config": {}}
            for border in ("INPUT", "OUTPUT")
        ]
    with _quantizing():
        ranges = _activation_ranges(model, {key: [{input_name: image} for image in images]}, rules)
    return _quantized(model, ranges, rules, output_count if float_io else 0)


def quantize_int8_uncalibrated(model: bytes) -> bytes:
    """The same operators for a file that is only timed: every activation is taken to
    lie between -1 and 1.

    Kernels take as long whatever the scales are, and finding them by running the model
    takes two thirds of ``quantize_int8``. Inputs and outputs are int8. Raises
    ExportError where an operator has no int8 form.
    """
    from ai_edge_quantizer import recipe

    return _quantized(model, _assumed_ranges(model), recipe.static_wi8_ai8(), 0)


def _quantized(model: bytes, ranges: Any, rules: Any, dequantized_outputs: int) -> bytes:
    from ai_edge_quantizer import quantizer

    with _quantizing():
        work = quantizer.Quantizer(model, rules).quantize(ranges, enable_progress_report=False)
    quantized = inlined(bytes(work.quantized_model))
    _require_int8(quantized, dequantized_outputs)
    return quantized


def _assumed_ranges(model: bytes) -> dict[str, Ranges]:
    """[-1, 1] for every tensor that is no constant."""
    return {name: _ranges(-1.0, 1.0, rank) for name, rank in _activations(model).items()}


def _activations(model: bytes) -> dict[str, int]:
    """The tensors that are no constants, and how many dimensions each has."""
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
    """In the quantizer's form: one number, in as many dimensions as the tensor has."""
    return {
        end: np.full((1,) * rank, value, np.float32) for end, value in (("min", low), ("max", high))
    }


def _activation_ranges(
    model: bytes, samples: dict[str, list[dict[str, Any]]], rules: Any
) -> dict[str, Ranges]:
    """The smallest and largest value that each tensor took over all samples.

    Quantizer.calibrate would start from the first sample and move 5 % towards each
    later one, so that a few dozen images leave the ranges at what the first one
    happened to need, and the others clip.

    LiteRT's own counters keep the extremes while the model runs; copying every tensor
    to Python for the same numbers, as the quantizer does by default, takes eight times
    as long.
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
    found = observer.get_model_qsvs()
    return {
        name: _ranges(found[name]["min"], found[name]["max"], rank)
        for name, rank in _activations(model).items()
        if name in found
    }


def _require_int8(model: bytes, dequantized_outputs: int) -> None:
    ops = graph_ops(model)
    in_float = [op.name for op in ops if op.dtype == "FLOAT32"]
    if not ops:
        raise ExportError("The graph has no operators, so there is nothing to quantise")
    if in_float != ["DEQUANTIZE"] * dequantized_outputs:
        culprits = sorted(set(in_float) - {"DEQUANTIZE"}) or ["an input that is also an output"]
        raise ExportError(
            f"No int8 form exists for {', '.join(culprits)}, which would run in float32"
        )


def _signature(model: bytes) -> tuple[str, str, tuple[int, ...], int]:
    """Signature key, name of the only input, its shape, and the number of outputs."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        with hushed_stderr():  # the first interpreter of a process announces XNNPACK there
            interpreter = Interpreter(model_content=model, num_threads=1)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ExportError(
            f"This is not a TFLite file that LiteRT can load: {first_line(error)}"
        ) from error
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
        found, wanted = f"{batch.dtype} {list(batch.shape)}", f"float32 {['N', *shape_NHWC[1:]]}"
        raise ExportError(f"A calibration array is {found}; the model wants {wanted}")
    return batch


@contextlib.contextmanager
def hushed_stderr() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2, which no Python logger or
    redirect sees.
    """
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
    """Turn the quantizer's errors into ours; hide its tqdm bars, and its warning that
    keeping all tensors takes memory.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), hushed_stderr():
            warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors")
            yield
    except Exception as error:  # plain ValueError, RuntimeError and KeyError
        raise ExportError(f"The graph cannot be quantised: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
