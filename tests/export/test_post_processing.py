"""The NumPy post-processor, against torchvision's on a network's outputs and on random
ones, and by hand.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hwnas.core.detector import PostProcessing
from hwnas.export import post_processing
from hwnas.export.detector import Decoded
from hwnas.export.post_processing import (
    DetectionArrays,
    apart,
    post_process,
    read_decoded,
    read_nms,
    read_tasks,
)
from hwnas.nn.post_processor import Detections, PostProcessor
from tests.export.detectors import images, lively_network
from tests.nn.detectors import KINDS, Kind

torch.set_num_threads(1)

CONFIGS = [
    PostProcessing(),
    PostProcessing(min_score=0.3, candidates=15, detections=400),
    PostProcessing(min_score=0.02, nms_iou=0.2, detections=9),
    PostProcessing(min_score=0.0, nms_iou=1.0, candidates=40),
]


def assert_same(actual: DetectionArrays, expected: Detections) -> None:
    """Assert the same detections, best first. Rounding may swap neighbours whose scores
    are nearly equal.
    """
    boxes, scores, classes = actual
    assert (boxes.dtype, scores.dtype, classes.dtype) == (np.float32, np.float32, np.int64)
    np.testing.assert_allclose(scores, expected.scores_D.numpy(), atol=1e-5)
    rows = np.column_stack([boxes / 64, scores, classes])
    wanted = np.column_stack(
        [expected.boxes_D4.numpy() / 64, expected.scores_D.numpy(), expected.classes_D.numpy()]
    )
    nearest = np.abs(rows[None] - wanted[:, None]).max(axis=2)
    assert nearest.min(axis=1, initial=1.0).max(initial=0.0) < 1e-5 and len(
        set(nearest.argmin(axis=1) if len(wanted) else ())
    ) == len(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_it_finds_what_torchvision_finds(config: PostProcessing, kind: Kind) -> None:
    network = lively_network(kind)
    x_NCHW = images()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        outputs, rows = network(x_NCHW), Decoded(network)(x_NCHW)
    reference = PostProcessor(network.arch, config)
    detections = [read_decoded(row, config.model_dump(), 64, 3) for row in rows.numpy()]
    assert max(len(arrays[1]) for arrays in detections) > 4 or kind != "softmax"
    for actual, expected in zip(detections, reference(outputs), strict=True):
        assert_same(actual, expected)

    class Random(torch.nn.Module):
        arch = network.arch

        def forward(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.logits, self.codes

    anchors = rows.shape[1]
    logits = outputs[0].shape[2]
    spread = 3 if kind == "softmax" else 1  # more would give sigmoids of 1, hence ties
    Random.logits = spread * torch.randn(2, anchors, logits, generator=generator)  # type: ignore[attr-defined]
    Random.codes = torch.randn(2, anchors, 4, generator=generator)  # type: ignore[attr-defined]
    random = Random()
    rows = Decoded(random)(x_NCHW).numpy()  # type: ignore[arg-type]
    for row, expected in zip(rows, reference(random(x_NCHW)), strict=True):
        assert_same(read_decoded(row, config.model_dump(), 64, 3), expected)


def test_by_hand() -> None:
    rows = np.array(
        [
            [0, 0, 10, 10, 0.6, 0.7],
            [0, 0, 10, 9, 0.5, 0.1],  # IoU 0.9 with the first
            [0, 5, 10, 15, 0.55, 0.9],  # IoU 1/3 with the first
            [3, 3, 3, 3, 0.4, 0.0],  # no area: overlaps nothing
        ],
        np.float32,
    )
    boxes, scores, classes = post_process(
        rows[None], min_score=0.1, nms_iou=0.5, candidates=10, detections_per_image=10
    )
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.6, 0.55, 0.4])
    assert classes.tolist() == [1, 1, 0, 0, 0] and boxes[:, 1].tolist() == [5, 0, 0, 5, 3]
    few = post_process(rows, min_score=0.1, nms_iou=0.3, candidates=1, detections_per_image=10)
    assert few[2].tolist() == [1, 0]
    assert apart(rows[:3, :4], 0.9).tolist() == [0, 1, 2], (
        "an IoU equal to the threshold is allowed"
    )


@pytest.mark.parametrize("limit", [None, 1, 7, 1000])
@pytest.mark.parametrize("nms_iou", [0.0, 0.3, 0.6, 1.0])
def test_greedy_suppression_box_by_box(nms_iou: float, limit: int | None) -> None:
    """By its definition, for boxes of which some are equal and some have no area."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (80, 2))
    boxes = np.hstack([corners, corners + rng.integers(0, 20, (80, 2))]).astype(np.float32)
    kept: list[int] = []
    for position, (x1, y1, x2, y2) in enumerate(boxes):
        for a1, b1, a2, b2 in boxes[kept]:
            shared = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            united = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared
            if united > 0 and shared / united > nms_iou:
                break
        else:
            kept.append(position)
    assert apart(boxes, nms_iou, limit).tolist() == kept[:limit]


def test_the_first_of_equal_scores_become_candidates() -> None:
    rows = np.zeros((9, 5), np.float32)
    rows[:, 0] = rows[:, 1] = 10 * np.arange(9)
    rows[:, 2:4] = rows[:, :2] + 5
    rows[:, 4] = [0.5, 0.9, 0.5, 0.5, 0.7, 0.5, 0.2, 0.5, 0.5]
    boxes, scores, _ = post_process(
        rows, min_score=0.3, nms_iou=0.5, candidates=4, detections_per_image=9
    )
    assert boxes[:, 0].tolist() == [10, 40, 0, 20] and scores.tolist() == pytest.approx(
        [0.9, 0.7, 0.5, 0.5]
    )


@pytest.mark.parametrize("read", [read_decoded, read_nms, read_tasks])
def test_empty_outputs_have_no_detections(read: post_processing.Reader) -> None:
    row = np.zeros(7 * 6 + (read is read_tasks), np.float32)
    boxes, scores, classes = read(row, PostProcessing().model_dump(), 64, 2)
    assert (boxes.shape, scores.shape, classes.shape) == ((0, 4), (0,), (0,))


def test_invalid_rows_are_dropped() -> None:
    rows = np.array(
        [[0, 0, 9, 9, 0.9, 1], [0, 0, 9, 9, 0.8, 2], [0, 0, 9, 9, 0.7, -1], [0, 0, 9, 9, 0, 0]],
        np.float32,
    )
    assert read_nms(rows, {}, 64, 2)[2].tolist() == [1]
    tasks = np.concatenate([np.tile([0.0, 0, 1, 1], 2), [0, np.nan], [0.5, 0.5], [np.nan]]).astype(
        np.float32
    )
    assert len(read_tasks(tasks, {}, 64, 2)[1]) == 0
    tasks[-1] = 2
    assert read_tasks(tasks, {}, 64, 2)[2].tolist() == [0]


def test_boxes_of_the_tasks_operator_become_pixels() -> None:
    row = np.array([0.25, -0.5, 0.5, 2, 9, 9, 9, 9, 1, 9, 0.75, 9, 1], np.float32)
    boxes, scores, classes = read_tasks(row, {}, 64, 2)
    assert (boxes.tolist(), scores.tolist(), classes.tolist()) == ([[0, 16, 64, 32]], [0.75], [1])


def test_boxes_of_the_tasks_operator_in_a_rectangle() -> None:
    """ymin, xmin, ymax, xmax as fractions of 24 rows and 40 columns."""
    row = np.array([0.25, 0.5, 0.5, 2, 1, 0.75, 1], np.float32)
    boxes, _, _ = read_tasks(row, {}, (24, 40), 2)
    assert boxes.tolist() == [[20, 6, 40, 12]]


def test_it_needs_only_numpy() -> None:
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'hwnas'} &"
        " set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(post_processing.__file__)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout.strip() == "set()"
