"""Normalisation before the network of an ONNX file, and a softmax after it
(``interface`` explains why).

``image`` becomes uint8, and Cast, Mul and Add normalise it, with constants [1, C, 1,
1].
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
"""Prefix of the names of all nodes and constants before the network."""


def with_pixels(
    model: bytes, scale_C: npt.NDArray[np.float64], shift_C: npt.NDArray[np.float64]
) -> bytes:
    """Turn the input of a file, ``image`` float32 [1, C, H, W], into ``image`` uint8
    [1, C, H, W]. The network gets ``pixel * scale + shift`` in float32.

    Raises ExportError if the result is not valid ONNX.
    """
    parsed = onnx.load_model_from_string(model)
    graph = parsed.graph
    cast, scaled, shifted = (f"{_NORMALISE}{part}" for part in ("cast", "scaled", "shifted"))
    _rename_input(graph.node, IMAGE, shifted)
    scale = _constant(f"{scaled}.value", scale_C)
    shift = _constant(f"{shifted}.value", shift_C)
    nodes = [
        helper.make_node("Cast", [IMAGE], [cast], cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, scale.name], [scaled], scaled),
        helper.make_node("Add", [scaled, shift.name], [shifted], shifted),
    ]
    # ONNX requires nodes in the order of execution.
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *network])
    graph.initializer.extend([scale, shift])
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return _packed(parsed)


def with_softmax(model: bytes) -> bytes:
    """Replace the output ``logits`` [1, classes] of a file by ``probabilities``, its
    softmax. Raises ExportError if the result is not valid ONNX.
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
    """Undo ``with_softmax`` and ``with_pixels``."""
    parsed = onnx.load_model_from_string(model)
    graph = parsed.graph
    if graph.output[0].name == PROBABILITIES:
        graph.output[0].name = LOGITS
        del graph.node[-1]
        del graph.value_info[-1]
    if graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8:
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
        network = [node for node in graph.node if not node.name.startswith(_NORMALISE)]
        tensors = list(graph.initializer)
        constants = [tensor for tensor in tensors if not tensor.name.startswith(_NORMALISE)]
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
            f"The graph with the interface for apps is not valid ONNX: {error}"
        ) from error
    content: bytes = parsed.SerializeToString(deterministic=True)
    return content
