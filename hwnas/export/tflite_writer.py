"""Writes ops and networks directly as TFLite files, without a converter.

litert-torch takes 1 to 2 s to convert a block; this takes 1 ms (see ``block_writer``).
The graph is that of ``convert.to_tflite``, operator by operator, with the one exception
below; the tests compare the two. It is float32, channels-last, with batch size 1:

- batch norms are folded into weights and biases in float64. ReLU and ReLU6 are fused,
  and HARD_SWISH follows its layer;
- padding is SAME where TFLite's SAME pads every side as PyTorch does (by kernel // 2).
  Elsewhere it is a PAD, followed by the operator with VALID;
- a convolution in which each input channel has its own filters is DEPTHWISE_CONV_2D,
  even with one input channel;
- the mean over a 1 x 1 map is left out in squeeze-and-excitation and in heads, and
  becomes a SUM before the classifier;
- the predictions of a detector are a RESHAPE of each map, and a CONCATENATION;
- a hard sigmoid after a convolution is computed by the convolution, with 3 added to its
  bias and a fused RELU6, and a MUL by 1/6. Elsewhere, an ADD of 3 with a fused RELU6
  takes the place of the convolution.

*The exception*: the converter adds a TRANSPOSE before the MEAN of a classifier or head,
but only if the file contains nothing else. Here, such a file has none, because a
latency table must contain what an op costs inside a network.

Schema: tensorflow/lite/schema/schema.fbs, version 3. Every operator code has the lowest
version that allows its use in the file. That is 1, except 2 for DEPTHWISE_CONV_2D with
dilation, 3 for RESIZE_BILINEAR with half-pixel centres, 4 for TRANSPOSE in five dimensions, 5 for FULLY_CONNECTED with kept dimensions
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
from hwnas.core.size import sides
from hwnas.export.block_writer import BlockWriter, Numbers
from hwnas.export.names import IMAGE, LOGITS
from hwnas.export.tflite_file import TFLiteGraph
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

    A detector has two outputs: ``logits`` [1, anchors, classes], with SSDLite [1,
    anchors, classes + 1] with the background first, and ``codes`` [1, anchors, 4].

    The file computes what the network computes in eval mode; the network itself stays
    unchanged. The same weights give the same bytes. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> from hwnas.nn.classifier import ClassificationNetwork
    >>> network = ClassificationNetwork(published("mobilenet_v2"))
    >>> len(write_tflite(network)) // 1_000_000  # MB
    13
    """
    graph = _Writer()
    entry = graph.tensor(IMAGE, (1, *network.arch.size_HW, network.arch.in_channels))
    outputs = graph.network(entry, network)
    names = (LOGITS, "codes")[: len(outputs)]
    return graph.pack(entry, *graph.rename_tensors(names, outputs))


def write_op(op: Op, module: nn.Module) -> bytes:
    """Write one op as a float32 TFLite file with the input ``input`` [1, size, size,
    in_ch].

    ``module`` is the result of ``hwnas.nn.blocks.build(op)``, with any weights. The
    output ``output`` is [1, out_size, out_size, out_ch], or [1, out_ch] for a
    classifier. Detector heads (``ssd``) have the outputs ``classes`` and ``boxes``
    instead. Takes about 1 ms.

    Raises ExportError if ``module`` was not built from ``op``.

    >>> from hwnas.nn.blocks import build
    >>> op = Op.parse("conv-h8-i3-o4-k3-s2-relu6")
    >>> write_op(op, build(op))[4:8]
    b'TFL3'
    """
    graph = _Writer()
    entry = graph.tensor("input", (1, *sides(op.size), op.in_ch))
    outputs = graph.block(entry, op, module)
    names = ("classes", "boxes") if len(outputs) > 1 else ("output",)
    return graph.pack(entry, *graph.rename_tensors(names, outputs))


def write_heads(network: DetectionNetwork) -> bytes:
    """Write the raw predictions of a detector as a float32 TFLite file with the input
    ``image`` [1, size, size, channels]. Its outputs are the class logits and the box
    codes of each map, alternating.

    They are [1, size, size, anchors * logits] and [1, size, size, anchors * 4], in the
    order of the rows of ``DetectionNetwork``. Each is a separate tensor, so that a
    quantizer can choose a scale for each map.
    """
    graph = _Writer()
    entry = graph.tensor(IMAGE, (1, *network.arch.size_HW, network.arch.in_channels))
    outputs = []
    for classes, boxes in graph.predictions(entry, network):
        outputs += [classes, boxes]
    return graph.pack(entry, *outputs)


class _Writer(TFLiteGraph, BlockWriter[int]):
    """Translates programs into TFLite operators. The docstring of each method lists the
    operators that it emits.
    """

    def conv(self, x: int, node: Node, weight_OIHW: Numbers, bias_O: Numbers) -> int:
        """PAD if needed, [DEPTHWISE_]CONV_2D, and the activation if it
        cannot be fused.
        """
        depthwise = _separate_filters(node)
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
        shape = (1, *sides(node.out_size), node.out_ch)
        options = _conv_options(node, act)
        x = self.operator(code, node.name, [x, weight, bias], shape, options, version=version)
        if node.act == "hsig":
            return self._times(x, f"{node.name}.sixth", 1 / 6)
        if act in _FUSED:
            return x
        return self.act(x, f"{node.name}.act", act)

    def _padded(self, x: int, node: Node) -> int:
        """PAD with zeros on every side, as PyTorch does; nothing without padding."""
        pad = _padding(node)
        if pad == 0:
            return x
        per_side = np.array([[0, 0], [pad, pad], [pad, pad], [0, 0]], np.int32)
        pads = self.constant(f"{node.name}.pads", per_side)
        height, width = sides(node.size)
        shape = (1, height + 2 * pad, width + 2 * pad, node.in_ch)
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
        """AVERAGE_POOL_2D or MAX_POOL_2D, directly if SAME or VALID pads as PyTorch
        does.

        Otherwise a border is added first. For a maximum, it consists of copies of the
        outer rows and columns. They cannot change the result, because each window that
        reaches a copy contains the original as well. For an average, it consists of
        zeros (PAD). A MUL then multiplies each average by the ratio of all cells in its
        window to those inside the image, as PyTorch does not count the padding.
        """
        options = schema.Pool2DOptionsT()
        options.filterHeight = options.filterWidth = node.kernel
        options.strideH = options.strideW = node.stride
        same = _same_padding(node)
        options.padding = _padding_code(node)
        shape = (1, *sides(node.out_size), node.out_ch)
        code = "AVERAGE_POOL_2D" if node.kind == "avgpool" else "MAX_POOL_2D"
        if same or _padding(node) == 0:
            return self.operator(code, node.name, [x], shape, options)
        if node.kind == "maxpool":
            for axis in (_HEIGHT, _WIDTH):
                x = self._repeated(x, node, axis)
            return self.operator(code, node.name, [x], shape, options)
        x = self.operator(code, node.name, [self._padded(x, node)], shape, options)
        ratios = self.constant(f"{node.name}.counts", _padding_ratios(node)[None, :, :, None])
        return self.operator(
            "MUL", f"{node.name}.counted", [x, ratios], shape, schema.MulOptionsT()
        )

    def _repeated(self, x: int, node: Node, axis: int) -> int:
        """Add copies of the outer rows or columns, as many on each side as windows
        reach beyond the image: SLICE, CONCATENATION.
        """
        before = _padding(node)
        size = sides(node.size)[axis - _HEIGHT]
        out_size = sides(node.out_size)[axis - _HEIGHT]
        # from the first row of the padding to the last row of the last window
        covered = (out_size - 1) * node.stride + node.kernel
        after = covered - size - before

        parts = [x]
        if before > 0:
            parts.insert(0, self._edge(x, node, axis, begin=0, count=before))
        if after > 0:
            parts.append(self._edge(x, node, axis, begin=size - after, count=after))
        return self.concatenate(f"{node.name}.{axis}", parts, axis)

    def _edge(self, x: int, node: Node, axis: int, *, begin: int, count: int) -> int:
        """``count`` rows or columns of a map, from ``begin`` on: SLICE."""
        starts = [0, 0, 0, 0]
        starts[axis] = begin
        size = list(self.shape(x))
        size[axis] = count
        return self._slice(x, f"{node.name}.{axis}.{begin}", starts, size)

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
        """RESHAPE to a row of channels, CONV_2D along it, RESHAPE back to a pixel, and
        the activation.
        """
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
        """The operators of an activation: LOGISTIC and MUL for SiLU, ADD and MUL for a
        hard sigmoid, one operator for all others.
        """
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
        """MEAN over height and width. A single pixel needs no MEAN: SUM with ``flat``,
        which then only removes the two axes, and nothing otherwise.
        """
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
        """ADD of two maps."""
        # both have the same shape, so nothing is broadcast
        return self.operator("ADD", name, [x, y], self.shape(y), schema.AddOptionsT())

    def mul(self, x: int, gate: int, name: str) -> int:
        """MUL of a map by a gate."""
        # the gate is a single pixel and is broadcast over the map, which gives the shape
        return self.operator("MUL", name, [x, gate], self.shape(x), schema.MulOptionsT())

    def crop(self, x: int, name: str) -> int:
        """SLICE without the first row and the first column."""
        batch, height, width, channels = self.shape(x)
        return self._slice(x, name, [0, 1, 1, 0], [batch, height - 1, width - 1, channels])

    def upsample(self, x: int, name: str) -> int:
        """RESIZE_BILINEAR with half-pixel centres."""
        batch, height, width, channels = self.shape(x)
        shape = (batch, 2 * height, 2 * width, channels)
        options = schema.ResizeBilinearOptionsT()
        options.halfPixelCenters = True
        size = self.constant(f"{name}.size", np.array(shape[1:3], np.int32))
        return self.operator("RESIZE_BILINEAR", name, [x, size], shape, options, version=3)

    def channels_joined(self, parts: Sequence[int], name: str) -> int:
        """CONCATENATION along the channels."""
        return self.concatenate(name, parts, _CHANNELS)

    def first_channels(self, x: int, name: str, channels: int) -> int:
        """SLICE of the first ``channels`` channels."""
        return self._slice(x, name, [0, 0, 0, 0], [*self.shape(x)[:-1], channels])

    def zeros(self, name: str, channels: int, size: int) -> int:
        """A constant map of zeros; no operator."""
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
    if _separate_filters(node):
        options = schema.DepthwiseConv2DOptionsT()
        options.depthMultiplier = node.out_ch // node.in_ch
    options.strideH = options.strideW = node.stride
    options.dilationHFactor = options.dilationWFactor = node.dilation
    options.padding = _padding_code(node)
    options.fusedActivationFunction = _FUSED.get(act, schema.ActivationFunctionType.NONE)
    return options


def _separate_filters(node: Node) -> bool:
    """Whether each input channel has its own filters. Unlike ``Node.depthwise``, this
    allows several filters per channel and a single input channel.
    """
    return node.groups == node.in_ch


def _padding(node: Node) -> int:
    """By how many cells PyTorch pads each side. Pooling with even kernels has no
    padding.
    """
    return node.dilation * (node.kernel // 2) if node.kernel % 2 else 0


def _padding_code(node: Node) -> Any:
    """SAME if TFLite has to pad, else VALID."""
    # Without padding, SAME and VALID compute the same; the converter writes VALID.
    if _padding(node) > 0 and _same_padding(node):
        return schema.Padding.SAME
    return schema.Padding.VALID


def _same_padding(node: Node) -> bool:
    """Whether TFLite's SAME pads each side as PyTorch does, which includes that neither
    pads at all. With padding and stride 2, this holds only for odd image sizes.
    """
    for size, out_size in zip(sides(node.size), sides(node.out_size), strict=True):
        # from the first cell of the first window to the last cell of the last one
        covered = (out_size - 1) * node.stride + node.dilation * (node.kernel - 1) + 1
        if max(0, covered - size) != 2 * _padding(node):
            return False
    return True


def _padding_ratios(node: Node) -> Numbers:
    """For each window, the number of its cells divided by the number of those inside
    the image: [output height, output width].
    """
    inside = []
    for size, out_size in zip(sides(node.size), sides(node.out_size), strict=True):
        starts = np.arange(out_size) * node.stride - _padding(node)
        inside.append(np.minimum(starts + node.kernel, size) - np.maximum(starts, 0))
    ratios: Numbers = node.kernel**2 / np.outer(*inside)
    return ratios
