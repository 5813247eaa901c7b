"""Training and evaluating detectors: the criterion, and results that belong to the
right images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwnas.config import OptimizerConfig
from hwnas.core.detector import PostProcessing
from hwnas.data.coco_eval import evaluate
from hwnas.data.images import evaluation_order
from hwnas.engine import CrossEntropy, Engine, Microbatch
from hwnas.errors import DataError, DivergenceError
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detection_loss import SSDLoss, detection_loss
from hwnas.nn.post_processor import Detections
from hwnas.tasks.boxes import DetectionCriterion, average_precision, detect
from tests.data.scenes import coco_config, load, scene, write_coco, write_scenes
from tests.nn.detectors import KINDS, Kind, batch, small_arch, small_network

torch.set_num_threads(1)

PLAIN = OptimizerConfig(
    name="momentum", lr=0.256, momentum=0.0, weight_decay=0.0, options={}, warmup=0.0
)


def engine_of(model: nn.Module, folder: Path, **changes: Any) -> Engine:
    return Engine(model, PLAIN, 10, 10, 0, folder, **changes)


# the criterion


class Squares(nn.Module):
    """The squared distance, weighted by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(2.0))

    def forward(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        squares = (outputs - y).square()
        return self.weight * squares.mean(), {"largest": squares.max(), "smallest": squares.min()}


def test_the_engine_minimises_any_criterion(tmp_path: Path) -> None:
    """w <- w - lr dL/dw of a single weight by hand, over two microbatches."""
    model = nn.Conv2d(1, 1, 1, bias=False)
    w = float(model.weight.detach())
    engine = engine_of(model, tmp_path, criterion=Squares())
    x = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    metrics = engine.optimizer_step(
        [Microbatch(x[:2], 3 * x[:2]), Microbatch(x[2:], 3 * x[2:], weight=0.5)]
    )
    assert metrics == pytest.approx(
        {
            "loss": (w - 3) ** 2 * (5 + 25) / 2,
            "largest": (w - 3) ** 2 * 10,
            "smallest": (w - 3) ** 2 * 5,
        }
    )
    gradient = 2 * 2 * (w - 3) * (5 / 2 + 0.5 * 25 / 2)
    assert float(model.weight.detach()) == pytest.approx(w - 0.01 * gradient)


def test_the_engine_keeps_the_cross_entropy_that_it_is_given(tmp_path: Path) -> None:
    engine = engine_of(nn.Linear(2, 2), tmp_path, criterion=CrossEntropy(0.2))
    assert isinstance(engine.criterion, CrossEntropy) and engine.criterion.label_smoothing == 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_criterion_of_a_detector_is_its_loss_and_reports_its_parts(
    kind: Kind, tmp_path: Path
) -> None:
    network = small_network(kind=kind).train()
    x_NCHW, y_NM5 = batch()
    expected = float(detection_loss(network.arch)(network(x_NCHW), y_NM5).detach())
    metrics = engine_of(network, tmp_path, criterion=DetectionCriterion(network.arch)).train_step(
        x_NCHW, y_NM5
    )
    assert list(metrics) == ["loss", "class_loss", "box_loss"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5) and metrics[
        "loss"
    ] == pytest.approx(metrics["class_loss"] + metrics["box_loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_outputs_are_a_divergence(kind: Kind, tmp_path: Path) -> None:
    network = small_network(kind=kind)
    engine = engine_of(network, tmp_path, criterion=DetectionCriterion(network.arch))
    x_NCHW, y_NM5 = batch()
    with pytest.raises(DivergenceError, match="the loss is nan at step 0"):
        engine.train_step(torch.full_like(x_NCHW, torch.nan), y_NM5)


# evaluation


class Oracle(nn.Module):
    """A network that knows the targets of the images, in the order in which it gets
    them: anchor i predicts object i exactly, and the other anchors are background.
    """

    def __init__(self, targets: Iterator[Tensor], classes: int) -> None:
        super().__init__()
        self.arch, self.targets = small_arch(classes), targets
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        anchors, coder = anchors_of(self.arch), SSDLoss(self.arch).ssd.box_coder
        logits = torch.full((len(x_NCHW), len(anchors), self.arch.classes + 1), -9.0)
        logits[..., 0] = 9.0
        codes = torch.zeros(len(x_NCHW), len(anchors), 4)
        for image in range(len(x_NCHW)):
            boxes = next(self.targets)
            for row, box in enumerate(boxes[boxes[:, 4] >= 0]):
                logits[image, row, 0], logits[image, row, 1 + int(box[4])] = -9.0, 9.0
                codes[image, row] = coder.encode_single(box[None, :4], anchors[row][None])[0]
        return logits, codes


@pytest.mark.parametrize("limit", [None, 2])
def test_detections_belong_to_their_images(limit: int | None, tmp_path: Path) -> None:
    """Images are evaluated in batches and not in the order in which they are stored;
    everything that the oracle predicts is right.
    """
    objects = [
        (0, 3, [10.0, 20, 40, 30]),
        (1, 8, [20.0, 60, 30, 40]),
        (2, 3, [0.0, 0, 50, 50]),
        (2, 8, [60.0, 60, 30, 30]),
    ]
    write_coco(
        tmp_path,
        {"a.png": scene(200, 100), "b.png": scene(60, 120), "c.png": scene(100, 100)},
        objects,
    )
    images = load(coco_config(tmp_path))
    order = evaluation_order(images, limit).tolist()
    assert order != sorted(order)
    _, targets = images.__getitems__([(index, 0) for index in order])
    oracle: Any = Oracle(iter(targets), len(images.names))
    detections = detect(oracle, images, PostProcessing(min_score=0.5), batch_size=2, limit=limit)
    assert list(detections) == order and not oracle.training
    metrics = average_precision(images, detections)
    assert pytest.approx((1.0, 1.0)) == (metrics.AP, metrics.AR100)
    wrong = dict(zip(reversed(order), detections.values(), strict=True))
    assert average_precision(images, wrong).AP50 < 0.6


def test_no_detections_score_zero(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    images = load(coco_config(tmp_path))
    empty = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    metrics = average_precision(images, dict.fromkeys(range(3), empty))
    assert (metrics.AP, metrics.AP50, metrics.AR100, metrics.AP_per_class) == (
        0,
        0,
        0,
        {"cat": 0, "dog": 0},
    )
    with pytest.raises(DataError, match="no object to find"):
        average_precision(images, {2: empty})


def test_post_processing_settings_are_applied(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    images, network = load(coco_config(tmp_path)), small_network(2)
    by_image = detect(network, images, PostProcessing(min_score=0.0, detections=7), batch_size=4)
    assert [len(detections.scores_D) for detections in by_image.values()] == [7, 7, 7]
    rows = [
        row
        for index, detections in by_image.items()
        for row in images.results(index, *(part.numpy() for part in detections))
    ]
    assert evaluate(images.ground_truth(np.arange(3)), rows) == average_precision(images, by_image)
