"""Normalisation before the network of an ONNX file, and a softmax after it
(``interface`` says what for).

``image`` becomes uint8; Cast, Mul and Add by constants [1, C, 1, 1] normalise it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwnas.errors import ExportError
from hwnas.export.names import IMAGE, LOGITS, PROBABILITIES

_NORMALISE = "normalise."
"""How the names begin of what stands before the network."""


def with_pixels(
    model: bytes, scale_C: npt.NDArray[np.float64], shift_C: npt.NDArray[np.float64]
) -> bytes:
    """The file that takes ``image`` uint8 [1, C, H, W], of which the network gets
    ``pixel * scale + shift`` in float32.

    ``model`` has one input, ``image`` float32 [1, C, H, W].
    """
    parsed = onnx.load_model_from_string(model)
    graph, names = parsed.graph, [f"{_NORMALISE}{part}" for part in ("cast", "scaled", "shifted")]
    _rename_input(graph.node, IMAGE, names[-1])
    constants = [
        _constant(f"{name}.value", values)
        for name, values in zip(names[1:], (scale_C, shift_C), strict=True)
    ]
    nodes = [
        helper.make_node("Cast", [IMAGE], names[:1], names[0], to=TensorProto.FLOAT),
        helper.make_node("Mul", [names[0], constants[0].name], names[1:2], names[1]),
        helper.make_node("Add", [names[1], constants[1].name], names[2:], names[2]),
    ]
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *network])
    graph.initializer.extend(constants)
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return _packed(parsed)


def with_softmax(model: bytes) -> bytes:
    """The file with the output ``probabilities``: the softmax of ``model``'s output
    ``logits`` [1, classes].
    """
    parsed = onnx.load_model_from_string(model)
    graph = parsed.graph
    graph.node.append(
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], PROBABILITIES, axis=-1)
    )
    graph.value_info.append(graph.output[0])
    graph.output[0].name = PROBABILITIES
    return _packed(parsed)


def network_alone(model: bytes) -> bytes:
    """The file without what the two others put around its network."""
    parsed = onnx.load_model_from_string(model)
    graph = parsed.graph
    if graph.output[0].name == PROBABILITIES:
        graph.output[0].name = LOGITS
        del graph.node[-1]
        del graph.value_info[-1]
    if graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8:
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
        network = [node for node in graph.node if not node.name.startswith(_NORMALISE)]
        constants = [
            tensor for tensor in graph.initializer if not tensor.name.startswith(_NORMALISE)
        ]
        _rename_input(network, f"{_NORMALISE}shifted", IMAGE)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(network)
        graph.initializer.extend(constants)
    return _packed(parsed)


def _rename_input(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def _constant(name: str, values_C: npt.NDArray[np.float64]) -> TensorProto:
    return numpy_helper.from_array(values_C.astype(np.float32).reshape(1, -1, 1, 1), name)


def _packed(parsed: onnx.ModelProto) -> bytes:
    try:
        onnx.checker.check_model(parsed, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph with its input and output for apps is not valid ONNX: {error}"
        ) from error
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content
