"""TFLite metadata as stored in the file. In tests/apps, other programs read them."""

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
from PIL import Image
from torch import nn

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Classifier, Conv
from hwnas.export import metadata_schema as tables
from hwnas.export.bundle import Bundle
from hwnas.export.convert import to_tflite
from hwnas.export.exporting import refused_by_mediapipe, stretched_by_apps
from hwnas.export.metadata import ENTRY, ModelCard, Normalisation, labels_text, with_metadata
from hwnas.export.quantization import quantize_int8
from hwnas.export.score_calibration import ScoreCalibration
from hwnas.export.tflite_detector import add_decoding, tasks, without_decoding
from hwnas.export.tflite_file import TFLiteGraph, graph_ops
from hwnas.export.tflite_writer import write_heads
from hwnas.nn.checkpoint import save_network
from hwnas.nn.network import network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from tests.export.detectors import images, lively_network, run_tflite
from tests.export.test_tflite_file import SETTINGS

torch.set_num_threads(1)

CARD = ModelCard(
    "small",
    3,
    ("cat", "dog", "red panda"),
    "logits",
    Normalisation.of_parts((0.5,) * 3, (0.5,) * 3),
    "to 16 x 16",
)


@pytest.fixture(scope="module")
def converted() -> bytes:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return to_tflite(nn.Sequential(*layers), (1, 3, 16, 16))


def pictures() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)


def outputs(model: bytes) -> np.ndarray:
    return np.stack(
        [
            next(iter(by_name.values()))
            for by_name in run_tflite(model, torch.from_numpy(pictures()).permute(0, 3, 1, 2))
        ]
    )


def entry(model: bytes) -> bytes:
    """The metadata flatbuffer of a file."""
    parsed = schema.ModelT.InitFromPackedBuf(model)
    [index] = [metadata.buffer for metadata in parsed.metadata if metadata.name == ENTRY.encode()]
    return bytes(parsed.buffers[index].data)


def root(packed: bytes) -> Table:
    assert packed[4:8] == b"M001"
    return Table(packed, int.from_bytes(packed[:4], "little"))


def field(table: Table, number: int) -> int:
    """The offset of a field in its table."""
    return int(table.Offset(4 + 2 * number))


def child(table: Table, number: int, position: int | None = None) -> Table:
    """The table in a field, or the one at a position of the vector in it."""
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
def test_the_graph_computes_the_same_and_gets_names(converted: bytes, int8: bool) -> None:
    before = quantize_int8(converted, [pictures()], float_io=True) if int8 else converted
    model = with_metadata(before, CARD)
    assert np.array_equal(outputs(model), outputs(before)) and graph_ops(model) == graph_ops(before)
    interpreter = Interpreter(model_content=model)
    assert interpreter.get_input_details()[0]["name"] == "image"
    assert interpreter.get_output_details()[0]["name"] == "logits"
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["logits"]}
    }
    names = [tensor.name for tensor in schema.ModelT.InitFromPackedBuf(model).subgraphs[0].tensors]
    assert len(names) == len(set(names))


def test_another_tensor_with_the_same_name_is_renamed() -> None:
    network = lively_network()
    heads = quantize_int8(
        write_heads(network), [images(4).permute(0, 2, 3, 1).numpy()], float_io=True
    )
    model = with_metadata(add_decoding(heads, network), replace(CARD, output="decoded"))
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


def test_normalisation_is_in_pixel_values(converted: bytes) -> None:
    assert normalisation(with_metadata(converted, CARD)) == ([127.5], [127.5])
    per_channel = Normalisation.of_parts((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    mean, std = normalisation(with_metadata(converted, replace(CARD, normalisation=per_channel)))
    assert mean == pytest.approx([102, 127.5, 153]) and std == pytest.approx([51, 51, 51])


def test_an_input_of_pixels_has_no_normalisation(converted: bytes) -> None:
    model = root(entry(with_metadata(converted, replace(CARD, normalisation=None))))
    image = child(child(model, tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0)
    assert field(image, tables.Tensor.PROCESS_UNITS) == 0
    assert floats(child(image, tables.Tensor.STATS), tables.Stats.MAX) == [255]


@pytest.mark.parametrize(
    ("channels", "color"), [(3, tables.ColorSpace.RGB), (1, tables.ColorSpace.GRAYSCALE)]
)
def test_the_colour_space_of_the_image(
    converted: bytes, channels: int, color: tables.ColorSpace
) -> None:
    model = root(entry(with_metadata(converted, replace(CARD, channels=channels))))
    content = child(
        child(child(model, tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0),
        tables.Tensor.CONTENT,
    )
    properties = child(content, tables.Content.PROPERTIES)
    assert properties.Bytes[properties.Pos + field(properties, 0)] == color


def test_metadata_are_replaced_by_newer_ones(converted: bytes) -> None:
    again = with_metadata(with_metadata(converted, replace(CARD, labels=("a", "b", "c"))), CARD)
    with zipfile.ZipFile(io.BytesIO(again)) as archive:
        assert archive.namelist() == ["labels.txt"] and archive.read("labels.txt").startswith(
            b"cat"
        )
    assert entry(again) == entry(with_metadata(converted, CARD))


def test_score_calibration_is_a_file_and_a_process_unit(converted: bytes) -> None:
    calibration = ScoreCalibration((1.5, 2.0, -0.25), (0.0, -1.0, 3.0), "IDENTITY")
    model = with_metadata(converted, replace(CARD, calibration=calibration))
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        assert archive.read("score_calibration.txt") == b"1,1.5,0\n1,2,-1\n1,-0.25,3"
    logits = child(child(root(entry(model)), tables.Model.SUBGRAPHS, 0), tables.Subgraph.OUTPUTS, 0)
    unit = child(logits, tables.Tensor.PROCESS_UNITS, 0)
    assert (
        unit.Bytes[unit.Pos + field(unit, tables.Unit.OPTIONS_TYPE)]
        == tables.UnitType.SCORE_CALIBRATION
    )
    assert text(child(logits, tables.Tensor.FILES, 1), tables.File.NAME) == "score_calibration.txt"


def test_reopening_a_detectors_file_drops_its_metadata() -> None:
    network = lively_network()
    heads = write_heads(network)
    bare = add_decoding(heads, network)
    model = with_metadata(bare, replace(CARD, output="decoded"))
    assert without_decoding(model) == without_decoding(bare)
    assert len(without_decoding(bare)) <= len(heads) + 1024 < len(bare)
    chosen = tasks(heads, network, SETTINGS)
    graph, first, exits = TFLiteGraph.open(with_metadata(chosen, replace(CARD, output="tasks")))
    again = graph.pack(first, *exits)
    assert ENTRY.encode() not in again
    for before, after in zip(
        run_tflite(chosen, images()), run_tflite(again, images()), strict=True
    ):
        assert list(before) == list(after) == ["boxes", "classes", "scores", "count"]
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_label_has_one_line() -> None:
    assert labels_text(("a\nb", " two  words ", "", "é")) == "a b\ntwo words\n2\né"


class Heard(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The bundle of a classifier whose photographs are padded and normalised per
    channel, and the messages of its export.
    """
    folder = tmp_path_factory.mktemp("padded")
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (folder / place).mkdir(parents=True)
        Image.new("RGB", (20, 12), (200, 100, 50)).save(folder / place / "0.png")
    data = {
        "name": "folder",
        "path": str(folder),
        "resolution": 16,
        "classes": 2,
        "augment": "none",
        "resize": "pad",
    }
    data.update(mean=(0.4, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    experiment = Experiment.model_validate(
        {"data": data, "export": {"formats": ["tflite-fp32", "onnx"]}}
    )
    blocks = (Conv(16, 3, 8, kernel=3, stride=2, act="relu6"), Classifier(8, 8, 2))
    network = network_of(
        Architecture(name="small", blocks=blocks), generator=torch.Generator().manual_seed(0)
    )
    save_network(network, folder / "run" / "train" / "model.safetensors", {})
    heard = Heard()
    Pipeline(experiment, folder / "run", heard).run_stage("export")
    return folder / "run" / "export", heard.messages


def test_the_image_is_described_as_the_bundle_describes_it(padded: tuple[Path, list[str]]) -> None:
    folder, _ = padded
    model = root(entry((folder / "model-fp32.tflite").read_bytes()))
    image = child(child(model, tables.Model.SUBGRAPHS, 0), tables.Subgraph.INPUTS, 0)
    resize = Bundle.load(folder / "bundle.json").preprocessing.resize
    assert "longer side to 16" in resize
    assert text(image, tables.Tensor.DESCRIPTION) == f"The image. Resizing: {resize}."


def test_export_says_once_what_apps_do_with_its_files(padded: tuple[Path, list[str]]) -> None:
    _, messages = padded
    refused, stretched = (line for line in messages if line.startswith("note: "))
    assert (
        refused.startswith("note: MediaPipe's tasks normalise float32 input with one mean and std")
        and "'uint8'" in refused
    )
    assert (
        stretched
        == "note: MediaPipe and ML Kit stretch photographs to the model's square, but these files"
        " were made for 'pad': resize photographs yourself first, or set data.resize = 'squash'."
    )


@pytest.mark.parametrize(
    ("mean", "std", "pixels", "reason"),
    [
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), False, None),
        ((0.4, 0.5, 0.5), (0.2, 0.2, 0.2), False, "set export.input = 'uint8'"),
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.3), False, "set export.input = 'uint8'"),
        ((0.4, 0.5, 0.5), (0.2, 0.2, 0.3), True, None),
        ((0.5,), (0.2,), False, "take RGB images only"),
        ((0.5,), (0.2,), True, "take RGB images only"),
    ],
)
def test_bundles_that_mediapipe_refuses(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pixels: bool,
    reason: str | None,
    padded: tuple[Path, list[str]],
) -> None:
    """Those with greyscale images, and those with float input that is normalised per
    channel. tests/apps shows it with MediaPipe itself.
    """
    bundle = Bundle.load(padded[0] / "bundle.json")
    files = bundle.files
    if pixels:
        inputs = [
            file.input.model_copy(update={"dtype": "uint8"})
            for file in files
            if file.input is not None
        ]
        files = tuple(
            file.model_copy(update={"input": input_})
            for file, input_ in zip(files, inputs, strict=True)
        )
    preprocessing = bundle.preprocessing.model_copy(
        update={"channels": len(mean), "mean": mean, "std": std}
    )
    note = refused_by_mediapipe(
        bundle.model_copy(update={"files": files, "preprocessing": preprocessing})
    )
    assert note is None if reason is None else reason in str(note)
    onnx = tuple(file for file in files if file.runtime == "onnxruntime")
    assert (
        onnx
        and refused_by_mediapipe(
            bundle.model_copy(update={"files": onnx, "preprocessing": preprocessing})
        )
        is None
    )


@pytest.mark.parametrize(
    ("mode", "stretched"), [("squash", False), (None, False), ("crop", True), ("pad", True)]
)
def test_bundles_whose_photographs_apps_stretch(
    mode: str | None, stretched: bool, padded: tuple[Path, list[str]]
) -> None:
    """Nothing is known of a plug-in's data (None)."""
    bundle = Bundle.load(padded[0] / "bundle.json")
    bundle = bundle.model_copy(
        update={"preprocessing": bundle.preprocessing.model_copy(update={"mode": mode})}
    )
    note = stretched_by_apps(bundle)
    assert (note is not None) == stretched and (not stretched or f"made for {mode!r}" in str(note))
    onnx = tuple(file for file in bundle.files if file.runtime == "onnxruntime")
    assert stretched_by_apps(bundle.model_copy(update={"files": onnx})) is None
