"""TFLite metadata as they lie in the file. What programs of others make of them: tests/apps."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flatbuffers.table import Table
from torch import nn

from hwnas.export import metadata_schema as tables
from hwnas.export.bundle import Bundle
from hwnas.export.metadata import ENTRY, ModelCard, Normalisation, labels_text, with_metadata
from hwnas.export.score_calibration import ScoreCalibration
from hwnas.export.stage import refused_by_mediapipe
from hwnas.export.tflite import graph_ops, quantize_int8, to_tflite
from hwnas.export.tflite_detector import decoded, tasks, without_decoding
from hwnas.export.tflite_writer import Graph, write_heads
from tests.export.detectors import images, lively_network, run_tflite
from tests.export.test_tflite_file import SETTINGS

torch.set_num_threads(1)

CARD = ModelCard("small", 3, ("cat", "dog", "red panda"), "logits", Normalisation.of_parts((0.5,) * 3, (0.5,) * 3))


@pytest.fixture(scope="module")
def converted() -> bytes:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return to_tflite(nn.Sequential(*layers), (1, 3, 16, 16))


def pictures() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)


def outputs(model: bytes) -> np.ndarray:
    return np.stack([next(iter(found.values())) for found in run_tflite(model, torch.from_numpy(pictures()).permute(0, 3, 1, 2))])


def entry(model: bytes) -> bytes:
    """The metadata flatbuffer of a file."""
    parsed = schema.ModelT.InitFromPackedBuf(model)
    [found] = [each.buffer for each in parsed.metadata if each.name == ENTRY.encode()]
    return bytes(parsed.buffers[found].data)


def root(packed: bytes) -> Table:
    assert packed[4:8] == b"M001"
    return Table(packed, int.from_bytes(packed[:4], "little"))


def field(table: Table, number: int) -> int:
    """Where a field lies in its table."""
    return int(table.Offset(4 + 2 * number))


def child(table: Table, number: int, position: int | None = None) -> Table:
    """A table that a field holds, itself or in a vector."""
    if position is None:
        return Table(table.Bytes, table.Indirect(field(table, number) + table.Pos))
    return Table(table.Bytes, table.Indirect(table.Vector(field(table, number)) + 4 * position))


def text(table: Table, number: int) -> str:
    return bytes(table.String(field(table, number) + table.Pos)).decode()


def floats(table: Table, number: int) -> list[float]:
    offset = field(table, number)
    return list(np.frombuffer(table.Bytes, "<f4", table.VectorLen(offset), table.Vector(offset)))


def normalisation(model: bytes) -> tuple[list[float], list[float]]:
    image = child(child(root(entry(model)), tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0)
    options = child(child(image, tables.Tensor.PROCESS_UNITS, 0), tables.Unit.OPTIONS)
    return floats(options, tables.Normalization.MEAN), floats(options, tables.Normalization.STD)


@pytest.mark.parametrize("int8", [False, True])
def test_the_graph_computes_what_it_did_and_has_names(converted: bytes, int8: bool) -> None:
    before = quantize_int8(converted, [pictures()], float_io=True) if int8 else converted
    model = with_metadata(before, CARD)
    assert np.array_equal(outputs(model), outputs(before)) and graph_ops(model) == graph_ops(before)
    interpreter = Interpreter(model_content=model)
    assert interpreter.get_input_details()[0]["name"] == "image"
    assert interpreter.get_output_details()[0]["name"] == "logits"
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["image"], "outputs": ["logits"]}}
    names = [tensor.name for tensor in schema.ModelT.InitFromPackedBuf(model).subgraphs[0].tensors]
    assert len(names) == len(set(names))


def test_a_name_that_another_tensor_has_is_taken_from_it() -> None:
    network = lively_network()
    heads = quantize_int8(write_heads(network), [images(4).permute(0, 2, 3, 1).numpy()], float_io=True)
    model = with_metadata(decoded(heads, network), replace(CARD, output="decoded"))
    names = [tensor.name for tensor in schema.ModelT.InitFromPackedBuf(model).subgraphs[0].tensors]
    assert len(names) == len(set(names)) and b"image" in names and b"detections" in names


def test_labels_follow_the_model_as_a_zip_archive(converted: bytes) -> None:
    model = with_metadata(converted, CARD)
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        [info] = archive.infolist()
        assert (info.filename, info.compress_type) == ("labels.txt", zipfile.ZIP_STORED)
        assert archive.read("labels.txt") == b"cat\ndog\nred panda"
    assert model == with_metadata(converted, CARD), "the same bytes every time"
    assert text(root(entry(model)), tables.Model.NAME) == "small"


def test_normalisation_is_of_pixel_values(converted: bytes) -> None:
    assert normalisation(with_metadata(converted, CARD)) == ([127.5], [127.5])
    per_channel = Normalisation.of_parts((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    mean, std = normalisation(with_metadata(converted, replace(CARD, normalisation=per_channel)))
    assert mean == pytest.approx([102, 127.5, 153]) and std == pytest.approx([51, 51, 51])


def test_an_input_of_pixels_has_no_normalisation(converted: bytes) -> None:
    model = root(entry(with_metadata(converted, replace(CARD, normalisation=None))))
    image = child(child(model, tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0)
    assert field(image, tables.Tensor.PROCESS_UNITS) == 0
    assert floats(child(image, tables.Tensor.STATS), tables.Stats.MAX) == [255]


@pytest.mark.parametrize(("channels", "color"), [(3, tables.ColorSpace.RGB), (1, tables.ColorSpace.GRAYSCALE)])
def test_the_image_is_of_a_colour_space(converted: bytes, channels: int, color: tables.ColorSpace) -> None:
    model = root(entry(with_metadata(converted, replace(CARD, channels=channels))))
    content = child(child(child(model, tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0), tables.Tensor.CONTENT)
    properties = child(content, tables.Content.PROPERTIES)
    assert properties.Bytes[properties.Pos + field(properties, 0)] == color


def test_metadata_are_replaced_by_newer_ones(converted: bytes) -> None:
    again = with_metadata(with_metadata(converted, replace(CARD, labels=("a", "b", "c"))), CARD)
    with zipfile.ZipFile(io.BytesIO(again)) as archive:
        assert archive.namelist() == ["labels.txt"] and archive.read("labels.txt").startswith(b"cat")
    assert entry(again) == entry(with_metadata(converted, CARD))


def test_score_calibration_is_a_file_and_a_process_unit(converted: bytes) -> None:
    calibration = ScoreCalibration((1.5, 2.0, -0.25), (0.0, -1.0, 3.0), "IDENTITY")
    model = with_metadata(converted, replace(CARD, calibration=calibration))
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        assert archive.read("score_calibration.txt") == b"1,1.5,0\n1,2,-1\n1,-0.25,3"
    logits = child(child(root(entry(model)), tables.Model.SUBGRAPHS, 0), tables.Subgraph.OUTPUTS, 0)
    unit = child(logits, tables.Tensor.PROCESS_UNITS, 0)
    assert unit.Bytes[unit.Pos + field(unit, tables.Unit.OPTIONS_TYPE)] == tables.UnitType.SCORE_CALIBRATION
    assert text(child(logits, tables.Tensor.FILES, 1), tables.File.NAME) == "score_calibration.txt"


def test_detectors_files_are_opened_again_without_their_metadata() -> None:
    network = lively_network()
    heads = write_heads(network)
    bare = decoded(heads, network)
    model = with_metadata(bare, replace(CARD, output="decoded"))
    assert without_decoding(model) == without_decoding(bare)
    assert len(without_decoding(bare)) <= len(heads) + 1024 < len(bare)
    chosen = tasks(heads, network, SETTINGS)
    graph, first, exits = Graph.opened(with_metadata(chosen, replace(CARD, output="tasks")))
    again = graph.pack(first, *exits)
    assert ENTRY.encode() not in again
    for one, other in zip(run_tflite(chosen, images()), run_tflite(again, images()), strict=True):
        assert list(one) == list(other) == ["boxes", "classes", "scores", "count"]
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_label_has_one_line() -> None:
    assert labels_text(("a\nb", " two  words ", "", "é")) == "a b\ntwo words\n2\né"


@pytest.mark.parametrize(
    ("mean", "std", "pixels", "refused"),
    [
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), False, False),
        ((0.4, 0.5, 0.5), (0.2, 0.2, 0.2), False, True),
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.3), False, True),
        ((0.4, 0.5, 0.5), (0.2, 0.2, 0.3), True, False),
    ],
)
def test_bundles_that_mediapipe_refuses(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: bool, refused: bool, finished_run: Path
) -> None:
    """Float input that is normalised per channel; MediaPipe itself says so in tests/apps."""
    bundle = Bundle.load(finished_run / "export" / "bundle.json")
    files = bundle.files
    if pixels:
        takes = [file.input.model_copy(update={"dtype": "uint8"}) for file in files if file.input is not None]
        files = tuple(file.model_copy(update={"input": each}) for file, each in zip(files, takes, strict=True))
    preprocessing = bundle.preprocessing.model_copy(update={"mean": mean, "std": std})
    assert refused_by_mediapipe(bundle.model_copy(update={"files": files, "preprocessing": preprocessing})) == refused
