"""The bundle: a folder with everything an app needs to use a network, and the proof
that its files are right.

export/
    bundle.json             what is in it: architecture, labels, preprocessing, files with sizes, parity and versions
    model-fp32.tflite       NHWC float32 in, logits out
    model-int8.tflite       the same interface, int8 inside
    model.onnx              NCHW float32 in, logits out; the architecture is in its metadata
    labels.txt              one label a line, in the order of the outputs; the TFLite files carry it in their metadata
    parity.npz              some test images as the files take them, PyTorch's outputs for them and its answers for all

``export.input`` and ``export.softmax`` have all files take uint8 pixels and return
probabilities (``interface``); ``input`` and ``outputs`` of each file say what it takes
and returns.

Of a detector, the three files return a row per anchor, and there may be files that
choose the detections themselves:

    model-nms.onnx          ONNX's NonMaxSuppression
    model-*-tasks.tflite    TFLite_Detection_PostProcess, the operator that Android's task libraries read
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hwnas import __version__
from hwnas.config import DataConfig, Format, Interpolation, Resize
from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.core.metric import ACCURACY, AP
from hwnas.data.images import Images
from hwnas.document import Document, Record, file_sha256, write_atomic
from hwnas.errors import DocumentError
from hwnas.export.interface import Interface
from hwnas.export.metadata import LABELS_FILE, labels_text
from hwnas.export.names import IMAGE, PROBABILITIES
from hwnas.export.score_calibration import Transformation
from hwnas.export.target import Target, target
from hwnas.task import Output, Parity, Task, task_named


class FileInput(Record):
    """What a file takes: one image, of batch 1. ``range`` has the smallest and the
    largest value that any channel can have.
    """

    name: str
    dtype: Literal["float32", "uint8"]
    layout: Literal["NHWC", "NCHW"]
    shape: tuple[int, int, int, int]
    range: tuple[float, float]
    meaning: str


class BundleFile(Record):
    """One exported file. Older bundles do not say what all files take and return."""

    name: str
    format: Format
    runtime: str
    dtype: str
    size_bytes: int
    sha256: str
    parity: Parity
    input: FileInput | None = None
    outputs: tuple[Output, ...] | None = None

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set, so that older bundles keep their hash."""
        return {name: value for name, value in handler(self).items() if value is not None}


class TextFile(Record):
    """A file beside the models."""

    name: str
    size_bytes: int
    sha256: str


class CalibrationPart(Record):
    """How the score calibration in the metadata of a classifier's TFLite files was
    fitted (``score_calibration`` has the formula).
    """

    images: int
    source: str
    transformation: Transformation
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]


class Preprocessing(Record):
    """From an RGB or grey image to the network's input: resize, scale to 0..1, subtract
    ``mean``, divide by ``std``.

    A file that takes uint8 pixels does all but the resizing itself. ``resize`` says the
    first in words, ``mode`` and what follows in numbers; of older bundles and of
    plug-ins' data there are words alone.

    squash  both sides become ``resolution``
    crop    the shorter side becomes ``shorter_side``, then the middle ``resolution`` x ``resolution`` is cut out
    pad     the longer side becomes ``resolution``, then the image lies in the middle of the colour ``padding``

    The other side of crop and pad is in proportion, rounded down; a middle between two
    pixels is rounded to the even one. Pillow's filters of the same name always smooth
    (``antialias``) where they make an image smaller.
    """

    resolution: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    mode: Resize | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    crop_fraction: float | None = Field(
        None, description="of crop: resolution / shorter_side, as configured"
    )
    shorter_side: int | None = Field(None, description="of crop, in pixels")
    padding: tuple[int, ...] | None = Field(
        None,
        description="of pad: the border's colour per channel, 0..255, before the normalisation",
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set, so that bundles from before the geometry was in
        numbers keep their hash.
        """
        return {name: value for name, value in handler(self).items() if value is not None}


class DetectorPart(Record):
    """How to read a detector's files. ``post_processing`` is what those without it in
    the graph still need.
    """

    anchors: int
    post_processing: PostProcessing

    @classmethod
    def of(cls, arch: Architecture, post_processing: PostProcessing) -> Self | None:
        """Of a detector; None of other networks."""
        return (
            None
            if arch.detector is None
            else cls(anchors=arch.detector.anchors, post_processing=post_processing)
        )


class Bundle(Document):
    """The description of a bundle (``bundle.json``). ``metrics`` are PyTorch's on the
    test images, by name.

    Version 1 had ``torch_accuracy`` of a classifier or ``torch_ap`` of a detector
    instead, and described the files of the latter in ``detector``.
    """

    SCHEMA: ClassVar[str] = "hwnas.bundle"
    VERSION: ClassVar[int] = 2

    architecture: Architecture
    task: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    macs: int
    params: int
    metric: str = Field(description="what the network is judged by")
    metrics: dict[str, float]
    test_images: int
    files: tuple[BundleFile, ...]
    detector: DetectorPart | None = None
    labels_file: TextFile | None = None
    score_calibration: CalibrationPart | None = None
    versions: dict[str, str]

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.metric not in self.metrics:
            raise ValueError(f"metrics lack {self.metric!r}, which is the metric: export again")
        if (self.detector is None) != (self.architecture.detector is None):
            raise ValueError(
                "a bundle of a detector, and no other, says how to read it in detector: export"
                " again"
            )
        return self

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """The names of version 1."""
        names = {"torch_accuracy": (ACCURACY, "classify"), "torch_ap": (AP, "detect")}
        for name, (metric, task) in names.items():
            value = content.pop(name, None)
            if value is not None:
                content |= {"metric": metric, "metrics": {metric: value}, "task": task}
        if "metrics" not in content:
            raise DocumentError(
                "a bundle has torch_accuracy, or torch_ap of a detector, and this has neither:"
                " export again."
            )
        detector = content.get("detector")
        if isinstance(detector, dict) and isinstance(content.get("files"), list):
            outputs = {name: each["outputs"] for name, each in detector.pop("files", {}).items()}
            content["files"] = [
                {**file, "outputs": outputs.get(file.get("name"))} for file in content["files"]
            ]
        return content

    @property
    def settings(self) -> Task:
        """The task, as the network was exported."""
        return task_named(
            self.task, None if self.detector is None else self.detector.post_processing
        )

    @property
    def interface(self) -> Interface:
        """What its files take and return."""
        takes = {file.input.dtype for file in self.files if file.input is not None}
        returns = {output.name for file in self.files for output in file.outputs or ()}
        pixels: Literal["float32", "uint8"] = "uint8" if takes == {"uint8"} else "float32"
        return Interface(
            pixels, returns == {PROBABILITIES}, self.preprocessing.mean, self.preprocessing.std
        )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set."""
        return {name: value for name, value in handler(self).items() if value is not None}


def preprocessing(data: DataConfig, images: Images) -> Preprocessing:
    """What the data loader does to a test image, in words and numbers."""
    said = {
        "resolution": data.resolution,
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        "resize": images.resizing,
    }
    geometry = images.geometry
    if geometry is None:
        return Preprocessing.model_validate(said)
    return Preprocessing.model_validate(
        {
            **said,
            "mode": geometry.mode,
            "interpolation": geometry.interpolation,
            "antialias": True,
            "crop_fraction": geometry.crop_fraction,
            "shorter_side": geometry.shorter_side,
            "padding": geometry.border if geometry.mode == "pad" else None,
        }
    )


def described_input(of: Target, interface: Interface, arch: Architecture) -> FileInput:
    """What a target's file takes, in words and numbers."""
    size, channels = arch.resolution, arch.in_channels
    colours = "red, green and blue" if channels == 3 else "grey"
    normalised = f"{colours} scaled to 0..1, less preprocessing.mean, divided by preprocessing.std"
    return FileInput(
        name=IMAGE,
        dtype=interface.input,
        layout=of.layout,
        shape=(1, size, size, channels) if of.layout == "NHWC" else (1, channels, size, size),
        range=interface.range,
        meaning=(
            f"{colours} from 0 to 255, as they are: the file normalises them"
            if interface.input == "uint8"
            else normalised
        ),
    )


def describe_file(
    folder: Path, kind: str, measured: Parity, entry: FileInput, outputs: tuple[Output, ...]
) -> BundleFile:
    """The entry of an exported file."""
    made = target(kind)
    path = folder / made.file
    return BundleFile.model_validate(
        {
            "name": made.file,
            "input": entry,
            "outputs": outputs,
            "format": kind,
            "runtime": made.runtime,
            "dtype": made.dtype,
            "size_bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "parity": measured,
        }
    )


def write_labels(folder: Path, labels: Sequence[str]) -> TextFile:
    """Write ``labels.txt``, and return its entry."""
    path = folder / LABELS_FILE
    write_atomic(path, labels_text(labels).encode())
    return TextFile(name=path.name, size_bytes=path.stat().st_size, sha256=file_sha256(path))


def save_parity(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def tool_versions() -> dict[str, str]:
    """Versions of everything that shaped the files."""
    packages = ("torch", "ai-edge-quantizer", "ai-edge-litert", "onnx", "onnxruntime")
    return {"hwnas": __version__, **{package: version(package) for package in packages}}
