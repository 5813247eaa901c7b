"""Normalisation before the network of a TFLite file, and a softmax after it
(``interface`` says what for).

``image`` becomes uint8 with the scale 1/255; DEQUANTIZE makes it 0..1; MUL and ADD by
constants normalise it. XNNPACK takes all three. The constants are a row of the image,
[1, 1, width, channels]: XNNPACK works at once through the innermost part that needs no
broadcasting, which is a row then, and three numbers where the constants are [channels]
or a DEPTHWISE_CONV_2D of 1x1. In an int8 file all of it stands before the QUANTIZE of
the network's input, so that its scales are those of the file without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from hwnas.export.names import IMAGE, LOGITS, PROBABILITIES
from hwnas.export.tflite_file import Graph

_WHITE = 255
_NORMALISING = 3
"""Operators before the network."""


def with_pixels(
    model: bytes, scale_C: npt.NDArray[np.float64], shift_C: npt.NDArray[np.float64]
) -> bytes:
    """The file that takes ``image`` uint8 [1, H, W, C], of which the network gets
    ``pixel * scale + shift`` in float32.

    ``model`` has one input, float32 [1, H, W, C].
    """
    graph, entry, exits = Graph.opened(model)
    graph.scope = "normalise."
    parts = graph.operator(
        "DEQUANTIZE", "parts", [entry], graph.shape(entry), schema.DequantizeOptionsT()
    )
    scaled = _by_row(graph, "MUL", "scaled", parts, _WHITE * scale_C)
    normalised = _by_row(graph, "ADD", "shifted", scaled, shift_C)
    graph.lead(_NORMALISING, entry, normalised)
    tensor = graph.tensors[entry]
    tensor.name, tensor.type, tensor.quantization = (
        IMAGE,
        schema.TensorType.UINT8,
        _scale(1 / _WHITE),
    )
    return graph.pack(entry, *exits)


def with_softmax(model: bytes) -> bytes:
    """The file with the output ``probabilities``: the softmax of the only output that
    ``model`` has, float32 [1, classes].
    """
    graph, entry, [logits] = Graph.opened(model)
    graph.tensors[logits].name = LOGITS
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return graph.pack(
        entry, graph.operator("SOFTMAX", PROBABILITIES, [logits], graph.shape(logits), options)
    )


def network_alone(model: bytes) -> bytes:
    """The file without what the two others put around its network."""
    graph, entry, exits = Graph.opened(model)
    if [graph.tensors[exit_].name for exit_ in exits] == [PROBABILITIES]:
        exits = graph.cut(PROBABILITIES)
    tensor = graph.tensors[entry]
    if tensor.type == schema.TensorType.UINT8:
        graph.drop_lead(_NORMALISING, entry)
        tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
    return graph.pack(entry, *exits)


def _by_row(graph: Graph, code: str, name: str, x: int, values_C: npt.NDArray[np.float64]) -> int:
    """MUL or ADD of an image and a constant per channel."""
    shape = graph.shape(x)
    _, _, width, channels = shape
    row = np.tile(values_C, width).reshape(1, 1, width, channels)
    options = {"MUL": schema.MulOptionsT, "ADD": schema.AddOptionsT}[code]()
    return graph.operator(code, name, [x, graph.constant(f"{name}.row", row)], shape, options)


def _scale(scale: float) -> Any:
    """What says that an integer n stands for ``scale * n``."""
    quantization = schema.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = [scale], [0]
    return quantization
