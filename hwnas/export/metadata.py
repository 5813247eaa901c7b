"""TFLite metadata: what lets MediaPipe's tasks, ML Kit and Android Studio take a file as it is.

A file then says how its image is to be normalised, which label belongs to which output,
and how to read a detector's boxes. It is stored as TFLite's ``MetadataPopulator`` does:
a flatbuffer (``metadata_schema``) in the buffer that the model's metadata entry
``TFLITE_METADATA`` names, and the files it mentions in a zip archive after the model's
flatbuffer, not compressed. Runtimes look at neither. Inputs and outputs get names, the
same ones in the graph and in its signature.

What the readers need (mediapipe/tasks/cc: image_tensor_specs.cc,
image_preprocessing_graph.cc, classification_postprocessing_graph.cc,
detection_postprocessing_graph.cc):

- ImageClassifier and ObjectDetector: an RGB image; of a float32 input one mean and one
  std for all channels ("Per-channel image normalization is not available"); of a uint8
  input nothing. They stretch the image to the input's size.
- ObjectDetector: a file with ``TFLite_Detection_PostProcess`` (``tasks``), whose four
  outputs have the names in ``_DETECTION``.
- ML Kit's custom classifiers: the same, but the normalisation may be per channel.

*Difference*: a zip archive carries the time of each file; ours is always 1980, so that
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
"""One label a line, in the order of the outputs: beside the model files and inside them."""
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
"""What a file gives -> the names of its outputs."""

_DETECTION = ("location", "category", "score", "number of detections")
"""The names by which MediaPipe knows the outputs of ``tasks``."""
_GROUP = "detection_result"
_LARGEST_PIXEL = 255.0
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Normalisation:
    """From a pixel value x in 0..255 to the input: (x - mean) / std, per channel, both
    in units of pixel values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_parts(cls, mean: Sequence[float], std: Sequence[float]) -> Normalisation:
        """From mean and std of images scaled to 0..1, as a configuration and a bundle have them."""
        return cls(
            tuple(_LARGEST_PIXEL * value for value in mean),
            tuple(_LARGEST_PIXEL * value for value in std),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same mean and the same std: MediaPipe takes no others."""
        return len(set(self.mean)) == len(set(self.std)) == 1


@dataclass(frozen=True)
class ModelCard:
    """All that the metadata of a file say.

    ``resizing`` says in words how an image becomes the input's size; programs read no
    such thing, and people do. ``normalisation`` is None where the file takes pixels as
    they are, as uint8 in 0..255. ``calibration`` is of a classifier alone.
    """

    name: str
    channels: int
    labels: tuple[str, ...]
    output: OutputKind
    normalisation: Normalisation | None
    resizing: str
    calibration: ScoreCalibration | None = None


def with_metadata(model: bytes, card: ModelCard) -> bytes:
    """The file with metadata, and with named input and outputs. Metadata that it had
    are replaced. The graph computes what it did.

    Raises ExportError where the file would have 2 GiB or more.
    """
    parsed = read_model(model)
    _name_tensors(parsed, IMAGE, OUTPUTS[card.output])
    entry, buffer = schema.MetadataT(), schema.BufferT()
    buffer.data = tables.packed(_model(card))
    others = [each for each in parsed.metadata or [] if each.name != ENTRY.encode()]
    entry.name, entry.buffer = ENTRY, len(parsed.buffers)
    parsed.buffers, parsed.metadata = [*parsed.buffers, buffer], [*others, entry]
    return _with_files(write_model(parsed), _files(card))


def labels_text(labels: Sequence[str]) -> str:
    """The content of ``labels.txt``: a label has one line, and a nameless one its position."""
    return "\n".join(
        " ".join(label.split()) or str(position) for position, label in enumerate(labels)
    )


def _files(card: ModelCard) -> dict[str, str]:
    """The content of the associated files by name. Without a newline at the end, after
    which readers would see one more line.
    """
    calibration = {} if card.calibration is None else {CALIBRATION_FILE: card.calibration.text()}
    return {LABELS_FILE: labels_text(card.labels), **calibration}


def _with_files(model: bytes, files: dict[str, str]) -> bytes:
    """The model, and after it a zip archive whose offsets count from the start of the
    model, as those of a self-extracting one do.
    """
    whole = io.BytesIO()
    whole.write(model)
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), text.encode())
    return whole.getvalue()


def _name_tensors(model: Any, entry: str, exits: Sequence[str]) -> None:
    """Give the graph's only input and its outputs names, in the graph and in its signature."""
    [graph] = model.subgraphs
    names = dict(
        zip([int(graph.inputs[0]), *map(int, graph.outputs)], [entry, *exits], strict=True)
    )
    for index, tensor in enumerate(graph.tensors):
        if index in names:
            tensor.name = names[index]
        elif tensor.name.decode() in names.values():
            # the quantizer keeps an output's name for the int8 tensor before it
            tensor.name = f"{tensor.name.decode()}.inner"
    for signature in model.signatureDefs or []:
        for tensor in [*signature.inputs, *signature.outputs]:
            tensor.name = names[int(tensor.tensorIndex)]


def _model(card: ModelCard) -> tables.Table:
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
    job = (
        "Which of the labels an image shows"
        if card.output in ("logits", "probabilities")
        else "Objects of the labels, and their boxes"
    )
    model: tables.Table = {
        tables.Model.NAME: card.name,
        tables.Model.DESCRIPTION: f"{job}. Made by hwnas {__version__}.",
        tables.Model.VERSION: __version__,
        tables.Model.SUBGRAPHS: [subgraph],
        # Groups came with 1.2.0; everything else was there from the start.
        tables.Model.MIN_PARSER_VERSION: "1.2.0" if grouped else "1.0.0",
    }
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
    low, high = np.zeros(1, np.float32), np.full(1, _LARGEST_PIXEL, np.float32)
    if card.normalisation is not None:
        mean, std = _shortest(card.normalisation)
        options: tables.Table = {tables.Normalization.MEAN: mean, tables.Normalization.STD: std}
        tensor[tables.Tensor.PROCESS_UNITS] = [_unit(tables.UnitType.NORMALIZATION, options)]
        low, high = (low - mean) / std, (high - mean) / std
    tensor[tables.Tensor.STATS] = {tables.Stats.MIN: low, tables.Stats.MAX: high}
    return tensor


def _shortest(normalisation: Normalisation) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std, as one number each where all channels have the same."""
    kept = 1 if normalisation.is_uniform else len(normalisation.mean)
    return np.array(normalisation.mean[:kept], np.float32), np.array(
        normalisation.std[:kept], np.float32
    )


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
    location, category, score, number = (
        _feature(name, meaning)
        for name, meaning in zip(
            _DETECTION,
            (
                "Boxes in parts of the input.",
                "Positions of labels.",
                "Scores in 0..1.",
                "How many there are.",
            ),
            strict=True,
        )
    )
    # an item per detection, along axis 2
    each: tables.Table = {tables.Range.MIN: np.int32(2), tables.Range.MAX: np.int32(2)}
    box: tables.Table = {
        tables.BoundingBox.INDEX: np.array([1, 0, 3, 2], np.uint32),  # top, left, bottom, right
        tables.BoundingBox.TYPE: np.int8(tables.BOUNDARIES),
        tables.BoundingBox.COORDINATES: np.int8(tables.RATIO),
    }
    location[tables.Tensor.CONTENT] = _content(tables.Properties.BOUNDING_BOX, box, each)
    for tensor in (category, score):
        tensor[tables.Tensor.CONTENT] = _content(tables.Properties.FEATURE, {}, each)
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
    return content if axes is None else {**content, tables.Content.RANGE: axes}


def _unit(kind: tables.UnitType, options: tables.Table) -> tables.Table:
    return {tables.Unit.OPTIONS_TYPE: np.uint8(kind), tables.Unit.OPTIONS: options}


def _file(name: str, description: str, kind: tables.FileType) -> tables.Table:
    return {
        tables.File.NAME: name,
        tables.File.DESCRIPTION: description,
        tables.File.TYPE: np.int8(kind),
    }
