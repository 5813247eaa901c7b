"""Ops and networks written straight into ONNX files, without an exporter.

torch.onnx traces and translates a block in 1 to 3 s; this takes 1 ms (``block_writer`` says what for). The graph is the one that
``onnx.to_onnx`` makes, operator by operator (its tests judge this one by it), in float32, channels-first, batch 1:

- batch norms are folded into weights and biases, in float64; an activation is an operator of its own, which runtimes fuse;
- every convolution pads by kernel // 2 on all sides, as in PyTorch;
- global pooling is a ReduceMean that keeps the axes, before the classifier with a Reshape to [1, C];
- predictions of a detector are a Transpose and a Reshape of each map, and a Concat of them all;
- a channel shuffle is Reshape, Transpose, Reshape.

Shapes of all values are in the file, as the exporter's files have them, so that ``onnx.checker`` can hold them against its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hwnas import __version__
from hwnas.core.op import Layer, Op
from hwnas.export.block_writer import BlockWriter, folded
from hwnas.export.names import IMAGE, LOGITS
from hwnas.export.onnx import IR_VERSION, OPSET
from hwnas.nn.detector import JOINED, DetectionNetwork
from hwnas.nn.network import AnyNetwork

_HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}


def write_onnx(network: AnyNetwork) -> bytes:
    """The float32 ONNX file of a network: ``image`` [1, channels, size, size] in, ``logits`` [1, classes] out.

    A detector has two outputs: ``logits`` [1, anchors, classes + 1], the background first, and ``codes`` [1, anchors, 4].

    BN statistics are those it has now, as in eval mode; the network itself is left untouched. The same weights give
    the same bytes. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> len(write_onnx(Network(published("mobilenet_v2")))) // 1_000_000  # MB
    13
    """
    ops = network.arch.ops()
    writer = _Writer(ops[0])
    if isinstance(network, DetectionNetwork):
        return writer.pack(dict(zip((LOGITS, "codes"), writer.detector(IMAGE, network), strict=True)))
    return writer.pack({LOGITS: writer.chain(IMAGE, ops, list(network.blocks))})


def write_op(op: Op, module: nn.Module) -> bytes:
    """The float32 ONNX file of one op: ``image`` [1, in_ch, size, size] in, ``logits`` out.

    ``module`` is what ``hwnas.nn.blocks.build(op)`` returned, with any weights. ``logits`` is
    [1, out_ch, out_size, out_size], and [1, out_ch] for a classifier. Predictors (``ssd``) have two: ``classes`` and ``boxes``.
    Takes about 1 ms.

    Raises ExportError where ``module`` does not belong to ``op``.
    """
    writer = _Writer(op)
    if op.kind == "ssd":
        return writer.pack(dict(zip(("classes", "boxes"), writer.predictors(IMAGE, op, module), strict=True)))
    return writer.pack({LOGITS: writer.chain(IMAGE, [op], [module])})


class _Writer(BlockWriter[str]):
    """A graph under construction. Values are known by their names."""

    def __init__(self, first: Op) -> None:
        entry = (1, first.in_ch, first.size, first.size)
        self.shapes: dict[str, tuple[int, ...]] = {IMAGE: entry}  # from the input on, in the order of the graph
        self._nodes: list[helper.NodeProto] = []
        self._constants: list[TensorProto] = []

    def conv(self, x: str, layer: Layer, module: nn.Module) -> str:
        """Conv, and the activation."""
        weight_OIHW, bias_O = folded(layer, module)
        inputs = [x, self._floats(f"{layer.name}.weight", weight_OIHW), self._floats(f"{layer.name}.bias", bias_O)]
        shape = (1, layer.out_ch, layer.out_size, layer.out_size)
        x = self._operator(
            "Conv",
            layer.name,
            inputs,
            shape,
            auto_pad="NOTSET",
            dilations=[1, 1],
            group=layer.groups,
            kernel_shape=[layer.kernel] * 2,
            pads=[layer.kernel // 2] * 4,
            strides=[layer.stride] * 2,
        )
        return self._activation(x, layer)

    def _activation(self, x: str, layer: Layer) -> str:
        name, shape = f"{layer.name}.act", self.shapes[x]
        if layer.act == "relu6":
            low, high = (self._floats(f"{name}.{bound}", np.array(value)) for bound, value in (("min", 0.0), ("max", 6.0)))
            return self._operator("Clip", name, [x, low, high], shape)
        codes = {"relu": "Relu", "hswish": "HardSwish"}
        return self._operator(codes[layer.act], name, [x], shape) if layer.act in codes else x

    def shuffle(self, x: str, groups: int) -> str:
        """Reshape, Transpose, Reshape."""
        batch, channels, *image = self.shapes[x]
        apart, swapped = (batch, groups, channels // groups, *image), (batch, channels // groups, groups, *image)
        x = self._reshape("shuffle.groups", x, apart)
        x = self._operator("Transpose", "shuffle.swapped", [x], swapped, perm=[0, 2, 1, 3, 4])
        return self._reshape("shuffle", x, (batch, channels, *image))

    def squeeze_excite(self, x: str, reduce: Layer, expand: Layer, gate: str, module: nn.Module) -> str:
        """ReduceMean, two Conv, Sigmoid or HardSigmoid, Mul."""
        factor = self.conv(self.pool(x), reduce, module.get_submodule("reduce"))
        factor = self.conv(factor, expand, module.get_submodule("expand"))
        code, options = ("Sigmoid", {}) if gate == "sigmoid" else ("HardSigmoid", _HARD_SIGMOID)
        factor = self._operator(code, "gate", [factor], self.shapes[factor], **options)
        return self._operator("Mul", "gated", [x, factor], self.shapes[x])

    def pool(self, x: str) -> str:
        """ReduceMean over height and width."""
        axes = self._integers("pool.axes", (-1, -2))
        return self._operator("ReduceMean", "pool", [x, axes], (*self.shapes[x][:2], 1, 1), keepdims=1, noop_with_empty_axes=0)

    def add(self, x: str, y: str) -> str:
        """Add."""
        return self._operator("Add", "add", [x, y], self.shapes[y])

    def classifier(self, x: str, weight_OI: npt.NDArray[np.float64], bias_O: npt.NDArray[np.float64]) -> str:
        """ReduceMean, Reshape, Gemm."""
        flat = self._reshape("flat", self.pool(x), self.shapes[x][:2])
        inputs = [flat, self._floats("linear.weight", weight_OI), self._floats("linear.bias", bias_O)]
        return self._operator("Gemm", "linear", inputs, (1, len(bias_O)), alpha=1.0, beta=1.0, transA=0, transB=1)

    def rows(self, name: str, x: str, columns: int) -> str:
        """Transpose, Reshape."""
        batch, channels, height, width = self.shapes[x]
        x = self._operator("Transpose", f"{name}.cells", [x], (batch, height, width, channels), perm=[0, 2, 3, 1])
        return self._reshape(f"{name}.rows", x, (batch, height * width * channels // columns, columns))

    def concatenated(self, name: str, parts: Sequence[str]) -> str:
        """Concat, as the network does it."""
        joined, width = list(parts), self.shapes[parts[0]][2]
        while len(joined) > 1:
            first = joined[:JOINED]
            scope = name if len(joined) <= JOINED else f"{name}.{len(joined)}"
            shape = (1, sum(self.shapes[part][1] for part in first), width)
            joined[:JOINED] = [self._operator("Concat", scope, first, shape, axis=1)]
        return joined[0]

    def _reshape(self, name: str, x: str, shape: tuple[int, ...]) -> str:
        return self._operator("Reshape", name, [x, self._integers(f"{name}.shape", shape)], shape, allowzero=1)

    def _operator(
        self, code: str, name: str, inputs: Sequence[str], shape: tuple[int, ...], **options: int | float | str | list[int]
    ) -> str:
        """Add an operator, and return its output, a value ``name`` of ``shape``."""
        output = self.scope + name
        self._nodes.append(helper.make_node(code, inputs, [output], output, **options))
        self.shapes[output] = shape
        return output

    def _floats(self, name: str, values: npt.NDArray[np.float64]) -> str:
        return self._constant(name, values.astype(np.float32))

    def _integers(self, name: str, values: tuple[int, ...]) -> str:
        return self._constant(name, np.array(values, np.int64))

    def _constant(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> str:
        self._constants.append(numpy_helper.from_array(values, self.scope + name))
        return self.scope + name

    def pack(self, exits: dict[str, str]) -> bytes:
        """The file of the graph from the first value to the values that ``exits`` maps names to."""
        named = {value: name for name, value in exits.items()}
        for node in self._nodes:
            node.output[0] = named.get(node.output[0], node.output[0])
        out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes.pop(value)) for name, value in exits.items()]
        entry, *between = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self.shapes.items())
        model = helper.make_model(
            helper.make_graph(self._nodes, "main_graph", [entry], out, self._constants, value_info=between),
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="hwnas",
            producer_version=__version__,
        )
        content: bytes = model.SerializeToString(deterministic=True)
        return content
