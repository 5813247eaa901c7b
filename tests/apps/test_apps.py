"""Exported files in other people's programs: MediaPipe's tasks, its metadata tools,
tflite-runtime 2.14.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_sample_images

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.export.bundle import Bundle
from hwnas.export.metadata import Normalisation, with_metadata
from hwnas.export.quantization import quantize_int8
from hwnas.export.score_calibration import ScoreCalibration
from hwnas.export.tflite_detector import tasks
from hwnas.export.tflite_file import TFLiteGraph, read_model, write_model
from hwnas.export.tflite_writer import write_heads
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from tests.apps.references import run_reference
from tests.export.detectors import run_tflite
from tests.export.test_metadata import CARD
from tests.export.test_tflite_file import SETTINGS, X_NCHW, calibration, large_network
from tests.train.rectangles import settings

torch.set_num_threads(1)

INT8_TOLERANCE = 0.05
"""As a fraction of the largest output. Two programs may round an input or a sum to
neighbouring ones of the 256 values.
"""
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
BLOCKS = (
    "conv-h32-i3-o16-k3-s2-relu6",
    "mbconv-h16-i16-o24-m48-k3-s2-relu6",
    "mbconv-h8-i24-o24-m48-k3-relu6-id",
    "conv-h8-i24-o64-relu6",
    "classifier-h8-i64-o10",
)


@dataclass(frozen=True)
class Exported:
    """A bundle, and images as an app has them: uint8 [N, size, size, 3], of the model's size."""

    folder: Path
    images: np.ndarray

    @property
    def bundle(self) -> Bundle:
        return Bundle.load(self.folder / "bundle.json")

    def inputs(self) -> np.ndarray:
        """The images, normalised as the bundle describes it."""
        pre = self.bundle.preprocessing
        normalised: np.ndarray = (self.images / 255.0 - np.array(pre.mean)) / np.array(pre.std)
        return normalised.astype(np.float32)

    def run(self, name: str) -> list[list[np.ndarray]]:
        """The outputs of LiteRT for each image."""
        interpreter = Interpreter(str(self.folder / name), num_threads=1)
        interpreter.allocate_tensors()
        outputs = []
        for image in self.inputs():
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
            interpreter.invoke()
            outputs.append(
                [
                    interpreter.get_tensor(exit_["index"])
                    for exit_ in interpreter.get_output_details()
                ]
            )
        return outputs

    def mediapipe(self, task: str, name: str, folder: Path) -> Any:
        np.save(folder / "images.npy", self.images)
        return run_reference(
            "mediapipe", "mediapipe_tasks.py", task, self.folder / name, folder / "images.npy"
        )


def patches(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops of 32 x 32 pixels from two photographs, labelled by the photograph and the
    fifth of its width: uint8 [N, 32, 32, 3], [N].
    """
    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images
    labels, rows, columns = (rng.integers(0, limit, count) for limit in (10, 427 - 32, 128 - 32))
    cut = [
        photographs[label // 5][row : row + 32, label % 5 * 128 + column :][:, :32]
        for label, row, column in zip(labels, rows, columns, strict=True)
    ]
    return np.stack(cut), labels


def exported(content: dict[str, Any], root: Path) -> Path:
    """Train and export the experiment ``content`` in the run folder ``root``; return
    the bundle's folder.
    """
    pipeline = Pipeline(Experiment.model_validate(content), root, Progress())
    for stage in ("train", "export"):
        pipeline.run_stage(stage)
    return root / "export"


@pytest.fixture(scope="module")
def classifier_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("photographs")
    for part, count, seed in (("train", 400, 0), ("test", 60, 1)):
        x, y = patches(count, seed)
        np.savez(folder / f"{part}.npz", x=x, y=y)
    Architecture(name="small", blocks=tuple(Op.parse(key) for key in BLOCKS)).save(
        folder / "small.json"
    )
    optimizer = {"name": "adamw", "lr": 0.1, "weight_decay": 0.01, "warmup": 0.1}
    return {
        "name": "photographs",
        "checkpoint_seconds": 1e9,
        "data": {"name": "npz", "path": str(folder), "resolution": 32, "augment": "none", **HALF},
        "train": {
            "arch": str(folder / "small.json"),
            "epochs": 6,
            "batch_size": 32,
            "optimizer": optimizer,
        },
        "export": {
            "formats": ["tflite-fp32", "tflite-int8"],
            "parity_images": 8,
            "calibration_images": 32,
        },
    }


@pytest.fixture(scope="module")
def classifier(
    classifier_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    root = tmp_path_factory.mktemp("classifier") / "run"
    return Exported(exported(classifier_settings, root), patches(8, 2)[0])


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("rectangles")
    content = settings(folder, epochs=20)
    content["data"] |= HALF
    content["detector"]["post_processing"] = {"min_score": 0.05, "detections": 20}
    content["export"] = {
        "formats": ["tflite-fp32", "tflite-int8", "tflite-fp32-tasks", "tflite-int8-tasks"],
        "parity_images": 8,
        "calibration_images": 16,
    }
    photographs = [photograph[100:148, 200:248] for photograph in load_sample_images().images]
    drawn = np.full((2, 48, 48, 3), 120, np.uint8)
    drawn[0, 8:30, 10:34], drawn[1, 20:40, 4:20] = (220, 40, 40), (40, 60, 220)
    return Exported(
        exported(content, folder / "run"), np.concatenate([drawn, np.stack(photographs)])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"), [("model-fp32.tflite", 1e-4), ("model-int8.tflite", INT8_TOLERANCE)]
)
def test_image_classifier_takes_a_file_as_it_is(
    classifier: Exported, name: str, tolerance: float, tmp_path: Path
) -> None:
    answers = classifier.mediapipe("classify", name, tmp_path)
    labels = classifier.bundle.labels
    for answer, [logits] in zip(answers, classifier.run(name), strict=True):
        scores = dict(answer)
        assert set(scores) == set(labels) and answer[0][0] == labels[int(logits[0].argmax())]
        assert [scores[label] for label in labels] == pytest.approx(
            logits[0], rel=0, abs=tolerance * float(np.abs(logits).max())
        )


@pytest.mark.slow
def test_image_classifier_applies_the_score_calibration(
    classifier: Exported, classifier_settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(classifier.folder.parent, tmp_path / "run")
    content = {
        **classifier_settings,
        "export": {**classifier_settings["export"], "score_calibration": True},
    }
    calibrated = Exported(exported(content, tmp_path / "run"), classifier.images)
    part = calibrated.bundle.score_calibration
    assert part is not None and part.images == 30 and part.transformation == "IDENTITY"
    for name, tolerance in (("model-fp32.tflite", 1e-5), ("model-int8.tflite", INT8_TOLERANCE)):
        answers = calibrated.mediapipe("classify", name, tmp_path)
        for answer, [logits] in zip(answers, calibrated.run(name), strict=True):
            wanted = ScoreCalibration(part.slopes, part.offsets, part.transformation).apply(logits)[
                0
            ]
            scores = dict(answer)
            assert [scores[label] for label in calibrated.bundle.labels] == pytest.approx(
                wanted, rel=0, abs=tolerance
            )
            assert answer == sorted(answer, key=lambda row: -row[1])


@pytest.mark.slow
def test_image_classifier_takes_calibrated_probabilities(
    classifier: Exported, tmp_path: Path
) -> None:
    """With the transformation for probabilities, even at both ends of their range."""
    calibration = ScoreCalibration((1.0, 0.5) * 5, (0.1, -0.2) * 5, "INVERSE_LOGISTIC")
    card = replace(
        CARD, labels=classifier.bundle.labels, output="probabilities", calibration=calibration
    )
    file = with_metadata(softmax_file(), card)
    (tmp_path / "probabilities.tflite").write_bytes(file)
    [answer] = Exported(tmp_path, classifier.images[:1]).mediapipe(
        "classify", "probabilities.tflite", tmp_path
    )
    wanted = calibration.apply(np.array([PROBABILITIES], np.float32))[0]
    assert [dict(answer)[label] for label in card.labels] == pytest.approx(wanted, rel=0, abs=1e-6)


PROBABILITIES = (1.0, 0.0, 0.5, 0.25, 1e-20, 0.99, 1e-3, 0.1, 0.9, 1e-8)


def softmax_file() -> bytes:
    """A file that gives ``PROBABILITIES`` for any image."""
    graph = TFLiteGraph()
    entry = graph.tensor("image", (1, 32, 32, 3))
    options = schema.ReducerOptionsT()
    mean = graph.operator(
        "SUM", "sum", [entry, graph.constant("axes", np.array([1, 2, 3], np.int32))], (1,), options
    )
    none = graph.operator(
        "MUL", "none", [mean, graph.constant("zero", np.array([0.0]))], (1,), schema.MulOptionsT()
    )
    given = graph.constant("given", np.array([PROBABILITIES]))
    return graph.pack(
        entry, graph.operator("ADD", "given.out", [given, none], (1, 10), schema.AddOptionsT())
    )


@pytest.mark.slow
def test_mediapipe_wants_one_mean_and_std_for_all_channels(
    classifier: Exported, tmp_path: Path
) -> None:
    """As deploy/README.md says; once it takes several, that sentence can go."""
    model = (classifier.folder / "model-fp32.tflite").read_bytes()
    card = replace(
        CARD,
        labels=classifier.bundle.labels,
        normalisation=Normalisation.of_parts((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)),
    )
    (tmp_path / "model.tflite").write_bytes(with_metadata(model, card))
    answer = Exported(tmp_path, classifier.images).mediapipe("classify", "model.tflite", tmp_path)
    assert "Per-channel image normalization is not available" in answer["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_object_detector_takes_a_tasks_file_as_it_is(
    detector: Exported, dtype: str, tmp_path: Path
) -> None:
    """MediaPipe rounds to whole pixels, and moves a corner beyond the image to its
    edge, without changing the size.
    """
    name = f"model-{dtype}-tasks.tflite"
    answers = detector.mediapipe("detect", name, tmp_path)
    labels, tolerance = detector.bundle.labels, 1e-4 if dtype == "fp32" else INT8_TOLERANCE
    for answer, outputs in zip(answers, detector.run(name), strict=True):
        ours = in_mediapipes_boxes(detections(outputs))
        theirs = np.array([[*box, score, labels.index(label)] for label, score, *box in answer])
        assert len(theirs) == len(ours) > 5
        assert_found(theirs, ours, score=tolerance, pixels=1.01 if dtype == "fp32" else 2.0)
    assert answers[0][0][0] == "red" and answers[1][0][0] == "blue"


def detections(outputs: list[np.ndarray]) -> np.ndarray:
    """The detections in a tasks file's outputs for one image: x1, y1, x2, y2 in pixels,
    score, position of the label.
    """
    boxes, classes, scores, count = (output[0] for output in outputs)
    return np.column_stack([48 * boxes[:, [1, 0, 3, 2]], scores, classes])[: int(count)]


def in_mediapipes_boxes(rows: np.ndarray) -> np.ndarray:
    """The same as x, y, width, height; a corner beyond the image is moved to its edge,
    without changing the size.
    """
    corners, sizes = rows[:, :2], rows[:, 2:4] - rows[:, :2]
    return np.hstack([np.maximum(corners, 0), sizes, rows[:, 4:]])


def assert_found(theirs: np.ndarray, ours: np.ndarray, *, score: float, pixels: float) -> None:
    """Assert that the five best of each are among the others, with the same label, and
    with a score and a box within these tolerances.
    """
    for best, others in ((theirs, ours), (ours, theirs)):
        for row in best[np.argsort(-best[:, 4])][:5]:
            alike = (others[:, 5] == row[5]) & (np.abs(others[:, 4] - row[4]) <= score)
            assert (
                np.abs(others[alike, :4] - row[:4]).max(axis=1, initial=0).min(initial=np.inf)
                <= pixels
            )


@pytest.mark.slow
def test_the_old_runtime_computes_the_same(
    classifier: Exported, detector: Exported, tmp_path: Path
) -> None:
    for source in (classifier, detector):
        names = [file.name for file in source.bundle.files]
        np.save(tmp_path / "inputs.npy", source.inputs())
        run_reference(
            "tflite-runtime",
            "old_runtime.py",
            tmp_path / "inputs.npy",
            tmp_path / "outputs.npz",
            *(source.folder / name for name in names),
        )
        with np.load(tmp_path / "outputs.npz") as outputs:
            for name in names:
                tolerance = 1e-4 if "fp32" in name else INT8_TOLERANCE
                for image, ours in enumerate(source.run(name)):
                    theirs = [outputs[f"{name}:{position}"][image] for position in range(len(ours))]
                    if "tasks" in name:
                        assert_found(
                            detections(theirs),
                            detections(ours),
                            score=tolerance,
                            pixels=48 * tolerance,
                        )
                    else:
                        unit = (
                            np.array([48.0] * 4 + [1.0] * 2)
                            if source is detector
                            else np.abs(ours[0]).max()
                        )
                        assert theirs[0] / unit == pytest.approx(
                            ours[0] / unit, rel=0, abs=tolerance
                        )


@pytest.mark.slow
def test_mediapipes_tools_read_the_metadata(
    classifier: Exported, detector: Exported, tmp_path: Path
) -> None:
    shown = run_reference(
        "tflite-runtime", "metadata_tools.py", "show", classifier.folder / "model-int8.tflite"
    )
    assert shown["files"] == ["labels.txt"]
    [graph] = shown["metadata"]["subgraph_metadata"]
    [image], [logits] = graph["input_tensor_metadata"], graph["output_tensor_metadata"]
    assert image["content"]["content_properties"] == {"color_space": "RGB"}
    assert image["process_units"] == [
        {"options_type": "NormalizationOptions", "options": {"mean": [127.5], "std": [127.5]}}
    ]
    assert (
        logits["associated_files"][0]["type"] == "TENSOR_AXIS_LABELS" and logits["name"] == "logits"
    )
    shown = run_reference(
        "tflite-runtime", "metadata_tools.py", "show", detector.folder / "model-int8-tasks.tflite"
    )
    [graph] = shown["metadata"]["subgraph_metadata"]
    assert [tensor["name"] for tensor in graph["output_tensor_metadata"]] == [
        "location",
        "category",
        "score",
        "number of detections",
    ]
    assert graph["output_tensor_metadata"][0]["content"]["content_properties"] == {
        "index": [1, 0, 3, 2],
        "type": "BOUNDARIES",
    }
    assert (
        graph["output_tensor_metadata"][1]["associated_files"][0]["type"] == "TENSOR_VALUE_LABELS"
    )
    assert graph["output_tensor_groups"] == [
        {"name": "detection_result", "tensor_names": ["location", "category", "score"]}
    ]
    shown = run_reference(
        "tflite-runtime", "metadata_tools.py", "show", detector.folder / "model-fp32.tflite"
    )
    assert (
        shown["files"] == ["labels.txt"]
        and shown["metadata"]["associated_files"][0]["name"] == "labels.txt"
    )


@pytest.mark.slow
def test_the_populator_finds_nothing_to_change(
    classifier: Exported, detector: Exported, tmp_path: Path
) -> None:
    """It computes min_parser_version itself, and packs metadata and files into the
    model: the result is the same.
    """
    for file in (
        classifier.folder / "model-fp32.tflite",
        detector.folder / "model-fp32-tasks.tflite",
    ):
        bare = tmp_path / f"bare-{file.name}"
        bare.write_bytes(without_metadata(file.read_bytes()))
        run_reference("tflite-runtime", "metadata_tools.py", "copy", file, bare)
        ours, theirs = (
            run_reference("tflite-runtime", "metadata_tools.py", "show", path)
            for path in (file, bare)
        )
        assert ours == theirs and ours["metadata"]["min_parser_version"]


def without_metadata(model: bytes) -> bytes:
    parsed = read_model(model)
    parsed.metadata = None
    return write_model(parsed)


@pytest.mark.slow
def test_a_metadata_writer_does_not_harm_a_large_int8_file(tmp_path: Path) -> None:
    """MediaPipe's writer loses the weights of the quantizer's own file, if they exceed
    256 KiB.
    """
    network = large_network(classes=2)
    heads = quantize_int8(write_heads(network), [calibration()], float_io=True)
    (tmp_path / "model.tflite").write_bytes(tasks(heads, network, SETTINGS))
    run_reference(
        "tflite-runtime",
        "metadata_tools.py",
        "write",
        tmp_path / "model.tflite",
        tmp_path / "written.tflite",
    )
    before, after = ((tmp_path / name).read_bytes() for name in ("model.tflite", "written.tflite"))
    assert len(before) > 256 * 1024
    for first, second in zip(run_tflite(before, X_NCHW), run_tflite(after, X_NCHW), strict=True):
        assert list(first) == list(second) and all(
            np.array_equal(first[name], second[name]) for name in first
        )
