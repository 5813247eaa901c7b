"""Any PyTorch module to TFLite and ONNX, by other people's converters: for modules of
your own, and the judge of our writers.

Networks of hwnas need neither: ``tflite_writer`` and ``onnx_writer`` write them.
Install the converters with the extra ``convert``.

TFLite (litert-torch): graphs are channels-last inside and out. Batch norms fold into
the convolutions before them, ReLU and ReLU6 fuse into them, a padded stride-1
convolution becomes SAME, and a padded stride-2 one becomes PAD and VALID, because
TFLite's SAME pads an even image on the other side than PyTorch does. The same module
gives the same bytes. What to write so that this holds:

- pool globally with ``adaptive_avg_pool2d(x, 1)`` and ``flatten(1)``: one MEAN.
  ``x.mean([2, 3])`` brings a TRANSPOSE;
- shuffle channels with reshapes: indexing makes a GATHER_ND, which XNNPACK does not
  take. ``ChannelShuffle`` is converted in its channels-last form, RESHAPE, TRANSPOSE
  and RESHAPE; the other one brings two more TRANSPOSE.

ONNX: PyTorch's supported exporter (``dynamo=True``), 2.5 s for MobileNetV2, against 0.8
s for the TorchScript one, which is deprecated. It folds batch norms into the
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
from hwnas.export.tflite_file import inlined
from hwnas.nn.blocks import ChannelShuffle


def to_tflite(module: nn.Module, input_shape: tuple[int, int, int, int]) -> bytes:
    """A float32 TFLite file that computes what ``module`` computes in eval mode.

    ``input_shape`` is NCHW with batch 1; the file takes [1, H, W, C]. Four-dimensional
    outputs come out channels-last too, others (logits [1, classes]) as they are. The
    module itself is left untouched: a copy on the CPU is converted. Takes 1 to 2 s for
    a block and 10 s for MobileNetV2, after 5 s for the first import of the converter.

    Raises ExportError where the converter refuses the module, or where the module does
    not run on that shape.

    >>> model = to_tflite(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 32, 32))
    >>> [op.name for op in graph_ops(model)]
    ['CONV_2D']
    """
    if len(input_shape) != 4 or input_shape[0] != 1:
        raise ExportError(
            f"The input shape is {input_shape}; exported files take NCHW with batch 1"
        )
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
        model = litert_torch.convert(
            channels_last.eval(), (torch.zeros(n, h, w, c),)
        ).model_content()
    except Exception as error:  # tracing, lowering and the converter each raise types of their own
        raise ExportError(
            f"LiteRT cannot convert {name} at {input_shape}: {first_line(error)}"
        ) from error
    return inlined(bytes(model))


def to_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    metadata: Mapping[str, str],
    path: str | Path,
    output_names: Sequence[str] = (LOGITS,),
) -> None:
    """Write ``module`` in eval mode as one ONNX file; see ``onnx_file``. An existing
    file is replaced only by a complete one.

    >>> to_onnx(net, (1, 3, 224, 224), metadata={"recipe": "mobile"}, path="net.onnx")  # doctest: +SKIP
    """
    write_atomic(path, onnx_file(module, input_shape, metadata=metadata, output_names=output_names))


def onnx_file(
    module: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    metadata: Mapping[str, str],
    output_names: Sequence[str] = (LOGITS,),
) -> bytes:
    """The ONNX file of ``module`` in eval mode, weights inside, as ``onnx.checker`` accepts it.

    The file takes ``image`` float32 NCHW, exactly ``input_shape`` (batch 1), and
    returns ``output_names``, one for each output of the module. ``metadata`` goes into
    its ``metadata_props``; the architecture belongs there. The module itself is left
    untouched.

    Raises ExportError where the exporter or the checker refuses the module, or where it
    has another number of outputs.
    """
    if len(input_shape) != 4 or input_shape[0] != 1:
        raise ExportError(
            f"The input shape is {input_shape}; exported files take NCHW with batch 1"
        )
    name = type(module).__name__
    model = _traced(module, input_shape, output_names)
    if len(model.graph.output) != len(output_names):
        raise ExportError(
            f"{name} has {len(model.graph.output)} outputs, and output_names names"
            f" {len(output_names)}: name each of them"
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
    except Exception as error:  # tracing and translation raise types of their own
        lines = str(error).strip().splitlines() or ["no message"]
        name = type(module).__name__
        raise ExportError(f"ONNX export refuses {name} at {input_shape}: {lines[0]}") from error
    assert program is not None, "dynamo=True returns the program"
    return program.model_proto


def _strip(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes on every node and value: stack traces with paths of the
    exporting machine.
    """
    graph = model.graph
    for noted in (
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
        graph,
    ):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    model.ClearField("metadata_props")


def _image_outputs(module: nn.Module, input_shape: tuple[int, int, int, int]) -> list[int]:
    """The positions of the outputs that are feature maps, found by running the module once."""
    with torch.no_grad():
        outputs = module(torch.zeros(input_shape))
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    return [index for index, output in enumerate(outputs) if output.ndim == 4]


@functools.cache
def _litert_torch() -> Any:
    """The converter, imported on first use (5 s) and kept quiet."""
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    # read once, at import: no line of MAC counts per conversion
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    try:
        # oneDNN's greeting and a deprecation inside torchao, both before any logger is set up.
        with hushed_stderr():
            try:
                import litert_torch
            except ModuleNotFoundError as error:
                raise ExportError(
                    "Converting a module to TFLite needs litert-torch: pip install 'hwnas[convert]'"
                ) from error
            except Exception as error:  # what its parts raise on a torch that is too old for them
                raise ExportError(
                    f"litert-torch cannot be imported ({first_line(error)}): upgrade it and torch"
                ) from error
    finally:
        if level is None:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]
        else:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = level
    litert_torch.config.show_progress = False  # thirty lines on stdout per conversion otherwise
    return litert_torch
