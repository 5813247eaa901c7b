"""TFLite files as they are stored: read in every form, written in one.

A file is a flatbuffer. Weights lie in it as ``Buffer.data``, or behind it, at ``Buffer.offset`` from the start of the file
(``Buffer.size`` bytes), which is how files of 2 GiB and more are possible. ai-edge-quantizer stores weights that way from 256 KiB on.
Options of a custom operator have the same two forms: ``customOptions``, and ``largeCustomOptionsOffset`` with its size.

Runtimes read both. Tools that pack the flatbuffer anew do not: TFLite's metadata writers keep the offset and drop what it pointed to.
So every file of ours holds everything in its flatbuffer, and is below 2 GiB.

Schema: tensorflow/lite/schema/schema.fbs, version 3; which offsets count: tensorflow/lite/core/interpreter_builder.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from hwnas.errors import ExportError

LIMIT_BYTES = 2**31
"""A flatbuffer's offsets are signed 32-bit numbers; TFLite refuses one of this size."""
_FILE_IDENTIFIER = b"TFL3"
_ALIGNMENT_BYTES = 16
_TABLES_BYTES = 65_536
"""Room for what is not weights, to begin with."""
_NO_OFFSET = 1
"""Offsets and sizes up to this one are place-holders of converters, not data."""


def read_model(content: bytes) -> Any:
    """The ``schema.ModelT`` of a file, with every buffer and every custom option inline.

    What follows the flatbuffer and no offset points to, such as the zip archive of TFLite metadata, is not in it.

    Raises ExportError where the file ends before the data that it points to.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    for buffer in model.buffers:
        if _is_outside(buffer.offset, buffer.size):
            buffer.data = _outside(content, buffer.offset, buffer.size)
        buffer.offset = buffer.size = 0
    for operator in (each for graph in model.subgraphs for each in graph.operators or []):
        if _is_outside(operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize):
            operator.customOptions = _outside(content, operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize)
        operator.largeCustomOptionsOffset = operator.largeCustomOptionsSize = 0
    return model


def write_model(model: Any) -> bytes:
    """The file of a ``schema.ModelT`` whose data are inline, aligned as schema.fbs demands. ``model`` itself is left as it was.

    Raises ExportError where the file would have 2 GiB or more.
    """
    buffers = model.buffers
    data_bytes = sum(0 if buffer.data is None else len(buffer.data) for buffer in buffers)
    if data_bytes + _TABLES_BYTES >= LIMIT_BYTES:
        raise ExportError(f"The TFLite file would have {data_bytes / 2**30:.1f} GiB, but must stay below 2 GiB: export a smaller network")
    # Room for all the weights at once: a builder that has to grow copies what it has.
    builder = flatbuffers.Builder(data_bytes + _TABLES_BYTES)
    model.buffers = [_Aligned(b"" if buffer.data is None else bytes(buffer.data)) for buffer in buffers]
    try:
        builder.Finish(model.Pack(builder), _FILE_IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(builder.Output())


def inlined(content: bytes) -> bytes:
    """The same model with everything inside the flatbuffer. What follows it (a zip archive) is left out."""
    return write_model(read_model(content))


def holds_data(model: Any, tensor: Any) -> bool:
    """Whether a tensor of a packed ``schema.Model`` is a constant; other tensors only exist while the graph runs."""
    buffer = model.Buffers(tensor.Buffer())
    return buffer.DataLength() > 0 or _is_outside(buffer.Offset(), buffer.Size())


def _is_outside(offset: int, size: int) -> bool:
    return offset > _NO_OFFSET and size > _NO_OFFSET


def _outside(content: bytes, offset: int, size: int) -> npt.NDArray[np.uint8]:
    if offset + size > len(content):
        raise ExportError(f"The TFLite file has {len(content)} bytes, but data up to byte {offset + size}: it is cut off, make it again")
    return np.frombuffer(content, np.uint8, size, offset)


@dataclass(frozen=True)
class _Aligned:
    """A buffer whose data is aligned as schema.fbs demands; the generated BufferT aligns to four bytes."""

    data: bytes

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - what the generated ModelT calls
        """Write the buffer, and return its offset. An empty one stands for a tensor that only exists while the graph runs."""
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


class GraphOp(NamedTuple):
    """One operator of a TFLite graph: its name and its first output's type, as the schema spells them."""

    name: str
    dtype: str


def graph_ops(model: bytes) -> tuple[GraphOp, ...]:
    """The operators of a TFLite file's main graph, in execution order."""
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    dtypes = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
    parsed = schema.Model.GetRootAs(model)
    graph = parsed.Subgraphs(0)
    ops = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = parsed.OperatorCodes(operator.OpcodeIndex())
        # Codes past 127 live in the newer of the two fields, and old files fill only the older one.
        name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        ops.append(GraphOp(name, dtypes[graph.Tensors(operator.Outputs(0)).Type()]))
    return tuple(ops)
