"""Conversion of any PyTorch module to TFLite and ONNX, with external converters: for
your own modules, and as the reference that our writers are tested against.

hwnas networks do not need them: ``tflite_writer`` and ``onnx_writer`` write those.
Install the converters with the extra ``convert``.

TFLite (litert-torch): graphs are channels-last inside and out. Batch norms are folded
into the preceding convolutions, and ReLU and ReLU6 are fused into them. A padded
stride-1 convolution becomes SAME. A padded stride-2 convolution becomes PAD and VALID,
because TFLite's SAME pads an even image on the other side than PyTorch does. The same
module gives the same bytes. To get such a graph from your own module:

- pool globally with ``adaptive_avg_pool2d(x, 1)`` and ``flatten(1)``, which become one
  MEAN. ``x.mean([2, 3])`` adds a TRANSPOSE;
- shuffle channels with reshapes. Indexing becomes a GATHER_ND, which XNNPACK does not
  support. ``ChannelShuffle`` is converted in its channels-last form: RESHAPE, TRANSPOSE
  and RESHAPE. The other form would add two more TRANSPOSE.

ONNX: PyTorch's supported exporter (``dynamo=True``). It takes 2.5 s for MobileNetV2;
the deprecated TorchScript exporter takes 0.8 s. It folds batch norms into the
convolutions itself.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from hwnas.document import write_atomic
from hwnas.errors import ExportError
from hwnas.export.names import IMAGE, LOGITS
from hwnas.export.onnx_writer import IR_VERSION, OPSET
from hwnas.export.quantization import first_line, hushed_stderr
from hwnas.export.tflite_file import inline_data
from hwnas.nn.blocks import ChannelShuffle


def to_tflite(module: nn.Module, input_shape: tuple[int, int, int, int]) -> bytes:
    """Convert ``module`` in eval mode to a float32 TFLite file.

    ``input_shape`` is NCHW with batch size 1, and the file takes [1, H, W, C].
    Four-dimensional outputs are channels-last as well; others (logits [1, classes]) are
    unchanged. A copy of the module on the CPU is converted, so the module itself stays
    unchanged. Takes 1 to 2 s for a block and 10 s for MobileNetV2, after 5 s for the
    first import of the converter.

    Raises ExportError if the converter refuses the module, or if the module does not
    run on this shape.

    >>> model = to_tflite(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 32, 32))
    >>> [op.name for op in graph_ops(model)]
    ['CONV_2D']
    """
    if len(input_shape) != 4 or input_shape[0] != 1:
        raise ExportError(f"The input shape is {input_shape}, but must be NCHW with batch size 1")
    name = type(module).__name__
    eager = copy.deepcopy(module).cpu().eval()
    for part in eager.modules():
        if isinstance(part, ChannelShuffle):
            part.channels_last = True
    litert_torch = _litert_torch()
    try:
        outputs = _image_outputs(eager, input_shape)
        channels_last = litert_torch.to_channel_last_io(eager, args=[0], outputs=outputs)
        n, c, h, w = input_shape
        edge_model = litert_torch.convert(channels_last.eval(), (torch.zeros(n, h, w, c),))
        model = edge_model.model_content()
    # Tracing, lowering and the converter each have their own exceptions.
    except Exception as error:
        raise ExportError(
            f"LiteRT cannot convert {name} at {input_shape}: {first_line(error)}"
        ) from error
    return inline_data(bytes(model))


def to_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    metadata: Mapping[str, str],
    path: str | Path,
    output_names: Sequence[str] = (LOGITS,),
) -> None:
    """Write ``module`` in eval mode as one ONNX file (see ``onnx_file``). An existing
    file is replaced atomically.

    >>> to_onnx(  # doctest: +SKIP
    ...     net, (1, 3, 224, 224), metadata={"recipe": "mobile"}, path="net.onnx"
    ... )
    """
    write_atomic(path, onnx_file(module, input_shape, metadata=metadata, output_names=output_names))


def onnx_file(
    module: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    metadata: Mapping[str, str],
    output_names: Sequence[str] = (LOGITS,),
) -> bytes:
    """Convert ``module`` in eval mode to an ONNX file that contains its weights and
    passes ``onnx.checker``.

    The file takes ``image`` float32 NCHW, of exactly ``input_shape`` (batch size 1),
    and returns ``output_names``, one for each output of the module. ``metadata`` goes
    into ``metadata_props`` and should contain the architecture. The module itself stays
    unchanged.

    Raises ExportError if the exporter or the checker refuses the module, or if the
    number of outputs differs from ``output_names``.
    """
    if len(input_shape) != 4 or input_shape[0] != 1:
        raise ExportError(f"The input shape is {input_shape}, but must be NCHW with batch size 1")
    name = type(module).__name__
    model = _traced(module, input_shape, output_names)
    if len(model.graph.output) != len(output_names):
        raise ExportError(
            f"{name} has {len(model.graph.output)} outputs, but output_names has"
            f" {len(output_names)} names: give each output a name"
        )
    _strip(model)
    model.ir_version = IR_VERSION
    onnx.helper.set_model_props(model, dict(metadata))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exported graph of {name} is not valid ONNX: {error}") from error
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _traced(
    module: nn.Module, input_shape: tuple[int, int, int, int], output_names: Sequence[str]
) -> onnx.ModelProto:
    if importlib.util.find_spec("onnxscript") is None:
        raise ExportError(
            "Converting a module to ONNX needs onnxscript: pip install 'hwnas[convert]'"
        )
    eager = copy.deepcopy(module).cpu().eval()
    try:
        program = torch.onnx.export(
            eager,
            (torch.zeros(input_shape),),
            input_names=[IMAGE],
            output_names=list(output_names),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    # Tracing and translation have their own exceptions.
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        name = type(module).__name__
        raise ExportError(
            f"PyTorch cannot export {name} at {input_shape} to ONNX: {lines[0]}"
        ) from error
    assert program is not None, "dynamo=True returns the program"
    return program.model_proto


def _strip(model: onnx.ModelProto) -> None:
    """Remove the tracer's notes from all nodes and values: stack traces with paths of
    the exporting machine.
    """
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output, *graph.initializer]
    for annotated in (*graph.node, *values, graph):
        annotated.ClearField("metadata_props")
        annotated.ClearField("doc_string")
    model.ClearField("metadata_props")


def _image_outputs(module: nn.Module, input_shape: tuple[int, int, int, int]) -> list[int]:
    """The positions of the outputs that are feature maps. Runs the module once."""
    with torch.no_grad():
        outputs = module(torch.zeros(input_shape))
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    return [index for index, output in enumerate(outputs) if output.ndim == 4]


@functools.cache
def _litert_torch() -> Any:
    """The converter. Imported on first use (5 s), with its output silenced."""
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    # Read once, at import. Otherwise each conversion prints a line of MAC counts.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    try:
        # oneDNN's banner and a deprecation warning of torchao, both written before any
        # logger is set up.
        with hushed_stderr():
            try:
                import litert_torch
            except ModuleNotFoundError as error:
                raise ExportError(
                    "Converting a module to TFLite needs litert-torch: pip install 'hwnas[convert]'"
                ) from error
            # Its parts raise all kinds of errors if torch is too old for them.
            except Exception as error:
                raise ExportError(
                    f"litert-torch cannot be imported ({first_line(error)}): upgrade it and torch"
                ) from error
    finally:
        if level is None:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]
        else:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = level
    # otherwise it prints thirty lines to stdout per conversion
    litert_torch.config.show_progress = False
    return litert_torch
