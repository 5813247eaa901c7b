"""The names of the export targets, so that a configuration can be checked without
loading them.
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
"""The targets: runtimes with a number format. Third parties add their own with the
entry point ``hwnas.target`` (see ``hwnas.export.target``).
"""


def _check_target(name: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"is not a target; {nearest(name, tuple(TARGETS))}")
    return name


RUNTIMES = ("litert", "onnxruntime")
"""Runtimes of the built-in targets."""

DTYPES = ("fp32", "int8")
"""Number formats of the built-in targets."""


def check_runtime(name: str) -> str:
    """Check the name of a runtime and return it. Raises ValueError if no target has it,
    as far as this is known without loading plug-ins.
    """
    return _check_name(name, RUNTIMES)


def check_dtype(name: str) -> str:
    """Check the name of a number format and return it; see ``check_runtime``."""
    return _check_name(name, DTYPES)


def _check_name(name: str, builtin: tuple[str, ...]) -> str:
    # With a target plug-in installed, any name may be one of its own.
    has_plugins = set(TARGETS) != set(TARGETS.builtin)
    if name not in builtin and not has_plugins:
        raise ValueError(f"input should be {' or '.join(map(repr, builtin))}")
    return name


Format = Annotated[str, AfterValidator(_check_target)]
"""The name of a target."""

FORMATS: tuple[str, ...] = ("tflite-fp32", "tflite-int8", "onnx")
"""The targets that every network is exported to by default."""

NMS_FORMATS: tuple[str, ...] = ("onnx-nms", "tflite-fp32-tasks", "tflite-int8-tasks")
"""Targets for detectors only, with post-processing in the graph."""
