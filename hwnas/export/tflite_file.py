"""TFLite files as they are stored: read in every form, written in one, and graphs on
their way into them.

A file is a flatbuffer. Weights lie in it as ``Buffer.data``, or behind it, at
``Buffer.offset`` from the start of the file (``Buffer.size`` bytes), which is how files
of 2 GiB and more are possible. ai-edge-quantizer stores weights that way from 256 KiB
on. Options of a custom operator have the same two forms: ``customOptions``, and
``largeCustomOptionsOffset`` with its size.

Runtimes read both. Tools that pack the flatbuffer anew do not: TFLite's metadata
writers keep the offset and drop what it pointed to. So every file of ours holds
everything in its flatbuffer, and is below 2 GiB.

Schema: tensorflow/lite/schema/schema.fbs, version 3; which offsets count:
tensorflow/lite/core/interpreter_builder.cc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from hwnas import __version__
from hwnas.errors import ExportError
from hwnas.nn.detector import JOINED

LIMIT_BYTES = 2**31
"""A flatbuffer's offsets are signed 32-bit numbers; TFLite refuses one of this size."""
_FILE_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_ALIGNMENT_BYTES = 16
_TABLES_BYTES = 65_536
"""Room for what is not weights, to begin with."""
_NO_OFFSET = 1
"""Offsets and sizes up to this one are place-holders of converters, not data."""


def read_model(content: bytes) -> Any:
    """The ``schema.ModelT`` of a file, with every buffer and every custom option inline.

    What follows the flatbuffer and no offset points to, such as the zip archive of
    TFLite metadata, is not in it.

    Raises ExportError where the file ends before the data that it points to.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    for buffer in model.buffers:
        if _is_outside(buffer.offset, buffer.size):
            buffer.data = _outside(content, buffer.offset, buffer.size)
        buffer.offset = buffer.size = 0
    for operator in (each for graph in model.subgraphs for each in graph.operators or []):
        if _is_outside(operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize):
            operator.customOptions = _outside(
                content, operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize
            )
        operator.largeCustomOptionsOffset = operator.largeCustomOptionsSize = 0
    return model


def write_model(model: Any) -> bytes:
    """The file of a ``schema.ModelT`` whose data are inline, aligned as schema.fbs
    demands. ``model`` itself is left as it was.

    Raises ExportError where the file would have 2 GiB or more.
    """
    buffers = model.buffers
    data_bytes = sum(0 if buffer.data is None else len(buffer.data) for buffer in buffers)
    if data_bytes + _TABLES_BYTES >= LIMIT_BYTES:
        raise ExportError(
            f"The TFLite file would have {data_bytes / 2**30:.1f} GiB, but must stay below 2 GiB:"
            " export a smaller network"
        )
    # Room for all the weights at once: a builder that has to grow copies what it has.
    builder = flatbuffers.Builder(data_bytes + _TABLES_BYTES)
    model.buffers = [
        _Aligned(b"" if buffer.data is None else bytes(buffer.data)) for buffer in buffers
    ]
    try:
        builder.Finish(model.Pack(builder), _FILE_IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(builder.Output())


def inlined(content: bytes) -> bytes:
    """The same model with everything inside the flatbuffer. What follows it (a zip
    archive) is left out.
    """
    return write_model(read_model(content))


def holds_data(model: Any, tensor: Any) -> bool:
    """Whether a tensor of a packed ``schema.Model`` is a constant; other tensors only
    exist while the graph runs.
    """
    buffer = model.Buffers(tensor.Buffer())
    return buffer.DataLength() > 0 or _is_outside(buffer.Offset(), buffer.Size())


def _is_outside(offset: int, size: int) -> bool:
    return offset > _NO_OFFSET and size > _NO_OFFSET


def _outside(content: bytes, offset: int, size: int) -> npt.NDArray[np.uint8]:
    if offset + size > len(content):
        raise ExportError(
            f"The TFLite file has {len(content)} bytes, but data up to byte {offset + size}: it is"
            " cut off, make it again"
        )
    return np.frombuffer(content, np.uint8, size, offset)


@dataclass(frozen=True)
class _Aligned:
    """A buffer whose data is aligned as schema.fbs demands; the generated BufferT
    aligns to four bytes.
    """

    data: bytes

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - what the generated ModelT calls
        """Write the buffer, and return its offset. An empty one stands for a tensor
        that only exists while the graph runs.
        """
        if not self.data:
            schema.BufferStart(builder)
            empty: int = schema.BufferEnd(builder)
            return empty
        builder.Prep(_ALIGNMENT_BYTES, len(self.data))
        vector = builder.CreateByteVector(self.data)
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        offset: int = schema.BufferEnd(builder)
        return offset


class Graph:
    """A TFLite graph under construction. Tensors are known by their index; names are
    unique, as the quantizer needs.
    """

    scope = ""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        # The schema keeps buffer 0 empty, for the tensors that only exist while the graph runs.
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        self._versions: dict[str, int] = {}  # of each operator code, the highest that is needed

    @classmethod
    def opened(cls, model: bytes) -> tuple[Self, int, list[int]]:
        """The graph of a file, to go on with; its only input, and its outputs. Metadata
        are left out.
        """
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
        """Leave out the operators with names of ``scope``, which are the last; return
        the tensors that they took from the others.
        """
        first = next(i for i, tensor in enumerate(self.tensors) if tensor.name.startswith(scope))
        ours = [operator for operator in self._operators if min(operator.outputs) < first]
        used = [
            int(i)
            for operator in self._operators[len(ours) :]
            for i in operator.inputs
            if i < first
        ]
        self.tensors, self._operators = self.tensors[:first], ours
        return list(dict.fromkeys(used))

    def lead(self, count: int, entry: int, exit_: int) -> None:
        """Move the last ``count`` operators, from ``entry`` to ``exit_``, before the
        others, which then take ``exit_`` for ``entry``.
        """
        leading, others = self._operators[-count:], self._operators[:-count]
        self._retake(others, entry, exit_)
        self._operators = [*leading, *others]

    def drop_lead(self, count: int, entry: int) -> None:
        """Leave out the first ``count`` operators, which ``lead`` put there; the others
        take ``entry`` again.
        """
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

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: int = schema.TensorType.FLOAT32,
        buffer: int = 0,
    ) -> int:
        """Add a tensor, and return its index."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = (
            self.scope + name,
            shape,
            dtype,
            buffer,
        )
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
        self,
        code: str,
        name: str,
        inputs: Sequence[int],
        shape: tuple[int, ...],
        options: Any = None,
        *,
        version: int = 1,
    ) -> int:
        """Add the operator ``code`` (as the schema spells it), and return its output, a
        tensor ``name`` of ``shape``.
        """
        output = self.tensor(name, shape)
        operator = self._operator(code, inputs, [output], version)
        if options is not None:
            operator.builtinOptionsType = getattr(
                schema.BuiltinOptions, type(options).__name__.removesuffix("T")
            )
            operator.builtinOptions = options
        return output

    def rows(self, name: str, x: int, columns: int) -> int:
        """RESHAPE."""
        shape = (1, int(np.prod(self.shape(x))) // columns, columns)
        return self.operator(
            "RESHAPE",
            f"{name}.rows",
            [x, self.constant(f"{name}.shape", np.array(shape, np.int32))],
            shape,
        )

    def concatenated(self, name: str, parts: Sequence[int], axis: int = 1) -> int:
        """CONCATENATION, of few enough parts at once for XNNPACK; nothing where there
        is one part.
        """
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

    def custom(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: bytes
    ) -> None:
        """Add an operator that the schema does not know, with its options as
        flexbuffers, between tensors that are there.
        """
        operator = self._operator(code, inputs, outputs, 1)
        operator.customOptions, operator.customOptionsFormat = (
            options,
            schema.CustomOptionsFormat.FLEXBUFFERS,
        )

    def change_custom(self, code: str, change: Callable[[bytes], bytes]) -> None:
        """Give a custom operator's options, flexbuffers, through a function."""
        position = list(self._versions).index(code)
        for operator in self._operators:
            if operator.opcodeIndex == position:
                operator.customOptions = change(bytes(operator.customOptions))

    def _operator(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], version: int
    ) -> Any:
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
        signature.inputs, signature.outputs = (
            [self._named(entry)],
            [self._named(exit_) for exit_ in exits],
        )
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


class GraphOp(NamedTuple):
    """One operator of a TFLite graph: its name and its first output's type, as the
    schema spells them.
    """

    name: str
    dtype: str


def graph_ops(model: bytes) -> tuple[GraphOp, ...]:
    """The operators of a TFLite file's main graph, in execution order."""
    names = {
        code: name
        for name, code in vars(schema.BuiltinOperator).items()
        if not name.startswith("_")
    }
    dtypes = {
        code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")
    }
    parsed = schema.Model.GetRootAs(model)
    graph = parsed.Subgraphs(0)
    ops = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = parsed.OperatorCodes(operator.OpcodeIndex())
        # Codes past 127 live in the newer of the two fields, and old files fill only the older one.
        name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        ops.append(GraphOp(name, dtypes[graph.Tensors(operator.Outputs(0)).Type()]))
    return tuple(ops)


def _code_name(code: Any) -> str:
    """An operator as the schema spells it, or as a custom one calls itself."""
    # Codes past 127 live in the newer of the two fields, and old files fill only the older one.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    if number == schema.BuiltinOperator.CUSTOM:
        return str(code.customCode.decode())
    return next(
        str(name) for name, value in vars(schema.BuiltinOperator).items() if value == number
    )


def _operator_code(name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode, code.version = (
        getattr(schema.BuiltinOperator, name, schema.BuiltinOperator.CUSTOM),
        version,
    )
    code.customCode = name if code.builtinCode == schema.BuiltinOperator.CUSTOM else None
    # Runtimes from before 2021 read a signed byte here, in which 127 stands for all the
    # codes that do not fit.
    code.deprecatedBuiltinCode = min(
        code.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
    )
    return code
