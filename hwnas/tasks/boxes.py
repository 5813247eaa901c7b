"""Boxes in training and in judgement: a detector's loss as the engine's criterion, what
networks and files find, COCO's numbers of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import CocoMetrics, evaluate
from hwnas.data.images import Batch, Images, evaluation_batches, evaluation_order
from hwnas.export.post_processing import READERS, DetectionArrays, iou
from hwnas.nn.detector import DetectionNetwork, Outputs
from hwnas.nn.ssd import DetectionLoss, Detections, PostProcessor
from hwnas.task import Answers, FileAnswers, Parity

BEST = 10
"""Detections of PyTorch's per image that a file with NMS in its graph has to find."""


class DetectionCriterion(nn.Module):
    """The loss of a detector, logged with its two parts, both per matched anchor."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.loss = DetectionLoss(arch)

    def forward(self, outputs: Outputs, y_NM5: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw outputs and targets [N, M, 5] -> the sum of the parts, and the parts."""
        parts = self.loss.parts(outputs, y_NM5)
        logged = {"class_loss": parts["classification"], "box_loss": parts["bbox_regression"]}
        return logged["class_loss"] + logged["box_loss"], logged


def detect(
    network: DetectionNetwork,
    images: CocoImages,
    config: PostProcessing,
    *,
    batch_size: int,
    limit: int | None = None,
    workers: int = 0,
) -> dict[int, Detections]:
    """What ``network`` finds, in eval mode, in all images or in ``limit`` of them:
    detections by image index, in ``evaluation_order``.
    """
    found = detections(
        network, evaluation_batches(images, batch_size, limit=limit, workers=workers), config
    )
    return dict(zip(evaluation_order(images, limit).tolist(), found, strict=True))


@torch.inference_mode()
def detections(
    network: DetectionNetwork, batches: Iterable[Batch], config: PostProcessing
) -> list[Detections]:
    """What ``network`` finds, in eval mode, in the images of some batches, one after
    another, on the CPU.
    """
    network.eval()
    device = next(network.parameters()).device
    post_processor = PostProcessor(network.arch, config).to(device)
    found: list[Detections] = []
    for x_NCHW, _ in batches:
        found += post_processor(network(x_NCHW.to(device, memory_format=torch.channels_last)))
    return [Detections(*(part.cpu() for part in each)) for each in found]


def average_precision(images: CocoImages, found: dict[int, Detections]) -> CocoMetrics:
    """COCO's numbers of the detections in some images, by their indices. Raises
    DataError where none of these images has an object.
    """
    return _numbers(images, {index: _arrays(each) for index, each in found.items()})


def _arrays(found: Detections) -> DetectionArrays:
    return found.boxes_D4.numpy(), found.scores_D.numpy(), found.classes_D.numpy()


def _numbers(images: CocoImages, found: dict[int, DetectionArrays]) -> CocoMetrics:
    rows = [row for index, each in found.items() for row in images.results(index, *each)]
    return evaluate(images.ground_truth(np.array(list(found))), rows)


class Boxes(Answers):
    """What was found in each image."""

    def __init__(self, found: Sequence[DetectionArrays] = ()) -> None:
        self.found = list(found)

    def __len__(self) -> int:
        return len(self.found)

    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """COCO's numbers, without those of sizes that no object has."""
        assert isinstance(images, CocoImages), "see Task.check_images"
        order = evaluation_order(images, limit).tolist()
        numbers = _numbers(images, dict(zip(order, self.found[: len(order)], strict=True))).by_name
        return {name: value for name, value in numbers.items() if value is not None}

    def arrays(self) -> dict[str, np.ndarray]:
        """``found``: x1, y1, x2, y2, score and label of all boxes, image by image;
        ``counts``: how many each image has.
        """
        rows = [
            np.concatenate((boxes, scores[:, None], classes[:, None]), axis=1)
            for boxes, scores, classes in self.found
        ]
        return {
            "found": np.concatenate(rows).astype(np.float32),
            "counts": np.array([len(row) for row in rows]),
        }

    @classmethod
    def of_torch(cls, found: Iterable[Detections]) -> Boxes:
        """Of what PyTorch finds."""
        return cls([_arrays(each) for each in found])

    @classmethod
    def of_arrays(cls, found: np.ndarray, counts: np.ndarray) -> Boxes:
        """The reverse of ``arrays``."""
        parts = np.split(found, np.cumsum(counts)[:-1])
        return cls([(part[:, :4], part[:, 4], part[:, 5].astype(np.int64)) for part in parts])


class FileBoxes(Boxes, FileAnswers):
    """What a file finds, and how long reading that out of its outputs takes on this computer.

    ``app_score``: a threshold of an app, at which reading is timed, too.
    """

    def __init__(
        self, graph: str, arch: Architecture, config: PostProcessing, app_score: float | None = None
    ) -> None:
        super().__init__()
        self.graph, self.arch, self.app_score = graph, arch, app_score
        self.options = config.model_dump()
        self._times_ms: list[float] = []
        self._app_times_ms: list[float] = []

    def add(self, outputs: np.ndarray) -> None:
        """One row per image, [N, numbers of all outputs]."""
        for row in outputs:
            found, took_ms = self._read(row, self.options)
            self.found.append(found)
            self._times_ms.append(took_ms)
            if self.app_score is not None:
                self._app_times_ms.append(
                    self._read(row, {**self.options, "min_score": self.app_score})[1]
                )

    def _read(self, row: np.ndarray, options: dict[str, Any]) -> tuple[DetectionArrays, float]:
        begun_at = time.perf_counter()
        found = READERS[self.graph](row, options, self.arch.resolution, self.arch.classes)
        return found, 1e3 * (time.perf_counter() - begun_at)

    def timings_ms(self) -> dict[str, float]:
        """The median time of an image, of files that leave post-processing to NumPy."""
        if self.graph != "decoded":
            return {}
        times_ms = {
            "post_processing_ms": self._times_ms,
            "app_post_processing_ms": self._app_times_ms,
        }
        return {name: float(np.median(each)) for name, each in times_ms.items() if each}


def parity(
    graph: str, outputs: np.ndarray, rows: np.ndarray, settings: PostProcessing, resolution: int
) -> Parity:
    """Compare a file's outputs [N, ...] with PyTorch's rows [N, anchors, 4 + classes].

    ``relative_error`` is the largest difference of a coordinate, in parts of the input,
    or of a score: over all anchors, and where the graph chooses the detections, over
    PyTorch's best of each image and what is nearest to them; a missing one counts 1,
    and so does a file with an output that is no number. ``agreement`` is the part of
    images whose best detection is of the same class, and overlaps PyTorch's with an IoU
    of 0.5 or more.
    """
    if not np.isfinite(outputs).all():
        return Parity(images=len(rows), relative_error=1.0, agreement=0.0)
    classes, options = rows.shape[-1] - 4, settings.model_dump()
    wanted = [READERS["decoded"](row, options, resolution, classes) for row in rows]
    found = [READERS[graph](row, options, resolution, classes) for row in outputs]
    if graph == "decoded":
        differences = np.abs(outputs.reshape(rows.shape) - rows)
        error = max(
            float(differences[..., :4].max()) / resolution, float(differences[..., 4:].max())
        )
    else:
        error = max(
            _furthest(one, other, resolution) for one, other in zip(wanted, found, strict=True)
        )
    agreement = float(
        np.mean([_same_best(one, other) for one, other in zip(wanted, found, strict=True)])
    )
    return Parity(images=len(rows), relative_error=error, agreement=agreement)


def _furthest(wanted: DetectionArrays, found: DetectionArrays, resolution: int) -> float:
    errors = [0.0]
    for box, score, label in zip(*(part[:BEST] for part in wanted), strict=True):
        same = found[2] == label
        distances = np.maximum(
            np.abs(found[0][same] - box).max(axis=1) / resolution, np.abs(found[1][same] - score)
        )
        errors.append(float(distances.min(initial=1.0)))
    return max(errors)


def _same_best(one: DetectionArrays, other: DetectionArrays) -> bool:
    if not len(one[1]) or not len(other[1]):
        return len(one[1]) == len(other[1])
    return bool(one[2][0] == other[2][0] and iou(np.stack([one[0][0], other[0][0]]))[0, 1] >= 0.5)
