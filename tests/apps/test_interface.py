"""Files that take pixels and return probabilities, in MediaPipe's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_sample_images

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.ops import Op
from hwnas.export.bundle import Bundle
from hwnas.nn.checkpoint import save_network
from hwnas.nn.network import network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from tests.apps.references import run_reference
from tests.apps.test_apps import INT8_TOLERANCE, assert_found, detections, in_mediapipes_boxes
from tests.train.rectangles import BLOCKS, settings

torch.set_num_threads(1)

PIECES = np.stack(
    [
        photograph[y : y + 48, y : y + 48]
        for photograph in load_sample_images().images
        for y in (0, 100, 200, 300)
    ]
)
"""uint8 [8, 48, 48, 3], of two photographs."""


def exported(experiment: Experiment, arch: Architecture, scale: float, root: Path) -> Path:
    """Export a network with random weights, the last of which are large enough to tell
    images apart; return the bundle's folder.
    """
    network = network_of(arch, generator=torch.Generator().manual_seed(0))
    for name, weight in network.named_parameters():
        if name.endswith(("linear.weight", "predict.conv.weight")):
            weight.data *= scale
    save_network(network, root / "train" / "model.safetensors", {})
    Pipeline(experiment, root, Progress()).run_stage("export")
    return root / "export"


def outputs(file: Path) -> list[list[np.ndarray]]:
    """The outputs of LiteRT for each piece, fed as it is."""
    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    [entry] = interpreter.get_input_details()
    assert entry["dtype"] == np.uint8
    by_piece = []
    for piece in PIECES:
        interpreter.set_tensor(entry["index"], piece[None])
        interpreter.invoke()
        by_piece.append(
            [interpreter.get_tensor(exit_["index"]) for exit_ in interpreter.get_output_details()]
        )
    return by_piece


def mediapipe(task: str, file: Path, folder: Path) -> Any:
    np.save(folder / "images.npy", PIECES)
    return run_reference("mediapipe", "mediapipe_tasks.py", task, file, folder / "images.npy")


@pytest.mark.slow
def test_image_classifier_takes_pixels_and_returns_probabilities(tmp_path: Path) -> None:
    """With ImageNet's mean and std per channel, which it refuses in a float32 file."""
    np.savez(tmp_path / "train.npz", x=PIECES, y=np.arange(8))
    np.savez(tmp_path / "test.npz", x=PIECES, y=np.arange(8))
    data = {
        "name": "npz",
        "path": str(tmp_path),
        "resolution": 48,
        "classes": 10,
        "augment": "none",
    }
    export = {"formats": ["tflite-fp32", "tflite-int8"], "input": "uint8", "softmax": True}
    experiment = Experiment.model_validate({"data": data, "export": export})
    assert len(set(experiment.data.mean)) == 3
    arch = Architecture(name="small", blocks=tuple(Op.parse(key) for key in BLOCKS))
    folder = exported(experiment, arch, 20.0, tmp_path / "run")
    labels = Bundle.load(folder / "bundle.json").labels
    for name in ("model-fp32.tflite", "model-int8.tflite"):
        for answer, [probabilities] in zip(
            mediapipe("classify", folder / name, tmp_path), outputs(folder / name), strict=True
        ):
            scores = dict(answer)
            assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
            np.testing.assert_allclose(
                [scores[label] for label in labels], probabilities[0], atol=1e-4
            )
            assert answer[0][0] == labels[probabilities[0].argmax()]


@pytest.mark.slow
def test_object_detector_takes_pixels(tmp_path: Path) -> None:
    content = settings(tmp_path)
    content["detector"]["post_processing"] = {"min_score": 0.3, "detections": 10}
    content["export"] = {
        "formats": ["tflite-fp32-tasks", "tflite-int8-tasks"],
        "input": "uint8",
        "parity_images": 2,
    }
    experiment = Experiment.model_validate(content)
    assert len(set(experiment.data.mean)) == 3
    backbone = Architecture(name="small", blocks=tuple(Op.parse(key) for key in BLOCKS[:4]))
    folder = exported(experiment, with_detector(backbone, 2, resolution=48), 20.0, tmp_path / "run")
    labels = Bundle.load(folder / "bundle.json").labels
    for name, pixels in (("model-fp32-tasks.tflite", 1.01), ("model-int8-tasks.tflite", 2.0)):
        for answer, parts in zip(
            mediapipe("detect", folder / name, tmp_path), outputs(folder / name), strict=True
        ):
            ours = in_mediapipes_boxes(detections(parts))
            theirs = np.array([[*box, score, labels.index(label)] for label, score, *box in answer])
            assert len(theirs) == len(ours) > 0
            assert_found(
                theirs, ours, score=1e-4 if "fp32" in name else INT8_TOLERANCE, pixels=pixels
            )
