"""Ops and networks written straight into TFLite files, without a converter.

litert-torch converts a block in 1 to 2 s; this takes 1 ms (``block_writer`` says what
for). The graph is the one that ``convert.to_tflite`` makes, operator by operator (its
tests judge this one by it), in float32, channels-last, batch 1:

- batch norms are folded into weights and biases, in float64; ReLU and ReLU6 are fused,
  HARD_SWISH follows its layer;
- where TFLite's SAME pads as PyTorch does, kernel // 2 on every side, it is SAME; else
  PAD and VALID;
- where each input channel has its own filters, it is DEPTHWISE_CONV_2D, even with one
  input channel;
- the mean over a 1 x 1 map vanishes inside squeeze-and-excitation and a head, and
  becomes a SUM before the classifier;
- predictions of a detector are a RESHAPE of each map, and a CONCATENATION of them all;
- a hard sigmoid is a bias of 3 more and RELU6 in the convolution before it, and a MUL by 1/6.

*Difference from the converter*: a classifier or head on its own has no TRANSPOSE before
the MEAN. The converter adds it only there, never inside a network, and a table must
hold what networks cost.

Schema: tensorflow/lite/schema/schema.fbs, version 3. Every operator code has the lowest
version that allows what the file uses it for: 1, but 2 for DEPTHWISE_CONV_2D with a
dilation, 4 for TRANSPOSE in five dimensions, 5 for FULLY_CONNECTED with kept dimensions
and 6 for grouped CONV_2D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from hwnas.core.ir import Node
from hwnas.core.ops import Op
from hwnas.export.block_writer import BlockWriter, Numbers
from hwnas.export.names import IMAGE, LOGITS
from hwnas.export.tflite_file import Graph
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import Network

_HEIGHT, _WIDTH, _CHANNELS = 1, 2, 3
_FUSED = {
    "none": schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}
_ACTS = {"relu": "RELU", "relu6": "RELU6", "hswish": "HARD_SWISH", "sigmoid": "LOGISTIC"}


def write_tflite(network: Network) -> bytes:
    """The float32 TFLite file of a network: ``image`` [1, size, size, channels] in,
    ``logits`` [1, classes] out.

    A detector has two outputs: ``logits`` [1, anchors, classes + 1], the background
    first, and ``codes`` [1, anchors, 4].

    BN statistics are those it has now, as in eval mode; the network itself is left
    untouched. The same weights give the same bytes. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> len(write_tflite(ClassificationNetwork(published("mobilenet_v2")))) // 1_000_000  # MB
    13
    """
    graph = _Writer()
    entry = graph.tensor(
        IMAGE, (1, network.arch.resolution, network.arch.resolution, network.arch.in_channels)
    )
    outputs = graph.network(entry, network)
    return graph.pack(entry, *graph.named((LOGITS, "codes")[: len(outputs)], outputs))


def write_op(op: Op, module: nn.Module) -> bytes:
    """The float32 TFLite file of one op: ``input`` [1, size, size, in_ch] in, ``output`` out.

    ``module`` is what ``hwnas.nn.blocks.build(op)`` returned, with any weights.
    ``output`` is [1, out_size, out_size, out_ch], and [1, out_ch] for a classifier.
    Predictors (``ssd``) have two: ``classes`` and ``boxes``. Takes about 1 ms.

    Raises ExportError where ``module`` does not belong to ``op``.

    >>> from hwnas.nn.blocks import build
    >>> op = Op.parse("conv-h8-i3-o4-k3-s2-relu6")
    >>> write_op(op, build(op))[4:8]
    b'TFL3'
    """
    graph = _Writer()
    entry = graph.tensor("input", (1, op.size, op.size, op.in_ch))
    outputs = graph.block(entry, op, module)
    return graph.pack(
        entry, *graph.named(("classes", "boxes") if len(outputs) > 1 else ("output",), outputs)
    )


def write_heads(network: DetectionNetwork) -> bytes:
    """The float32 TFLite file of a detector's raw predictions: ``image`` in; of each
    map, its class logits and its box codes out.

    They are [1, size, size, anchors * (classes + 1)] and [1, size, size, anchors * 4],
    an image of rows as ``DetectionNetwork`` has them, and have names and scales of
    their own, so that a quantizer need not find one scale for all maps.
    """
    graph = _Writer()
    entry = graph.tensor(
        IMAGE, (1, network.arch.resolution, network.arch.resolution, network.arch.in_channels)
    )
    return graph.pack(
        entry, *(exit_ for pair in graph.predictions(entry, network) for exit_ in pair)
    )


class _Writer(Graph, BlockWriter[int]):
    """Nodes of programs in TFLite's operators."""

    def conv(self, x: int, node: Node, weight_OIHW: Numbers, bias_O: Numbers) -> int:
        """[PAD], [DEPTHWISE_]CONV_2D, and what of the activation is not fused."""
        depthwise = _depthwise(node)
        weight = self.constant(
            f"{node.name}.weight",
            weight_OIHW.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)),
        )
        act = node.act
        # relu6(x + 3) / 6, for which TFLite has no operator: the convolution takes the
        # first two steps
        if act == "hsig":
            act, bias_O = "relu6", bias_O + 3.0
        bias = self.constant(f"{node.name}.bias", bias_O)
        if not _same_padding(node):
            x = self._padded(x, node)
        if depthwise:
            code, version = "DEPTHWISE_CONV_2D", 1 if node.dilation == 1 else 2
        else:
            code, version = "CONV_2D", 1 if node.groups == 1 else 6
        shape = (1, node.out_size, node.out_size, node.out_ch)
        x = self.operator(
            code, node.name, [x, weight, bias], shape, _conv_options(node, act), version=version
        )
        if node.act == "hsig":
            return self._times(x, f"{node.name}.sixth", 1 / 6)
        return x if act in _FUSED else self.act(x, f"{node.name}.act", act)

    def _padded(self, x: int, node: Node) -> int:
        """PAD, by as much on every side as PyTorch."""
        pad = _padding(node)
        if pad == 0:
            return x
        padded = node.size + 2 * pad
        pads = self.constant(
            f"{node.name}.pads", np.array([[0, 0], [pad, pad], [pad, pad], [0, 0]], np.int32)
        )
        return self.operator(
            "PAD",
            f"{node.name}.pad",
            [x, pads],
            (1, padded, padded, node.in_ch),
            schema.PadOptionsT(),
        )

    def linear(self, x: int, name: str, weight_OI: Numbers, bias_O: Numbers) -> int:
        """FULLY_CONNECTED."""
        weight, bias = (
            self.constant(f"{name}.weight", weight_OI),
            self.constant(f"{name}.bias", bias_O),
        )
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        return self.operator(
            "FULLY_CONNECTED", name, [x, weight, bias], (1, len(bias_O)), options, version=5
        )

    def pool(self, x: int, node: Node) -> int:
        """AVERAGE_POOL_2D or MAX_POOL_2D where SAME or VALID is PyTorch's padding.

        Elsewhere the border is made first: for a maximum the first rows and columns
        once more, which no maximum notices, as their window holds them anyway; for an
        average PAD with zeros, and the quotient of all cells and those inside for each
        window.
        """
        options = schema.Pool2DOptionsT()
        options.filterHeight = options.filterWidth = node.kernel
        options.strideH = options.strideW = node.stride
        same = _same_padding(node)
        options.padding = schema.Padding.SAME if same and _padding(node) else schema.Padding.VALID
        shape = (1, node.out_size, node.out_size, node.out_ch)
        code = "AVERAGE_POOL_2D" if node.kind == "avgpool" else "MAX_POOL_2D"
        if same or _padding(node) == 0:
            return self.operator(code, node.name, [x], shape, options)
        if node.kind == "maxpool":
            for axis in (_HEIGHT, _WIDTH):
                x = self._repeated(x, node, axis)
            return self.operator(code, node.name, [x], shape, options)
        x = self.operator(code, node.name, [self._padded(x, node)], shape, options)
        counts = self.constant(f"{node.name}.counts", _uncounted_padding(node)[None, :, :, None])
        return self.operator(
            "MUL", f"{node.name}.counted", [x, counts], shape, schema.MulOptionsT()
        )

    def _repeated(self, x: int, node: Node, axis: int) -> int:
        """As many of the first and last rows or columns as windows reach beyond them,
        once more: SLICE, CONCATENATION.
        """
        before = _padding(node)
        behind = (node.out_size - 1) * node.stride + node.kernel - node.size - before
        parts = [x]
        for rows, begin in ((before, 0), (behind, node.size - behind)):
            if rows > 0:
                starts, size = [0, 0, 0, 0], list(self.shape(x))
                starts[axis], size[axis] = begin, rows
                border = self._slice(x, f"{node.name}.{axis}.{begin}", starts, size)
                parts = [border, *parts] if begin == 0 else [*parts, border]
        return self.concatenated(f"{node.name}.{axis}", parts, axis)

    def scaled(self, x: int, node: Node, scale_C: Numbers, shift_C: Numbers) -> int:
        """MUL, ADD."""
        scale, shift = (
            self.constant(f"{node.name}.scale", scale_C),
            self.constant(f"{node.name}.shift", shift_C),
        )
        x = self.operator(
            "MUL", f"{node.name}.scaled", [x, scale], self.shape(x), schema.MulOptionsT()
        )
        options = schema.AddOptionsT()
        options.fusedActivationFunction = _FUSED.get(node.act, schema.ActivationFunctionType.NONE)
        x = self.operator("ADD", f"{node.name}.norm", [x, shift], self.shape(x), options)
        return x if node.act in _FUSED else self.act(x, f"{node.name}.act", node.act)

    def along_channels(self, x: int, node: Node, kernel_K: Numbers) -> int:
        """RESHAPE to a row of channels, CONV_2D, RESHAPE, and the activation."""
        channels = self.shape(x)[-1]
        row, name = (1, 1, channels, 1), node.name
        x = self._reshape(f"{name}.row", x, row)
        weight = self.constant(f"{name}.weight", kernel_K[None, None, :, None])
        bias = self.constant(f"{name}.bias", np.zeros(1))
        options = schema.Conv2DOptionsT()
        options.strideH = options.strideW = 1
        options.padding = schema.Padding.SAME
        x = self.operator("CONV_2D", name, [x, weight, bias], row, options)
        return self.act(
            self._reshape(f"{name}.pixel", x, (1, 1, 1, channels)), f"{name}.act", node.act
        )

    def act(self, x: int, name: str, act: str) -> int:
        """The operator of an activation, or the operators."""
        if act == "none":
            return x
        if act == "silu":
            return self.mul(
                x, self.operator("LOGISTIC", f"{name}.sigmoid", [x], self.shape(x)), name
            )
        if act == "hsig":
            options = schema.AddOptionsT()
            options.fusedActivationFunction = schema.ActivationFunctionType.RELU6
            three = self.constant(f"{name}.three", np.array(3.0))
            return self._times(
                self.operator("ADD", f"{name}.add", [x, three], self.shape(x), options), name, 1 / 6
            )
        return self.operator(_ACTS[act], name, [x], self.shape(x))

    def _times(self, x: int, name: str, factor: float) -> int:
        """MUL by a number."""
        return self.operator(
            "MUL",
            name,
            [x, self.constant(f"{name}.factor", np.array(factor))],
            self.shape(x),
            schema.MulOptionsT(),
        )

    def shuffle(self, x: int, name: str, groups: int) -> int:
        """RESHAPE, TRANSPOSE, RESHAPE."""
        *image, channels = self.shape(x)
        apart, swapped = (*image, groups, channels // groups), (*image, channels // groups, groups)
        x = self._reshape(f"{name}.groups", x, apart)
        order = self.constant(f"{name}.order", np.array([0, 1, 2, 4, 3], np.int32))
        x = self.operator("TRANSPOSE", f"{name}.swapped", [x, order], swapped, version=4)
        return self._reshape(name, x, (*image, channels))

    def mean(self, x: int, name: str, *, flat: bool) -> int:
        """MEAN; of one pixel nothing, or SUM where it is flattened."""
        _, height, width, channels = self.shape(x)
        if height == width == 1 and not flat:
            return x
        options = schema.ReducerOptionsT()
        options.keepDims = not flat
        axes = self.constant(f"{name}.axes", np.array([_HEIGHT, _WIDTH], np.int32))
        shape = (1, channels) if flat else (1, 1, 1, channels)
        return self.operator(
            "SUM" if height == width == 1 else "MEAN", name, [x, axes], shape, options
        )

    def add(self, x: int, y: int, name: str) -> int:
        """ADD."""
        return self.operator("ADD", name, [x, y], self.shape(y), schema.AddOptionsT())

    def mul(self, x: int, gate: int, name: str) -> int:
        """MUL."""
        return self.operator("MUL", name, [x, gate], self.shape(x), schema.MulOptionsT())

    def crop(self, x: int, name: str) -> int:
        """SLICE."""
        batch, height, width, channels = self.shape(x)
        return self._slice(x, name, [0, 1, 1, 0], [batch, height - 1, width - 1, channels])

    def channels_joined(self, parts: Sequence[int], name: str) -> int:
        """CONCATENATION."""
        return self.concatenated(name, parts, _CHANNELS)

    def first_channels(self, x: int, name: str, channels: int) -> int:
        """SLICE."""
        return self._slice(x, name, [0, 0, 0, 0], [*self.shape(x)[:-1], channels])

    def zeros(self, name: str, channels: int, size: int) -> int:
        """A constant."""
        return self.constant(name, np.zeros((1, size, size, channels)))

    def _slice(self, x: int, name: str, begin: Sequence[int], size: Sequence[int]) -> int:
        starts, sizes = (
            self.constant(f"{name}.begin", np.array(begin, np.int32)),
            self.constant(f"{name}.size", np.array(size, np.int32)),
        )
        return self.operator("SLICE", name, [x, starts, sizes], tuple(size), schema.SliceOptionsT())

    def _reshape(self, name: str, x: int, shape: tuple[int, ...]) -> int:
        return self.operator(
            "RESHAPE", name, [x, self.constant(f"{name}.shape", np.array(shape, np.int32))], shape
        )


def _conv_options(node: Node, act: str) -> Any:
    options = schema.DepthwiseConv2DOptionsT() if _depthwise(node) else schema.Conv2DOptionsT()
    if _depthwise(node):
        options.depthMultiplier = node.out_ch // node.in_ch
    options.strideH = options.strideW = node.stride
    options.dilationHFactor = options.dilationWFactor = node.dilation
    options.padding = (
        schema.Padding.SAME if _padding(node) and _same_padding(node) else schema.Padding.VALID
    )
    options.fusedActivationFunction = _FUSED.get(act, schema.ActivationFunctionType.NONE)
    return options


def _depthwise(node: Node) -> bool:
    return node.groups == node.in_ch


def _padding(node: Node) -> int:
    """How much PyTorch pads every side: nothing for pooling with even kernels."""
    return node.dilation * (node.kernel // 2) if node.kernel % 2 else 0


def _same_padding(node: Node) -> bool:
    """Whether TFLite's SAME puts as much on every side as PyTorch. At stride 2 it does
    on odd images only.
    """
    covered = (node.out_size - 1) * node.stride + node.dilation * (node.kernel - 1) + 1
    return max(0, covered - node.size) == 2 * _padding(node)


def _uncounted_padding(node: Node) -> Numbers:
    """All cells of a window / those inside the image, for every window [out_size, out_size]."""
    starts = np.arange(node.out_size) * node.stride - _padding(node)
    inside = np.minimum(starts + node.kernel, node.size) - np.maximum(starts, 0)
    quotients: Numbers = node.kernel**2 / np.outer(inside, inside)
    return quotients
