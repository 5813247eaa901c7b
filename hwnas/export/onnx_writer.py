"""Writes ops and networks directly as ONNX files, without an exporter.

torch.onnx takes 1 to 3 s to trace and translate a block; this takes 1 ms (see
``block_writer``). The graph is that of ``convert.to_onnx``, operator by operator; the
tests compare the two. It is float32, channels-first, with batch size 1:

- batch norms are folded into weights and biases in float64. Activations are separate
  operators, which runtimes fuse;
- every convolution pads all sides by dilation * (kernel // 2), as PyTorch does;
- global pooling is a ReduceMean that keeps the axes. Before the classifier, a Reshape
  to [1, C] follows;
- the predictions of a detector are a Transpose and a Reshape of each map, and a Concat;
- a channel shuffle is Reshape, Transpose, Reshape.

The file contains the shapes of all values, as the exporter's files do. This lets
``onnx.checker`` compare them with the shapes that it infers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hwnas import __version__
from hwnas.core.detector import JOINED
from hwnas.core.ir import Node
from hwnas.core.ops import Op
from hwnas.core.size import Size, sides
from hwnas.export.block_writer import BlockWriter, Numbers
from hwnas.export.names import IMAGE, LOGITS
from hwnas.nn.network import Network

OPSET = 18
IR_VERSION = 8
"""The oldest version that allows opset 18. onnxruntime before 1.18 refuses newer ones.
"""
_HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}
_ACTS = {"relu": "Relu", "hswish": "HardSwish", "sigmoid": "Sigmoid", "hsig": "HardSigmoid"}


def write_onnx(network: Network, metadata: Mapping[str, str] | None = None) -> bytes:
    """Write a network as a float32 ONNX file with the input ``image`` [1, channels,
    size, size] and the output ``logits`` [1, classes].

    A detector has two outputs: ``logits`` [1, anchors, classes], with SSDLite [1,
    anchors, classes + 1] with the background first, and ``codes`` [1, anchors, 4].

    The file computes what the network computes in eval mode; the network itself stays
    unchanged. The same weights give the same bytes. ``metadata`` goes into the file's
    ``metadata_props``. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> from hwnas.nn.classifier import ClassificationNetwork
    >>> network = ClassificationNetwork(published("mobilenet_v2"))
    >>> len(write_onnx(network)) // 1_000_000  # MB
    13
    """
    writer = OnnxWriter(network.arch.in_channels, network.arch.size)
    outputs = writer.network(IMAGE, network)
    return writer.pack(dict(zip((LOGITS, "codes"), outputs, strict=False)), metadata or {})


def write_op(op: Op, module: nn.Module) -> bytes:
    """Write one op as a float32 ONNX file with the input ``image`` [1, in_ch, size,
    size].

    ``module`` is the result of ``hwnas.nn.blocks.build(op)``, with any weights. The
    output ``logits`` is [1, out_ch, out_size, out_size], or [1, out_ch] for a
    classifier. Detector heads (``ssd``) have the outputs ``classes`` and ``boxes``
    instead. Takes about 1 ms.

    Raises ExportError if ``module`` was not built from ``op``.
    """
    writer = OnnxWriter(op.in_ch, op.size)
    outputs = writer.block(IMAGE, op, module)
    names = ("classes", "boxes") if len(outputs) > 1 else (LOGITS,)
    return writer.pack(dict(zip(names, outputs, strict=True)))


class OnnxGraph:
    """An ONNX graph under construction. Values are referred to by their names."""

    scope = ""

    def __init__(self, in_channels: int, size: Size) -> None:
        # in the order of the graph, starting with the input
        self.shapes: dict[str, tuple[int, ...]] = {IMAGE: (1, in_channels, *sides(size))}
        self._nodes: list[helper.NodeProto] = []
        self._constants: list[TensorProto] = []
        self._constant_shapes: dict[str, tuple[int, ...]] = {}

    def shape(self, x: str) -> tuple[int, ...]:
        """The shape of a value or a constant."""
        if x in self._constant_shapes:
            return self._constant_shapes[x]
        return self.shapes[x]

    def slice(
        self, name: str, x: str, shape: tuple[int, ...], where: dict[str, tuple[int, ...]]
    ) -> str:
        """Slice to ``shape``. ``where`` has the ``starts``, ``ends`` and ``axes``."""
        bounds = [self.integers(f"{name}.{key}", values) for key, values in where.items()]
        return self.operator("Slice", name, [x, *bounds], shape)

    def reshape(self, name: str, x: str, shape: tuple[int, ...]) -> str:
        """Reshape."""
        target_shape = self.integers(f"{name}.shape", shape)
        return self.operator("Reshape", name, [x, target_shape], shape, allowzero=1)

    def operator(
        self,
        code: str,
        name: str,
        inputs: Sequence[str],
        shape: tuple[int, ...],
        **options: int | float | str | list[int],
    ) -> str:
        """Add an operator. Returns its output, a value called ``name`` with
        ``shape``.
        """
        output = self.scope + name
        self._nodes.append(helper.make_node(code, inputs, [output], output, **options))
        self.shapes[output] = shape
        return output

    def floats(self, name: str, values: npt.NDArray[np.float64]) -> str:
        """Add a float32 constant."""
        return self._constant(name, values.astype(np.float32))

    def integers(self, name: str, values: tuple[int, ...]) -> str:
        """Add an int64 constant."""
        return self._constant(name, np.array(values, np.int64))

    def _constant(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> str:
        self._constants.append(numpy_helper.from_array(values, self.scope + name))
        return self.scope + name

    def pack(self, outputs: dict[str, str], metadata: Mapping[str, str] | None = None) -> bytes:
        """Serialise the graph. ``outputs``: name of an output -> the value that becomes
        it.
        """
        output_names = {value: name for name, value in outputs.items()}
        for node in self._nodes:
            node.output[0] = output_names.get(node.output[0], node.output[0])

        # Outputs must not be listed among the intermediate values as well.
        exposed = [_value_info(name, self.shapes.pop(value)) for name, value in outputs.items()]
        entry, *between = (_value_info(name, shape) for name, shape in self.shapes.items())
        graph = helper.make_graph(
            self._nodes, "main_graph", [entry], exposed, self._constants, value_info=between
        )
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="hwnas",
            producer_version=__version__,
        )
        if metadata:
            helper.set_model_props(model, dict(metadata))
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def _value_info(name: str, shape: tuple[int, ...]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class OnnxWriter(OnnxGraph, BlockWriter[str]):
    """Translates programs into ONNX operators. The docstring of each method lists the
    operators that it emits.
    """

    def conv(self, x: str, node: Node, weight_OIHW: Numbers, bias_O: Numbers) -> str:
        """Conv and the activation."""
        inputs = [
            x,
            self.floats(f"{node.name}.weight", weight_OIHW),
            self.floats(f"{node.name}.bias", bias_O),
        ]
        shape = (1, node.out_ch, *sides(node.out_size))
        x = self.operator(
            "Conv",
            node.name,
            inputs,
            shape,
            auto_pad="NOTSET",
            dilations=[node.dilation] * 2,
            group=node.groups,
            kernel_shape=[node.kernel] * 2,
            pads=[node.dilation * (node.kernel // 2)] * 4,
            strides=[node.stride] * 2,
        )
        return self.act(x, f"{node.name}.act", node.act)

    def linear(self, x: str, name: str, weight_OI: Numbers, bias_O: Numbers) -> str:
        """Gemm."""
        inputs = [x, self.floats(f"{name}.weight", weight_OI), self.floats(f"{name}.bias", bias_O)]
        return self.operator(
            "Gemm", name, inputs, (1, len(bias_O)), alpha=1.0, beta=1.0, transA=0, transB=1
        )

    def pool(self, x: str, node: Node) -> str:
        """AveragePool or MaxPool."""
        # pooling with even kernels has no padding
        padding = node.kernel // 2 if node.kernel % 2 else 0
        options: dict[str, Any] = {
            "kernel_shape": [node.kernel] * 2,
            "pads": [padding] * 4,
            "strides": [node.stride] * 2,
        }
        if node.kind == "avgpool":
            options["count_include_pad"] = 0
        shape = (1, node.out_ch, *sides(node.out_size))
        code = "AveragePool" if node.kind == "avgpool" else "MaxPool"
        return self.operator(code, node.name, [x], shape, **options)

    def scaled(self, x: str, node: Node, scale_C: Numbers, shift_C: Numbers) -> str:
        """BatchNormalization with mean 0 and variance 1, and the activation."""
        parameters = {
            "scale": scale_C,
            "shift": shift_C,
            "mean": np.zeros_like(scale_C),
            "variance": np.ones_like(scale_C),
        }
        constants = [self.floats(f"{node.name}.{key}", part) for key, part in parameters.items()]
        inputs = [x, *constants]
        x = self.operator(
            "BatchNormalization", f"{node.name}.norm", inputs, self.shape(x), epsilon=0.0
        )
        return self.act(x, f"{node.name}.act", node.act)

    def along_channels(self, x: str, node: Node, kernel_K: Numbers) -> str:
        """Reshape to a row of channels, Conv along it, Reshape back to a pixel, and the
        activation.
        """
        name = node.name
        pixel = self.shape(x)
        row = (1, 1, pixel[1])
        x = self.reshape(f"{name}.row", x, row)
        inputs = [x, self.floats(f"{name}.weight", kernel_K[None, None])]
        x = self.operator(
            "Conv", name, inputs, row, kernel_shape=[len(kernel_K)], pads=[len(kernel_K) // 2] * 2
        )
        return self.act(self.reshape(f"{name}.pixel", x, pixel), f"{name}.act", node.act)

    def act(self, x: str, name: str, act: str) -> str:
        """The operators of an activation: Sigmoid and Mul for SiLU, one operator for
        all others.
        """
        shape = self.shape(x)
        if act == "none":
            return x
        if act == "relu6":
            low = self.floats(f"{name}.min", np.array(0.0))
            high = self.floats(f"{name}.max", np.array(6.0))
            return self.operator("Clip", name, [x, low, high], shape)
        if act == "silu":
            gate = self.operator("Sigmoid", f"{name}.sigmoid", [x], shape)
            return self.operator("Mul", name, [x, gate], shape)
        options = _HARD_SIGMOID if act == "hsig" else {}
        return self.operator(_ACTS[act], name, [x], shape, **options)

    def shuffle(self, x: str, name: str, groups: int) -> str:
        """Reshape, Transpose, Reshape."""
        batch, channels, *image = self.shape(x)
        grouped = (batch, groups, channels // groups, *image)
        swapped = (batch, channels // groups, groups, *image)
        x = self.reshape(f"{name}.groups", x, grouped)
        x = self.operator("Transpose", f"{name}.swapped", [x], swapped, perm=[0, 2, 1, 3, 4])
        return self.reshape(name, x, (batch, channels, *image))

    def mean(self, x: str, name: str, *, flat: bool) -> str:
        """ReduceMean over height and width, and with ``flat`` a Reshape."""
        axes = self.integers(f"{name}.axes", (-1, -2))
        channels = self.shape(x)[:2]
        x = self.operator(
            "ReduceMean", name, [x, axes], (*channels, 1, 1), keepdims=1, noop_with_empty_axes=0
        )
        if not flat:
            return x
        return self.reshape(f"{name}.flat", x, channels)

    def add(self, x: str, y: str, name: str) -> str:
        """Add of two maps."""
        # both have the same shape, so nothing is broadcast
        return self.operator("Add", name, [x, y], self.shape(y))

    def mul(self, x: str, gate: str, name: str) -> str:
        """Mul of a map by a gate."""
        # the gate is a single pixel and is broadcast over the map, which gives the shape
        return self.operator("Mul", name, [x, gate], self.shape(x))

    def crop(self, x: str, name: str) -> str:
        """Slice without the first row and the first column."""
        batch, channels, height, width = self.shape(x)
        shape = (batch, channels, height - 1, width - 1)
        return self.slice(
            name, x, shape, {"starts": (1, 1), "ends": (height, width), "axes": (2, 3)}
        )

    def upsample(self, x: str, name: str) -> str:
        """Resize."""
        batch, channels, height, width = self.shape(x)
        factors = self.floats(f"{name}.factors", np.array([1.0, 1.0, 2.0, 2.0]))
        return self.operator(
            "Resize",
            name,
            [x, "", factors],
            (batch, channels, 2 * height, 2 * width),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )

    def channels_joined(self, parts: Sequence[str], name: str) -> str:
        """Concat along the channels."""
        batch, _, *image = self.shape(parts[0])
        channels = sum(self.shape(part)[1] for part in parts)
        return self.operator("Concat", name, parts, (batch, channels, *image), axis=1)

    def first_channels(self, x: str, name: str, channels: int) -> str:
        """Slice of the first ``channels`` channels."""
        batch, _, *image = self.shape(x)
        return self.slice(
            name, x, (batch, channels, *image), {"starts": (0,), "ends": (channels,), "axes": (1,)}
        )

    def zeros(self, name: str, channels: int, size: int) -> str:
        """A constant map of zeros; no operator."""
        shape = (1, channels, size, size)
        constant = self.floats(name, np.zeros(shape))
        self._constant_shapes[constant] = shape
        return constant

    def rows(self, name: str, x: str, columns: int) -> str:
        """Transpose to channels-last, Reshape to rows."""
        batch, channels, height, width = self.shape(x)
        cells = (batch, height, width, channels)
        x = self.operator("Transpose", f"{name}.cells", [x], cells, perm=[0, 2, 3, 1])
        count = height * width * channels // columns
        return self.reshape(f"{name}.rows", x, (batch, count, columns))

    def concatenate(self, name: str, parts: Sequence[str]) -> str:
        """Concat of at most ``JOINED`` parts at a time, as in the network."""
        joined = list(parts)
        width = self.shape(parts[0])[2]
        while len(joined) > 1:
            first = joined[:JOINED]
            scope = name if len(joined) <= JOINED else f"{name}.{len(joined)}"
            shape = (1, sum(self.shape(part)[1] for part in first), width)
            joined[:JOINED] = [self.operator("Concat", scope, first, shape, axis=1)]
        return joined[0]
