"""Ops and networks written straight into TFLite files, without a converter.

litert-torch converts a block in 1 to 2 s; this takes 1 ms (``block_writer`` says what for). The graph is the one that
``tflite.to_tflite`` makes, operator by operator (its tests judge this one by it), in float32, channels-last, batch 1:

- batch norms are folded into weights and biases, in float64; ReLU and ReLU6 are fused, HARD_SWISH follows its layer;
- where TFLite's SAME pads as PyTorch does, kernel // 2 on every side, it is SAME; else PAD and VALID;
- where each input channel has its own filters, it is DEPTHWISE_CONV_2D, even with one input channel;
- the mean over a 1 x 1 map vanishes inside squeeze-and-excitation and a head, and becomes a SUM before the classifier;
- predictions of a detector are a RESHAPE of each map, and a CONCATENATION of them all;
- a hard sigmoid is a bias of 3 more and RELU6 in the convolution before it, and a MUL by 1/6.

*Difference from the converter*: a classifier or head on its own has no TRANSPOSE before the MEAN. The converter adds it only
there, never inside a network, and a table must hold what networks cost.

Schema: tensorflow/lite/schema/schema.fbs, version 3. Every operator code has the lowest version that allows what the file uses it
for: 1, but 4 for TRANSPOSE in five dimensions, 5 for FULLY_CONNECTED with kept dimensions and 6 for grouped CONV_2D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from hwnas import __version__
from hwnas.core.op import Layer, Op
from hwnas.export.block_writer import BlockWriter, folded
from hwnas.export.names import IMAGE, LOGITS
from hwnas.export.tflite_file import read_model, write_model
from hwnas.nn.detector import JOINED, DetectionNetwork
from hwnas.nn.network import AnyNetwork

_SCHEMA_VERSION = 3
_HEIGHT, _WIDTH = 1, 2
_FUSED = {
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}


def write_tflite(network: AnyNetwork) -> bytes:
    """The float32 TFLite file of a network: ``image`` [1, size, size, channels] in, ``logits`` [1, classes] out.

    A detector has two outputs: ``logits`` [1, anchors, classes + 1], the background first, and ``codes`` [1, anchors, 4].

    BN statistics are those it has now, as in eval mode; the network itself is left untouched. The same weights give
    the same bytes. Takes about 40 ms for MobileNetV2.

    >>> from hwnas.core.spaces import published
    >>> len(write_tflite(Network(published("mobilenet_v2")))) // 1_000_000  # MB
    13
    """
    ops, graph = network.arch.ops(), _Writer()
    entry = graph.tensor(IMAGE, (1, ops[0].size, ops[0].size, ops[0].in_ch))
    if isinstance(network, DetectionNetwork):
        return graph.pack(entry, *graph.named((LOGITS, "codes"), graph.detector(entry, network)))
    return graph.pack(entry, *graph.named((LOGITS,), (graph.chain(entry, ops, list(network.blocks)),)))


def write_op(op: Op, module: nn.Module) -> bytes:
    """The float32 TFLite file of one op: ``input`` [1, size, size, in_ch] in, ``output`` out.

    ``module`` is what ``hwnas.nn.blocks.build(op)`` returned, with any weights. ``output`` is
    [1, out_size, out_size, out_ch], and [1, out_ch] for a classifier. Predictors (``ssd``) have two: ``classes`` and ``boxes``.
    Takes about 1 ms.

    Raises ExportError where ``module`` does not belong to ``op``.

    >>> from hwnas.nn.blocks import build
    >>> op = Op.parse("conv-h8-i3-o4-k3-s2-relu6")
    >>> write_op(op, build(op))[4:8]
    b'TFL3'
    """
    graph = _Writer()
    entry = graph.tensor("input", (1, op.size, op.size, op.in_ch))
    if op.kind == "ssd":
        return graph.pack(entry, *graph.named(("classes", "boxes"), graph.predictors(entry, op, module)))
    return graph.pack(entry, *graph.named(("output",), (graph.chain(entry, [op], [module]),)))


def write_heads(network: DetectionNetwork) -> bytes:
    """The float32 TFLite file of a detector's raw predictions: ``image`` in; of each map, its class logits and its box codes out.

    They are [1, size, size, anchors * (classes + 1)] and [1, size, size, anchors * 4], an image of rows as ``DetectionNetwork`` has
    them, and have names and scales of their own, so that a quantizer need not find one scale for all maps.
    """
    graph = _Writer()
    entry = graph.tensor(IMAGE, (1, network.arch.resolution, network.arch.resolution, network.arch.in_channels))
    return graph.pack(entry, *(exit_ for pair in graph.predictions(entry, network) for exit_ in pair))


class Graph:
    """A TFLite graph under construction. Tensors are known by their index; names are unique, as the quantizer needs."""

    scope = ""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        # The schema keeps buffer 0 empty, for the tensors that only exist while the graph runs.
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        self._versions: dict[str, int] = {}  # of each operator code, the highest that is needed

    @classmethod
    def opened(cls, model: bytes) -> tuple[Self, int, list[int]]:
        """The graph of a file, to go on with; its only input, and its outputs. Metadata are left out."""
        parsed, opened = read_model(model), cls()
        [graph] = parsed.subgraphs
        codes = [(_code_name(code), code.version) for code in parsed.operatorCodes]
        for name, version in codes:
            opened._versions[name] = max(version, opened._versions.get(name, 1))
        opened.tensors, opened._operators = graph.tensors, graph.operators
        for operator in opened._operators:
            operator.opcodeIndex = list(opened._versions).index(codes[operator.opcodeIndex][0])
        for tensor in opened.tensors:
            tensor.name = tensor.name.decode()
        opened._buffers += parsed.buffers[1:]
        [entry] = graph.inputs
        return opened, int(entry), [int(exit_) for exit_ in graph.outputs]

    def cut(self, scope: str) -> list[int]:
        """Leave out the operators with names of ``scope``, which are the last; return the tensors that they took from the others."""
        first = next(i for i, tensor in enumerate(self.tensors) if tensor.name.startswith(scope))
        ours = [operator for operator in self._operators if min(operator.outputs) < first]
        used = [int(i) for operator in self._operators[len(ours) :] for i in operator.inputs if i < first]
        self.tensors, self._operators = self.tensors[:first], ours
        return list(dict.fromkeys(used))

    def lead(self, count: int, entry: int, exit_: int) -> None:
        """Move the last ``count`` operators, from ``entry`` to ``exit_``, before the others, which then take ``exit_`` for ``entry``."""
        leading, others = self._operators[-count:], self._operators[:-count]
        self._retake(others, entry, exit_)
        self._operators = [*leading, *others]

    def drop_lead(self, count: int, entry: int) -> None:
        """Leave out the first ``count`` operators, which ``lead`` put there; the others take ``entry`` again."""
        leading, others = self._operators[:count], self._operators[count:]
        [exit_] = leading[-1].outputs
        self._retake(others, int(exit_), entry)
        self._operators = others

    @staticmethod
    def _retake(operators: Sequence[Any], old: int, new: int) -> None:
        for operator in operators:
            operator.inputs = [int(tensor) if tensor != old else new for tensor in operator.inputs]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Height and width in the middle: NHWC, or [1, classes]."""
        return tuple(int(size) for size in self.tensors[tensor].shape)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: int = schema.TensorType.FLOAT32, buffer: int = 0) -> int:
        """Add a tensor, and return its index."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = self.scope + name, shape, dtype, buffer
        tensor.hasRank = True  # or an empty shape would mean an unknown one
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, values: npt.NDArray[np.float64] | npt.NDArray[np.int32]) -> int:
        """Add a tensor with values: int32 as they are, float64 as float32."""
        integers = values.dtype == np.int32
        buffer = schema.BufferT()
        buffer.data = values.astype("<i4" if integers else "<f4").tobytes()
        self._buffers.append(buffer)
        dtype = schema.TensorType.INT32 if integers else schema.TensorType.FLOAT32
        return self.tensor(name, values.shape, dtype, len(self._buffers) - 1)

    def operator(
        self, code: str, name: str, inputs: Sequence[int], shape: tuple[int, ...], options: Any = None, *, version: int = 1
    ) -> int:
        """Add the operator ``code`` (as the schema spells it), and return its output, a tensor ``name`` of ``shape``."""
        output = self.tensor(name, shape)
        operator = self._operator(code, inputs, [output], version)
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        return output

    def rows(self, name: str, x: int, columns: int) -> int:
        """RESHAPE."""
        shape = (1, int(np.prod(self.shape(x))) // columns, columns)
        return self.operator("RESHAPE", f"{name}.rows", [x, self.constant(f"{name}.shape", np.array(shape, np.int32))], shape)

    def concatenated(self, name: str, parts: Sequence[int], axis: int = 1) -> int:
        """CONCATENATION, of few enough parts at once for XNNPACK; nothing where there is one part."""
        joined = list(parts)
        while len(joined) > 1:
            first = joined[:JOINED]
            options = schema.ConcatenationOptionsT()
            options.axis = axis
            scope = name if len(joined) <= JOINED else f"{name}.{len(joined)}"
            shape = list(self.shape(first[0]))
            shape[axis] = sum(self.shape(part)[axis] for part in first)
            joined[:JOINED] = [self.operator("CONCATENATION", scope, first, tuple(shape), options)]
        return joined[0]

    def custom(self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: bytes) -> None:
        """Add an operator that the schema does not know, with its options as flexbuffers, between tensors that are there."""
        operator = self._operator(code, inputs, outputs, 1)
        operator.customOptions, operator.customOptionsFormat = options, schema.CustomOptionsFormat.FLEXBUFFERS

    def change_custom(self, code: str, change: Callable[[bytes], bytes]) -> None:
        """Give a custom operator's options, flexbuffers, through a function."""
        position = list(self._versions).index(code)
        for operator in self._operators:
            if operator.opcodeIndex == position:
                operator.customOptions = change(bytes(operator.customOptions))

    def _operator(self, code: str, inputs: Sequence[int], outputs: Sequence[int], version: int) -> Any:
        operator = schema.OperatorT()
        self._versions[code] = max(version, self._versions.get(code, 1))
        operator.opcodeIndex = list(self._versions).index(code)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        self._operators.append(operator)
        return operator

    def named(self, names: Sequence[str], tensors: Sequence[int]) -> Sequence[int]:
        """Tensors, which get these names."""
        for name, tensor in zip(names, tensors, strict=True):
            self.tensors[tensor].name = name
        return tensors

    def pack(self, entry: int, *exits: int) -> bytes:
        """The file of the graph from tensor ``entry`` to the tensors ``exits``."""
        self._leave_out_unused_buffers()
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self.tensors, self._operators
        graph.inputs, graph.outputs = [entry], list(exits)
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs, signature.outputs = [self._named(entry)], [self._named(exit_) for exit_ in exits]
        model = schema.ModelT()
        model.version, model.description = _SCHEMA_VERSION, f"hwnas {__version__}"
        model.operatorCodes = [_operator_code(*code) for code in self._versions.items()]
        model.subgraphs, model.buffers, model.signatureDefs = [graph], self._buffers, [signature]
        return write_model(model)

    def _leave_out_unused_buffers(self) -> None:
        """Those of what was cut off, and of a file's metadata."""
        used = sorted({0, *(int(tensor.buffer) for tensor in self.tensors)})
        places = {before: after for after, before in enumerate(used)}
        for tensor in self.tensors:
            tensor.buffer = places[int(tensor.buffer)]
        self._buffers = [self._buffers[before] for before in used]

    def _named(self, tensor: int) -> Any:
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = self.tensors[tensor].name, tensor
        return entry


class _Writer(Graph, BlockWriter[int]):
    """Ops in TFLite's operators."""

    def conv(self, x: int, layer: Layer, module: nn.Module, *, shift: float = 0.0) -> int:
        """[PAD], [DEPTHWISE_]CONV_2D, [HARD_SWISH], with ``shift`` added before the activation."""
        weight_OIHW, bias_O = folded(layer, module)
        depthwise = _depthwise(layer)
        weight = self.constant(f"{layer.name}.weight", weight_OIHW.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)))
        bias = self.constant(f"{layer.name}.bias", bias_O + shift)
        if layer.kernel > 1 and not _same_padding(layer):
            x = self._padding(x, layer)
        code, version = ("DEPTHWISE_CONV_2D", 1) if depthwise else ("CONV_2D", 1 if layer.groups == 1 else 6)
        shape = (1, layer.out_size, layer.out_size, layer.out_ch)
        x = self.operator(code, layer.name, [x, weight, bias], shape, _conv_options(layer), version=version)
        return self.operator("HARD_SWISH", f"{layer.name}.act", [x], shape) if layer.act == "hswish" else x

    def _padding(self, x: int, layer: Layer) -> int:
        pad, padded = layer.kernel // 2, layer.size + 2 * (layer.kernel // 2)
        pads = self.constant(f"{layer.name}.pads", np.array([[0, 0], [pad, pad], [pad, pad], [0, 0]], np.int32))
        return self.operator("PAD", f"{layer.name}.pad", [x, pads], (1, padded, padded, layer.in_ch), schema.PadOptionsT())

    def shuffle(self, x: int, groups: int) -> int:
        """RESHAPE, TRANSPOSE, RESHAPE."""
        *image, channels = self.shape(x)
        apart, swapped = (*image, groups, channels // groups), (*image, channels // groups, groups)
        x = self.operator("RESHAPE", "shuffle.groups", [x, self.constant("shuffle.apart", np.array(apart, np.int32))], apart)
        order = self.constant("shuffle.order", np.array([0, 1, 2, 4, 3], np.int32))
        x = self.operator("TRANSPOSE", "shuffle.swapped", [x, order], swapped, version=4)
        shape = (*image, channels)
        return self.operator("RESHAPE", "shuffle", [x, self.constant("shuffle.together", np.array(shape, np.int32))], shape)

    def squeeze_excite(self, x: int, reduce: Layer, expand: Layer, gate: str, module: nn.Module) -> int:
        """[MEAN], two CONV_2D, LOGISTIC or MUL by 1/6, MUL."""
        factor = self.conv(self.pool(x), reduce, module.get_submodule("reduce"))
        if gate == "sigmoid":
            factor = self.conv(factor, expand, module.get_submodule("expand"))
            factor = self.operator("LOGISTIC", "gate", [factor], self.shape(factor))
        else:  # relu6(x + 3) / 6, for which TFLite has no operator: the convolution takes the first two steps
            factor = self.conv(factor, replace(expand, act="relu6"), module.get_submodule("expand"), shift=3.0)
            sixth = self.constant("gate.sixth", np.array(1 / 6))
            factor = self.operator("MUL", "gate", [factor, sixth], self.shape(factor), schema.MulOptionsT())
        return self.operator("MUL", "gated", [x, factor], self.shape(x), schema.MulOptionsT())

    def pool(self, x: int) -> int:
        """MEAN, or nothing where there is one pixel."""
        return x if self.shape(x)[_HEIGHT] == self.shape(x)[_WIDTH] == 1 else self._mean(x, keep_dims=True)

    def _mean(self, x: int, *, keep_dims: bool) -> int:
        """Global average pooling to [1, 1, 1, C] or [1, C]."""
        _, height, width, channels = self.shape(x)
        options = schema.ReducerOptionsT()
        options.keepDims = keep_dims
        axes = self.constant("pool.axes", np.array([_HEIGHT, _WIDTH], np.int32))
        shape = (1, 1, 1, channels) if keep_dims else (1, channels)
        return self.operator("SUM" if height == width == 1 else "MEAN", "pool", [x, axes], shape, options)

    def add(self, x: int, y: int) -> int:
        """ADD."""
        return self.operator("ADD", "add", [x, y], self.shape(y), schema.AddOptionsT())

    def classifier(self, x: int, weight_OI: npt.NDArray[np.float64], bias_O: npt.NDArray[np.float64]) -> int:
        """MEAN or SUM, FULLY_CONNECTED."""
        weight, bias = self.constant("linear.weight", weight_OI), self.constant("linear.bias", bias_O)
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        pooled = self._mean(x, keep_dims=False)
        return self.operator("FULLY_CONNECTED", "linear", [pooled, weight, bias], (1, len(bias_O)), options, version=5)


def _conv_options(layer: Layer) -> Any:
    options = schema.DepthwiseConv2DOptionsT() if _depthwise(layer) else schema.Conv2DOptionsT()
    if _depthwise(layer):
        options.depthMultiplier = layer.out_ch // layer.in_ch
    options.strideH = options.strideW = layer.stride
    options.padding = schema.Padding.SAME if _same_padding(layer) else schema.Padding.VALID
    options.fusedActivationFunction = _FUSED.get(layer.act, schema.ActivationFunctionType.NONE)
    return options


def _depthwise(layer: Layer) -> bool:
    return layer.groups == layer.in_ch


def _same_padding(layer: Layer) -> bool:
    """Whether TFLite's SAME puts kernel // 2 on every side. At stride 2 it does on odd images only."""
    return layer.kernel > 1 and (layer.out_size - 1) * layer.stride + layer.kernel - layer.size == 2 * (layer.kernel // 2)


def _code_name(code: Any) -> str:
    """An operator as the schema spells it, or as a custom one calls itself."""
    # Codes past 127 live in the newer of the two fields, and old files fill only the older one.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    if number == schema.BuiltinOperator.CUSTOM:
        return str(code.customCode.decode())
    return next(str(name) for name, value in vars(schema.BuiltinOperator).items() if value == number)


def _operator_code(name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode, code.version = getattr(schema.BuiltinOperator, name, schema.BuiltinOperator.CUSTOM), version
    code.customCode = name if code.builtinCode == schema.BuiltinOperator.CUSTOM else None
    # Runtimes from before 2021 read a signed byte here, in which 127 stands for all the codes that do not fit.
    code.deprecatedBuiltinCode = min(code.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    return code
