"""Writes ops and networks directly as TFLite files, without a converter.

litert-torch takes 1 to 2 s to convert a block; this takes 1 ms (see ``block_writer``).
The graph is the same as that of ``convert.to_tflite``, operator by operator, and the
tests compare the two. It is float32, channels-last, with batch size 1:

- batch norms are folded into weights and biases in float64. ReLU and ReLU6 are fused,
  and HARD_SWISH follows its layer;
- padding is SAME if TFLite's SAME pads as PyTorch does, by kernel // 2 on every side.
  Otherwise it is PAD and VALID;
- a convolution in which each input channel has its own filters is DEPTHWISE_CONV_2D,
  even with one input channel;
- the mean over a 1 x 1 map is left out in squeeze-and-excitation and in heads, and
  becomes a SUM before the classifier;
- the predictions of a detector are a RESHAPE of each map, and a CONCATENATION;
- a hard sigmoid adds 3 to the bias of the preceding convolution, applies RELU6 in it,
  and is completed by a MUL by 1/6.

*Difference from the converter*: a separate classifier or head has no TRANSPOSE before
the MEAN. The converter adds it only there and never inside a network, and a table must
contain the cost inside networks.

Schema: tensorflow/lite/schema/schema.fbs, version 3. Every operator code has the lowest
version that allows its use in the file. That is 1, except 2 for DEPTHWISE_CONV_2D with
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
    """Write a network as a float32 TFLite file with the input ``image`` [1, size, size,
    channels] and the output ``logits`` [1, classes].

    A detector has two outputs: ``logits`` [1, anchors, classes + 1], with the background
    first, and ``codes`` [1, anchors, 4].

    The file computes what the network computes in eval mode; the network itself stays
    unchanged. The same weights give the same bytes. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> len(write_tflite(ClassificationNetwork(published("mobilenet_v2")))) // 1_000_000  # MB
    13
    """
    graph = _Writer()
    size = network.arch.resolution
    entry = graph.tensor(IMAGE, (1, size, size, network.arch.in_channels))
    outputs = graph.network(entry, network)
    names = (LOGITS, "codes")[: len(outputs)]
    return graph.pack(entry, *graph.named(names, outputs))


def write_op(op: Op, module: nn.Module) -> bytes:
    """Write one op as a float32 TFLite file with the input ``input`` [1, size, size, in_ch].

    ``module`` is the result of ``hwnas.nn.blocks.build(op)``, with any weights. The output
    ``output`` is [1, out_size, out_size, out_ch], or [1, out_ch] for a classifier.
    Detector heads (``ssd``) have the outputs ``classes`` and ``boxes`` instead. Takes
    about 1 ms.

    Raises ExportError if ``module`` was not built from ``op``.

    >>> from hwnas.nn.blocks import build
    >>> op = Op.parse("conv-h8-i3-o4-k3-s2-relu6")
    >>> write_op(op, build(op))[4:8]
    b'TFL3'
    """
    graph = _Writer()
    entry = graph.tensor("input", (1, op.size, op.size, op.in_ch))
    outputs = graph.block(entry, op, module)
    names = ("classes", "boxes") if len(outputs) > 1 else ("output",)
    return graph.pack(entry, *graph.named(names, outputs))


def write_heads(network: DetectionNetwork) -> bytes:
    """Write the raw predictions of a detector as a float32 TFLite file with the input
    ``image`` [1, size, size, channels]. Its outputs are the class logits and the box codes
    of each map, alternating.

    They are [1, size, size, anchors * (classes + 1)] and [1, size, size, anchors * 4], in
    the order of the rows of ``DetectionNetwork``. Each is a tensor of its own, so that a
    quantizer need not find one scale for all maps.
    """
    graph = _Writer()
    size = network.arch.resolution
    entry = graph.tensor(IMAGE, (1, size, size, network.arch.in_channels))
    exits = []
    for classes, boxes in graph.predictions(entry, network):
        exits += [classes, boxes]
    return graph.pack(entry, *exits)


class _Writer(Graph, BlockWriter[int]):
    """Translates programs into TFLite operators."""

    def conv(self, x: int, node: Node, weight_OIHW: Numbers, bias_O: Numbers) -> int:
        """PAD if needed, [DEPTHWISE_]CONV_2D, and the activation if it cannot be fused."""
        depthwise = _depthwise(node)
        # TFLite's layouts: 1HWO for depthwise convolutions, OHWI for others
        axes = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        weight = self.constant(f"{node.name}.weight", weight_OIHW.transpose(axes))
        act = node.act
        # TFLite has no operator for relu6(x + 3) / 6. The convolution computes all of it
        # except the division.
        if act == "hsig":
            act = "relu6"
            bias_O = bias_O + 3.0
        bias = self.constant(f"{node.name}.bias", bias_O)
        if not _same_padding(node):
            x = self._padded(x, node)
        if depthwise:
            code = "DEPTHWISE_CONV_2D"
            version = 1 if node.dilation == 1 else 2
        else:
            code = "CONV_2D"
            version = 1 if node.groups == 1 else 6
        shape = (1, node.out_size, node.out_size, node.out_ch)
        options = _conv_options(node, act)
        x = self.operator(code, node.name, [x, weight, bias], shape, options, version=version)
        if node.act == "hsig":
            return self._times(x, f"{node.name}.sixth", 1 / 6)
        if act in _FUSED:
            return x
        return self.act(x, f"{node.name}.act", act)

    def _padded(self, x: int, node: Node) -> int:
        """PAD every side as PyTorch does."""
        pad = _padding(node)
        if pad == 0:
            return x
        padded = node.size + 2 * pad
        per_side = np.array([[0, 0], [pad, pad], [pad, pad], [0, 0]], np.int32)
        pads = self.constant(f"{node.name}.pads", per_side)
        shape = (1, padded, padded, node.in_ch)
        return self.operator("PAD", f"{node.name}.pad", [x, pads], shape, schema.PadOptionsT())

    def linear(self, x: int, name: str, weight_OI: Numbers, bias_O: Numbers) -> int:
        """FULLY_CONNECTED."""
        weight = self.constant(f"{name}.weight", weight_OI)
        bias = self.constant(f"{name}.bias", bias_O)
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        return self.operator(
            "FULLY_CONNECTED", name, [x, weight, bias], (1, len(bias_O)), options, version=5
        )

    def pool(self, x: int, node: Node) -> int:
        """AVERAGE_POOL_2D or MAX_POOL_2D, directly if SAME or VALID is PyTorch's padding.

        Otherwise the border is added first. For a maximum, it repeats the outer rows and
        columns, which cannot change the result, as each window contains them already. For
        an average, it is PAD with zeros, and each window is then multiplied by the ratio
        of all its cells to those inside the image.
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
        ratios = _padding_ratios(node)[None, :, :, None]
        counts = self.constant(f"{node.name}.counts", ratios)
        return self.operator(
            "MUL", f"{node.name}.counted", [x, counts], shape, schema.MulOptionsT()
        )

    def _repeated(self, x: int, node: Node, axis: int) -> int:
        """Repeat the outer rows or columns, as many on either side as windows reach beyond
        the image: SLICE, CONCATENATION.
        """
        before = _padding(node)
        behind = (node.out_size - 1) * node.stride + node.kernel - node.size - before
        parts = [x]
        for count, begin in ((before, 0), (behind, node.size - behind)):
            if count > 0:
                starts = [0, 0, 0, 0]
                starts[axis] = begin
                size = list(self.shape(x))
                size[axis] = count
                border = self._slice(x, f"{node.name}.{axis}.{begin}", starts, size)
                parts = [border, *parts] if begin == 0 else [*parts, border]
        return self.concatenated(f"{node.name}.{axis}", parts, axis)

    def scaled(self, x: int, node: Node, scale_C: Numbers, shift_C: Numbers) -> int:
        """MUL, ADD, and the activation if it cannot be fused."""
        scale = self.constant(f"{node.name}.scale", scale_C)
        shift = self.constant(f"{node.name}.shift", shift_C)
        x = self.operator(
            "MUL", f"{node.name}.scaled", [x, scale], self.shape(x), schema.MulOptionsT()
        )
        options = schema.AddOptionsT()
        options.fusedActivationFunction = _FUSED.get(node.act, schema.ActivationFunctionType.NONE)
        x = self.operator("ADD", f"{node.name}.norm", [x, shift], self.shape(x), options)
        if node.act in _FUSED:
            return x
        return self.act(x, f"{node.name}.act", node.act)

    def along_channels(self, x: int, node: Node, kernel_K: Numbers) -> int:
        """RESHAPE to a row of channels, CONV_2D, RESHAPE, and the activation."""
        channels = self.shape(x)[-1]
        row = (1, 1, channels, 1)
        name = node.name
        x = self._reshape(f"{name}.row", x, row)
        weight = self.constant(f"{name}.weight", kernel_K[None, None, :, None])
        bias = self.constant(f"{name}.bias", np.zeros(1))
        options = schema.Conv2DOptionsT()
        options.strideH = options.strideW = 1
        options.padding = schema.Padding.SAME
        x = self.operator("CONV_2D", name, [x, weight, bias], row, options)
        x = self._reshape(f"{name}.pixel", x, (1, 1, 1, channels))
        return self.act(x, f"{name}.act", node.act)

    def act(self, x: int, name: str, act: str) -> int:
        """The operator or operators of an activation."""
        if act == "none":
            return x
        if act == "silu":
            gate = self.operator("LOGISTIC", f"{name}.sigmoid", [x], self.shape(x))
            return self.mul(x, gate, name)
        if act == "hsig":
            options = schema.AddOptionsT()
            options.fusedActivationFunction = schema.ActivationFunctionType.RELU6
            three = self.constant(f"{name}.three", np.array(3.0))
            x = self.operator("ADD", f"{name}.add", [x, three], self.shape(x), options)
            return self._times(x, name, 1 / 6)
        return self.operator(_ACTS[act], name, [x], self.shape(x))

    def _times(self, x: int, name: str, factor: float) -> int:
        """MUL by a number."""
        constant = self.constant(f"{name}.factor", np.array(factor))
        return self.operator("MUL", name, [x, constant], self.shape(x), schema.MulOptionsT())

    def shuffle(self, x: int, name: str, groups: int) -> int:
        """RESHAPE, TRANSPOSE, RESHAPE."""
        *image, channels = self.shape(x)
        grouped = (*image, groups, channels // groups)
        swapped = (*image, channels // groups, groups)
        x = self._reshape(f"{name}.groups", x, grouped)
        order = self.constant(f"{name}.order", np.array([0, 1, 2, 4, 3], np.int32))
        x = self.operator("TRANSPOSE", f"{name}.swapped", [x, order], swapped, version=4)
        return self._reshape(name, x, (*image, channels))

    def mean(self, x: int, name: str, *, flat: bool) -> int:
        """MEAN. For a single pixel, SUM with ``flat``, and nothing otherwise."""
        _, height, width, channels = self.shape(x)
        is_pixel = height == width == 1
        if is_pixel and not flat:
            return x
        options = schema.ReducerOptionsT()
        options.keepDims = not flat
        axes = self.constant(f"{name}.axes", np.array([_HEIGHT, _WIDTH], np.int32))
        shape = (1, channels) if flat else (1, 1, 1, channels)
        return self.operator("SUM" if is_pixel else "MEAN", name, [x, axes], shape, options)

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
        starts = self.constant(f"{name}.begin", np.array(begin, np.int32))
        sizes = self.constant(f"{name}.size", np.array(size, np.int32))
        return self.operator("SLICE", name, [x, starts, sizes], tuple(size), schema.SliceOptionsT())

    def _reshape(self, name: str, x: int, shape: tuple[int, ...]) -> int:
        target_shape = self.constant(f"{name}.shape", np.array(shape, np.int32))
        return self.operator("RESHAPE", name, [x, target_shape], shape)


def _conv_options(node: Node, act: str) -> Any:
    options: Any = schema.Conv2DOptionsT()
    if _depthwise(node):
        options = schema.DepthwiseConv2DOptionsT()
        options.depthMultiplier = node.out_ch // node.in_ch
    options.strideH = options.strideW = node.stride
    options.dilationHFactor = options.dilationWFactor = node.dilation
    # SAME and VALID are equal without padding.
    is_same = _padding(node) and _same_padding(node)
    options.padding = schema.Padding.SAME if is_same else schema.Padding.VALID
    options.fusedActivationFunction = _FUSED.get(act, schema.ActivationFunctionType.NONE)
    return options


def _depthwise(node: Node) -> bool:
    return node.groups == node.in_ch


def _padding(node: Node) -> int:
    """How much PyTorch pads each side. Pooling with even kernels has no padding."""
    return node.dilation * (node.kernel // 2) if node.kernel % 2 else 0


def _same_padding(node: Node) -> bool:
    """Whether TFLite's SAME pads each side as PyTorch does. With stride 2, that is the case
    only for odd image sizes.
    """
    covered = (node.out_size - 1) * node.stride + node.dilation * (node.kernel - 1) + 1
    return max(0, covered - node.size) == 2 * _padding(node)


def _padding_ratios(node: Node) -> Numbers:
    """The number of all cells of a window divided by that of its cells inside the image,
    [out_size, out_size].
    """
    starts = np.arange(node.out_size) * node.stride - _padding(node)
    inside = np.minimum(starts + node.kernel, node.size) - np.maximum(starts, 0)
    quotients: Numbers = node.kernel**2 / np.outer(inside, inside)
    return quotients
