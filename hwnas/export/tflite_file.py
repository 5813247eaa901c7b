"""TFLite files: reading every storage form, writing a single one, and building graphs.

A file is a flatbuffer. Weights are stored inside it as ``Buffer.data``, or after it, at
``Buffer.offset`` from the start of the file (``Buffer.size`` bytes). The latter allows
files of 2 GiB and more, and ai-edge-quantizer uses it for weights from 256 KiB on. The
options of a custom operator have the same two forms: ``customOptions``, and
``largeCustomOptionsOffset`` with its size.

Runtimes read both forms. Tools that pack the flatbuffer again do not: TFLite's metadata
writers keep the offset and drop the data that it pointed to. Our files therefore store
everything inside the flatbuffer, and are limited to 2 GiB.

Schema: tensorflow/lite/schema/schema.fbs, version 3. Which offsets are valid:
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
from hwnas.core.detector import JOINED
from hwnas.errors import ExportError

LIMIT_BYTES = 2**31
"""Offsets in a flatbuffer are signed 32-bit numbers. TFLite refuses files of this size.
"""
_FILE_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_ALIGNMENT_BYTES = 16
_TABLES_BYTES = 65_536
"""Initial space for everything except the weights."""
_NO_OFFSET = 1
"""Offsets and sizes up to this one are placeholders of converters."""


def read_model(content: bytes) -> Any:
    """Read a file into a ``schema.ModelT`` whose buffers and custom options are inline.

    Data after the flatbuffer that no offset points to, such as the zip archive of
    TFLite metadata, is dropped.

    Raises ExportError if the file ends before the data that it points to.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    for buffer in model.buffers:
        if _is_outside(buffer.offset, buffer.size):
            buffer.data = _outside(content, buffer.offset, buffer.size)
        buffer.offset = buffer.size = 0
    for graph in model.subgraphs:
        for operator in graph.operators or []:
            offset = operator.largeCustomOptionsOffset
            size = operator.largeCustomOptionsSize
            if _is_outside(offset, size):
                operator.customOptions = _outside(content, offset, size)
            operator.largeCustomOptionsOffset = operator.largeCustomOptionsSize = 0
    return model


def write_model(model: Any) -> bytes:
    """Write a ``schema.ModelT`` whose data are inline, with the alignment that
    schema.fbs requires. ``model`` stays unchanged.

    Raises ExportError if the file would have 2 GiB or more.
    """
    buffers = model.buffers
    data_bytes = sum(len(buffer.data) for buffer in buffers if buffer.data is not None)
    if data_bytes + _TABLES_BYTES >= LIMIT_BYTES:
        raise ExportError(
            f"The TFLite file would have {data_bytes / 2**30:.1f} GiB, but must stay below 2 GiB:"
            " export a smaller network"
        )
    # Space for all weights from the start: a builder that grows copies its content.
    builder = flatbuffers.Builder(data_bytes + _TABLES_BYTES)
    aligned = []
    for buffer in buffers:
        data = b"" if buffer.data is None else bytes(buffer.data)
        aligned.append(_Aligned(data))
    model.buffers = aligned
    try:
        builder.Finish(model.Pack(builder), _FILE_IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(builder.Output())


def inline_data(content: bytes) -> bytes:
    """Move all data of a file into the flatbuffer. Anything else after the flatbuffer
    (a zip archive) is dropped.
    """
    return write_model(read_model(content))


def holds_data(model: Any, tensor: Any) -> bool:
    """Whether a tensor of a packed ``schema.Model`` is a constant. Other tensors exist
    only while the graph runs.
    """
    buffer = model.Buffers(tensor.Buffer())
    return buffer.DataLength() > 0 or _is_outside(buffer.Offset(), buffer.Size())


def _is_outside(offset: int, size: int) -> bool:
    return offset > _NO_OFFSET and size > _NO_OFFSET


def _outside(content: bytes, offset: int, size: int) -> npt.NDArray[np.uint8]:
    if offset + size > len(content):
        raise ExportError(
            f"The TFLite file has {len(content)} bytes, but refers to data up to byte"
            f" {offset + size}: it is truncated, so create it again"
        )
    return np.frombuffer(content, np.uint8, size, offset)


@dataclass(frozen=True)
class _Aligned:
    """A buffer with the alignment that schema.fbs requires. The generated BufferT
    aligns to only four bytes.
    """

    data: bytes

    # the generated ModelT calls this name
    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802
        """Write the buffer, and return its offset. An empty buffer is for tensors that
        exist only while the graph runs, and must have no data field.
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


class TFLiteGraph:
    """A TFLite graph under construction. Tensors are referred to by their index. Their
    names are unique, as the quantizer requires.
    """

    scope = ""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        # The schema reserves buffer 0, empty, for tensors that exist only while the graph
        # runs.
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        # operator code -> the highest version needed; positions are the file's opcode indices
        self._versions: dict[str, int] = {}

    @classmethod
    def open(cls, model: bytes) -> tuple[Self, int, list[int]]:
        """Open the graph of a file in order to extend it. Returns the graph, its only
        input, and its outputs. Drops metadata.
        """
        parsed = read_model(model)
        opened = cls()
        [graph] = parsed.subgraphs
        codes = [(_code_name(code), code.version) for code in parsed.operatorCodes]
        for name, version in codes:
            opened._versions[name] = max(version, opened._versions.get(name, 1))
        opened.tensors = graph.tensors
        opened._operators = graph.operators
        for operator in opened._operators:
            operator.opcodeIndex = list(opened._versions).index(codes[operator.opcodeIndex][0])
        for tensor in opened.tensors:
            tensor.name = tensor.name.decode()
        opened._buffers += parsed.buffers[1:]
        [entry] = graph.inputs
        return opened, int(entry), [int(exit_) for exit_ in graph.outputs]

    def cut(self, scope: str) -> list[int]:
        """Remove the last operators, those whose names start with ``scope``. Returns
        the tensors that they read from the others.
        """
        first = next(i for i, tensor in enumerate(self.tensors) if tensor.name.startswith(scope))
        kept = [operator for operator in self._operators if min(operator.outputs) < first]
        read: list[int] = []
        for operator in self._operators[len(kept) :]:
            read += [int(tensor) for tensor in operator.inputs if tensor < first]
        self.tensors = self.tensors[:first]
        self._operators = kept
        return list(dict.fromkeys(read))

    def lead(self, count: int, entry: int, exit_: int) -> None:
        """Move the last ``count`` operators, which lead from ``entry`` to ``exit_``, to
        the front. The others then read ``exit_`` instead of ``entry``.
        """
        leading = self._operators[-count:]
        others = self._operators[:-count]
        self._replace_input(others, entry, exit_)
        self._operators = [*leading, *others]

    def drop_lead(self, count: int, entry: int) -> None:
        """Remove the first ``count`` operators, which ``lead`` has moved there. The
        others read ``entry`` again.
        """
        leading = self._operators[:count]
        others = self._operators[count:]
        [exit_] = leading[-1].outputs
        self._replace_input(others, int(exit_), entry)
        self._operators = others

    @staticmethod
    def _replace_input(operators: Sequence[Any], old: int, new: int) -> None:
        for operator in operators:
            inputs = [int(tensor) for tensor in operator.inputs]
            for position, tensor in enumerate(inputs):
                if tensor == old:
                    inputs[position] = new
            operator.inputs = inputs

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The shape of a tensor: NHWC for maps, [1, classes] for logits."""
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
        tensor.name = self.scope + name
        tensor.shape = shape
        tensor.type = dtype
        tensor.buffer = buffer
        tensor.hasRank = True  # otherwise an empty shape would mean an unknown one
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, values: npt.NDArray[np.float64] | npt.NDArray[np.int32]) -> int:
        """Add a tensor with values: int32 unchanged, float64 as float32. Returns its
        index.
        """
        stored = "<f4"
        dtype = schema.TensorType.FLOAT32
        if values.dtype == np.int32:
            stored = "<i4"
            dtype = schema.TensorType.INT32
        buffer = schema.BufferT()
        buffer.data = values.astype(stored).tobytes()
        self._buffers.append(buffer)
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
        """Add the operator ``code`` (spelled as in the schema). Returns its output, a
        tensor called ``name`` with ``shape``.
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
        target_shape = self.constant(f"{name}.shape", np.array(shape, np.int32))
        return self.operator("RESHAPE", f"{name}.rows", [x, target_shape], shape)

    def concatenate(self, name: str, parts: Sequence[int], axis: int = 1) -> int:
        """CONCATENATION, of at most ``JOINED`` parts at once, the limit of XNNPACK.
        Nothing for a single part.
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
        """Add an operator that is not in the schema, with its options as flexbuffers.
        The tensors must exist.
        """
        operator = self._operator(code, inputs, outputs, 1)
        operator.customOptions = options
        operator.customOptionsFormat = schema.CustomOptionsFormat.FLEXBUFFERS

    def change_custom(self, code: str, change: Callable[[bytes], bytes]) -> None:
        """Apply a function to the options (flexbuffers) of a custom operator."""
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
        operator.inputs = list(inputs)
        operator.outputs = list(outputs)
        self._operators.append(operator)
        return operator

    def rename_tensors(self, names: Sequence[str], tensors: Sequence[int]) -> Sequence[int]:
        """Rename tensors, and return them."""
        for name, tensor in zip(names, tensors, strict=True):
            self.tensors[tensor].name = name
        return tensors

    def pack(self, entry: int, *exits: int) -> bytes:
        """Serialise the graph, with the input ``entry`` and the outputs ``exits``."""
        self._remove_unused_buffers()
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors = self.tensors
        graph.operators = self._operators
        graph.inputs = [entry]
        graph.outputs = list(exits)

        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs = [self._named(entry)]
        signature.outputs = [self._named(exit_) for exit_ in exits]

        model = schema.ModelT()
        model.version = _SCHEMA_VERSION
        model.description = f"hwnas {__version__}"
        model.operatorCodes = [_operator_code(*code) for code in self._versions.items()]
        model.subgraphs = [graph]
        model.buffers = self._buffers
        model.signatureDefs = [signature]
        return write_model(model)

    def _remove_unused_buffers(self) -> None:
        """Remove the buffers of operators that were cut off, and of metadata."""
        used = sorted({0, *(int(tensor.buffer) for tensor in self.tensors)})
        new_positions = {old: new for new, old in enumerate(used)}
        for tensor in self.tensors:
            tensor.buffer = new_positions[int(tensor.buffer)]
        self._buffers = [self._buffers[old] for old in used]

    def _named(self, tensor: int) -> Any:
        """The entry of a tensor in the signature."""
        entry = schema.TensorMapT()
        entry.name = self.tensors[tensor].name
        entry.tensorIndex = tensor
        return entry


class GraphOp(NamedTuple):
    """An operator of a TFLite graph: its name and the type of its first output, spelled
    as in the schema.
    """

    name: str
    dtype: str


def graph_ops(model: bytes) -> tuple[GraphOp, ...]:
    """The operators of a TFLite file's main graph, in execution order."""
    names = _names_of(schema.BuiltinOperator)
    dtypes = _names_of(schema.TensorType)
    parsed = schema.Model.GetRootAs(model)
    graph = parsed.Subgraphs(0)
    ops = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = parsed.OperatorCodes(operator.OpcodeIndex())
        # Codes above 127 are in the newer of the two fields. Old files have only the older.
        name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        ops.append(GraphOp(name, dtypes[graph.Tensors(operator.Outputs(0)).Type()]))
    return tuple(ops)


def _names_of(enum: type) -> dict[int, str]:
    """Value -> name of a generated enum, which is a plain class."""
    return {value: name for name, value in vars(enum).items() if not name.startswith("_")}


def _code_name(code: Any) -> str:
    """The name of an operator: spelled as in the schema, or a custom operator's own."""
    # Codes above 127 are in the newer of the two fields. Old files have only the older.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    if number == schema.BuiltinOperator.CUSTOM:
        return str(code.customCode.decode())
    return _names_of(schema.BuiltinOperator)[number]


def _operator_code(name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name, schema.BuiltinOperator.CUSTOM)
    code.version = version
    if code.builtinCode == schema.BuiltinOperator.CUSTOM:
        code.customCode = name
    # Runtimes older than 2021 read this signed byte, in which 127 represents all codes
    # that do not fit.
    code.deprecatedBuiltinCode = min(
        code.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
    )
    return code
