"""Which targets there are to export to: known by name here, so that a configuration can
be checked without loading them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hwnas.document import nearest
from hwnas.registry import Registry

TARGETS = Registry(
    "target",
    {
        "tflite-fp32": "hwnas.export.targets:TFLiteFloat",
        "tflite-int8": "hwnas.export.targets:TFLiteInt8",
        "onnx": "hwnas.export.targets:Onnx",
        "onnx-nms": "hwnas.export.targets:OnnxNMS",
        "tflite-fp32-tasks": "hwnas.export.targets:TFLiteFloatTasks",
        "tflite-int8-tasks": "hwnas.export.targets:TFLiteInt8Tasks",
    },
)
"""Runtimes and number formats; third parties add theirs with the entry point
``hwnas.target`` (see ``hwnas.export.target``).
"""


def _known(name: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"is no target; {nearest(name, tuple(TARGETS))}")
    return name


RUNTIMES, DTYPES = ("litert", "onnxruntime"), ("fp32", "int8")
"""Those of the built-in targets."""


def known_runtime(name: str) -> str:
    """A runtime's name. Raises ValueError where no target has it, as far as that can be
    told without loading plug-ins.
    """
    return _one_of(name, RUNTIMES)


def known_dtype(name: str) -> str:
    """The name of a number format; see ``known_runtime``."""
    return _one_of(name, DTYPES)


def _one_of(name: str, ours: tuple[str, ...]) -> str:
    if name not in ours and set(TARGETS) == set(TARGETS.builtin):
        raise ValueError(f"input should be {' or '.join(map(repr, ours))}")
    return name


Format = Annotated[str, AfterValidator(_known)]
"""The name of a target."""
FORMATS: tuple[str, ...] = ("tflite-fp32", "tflite-int8", "onnx")
"""What every network is exported to."""
NMS_FORMATS: tuple[str, ...] = ("onnx-nms", "tflite-fp32-tasks", "tflite-int8-tasks")
"""Detectors with post-processing in the graph."""
