"""TFLite metadata, with which MediaPipe's tasks, ML Kit and Android Studio can use a
file without further information.

The metadata describe how to normalise the image, which label belongs to which output,
and how to read a detector's boxes. They are stored as TFLite's ``MetadataPopulator``
does it: a flatbuffer (``metadata_schema``) in the buffer that the model's metadata
entry ``TFLITE_METADATA`` names, and the associated files in an uncompressed zip archive
after the model's flatbuffer. Runtimes ignore both. Inputs and outputs get names, the
same in the graph and in its signature.

Requirements of the readers (mediapipe/tasks/cc: image_tensor_specs.cc,
image_preprocessing_graph.cc, classification_postprocessing_graph.cc,
detection_postprocessing_graph.cc):

- ImageClassifier and ObjectDetector: an RGB image. A float32 input needs one mean and
  one std for all channels ("Per-channel image normalization is not available"), a uint8
  input needs nothing. They stretch the image to the input's size.
- ObjectDetector: a file with ``TFLite_Detection_PostProcess`` (``tasks``), whose four
  outputs have the names in ``_DETECTION``.
- ML Kit's custom classifiers: the same, but the normalisation may be per channel.

*Difference*: a zip archive stores the time of each file. Ours is always 1980, so that
the same network gives the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from hwnas import __version__
from hwnas.export import metadata_schema as tables
from hwnas.export.names import DETECTIONS, IMAGE, LOGITS, PROBABILITIES, TASK_OUTPUTS
from hwnas.export.score_calibration import ScoreCalibration
from hwnas.export.tflite_file import read_model, write_model

LABELS_FILE = "labels.txt"
"""One label per line, in the order of the outputs: next to the model files, and inside
them.
"""
CALIBRATION_FILE = "score_calibration.txt"
ENTRY = "TFLITE_METADATA"
"""The name of the model's metadata entry."""

OutputKind = Literal["logits", "probabilities", "decoded", "tasks"]
OUTPUTS: dict[OutputKind, tuple[str, ...]] = {
    "logits": (LOGITS,),
    "probabilities": (PROBABILITIES,),
    "decoded": (DETECTIONS,),
    "tasks": TASK_OUTPUTS,
}
"""Kind of output -> the names of the output tensors."""

_DETECTION = ("location", "category", "score", "number of detections")
"""The names by which MediaPipe finds the outputs of ``tasks``."""
_GROUP = "detection_result"
_LARGEST_PIXEL = 255.0
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Normalisation:
    """The normalisation of a pixel value x in 0..255: (x - mean) / std, per channel.
    Both are in units of pixel values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_parts(cls, mean: Sequence[float], std: Sequence[float]) -> Normalisation:
        """From mean and std for images scaled to 0..1, as in configurations and
        bundles.
        """
        return cls(
            tuple(_LARGEST_PIXEL * value for value in mean),
            tuple(_LARGEST_PIXEL * value for value in std),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same mean and std, which MediaPipe requires."""
        return len(set(self.mean)) == len(set(self.std)) == 1


@dataclass(frozen=True)
class ModelCard:
    """The contents of a file's metadata.

    ``resizing`` describes in words, for people, how an image is resized to the input's
    size. ``normalisation`` is None if the file takes raw uint8 pixels in 0..255.
    ``calibration`` is for classifiers only.
    """

    name: str
    channels: int
    labels: tuple[str, ...]
    output: OutputKind
    normalisation: Normalisation | None
    resizing: str
    calibration: ScoreCalibration | None = None


def with_metadata(model: bytes, card: ModelCard) -> bytes:
    """Add metadata to a file, and name its input and outputs. Replaces existing
    metadata. What the graph computes does not change.

    Raises ExportError if the file would have 2 GiB or more.
    """
    parsed = read_model(model)
    _name_tensors(parsed, IMAGE, OUTPUTS[card.output])
    buffer = schema.BufferT()
    buffer.data = tables.packed(_model(card))
    entry = schema.MetadataT()
    entry.name = ENTRY
    entry.buffer = len(parsed.buffers)
    # entries of others, such as the minimum runtime version, stay
    others = [other for other in parsed.metadata or [] if other.name != ENTRY.encode()]
    parsed.buffers = [*parsed.buffers, buffer]
    parsed.metadata = [*others, entry]
    return _with_files(write_model(parsed), _files(card))


def labels_text(labels: Sequence[str]) -> str:
    """The content of ``labels.txt``: one line per label. A label without a name gets
    its position.
    """
    # a newline inside a label would shift all later labels by one
    lines = [" ".join(label.split()) or str(number) for number, label in enumerate(labels)]
    return "\n".join(lines)


def _files(card: ModelCard) -> dict[str, str]:
    """The contents of the associated files by name. They end without a newline, because
    readers would take it for one more line.
    """
    files = {LABELS_FILE: labels_text(card.labels)}
    if card.calibration is not None:
        files[CALIBRATION_FILE] = card.calibration.text()
    return files


def _with_files(model: bytes, files: dict[str, str]) -> bytes:
    """The model followed by a zip archive. As in a self-extracting archive, offsets
    count from the start of the whole file.
    """
    whole = io.BytesIO()
    whole.write(model)
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), text.encode())
    return whole.getvalue()


def _name_tensors(model: Any, entry: str, exits: Sequence[str]) -> None:
    """Name the only input and the outputs, in the graph and in its signature."""
    [graph] = model.subgraphs
    indices = [int(graph.inputs[0]), *map(int, graph.outputs)]
    names = dict(zip(indices, [entry, *exits], strict=True))
    for index, tensor in enumerate(graph.tensors):
        if index in names:
            tensor.name = names[index]
        elif tensor.name.decode() in names.values():
            # In quantised files, the int8 tensor before an output has the output's name.
            tensor.name = f"{tensor.name.decode()}.inner"
    for signature in model.signatureDefs or []:
        for tensor in [*signature.inputs, *signature.outputs]:
            tensor.name = names[int(tensor.tensorIndex)]


def _model(card: ModelCard) -> tables.Table:
    """The root table of the metadata."""
    grouped = card.output == "tasks"
    subgraph: tables.Table = {
        tables.Subgraph.INPUTS: [_input(card)],
        tables.Subgraph.OUTPUTS: _outputs(card),
    }
    if grouped:
        group: tables.Table = {
            tables.Group.NAME: _GROUP,
            tables.Group.TENSOR_NAMES: list(_DETECTION[:-1]),
        }
        subgraph[tables.Subgraph.OUTPUT_GROUPS] = [group]
    job = "Objects of the labels, and their boxes"
    if card.output in ("logits", "probabilities"):
        job = "Which of the labels an image shows"
    model: tables.Table = {
        tables.Model.NAME: card.name,
        tables.Model.DESCRIPTION: f"{job}. Made by hwnas {__version__}.",
        tables.Model.VERSION: __version__,
        tables.Model.SUBGRAPHS: [subgraph],
        # Groups exist since version 1.2.0 of the schema, everything else since 1.0.0.
        tables.Model.MIN_PARSER_VERSION: "1.2.0" if grouped else "1.0.0",
    }
    # a row has four columns before its labels, so they cannot label one of its axes
    if card.output == "decoded":
        model[tables.Model.FILES] = [
            _file(LABELS_FILE, "Labels of a row's columns after its box.", tables.FileType.UNKNOWN)
        ]
    return model


def _input(card: ModelCard) -> tables.Table:
    color = tables.ColorSpace.RGB if card.channels == 3 else tables.ColorSpace.GRAYSCALE
    tensor: tables.Table = {
        tables.Tensor.NAME: IMAGE,
        tables.Tensor.DESCRIPTION: f"The image. Resizing: {card.resizing}.",
        tables.Tensor.CONTENT: _content(tables.Properties.IMAGE, {0: np.int8(color)}),
    }
    # the range of the input's values: pixels, or pixels after normalisation
    low = np.zeros(1, np.float32)
    high = np.full(1, _LARGEST_PIXEL, np.float32)
    if card.normalisation is not None:
        mean, std = _shortest(card.normalisation)
        options: tables.Table = {tables.Normalization.MEAN: mean, tables.Normalization.STD: std}
        tensor[tables.Tensor.PROCESS_UNITS] = [_unit(tables.UnitType.NORMALIZATION, options)]
        low = (low - mean) / std
        high = (high - mean) / std
    tensor[tables.Tensor.STATS] = {tables.Stats.MIN: low, tables.Stats.MAX: high}
    return tensor


def _shortest(normalisation: Normalisation) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std as arrays [channels], or [1] if all channels have the same.
    MediaPipe accepts only the latter.
    """
    count = 1 if normalisation.is_uniform else len(normalisation.mean)
    mean = np.array(normalisation.mean[:count], np.float32)
    std = np.array(normalisation.std[:count], np.float32)
    return mean, std


def _outputs(card: ModelCard) -> list[tables.Table]:
    if card.output == "tasks":
        return _detection_outputs()
    if card.output == "decoded":
        row = "Per anchor: x1, y1, x2, y2 in pixels of the input, then a score in 0..1 per label."
        return [_feature(OUTPUTS["decoded"][0], row)]
    [name] = OUTPUTS[card.output]
    tensor = _feature(name, "A number per label, the largest for the likeliest.")
    files = [
        _file(LABELS_FILE, "Labels in the order of the output.", tables.FileType.TENSOR_AXIS_LABELS)
    ]
    if card.output == "probabilities":
        tensor[tables.Tensor.STATS] = {
            tables.Stats.MIN: np.zeros(1, np.float32),
            tables.Stats.MAX: np.ones(1, np.float32),
        }
    if card.calibration is not None:
        transformation = tables.Transformation[card.calibration.transformation]
        options: tables.Table = {
            tables.Calibration.TRANSFORMATION: np.int8(transformation),
            tables.Calibration.DEFAULT_SCORE: np.float32(0),
        }
        tensor[tables.Tensor.PROCESS_UNITS] = [_unit(tables.UnitType.SCORE_CALIBRATION, options)]
        files.append(
            _file(
                CALIBRATION_FILE,
                "scale, slope, offset per label.",
                tables.FileType.TENSOR_AXIS_SCORE_CALIBRATION,
            )
        )
    tensor[tables.Tensor.FILES] = files
    return [tensor]


def _detection_outputs() -> list[tables.Table]:
    # part of the exported files, whose bytes must not change for a better wording
    descriptions = (
        "Boxes in parts of the input.",
        "Positions of labels.",
        "Scores in 0..1.",
        "How many there are.",
    )
    location, category, score, number = map(_feature, _DETECTION, descriptions)
    # Axis 2 is what the readers expect for the values of one detection.
    axis: tables.Table = {tables.Range.MIN: np.int32(2), tables.Range.MAX: np.int32(2)}
    box: tables.Table = {
        tables.BoundingBox.INDEX: np.array([1, 0, 3, 2], np.uint32),  # top, left, bottom, right
        tables.BoundingBox.TYPE: np.int8(tables.BOUNDARIES),
        tables.BoundingBox.COORDINATES: np.int8(tables.RATIO),
    }
    location[tables.Tensor.CONTENT] = _content(tables.Properties.BOUNDING_BOX, box, axis)
    for tensor in (category, score):
        tensor[tables.Tensor.CONTENT] = _content(tables.Properties.FEATURE, {}, axis)
    category[tables.Tensor.FILES] = [
        _file(LABELS_FILE, "Labels by position.", tables.FileType.TENSOR_VALUE_LABELS)
    ]
    return [location, category, score, number]


def _feature(name: str, description: str) -> tables.Table:
    return {
        tables.Tensor.NAME: name,
        tables.Tensor.DESCRIPTION: description,
        tables.Tensor.CONTENT: _content(tables.Properties.FEATURE, {}),
    }


def _content(
    kind: tables.Properties, properties: tables.Table, axes: tables.Table | None = None
) -> tables.Table:
    content: tables.Table = {
        tables.Content.PROPERTIES_TYPE: np.uint8(kind),
        tables.Content.PROPERTIES: properties,
    }
    if axes is not None:
        content[tables.Content.RANGE] = axes
    return content


def _unit(kind: tables.UnitType, options: tables.Table) -> tables.Table:
    return {tables.Unit.OPTIONS_TYPE: np.uint8(kind), tables.Unit.OPTIONS: options}


def _file(name: str, description: str, kind: tables.FileType) -> tables.Table:
    return {
        tables.File.NAME: name,
        tables.File.DESCRIPTION: description,
        tables.File.TYPE: np.int8(kind),
    }
