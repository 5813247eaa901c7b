"""The validation curve: the right values, nothing else changed by computing them, and
the same rows after a kill at the worst moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.data.images import evaluation_batches, load_images
from hwnas.document import file_sha256
from hwnas.engine import Engine
from hwnas.nn.checkpoint import load_network
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines, StageContext
from hwnas.tasks.classification import Classification
from hwnas.train import validation
from hwnas.train.result import TrainResult
from hwnas.train.validation import Validation
from tests.train.rectangles import settings

torch.set_num_threads(1)

OPTIMIZER = {"name": "adamw", "lr": 0.05, "weight_decay": 0.01, "warmup": 0.1}


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


class Lines(Progress):
    """Keeps the messages of a stage, and kills it at message number ``last``."""

    def __init__(self, last: int = -1) -> None:
        self.said: list[str] = []
        self.last = last

    def info(self, message: str) -> None:
        self.said.append(message)
        if len(self.said) == self.last:
            raise Killed


def digits(**train: Any) -> Experiment:
    content = {
        "data": {
            "name": "digits",
            "resolution": 8,
            "channels": 1,
            "classes": 10,
            "mean": [0.31],
            "std": [0.37],
        },
        "space": {"name": "mobile32"},
        "checkpoint_seconds": 1e9,
        "train": {
            "epochs": 3,
            "batch_size": 96,
            "dropout": 0.2,
            "ema_decay": 0.9,
            "optimizer": OPTIMIZER,
            **train,
        },
    }
    return Experiment.model_validate(content)


def small(root: Path, **train: Any) -> Experiment:
    """A training of a convolution and a classifier on digits."""
    path = root / "arch.json"
    blocks = (Op.parse("conv-h8-i1-o8-k3-relu6"), Op.parse("classifier-h8-i8-o10"))
    Architecture(name="tiny", in_channels=1, blocks=blocks).save(path)
    return digits(arch=str(path), **train)


def trained(experiment: Experiment, run: Path, progress: Progress | None = None) -> Path:
    Pipeline(experiment, run, progress or Progress()).run_stage("train")
    return run / "train"


@pytest.mark.slow
def test_the_curve_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    """With dropout, averaged weights and BN statistics. The last row is the result of
    the stage.
    """
    without = trained(small(tmp_path, validate_every=0), tmp_path / "without")
    folder = trained(small(tmp_path, validate_every=0.5), tmp_path / "with", lines := Lines())
    for name in ("model.safetensors", "train.json", "metrics.jsonl"):
        assert file_sha256(folder / name) == file_sha256(without / name), name
    assert JsonLines(without / validation.FILE).read() == []
    rows, result = (
        JsonLines(folder / validation.FILE).read(),
        TrainResult.load(folder / "train.json"),
    )
    assert [row["step"] for row in rows] == [7, 14, 21, 28, 35, 42, 45]
    assert [row["epoch"] for row in rows] == [
        pytest.approx(row["step"] * 96 / 1438, abs=1e-3) for row in rows
    ]
    assert {row["images"] for row in rows} == {result.test_images} and rows[-1][
        "test_accuracy"
    ] == result.metrics["accuracy"]
    assert len({row["test_accuracy"] for row in rows}) > 3
    assert lines.said[0] == f"epoch 0.467: {rows[0]['test_accuracy']:.1%} of 359 test images"


@pytest.mark.slow
def test_the_curve_is_of_the_averaged_weights_on_the_first_images_of_the_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Classification, "curve_images", 100)
    experiment = small(tmp_path, validate_every=1)
    folder = trained(experiment, tmp_path / "run")
    network = load_network(folder / "model.safetensors").eval()
    [(x_NCHW, y)] = evaluation_batches(load_images(experiment.data, "test"), 360)
    with torch.no_grad():
        right = (network(x_NCHW[:100]).argmax(1) == y[:100]).float().mean()
    last = JsonLines(folder / validation.FILE).read()[-1]
    assert last["images"] == 100 and last["test_accuracy"] == pytest.approx(float(right))


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 3])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_a_kill_between_a_row_and_its_checkpoint_changes_no_row(
    last: int, checkpoint_seconds: float, tmp_path: Path
) -> None:
    straight = trained(small(tmp_path, validate_every=0.5), tmp_path / "straight")
    experiment = small(tmp_path, validate_every=0.5).model_copy(
        update={"checkpoint_seconds": checkpoint_seconds}
    )
    with pytest.raises(Killed):
        trained(experiment, tmp_path / "killed", Lines(last))
    assert len(JsonLines(tmp_path / "killed" / "train" / validation.FILE).read()) == last
    killed = trained(experiment, tmp_path / "killed", lines := Lines())
    assert lines.said[0].startswith("train: ") and "epoch" in lines.said[1]
    for name in ("model.safetensors", "metrics.jsonl", validation.FILE):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.slow
def test_the_curve_of_a_detector_ends_in_its_result(tmp_path: Path) -> None:
    experiment = Experiment.model_validate(settings(tmp_path, epochs=6, validate_every=2))
    folder = trained(experiment, tmp_path / "run", lines := Lines())
    without = trained(
        Experiment.model_validate(settings(tmp_path, epochs=6, validate_every=0)),
        tmp_path / "without",
    )
    assert file_sha256(folder / "model.safetensors") == file_sha256(without / "model.safetensors")
    rows, result = (
        JsonLines(folder / validation.FILE).read(),
        TrainResult.load(folder / "train.json"),
    )
    assert [row["step"] for row in rows] == [6, 12, 18] and result.metric == "AP"
    assert (rows[-1]["test_ap"], rows[-1]["test_ap50"]) == (
        result.metrics["AP"],
        result.metrics["AP50"],
    )
    assert lines.said[2] == f"epoch 6: AP {result.metrics['AP']:.1%} on 8 test images"


@pytest.mark.parametrize(
    ("epochs", "points"), [(1, 0), (3, 0), (6, 3), (12, 7), (30, 10), (3000, 10)]
)
def test_the_default_curve_costs_at_most_a_twentieth_of_the_training(
    epochs: int, points: int, tmp_path: Path
) -> None:
    """An epoch has 1438 training images. An evaluation passes 359 test images, but only
    forward, which costs a third: 0.05 * 1438 / 120 = 0.6 evaluations per epoch.
    """
    experiment = small(tmp_path, epochs=epochs)
    steps = round(epochs * 1438 / 96)
    network = ClassificationNetwork(
        Architecture.load(tmp_path / "arch.json"), generator=torch.Generator().manual_seed(0)
    )
    engine = Engine(network, experiment.train.optimizer, steps, 96, 0, tmp_path)
    due = Validation(
        StageContext(experiment, tmp_path, tmp_path),
        engine,
        load_images(experiment.data, "test"),
        1438 / 96,
    ).due
    assert len(due) == points and (not due or max(due) == steps)
    assert len(due) * 359 / 3 <= 0.05 * epochs * 1438 * 1.01
    distances = np.diff(sorted(due))
    assert not len(distances) or distances.max() - distances.min() <= 1


@pytest.mark.slow
def test_there_is_no_curve_if_the_test_images_have_no_objects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # as if no image had an object
    monkeypatch.setattr(
        "hwnas.data.coco.CocoImages.labels_of", lambda images, indices: np.zeros(0, np.int64)
    )
    folder = trained(
        Experiment.model_validate(settings(tmp_path, validate_every=1)), tmp_path / "run"
    )
    assert JsonLines(folder / validation.FILE).read() == []
