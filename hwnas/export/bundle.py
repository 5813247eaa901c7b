"""The bundle: a folder with everything that an app needs to use a network, and a proof
that its files are correct.

export/
    bundle.json             the description: architecture, labels, preprocessing, files with sizes, parity, versions
    model-fp32.tflite       input NHWC float32, output logits
    model-int8.tflite       the same interface, int8 inside
    model.onnx              input NCHW float32, output logits; its metadata contain the architecture
    labels.txt              one label per line, in the order of the outputs; also in the metadata of the TFLite files
    parity.npz              test images in the form that files take, PyTorch's outputs for them, and its answers for all

With ``export.input`` and ``export.softmax``, all files take uint8 pixels and return
probabilities (``interface``). ``input`` and ``outputs`` of each file describe what it
takes and returns.

For a detector, these three files return one row per anchor. There may be more files,
which select the detections themselves:

    model-nms.onnx          ONNX's NonMaxSuppression
    model-*-tasks.tflite    TFLite_Detection_PostProcess, the operator that Android's task libraries read
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

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
from hwnas.core.size import SizeField
from hwnas.document import Document, Record, file_sha256, read_bytes, write_atomic
from hwnas.errors import DocumentError, ExportError
from hwnas.export.interface import Interface
from hwnas.export.metadata import LABELS_FILE, labels_text
from hwnas.export.names import IMAGE, PROBABILITIES
from hwnas.export.quantization import first_line
from hwnas.export.score_calibration import Transformation
from hwnas.export.target import Target, target
from hwnas.task import Output, Parity, Task, task_named

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.data.images import Images

PARITY_FILE = "parity.npz"


class FileInput(Record):
    """The input of a file: one image, with batch size 1. ``range`` holds the smallest and
    the largest possible value of any channel.
    """

    name: str
    dtype: Literal["float32", "uint8"]
    layout: Literal["NHWC", "NCHW"]
    shape: tuple[int, int, int, int]
    range: tuple[float, float]
    meaning: str


class BundleFile(Record):
    """One exported file. Older bundles lack ``input`` and ``outputs``."""

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
        """Leave out unset fields, so that older bundles keep their hash."""
        return {name: value for name, value in handler(self).items() if value is not None}


class OtherFile(Record):
    """A file next to the models."""

    name: str
    size_bytes: int
    sha256: str


class CalibrationPart(Record):
    """The score calibration in the metadata of a classifier's TFLite files, and the images
    that it was fitted to. ``score_calibration`` has the formula.
    """

    images: int
    source: str
    transformation: Transformation
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]


class Preprocessing(Record):
    """From an RGB or grey image to the network's input: resize, scale to 0..1, subtract
    ``mean``, divide by ``std``.

    A file that takes uint8 pixels does everything except the resizing itself. ``resize``
    describes the resizing in words, and ``mode`` and the fields after it in numbers.
    Older bundles and the data of plug-ins have only the words.

    squash  both sides become ``resolution``, a number, or [height, width]
    crop    the shorter side becomes ``shorter_side``, then the centre ``resolution`` x ``resolution`` is cut out
    pad     the longer side becomes ``resolution``, then the image is centred on the colour ``padding``

    If the input is not square, ``crop`` has no ``shorter_side``: the image is scaled to the
    smallest size that covers both sides of the input divided by ``crop_fraction`` (rounded
    down), and ``pad`` scales it to the largest size that fits into the input.

    For crop and pad, the other side is scaled in proportion and rounded down. A centre
    between two pixels is rounded to the even one. Pillow's filters of the same name
    always smooth (``antialias``) when they shrink an image.
    """

    resolution: SizeField
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    mode: Resize | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    crop_fraction: float | None = Field(
        None, description="for crop: each side of the input, divided by that of the scaled image"
    )
    shorter_side: int | None = Field(None, description="for crop to a square, in pixels")
    padding: tuple[int, ...] | None = Field(
        None,
        description="for pad: the colour of the border per channel, 0..255, before normalisation",
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out unset fields, so that bundles older than the numeric geometry keep
        their hash.
        """
        return {name: value for name, value in handler(self).items() if value is not None}


class DetectorPart(Record):
    """How to read a detector's files. ``post_processing`` is for the files that do not
    include it in their graph.
    """

    anchors: int
    post_processing: PostProcessing

    @classmethod
    def of(cls, arch: Architecture, post_processing: PostProcessing) -> Self | None:
        """The part for a detector; None for other networks."""
        if arch.detector is None:
            return None
        return cls(anchors=arch.detector.anchors, post_processing=post_processing)


class Bundle(Document):
    """The description of a bundle (``bundle.json``). ``metrics`` are PyTorch's results on
    the test images, by name.

    Version 1 had ``torch_accuracy`` for classifiers and ``torch_ap`` for detectors
    instead, and described a detector's files in ``detector``.
    """

    SCHEMA: ClassVar[str] = "hwnas.bundle"
    VERSION: ClassVar[int] = 2

    architecture: Architecture
    task: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    macs: int
    params: int
    metric: str = Field(description="the main one of the metrics")
    metrics: dict[str, float]
    test_images: int
    files: tuple[BundleFile, ...]
    detector: DetectorPart | None = None
    labels_file: OtherFile | None = None
    parity_file: OtherFile | None = None
    score_calibration: CalibrationPart | None = None
    versions: dict[str, str]

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.metric not in self.metrics:
            raise ValueError(f"metrics lack {self.metric!r}, the main metric: export again")
        if (self.detector is None) != (self.architecture.detector is None):
            raise ValueError(
                "the key detector must be present for a detector, and only then: export again"
            )
        return self

    @model_validator(mode="after")
    def _finite(self) -> Self:
        numbers = dict(self.metrics)
        for file in self.files:
            numbers[f"{file.name}, relative_error"] = file.parity.relative_error
            numbers[f"{file.name}, agreement"] = file.parity.agreement
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"{name} is {number}: export again")
        return self

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Rename the fields of version 1, and move the outputs of a detector's files."""
        names = {"torch_accuracy": (ACCURACY, "classify"), "torch_ap": (AP, "detect")}
        for name, (metric, task) in names.items():
            value = content.pop(name, None)
            if value is not None:
                content |= {"metric": metric, "metrics": {metric: value}, "task": task}
        if "metrics" not in content:
            raise DocumentError(
                "a bundle of version 1 needs torch_accuracy or torch_ap, but this one has neither:"
                " export again."
            )
        detector = content.get("detector")
        if isinstance(detector, dict) and isinstance(content.get("files"), list):
            described = detector.pop("files", {})
            outputs = {name: file["outputs"] for name, file in described.items()}
            content["files"] = [
                {**file, "outputs": outputs.get(file.get("name"))} for file in content["files"]
            ]
        return content

    @property
    def settings(self) -> Task:
        """The task, with the post-processing that the network was exported with."""
        post_processing = None if self.detector is None else self.detector.post_processing
        return task_named(self.task, post_processing)

    @property
    def interface(self) -> Interface:
        """What all files take and return."""
        takes = {file.input.dtype for file in self.files if file.input is not None}
        returns: set[str] = set()
        for file in self.files:
            returns |= {output.name for output in file.outputs or ()}
        pixels: Literal["float32", "uint8"] = "uint8" if takes == {"uint8"} else "float32"
        return Interface(
            pixels, returns == {PROBABILITIES}, self.preprocessing.mean, self.preprocessing.std
        )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out unset fields."""
        return {name: value for name, value in handler(self).items() if value is not None}


def preprocessing(data: DataConfig, images: Images) -> Preprocessing:
    """Describe, in words and numbers, how the data loader prepares a test image."""
    common = {
        "resolution": data.resolution,
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        "resize": images.resizing,
    }
    geometry = images.geometry
    if geometry is None:
        return Preprocessing.model_validate(common)
    return Preprocessing.model_validate(
        {
            **common,
            "mode": geometry.mode,
            "interpolation": geometry.interpolation,
            "antialias": True,
            "crop_fraction": geometry.crop_fraction,
            "shorter_side": geometry.shorter_side,
            "padding": geometry.border if geometry.mode == "pad" else None,
        }
    )


def described_input(of: Target, interface: Interface, arch: Architecture) -> FileInput:
    """Describe the input of a target's file, in words and numbers."""
    sides = arch.size_HW
    channels = arch.in_channels
    shape = (1, *sides, channels) if of.layout == "NHWC" else (1, channels, *sides)
    colours = "red, green and blue" if channels == 3 else "grey"
    meaning = f"{colours} scaled to 0..1, less preprocessing.mean, divided by preprocessing.std"
    if interface.input == "uint8":
        meaning = f"{colours} from 0 to 255, as they are: the file normalises them"
    return FileInput(
        name=IMAGE,
        dtype=interface.input,
        layout=of.layout,
        shape=shape,
        range=interface.range,
        meaning=meaning,
    )


def describe_file(
    folder: Path, kind: str, measured: Parity, entry: FileInput, outputs: tuple[Output, ...]
) -> BundleFile:
    """The entry in ``bundle.json`` for an exported file."""
    kind_target = target(kind)
    path = folder / kind_target.file
    return BundleFile.model_validate(
        {
            "name": kind_target.file,
            "input": entry,
            "outputs": outputs,
            "format": kind,
            "runtime": kind_target.runtime,
            "dtype": kind_target.dtype,
            "size_bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "parity": measured,
        }
    )


def write_labels(folder: Path, labels: Sequence[str]) -> OtherFile:
    """Write ``labels.txt``, and return its entry."""
    path = folder / LABELS_FILE
    write_atomic(path, labels_text(labels).encode())
    return _entry(path)


def write_parity(folder: Path, arrays: Mapping[str, np.ndarray]) -> OtherFile:
    """Write ``parity.npz``, and return its entry. Raises ExportError if an array holds
    NaN.
    """
    for name, array in arrays.items():
        if has_nan(array):
            raise ExportError(
                f"the trained network's {name} for test images hold NaN: train again, with a lower"
                " train.optimizer.lr or with train.optimizer.clip_norm."
            )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    path = folder / PARITY_FILE
    write_atomic(path, buffer.getvalue())
    return _entry(path)


def _entry(path: Path) -> OtherFile:
    return OtherFile(name=path.name, size_bytes=path.stat().st_size, sha256=file_sha256(path))


def has_nan(array: np.ndarray) -> bool:
    """Whether an array holds NaN."""
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def load_parity(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """All arrays in the ``parity.npz`` of a bundle.

    Raises DocumentError if the file is missing or damaged, if it lacks one of ``names``,
    or if an array holds NaN.
    """
    path = folder / PARITY_FILE
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever damage leads to
        raise DocumentError(f"{path} is damaged ({first_line(error)}): export again.") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DocumentError(f"{path} lacks the array {missing[0]!r}: export again.")
    for name, array in arrays.items():
        if has_nan(array):
            raise DocumentError(f"{path} holds NaN in {name!r}: export again.")
    return arrays


def tool_versions() -> dict[str, str]:
    """The versions of all packages that affect the files."""
    packages = ("torch", "ai-edge-quantizer", "ai-edge-litert", "onnx", "onnxruntime")
    return {"hwnas": __version__, **{package: version(package) for package in packages}}
