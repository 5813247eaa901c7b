"""Normalisation before the network of a TFLite file, and a softmax after it
(``interface`` explains why).

``image`` becomes uint8 with the scale 1/255. DEQUANTIZE converts it to 0..1, and MUL
and ADD by constants normalise it. XNNPACK runs all three. The constants have the shape
of a row of the image, [1, 1, width, channels], because XNNPACK vectorises the innermost
part that needs no broadcasting. That is a whole row here, but only three numbers for
constants [channels] or for a 1x1 DEPTHWISE_CONV_2D.

In an int8 file, all of this comes before the QUANTIZE of the network's input, so that
the scales are those of the plain file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from hwnas.export.names import IMAGE, LOGITS, PROBABILITIES
from hwnas.export.tflite_file import TFLiteGraph

_WHITE = 255
_NORMALISING = 3
"""The number of operators before the network."""


def with_pixels(
    model: bytes, scale_C: npt.NDArray[np.float64], shift_C: npt.NDArray[np.float64]
) -> bytes:
    """Turn the only input of a file, float32 [1, H, W, C], into ``image`` uint8
    [1, H, W, C]. The network gets ``pixel * scale + shift`` in float32.
    """
    graph, entry, exits = TFLiteGraph.open(model)
    graph.scope = "normalise."
    parts = graph.operator(
        "DEQUANTIZE", "parts", [entry], graph.shape(entry), schema.DequantizeOptionsT()
    )
    # DEQUANTIZE has already divided by _WHITE
    scaled = _by_row(graph, "MUL", "scaled", parts, _WHITE * scale_C)
    normalised = _by_row(graph, "ADD", "shifted", scaled, shift_C)
    # the operators were appended at the end, but runtimes run them in this order
    graph.lead(_NORMALISING, entry, normalised)
    tensor = graph.tensors[entry]
    tensor.name = IMAGE
    tensor.type = schema.TensorType.UINT8
    tensor.quantization = _scale(1 / _WHITE)
    return graph.pack(entry, *exits)


def with_softmax(model: bytes) -> bytes:
    """Replace the only output of a file, float32 [1, classes], by ``probabilities``,
    its softmax.
    """
    graph, entry, [logits] = TFLiteGraph.open(model)
    # the softmax takes over the role of the output, and its name
    graph.tensors[logits].name = LOGITS
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    probabilities = graph.operator("SOFTMAX", PROBABILITIES, [logits], graph.shape(logits), options)
    return graph.pack(entry, probabilities)


def network_alone(model: bytes) -> bytes:
    """Undo ``with_softmax`` and ``with_pixels``."""
    graph, entry, exits = TFLiteGraph.open(model)
    # the reverse order: the softmax was added last
    if [graph.tensors[exit_].name for exit_ in exits] == [PROBABILITIES]:
        exits = graph.cut(PROBABILITIES)
    tensor = graph.tensors[entry]
    if tensor.type == schema.TensorType.UINT8:
        graph.drop_lead(_NORMALISING, entry)
        # the input keeps its name, so only its type tells that it is normalised again
        tensor.type = schema.TensorType.FLOAT32
        tensor.quantization = None
    return graph.pack(entry, *exits)


def _by_row(
    graph: TFLiteGraph, code: str, name: str, x: int, values_C: npt.NDArray[np.float64]
) -> int:
    """MUL or ADD of an image and one constant per channel."""
    shape = graph.shape(x)
    _, _, width, channels = shape
    row = np.tile(values_C, width).reshape(1, 1, width, channels)
    options = {"MUL": schema.MulOptionsT, "ADD": schema.AddOptionsT}[code]()
    constant = graph.constant(f"{name}.row", row)
    return graph.operator(code, name, [x, constant], shape, options)


def _scale(scale: float) -> Any:
    """Quantisation parameters: an integer n represents ``scale * n``."""
    quantization = schema.QuantizationParametersT()
    quantization.scale = [scale]
    quantization.zeroPoint = [0]
    return quantization
