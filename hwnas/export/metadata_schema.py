"""The tables of TFLite metadata, packed as a flatbuffer.

Schema: mediapipe/tasks/metadata/metadata_schema.fbs, version 1.5.0 (``M001``), the same
as in tflite-support. No package that hwnas depends on contains the generated classes,
so the field numbers are written down here, in the order of the schema.

A table is a dict from field number to value. The type of a value decides how it is
stored: a NumPy scalar as that type, an array as a vector of numbers, a ``str`` as a
string, a dict as a table, and a list as a vector of strings or tables. A union takes
two fields: the type of its table, and the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import flatbuffers
import numpy as np
import numpy.typing as npt

FILE_IDENTIFIER = b"M001"

Value: TypeAlias = "np.generic | npt.NDArray[Any] | str | dict[int, Value] | Sequence[Value]"
Table: TypeAlias = dict[int, Value]

_OFFSET_BYTES = 4


class Model(IntEnum):
    """ModelMetadata."""

    NAME, DESCRIPTION, VERSION, SUBGRAPHS, AUTHOR, LICENSE, FILES, MIN_PARSER_VERSION = range(8)


class Subgraph(IntEnum):
    """SubGraphMetadata."""

    (
        NAME,
        DESCRIPTION,
        INPUTS,
        OUTPUTS,
        FILES,
        INPUT_UNITS,
        OUTPUT_UNITS,
        INPUT_GROUPS,
        OUTPUT_GROUPS,
    ) = range(9)


class Tensor(IntEnum):
    """TensorMetadata."""

    NAME, DESCRIPTION, DIMENSION_NAMES, CONTENT, PROCESS_UNITS, STATS, FILES = range(7)


class File(IntEnum):
    """AssociatedFile."""

    NAME, DESCRIPTION, TYPE = range(3)


class FileType(IntEnum):
    """AssociatedFileType."""

    (
        UNKNOWN,
        DESCRIPTIONS,
        TENSOR_AXIS_LABELS,
        TENSOR_VALUE_LABELS,
        TENSOR_AXIS_SCORE_CALIBRATION,
    ) = range(5)


class Content(IntEnum):
    """Content: a union of properties, and the axes that they describe."""

    PROPERTIES_TYPE, PROPERTIES, RANGE = range(3)


class Properties(IntEnum):
    """ContentProperties, a union."""

    NONE, FEATURE, IMAGE, BOUNDING_BOX = range(4)


class ColorSpace(IntEnum):
    """ColorSpaceType, field 0 of ImageProperties."""

    UNKNOWN, RGB, GRAYSCALE = range(3)


class BoundingBox(IntEnum):
    """BoundingBoxProperties."""

    INDEX, TYPE, COORDINATES = range(3)


BOUNDARIES = 1
"""A BoundingBoxType: left, top, right and bottom, in the order of
``BoundingBox.INDEX``.
"""
RATIO = 0
"""A CoordinateType: coordinates are fractions of the image size."""


class Range(IntEnum):
    """ValueRange."""

    MIN, MAX = range(2)


class Stats(IntEnum):
    """Stats, per channel."""

    MAX, MIN = range(2)


class Unit(IntEnum):
    """ProcessUnit, a table that contains only a union."""

    OPTIONS_TYPE, OPTIONS = range(2)


class UnitType(IntEnum):
    """ProcessUnitOptions, a union."""

    NONE, NORMALIZATION, SCORE_CALIBRATION = range(3)


class Normalization(IntEnum):
    """NormalizationOptions."""

    MEAN, STD = range(2)


class Calibration(IntEnum):
    """ScoreCalibrationOptions."""

    TRANSFORMATION, DEFAULT_SCORE = range(2)


class Transformation(IntEnum):
    """ScoreTransformationType: applied to a score before its sigmoid."""

    IDENTITY, LOG, INVERSE_LOGISTIC = range(3)


class Group(IntEnum):
    """TensorGroup."""

    NAME, TENSOR_NAMES = range(2)


def packed(model: Table) -> bytes:
    """Pack a ``ModelMetadata`` table as a flatbuffer."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(_table(builder, model), FILE_IDENTIFIER)
    return bytes(builder.Output())


_PREPEND = {
    np.dtype(np.int8): flatbuffers.Builder.PrependInt8Slot,
    np.dtype(np.uint8): flatbuffers.Builder.PrependUint8Slot,
    np.dtype(np.int32): flatbuffers.Builder.PrependInt32Slot,
    np.dtype(np.uint32): flatbuffers.Builder.PrependUint32Slot,
    np.dtype(np.float32): flatbuffers.Builder.PrependFloat32Slot,
}


def _table(builder: flatbuffers.Builder, fields: Table) -> int:
    # A flatbuffer is built from its leaves: everything that a table points to must be
    # finished before the table is started.
    offsets = {
        number: _offset(builder, value)
        for number, value in fields.items()
        if not isinstance(value, np.generic)
    }
    builder.StartObject(max(fields, default=-1) + 1)
    for number, value in fields.items():
        if isinstance(value, np.generic):
            _PREPEND[value.dtype](builder, int(number), value.item(), 0)
        else:
            builder.PrependUOffsetTRelativeSlot(int(number), offsets[number], 0)
    return int(builder.EndObject())


def _offset(builder: flatbuffers.Builder, value: Value) -> int:
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, np.ndarray):
        return int(builder.CreateNumpyVector(value))
    if isinstance(value, dict):
        return _table(builder, value)
    assert isinstance(value, Sequence)
    offsets = [_offset(builder, item) for item in value]
    builder.StartVector(_OFFSET_BYTES, len(offsets), _OFFSET_BYTES)
    # vectors are filled from the back
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
