"""Boxes in training and evaluation: a detector's loss as the engine's criterion, the
detections of networks and files, and COCO's metrics of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.core.metric import AP, OF_LOSS
from hwnas.core.search_space import SearchSpace
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import CocoMetrics, evaluate
from hwnas.data.images import Batch, Images, evaluation_batches, evaluation_order
from hwnas.engine import Criterion
from hwnas.errors import ConfigError
from hwnas.export.detector import Decoded
from hwnas.export.post_processing import READERS, DetectionArrays, Resolution, edges, iou
from hwnas.nn.detection_loss import detection_loss
from hwnas.nn.detector import DetectionNetwork, Outputs
from hwnas.nn.network import Network
from hwnas.nn.post_processor import Detections, PostProcessor
from hwnas.task import (
    Answers,
    EvaluationResult,
    EvaluationSettings,
    FileAnswers,
    Parity,
    SearchQuality,
)
from hwnas.tasks.losses import of_loss, of_mean_loss

BATCH = 16
"""Batch size of PyTorch's detections for a bundle."""
BEST = 10
"""The best detections of PyTorch per image that a file with NMS in its graph must
match.
"""


class DetectionCriterion(nn.Module):
    """The loss of a detector, logged with its two parts; both are per matched anchor."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.loss = detection_loss(arch)

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
    """The detections of ``network``, in eval mode, in all images or in ``limit`` of
    them: by image index, in ``evaluation_order``.
    """
    batches = evaluation_batches(images, batch_size, limit=limit, workers=workers)
    per_image = detections(network, batches, config)
    return dict(zip(evaluation_order(images, limit).tolist(), per_image, strict=True))


@torch.inference_mode()
def detections(
    network: DetectionNetwork, batches: Iterable[Batch], config: PostProcessing
) -> list[Detections]:
    """The detections of ``network``, in eval mode, in the images of some batches, in
    their order, on the CPU.
    """
    network.eval()
    device = next(network.parameters()).device
    post_processor = PostProcessor(network.arch, config).to(device)
    per_image: list[Detections] = []
    for x_NCHW, _ in batches:
        outputs = network(x_NCHW.to(device, memory_format=torch.channels_last))
        per_image += post_processor(outputs)
    return [_to_cpu(image) for image in per_image]


def evaluate_detector(
    network: DetectionNetwork,
    images: CocoImages,
    config: PostProcessing,
    settings: EvaluationSettings,
) -> EvaluationResult:
    """COCO's metrics, the AP of each class, and the detections by image index."""
    detected = detect(
        network,
        images,
        config,
        batch_size=settings.batch_size,
        limit=settings.limit,
        workers=settings.workers,
    )
    if settings.limit is not None:
        # some of the images may have no object between them, which leaves AP undefined
        labels = images.labels_of(evaluation_order(images, settings.limit))
        if len(labels) == 0:
            return EvaluationResult({AP: None}, answers=detected)
    coco = average_precision(images, detected)
    return EvaluationResult(coco.by_name, dict(coco.AP_per_class), detected)


@torch.inference_mode()
def torch_rows(network: DetectionNetwork, images_NHWC: np.ndarray) -> np.ndarray:
    """Rows [N, anchors, 4 + classes] of ``network`` on the CPU, for channels-last images."""
    decoded = Decoded(network).cpu().eval()
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    batches = []
    for start in range(0, len(x_NCHW), BATCH):
        batches.append(decoded(x_NCHW[start : start + BATCH]))
    rows: np.ndarray = torch.cat(batches).numpy()
    return rows


def torch_boxes(
    network: DetectionNetwork, images: CocoImages, config: PostProcessing, workers: int
) -> Boxes:
    """The detections of ``network`` in all images."""
    detected = detect(network, images, config, batch_size=BATCH, workers=workers)
    return Boxes.of_torch(detected.values())


def _to_cpu(image: Detections) -> Detections:
    return Detections(*(values.cpu() for values in image))


def average_precision(images: CocoImages, detected: dict[int, Detections]) -> CocoMetrics:
    """COCO's metrics of the detections in some images, by image index. Raises DataError
    if none of these images has an object.
    """
    return _coco_metrics(images, {index: _arrays(image) for index, image in detected.items()})


def _arrays(detected: Detections) -> DetectionArrays:
    return detected.boxes_D4.numpy(), detected.scores_D.numpy(), detected.classes_D.numpy()


def _coco_metrics(images: CocoImages, detected: dict[int, DetectionArrays]) -> CocoMetrics:
    rows = []
    for index, arrays in detected.items():
        rows += images.results(index, *arrays)
    return evaluate(images.ground_truth(np.array(list(detected))), rows)


class Boxes(Answers):
    """The detections in each image."""

    def __init__(self, found: Sequence[DetectionArrays] = ()) -> None:
        self.found = list(found)

    def __len__(self) -> int:
        return len(self.found)

    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """COCO's metrics, without those of object sizes that do not occur."""
        assert isinstance(images, CocoImages), "see Task.check_images"
        order = evaluation_order(images, limit).tolist()
        detected = dict(zip(order, self.found[: len(order)], strict=True))
        metrics = _coco_metrics(images, detected).by_name
        return {name: value for name, value in metrics.items() if value is not None}

    def arrays(self) -> dict[str, np.ndarray]:
        """``found``: x1, y1, x2, y2, score and label of all boxes, image by image;
        ``counts``: the number of boxes in each image.
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
    def of_torch(cls, detected: Iterable[Detections]) -> Boxes:
        """From PyTorch's detections."""
        return cls([_arrays(image) for image in detected])

    @classmethod
    def of_arrays(cls, found: np.ndarray, counts: np.ndarray) -> Boxes:
        """The reverse of ``arrays``."""
        parts = np.split(found, np.cumsum(counts)[:-1])
        return cls([(part[:, :4], part[:, 4], part[:, 5].astype(np.int64)) for part in parts])


class FileBoxes(Boxes, FileAnswers):
    """The detections of a file, and how long this computer takes to get them from its
    outputs.

    ``app_score`` is the threshold of an app, at which post-processing is timed as well.
    """

    def __init__(
        self, graph: str, arch: Architecture, config: PostProcessing, app_score: float | None = None
    ) -> None:
        super().__init__()
        self.graph = graph
        self.arch = arch
        self.app_score = app_score
        self.options = config.model_dump()
        self._times_ms: list[float] = []
        self._app_times_ms: list[float] = []

    def add(self, outputs: np.ndarray) -> None:
        """Add outputs with one row per image, [N, values of all outputs]."""
        for row in outputs:
            arrays, took_ms = self._read(row, self.options)
            self.found.append(arrays)
            self._times_ms.append(took_ms)
            if self.app_score is not None:
                _, app_ms = self._read(row, {**self.options, "min_score": self.app_score})
                self._app_times_ms.append(app_ms)

    def _read(self, row: np.ndarray, options: dict[str, Any]) -> tuple[DetectionArrays, float]:
        begun_at = time.perf_counter()
        arrays = READERS[self.graph](row, options, self.arch.size_HW, self.arch.classes)
        return arrays, 1e3 * (time.perf_counter() - begun_at)

    def timings_ms(self) -> dict[str, float]:
        """The median time per image, for files that leave post-processing to NumPy."""
        if self.graph != "decoded":
            return {}
        times_ms = {
            "post_processing_ms": self._times_ms,
            "app_post_processing_ms": self._app_times_ms,
        }
        return {name: float(np.median(times)) for name, times in times_ms.items() if times}


def parity(
    graph: str,
    outputs: np.ndarray,
    rows: np.ndarray,
    settings: PostProcessing,
    resolution: Resolution,
) -> Parity:
    """Compare a file's outputs [N, ...] with PyTorch's rows [N, anchors, 4 + classes], for
    an input of this ``resolution``.

    ``relative_error`` is the largest difference of a coordinate, as a fraction of the
    input's width or height, or of a score. It is taken over all anchors; if the graph selects the
    detections, over PyTorch's best of each image and the detections nearest to them. A
    missing detection counts 1, and so does a file with an output that is not finite.
    ``agreement`` is the fraction of images whose best detection has the same class as
    PyTorch's and overlaps it with an IoU of 0.5 or more.
    """
    if not np.isfinite(outputs).all():
        return Parity(images=len(rows), relative_error=1.0, agreement=0.0)

    classes = rows.shape[-1] - 4
    options = settings.model_dump()
    expected = [READERS["decoded"](row, options, resolution, classes) for row in rows]
    actual = [READERS[graph](row, options, resolution, classes) for row in outputs]
    pairs = list(zip(expected, actual, strict=True))
    if graph == "decoded":
        differences = np.abs(outputs.reshape(rows.shape) - rows)
        box_error = float((differences[..., :4] / edges(resolution)).max())
        error = max(box_error, float(differences[..., 4:].max()))
    else:
        # these rows are detections and no longer anchors, so they have to be matched
        error = max(_largest_difference(*pair, resolution) for pair in pairs)
    agreement = float(np.mean([_same_best(*pair) for pair in pairs]))
    return Parity(images=len(rows), relative_error=error, agreement=agreement)


def _largest_difference(
    expected: DetectionArrays, actual: DetectionArrays, resolution: Resolution
) -> float:
    """The largest difference between one of the ``BEST`` expected detections and the
    nearest actual one of its class.
    """
    boxes_D4, scores_D, labels_D = actual
    errors = [0.0]
    for box, score, label in zip(*(part[:BEST] for part in expected), strict=True):
        same_class = labels_D == label
        box_errors = (np.abs(boxes_D4[same_class] - box) / edges(resolution)).max(axis=1)
        distances = np.maximum(box_errors, np.abs(scores_D[same_class] - score))
        errors.append(float(distances.min(initial=1.0)))
    return max(errors)


def _same_best(expected: DetectionArrays, actual: DetectionArrays) -> bool:
    """Whether the best detections have one class and overlap, or both images have none."""
    expected_boxes, expected_scores, expected_labels = expected
    actual_boxes, actual_scores, actual_labels = actual
    if not len(expected_scores) or not len(actual_scores):
        return len(expected_scores) == len(actual_scores)
    if expected_labels[0] != actual_labels[0]:
        return False
    # a box that was clipped to an edge has no area, and thus no IoU with itself
    if np.array_equal(expected_boxes[0], actual_boxes[0]):
        return True
    return bool(iou(np.stack([expected_boxes[0], actual_boxes[0]]))[0, 1] >= 0.5)


class DetectionQuality(SearchQuality):
    """AP or the loss; see ``hwnas.tasks.detection``."""

    def __init__(self, experiment: Experiment, space: SearchSpace) -> None:
        self.by_loss = experiment.search.quality == "loss"
        self.metric = OF_LOSS if self.by_loss else AP
        self.post_processing = experiment.detector.post_processing
        # Any architecture of the space will do for the loss: all share anchors and classes.
        self.arch = space.decode(space.at([0] * len(space.choices)))
        self._loss = DetectionCriterion(self.arch)

    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """The detector's loss. It has no image labels to smooth."""
        del label_smoothing
        return DetectionCriterion(self.arch)

    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """1 / (1 + loss)."""
        loss, _ = self._loss.to(y.device)(outputs, y)
        return of_loss(float(loss))

    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """None: it depends on how many anchors match an object."""
        del labels_N, label_smoothing
        return None

    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """An AP of 0."""
        del labels_N
        return None if self.by_loss else 0.0

    def of_network(
        self, network: Network, images: Images, batches: Iterable[Batch], limit: int | None
    ) -> float:
        """AP, or 1 / (1 + mean loss per image)."""
        assert isinstance(network, DetectionNetwork)
        if self.by_loss:
            return of_mean_loss(network, batches, self._loss)
        if not isinstance(images, CocoImages):
            raise ConfigError(
                "the AP of a search needs annotations in COCO's format: set data.name = 'coco'."
            )
        per_image = detections(network, batches, self.post_processing)
        order = evaluation_order(images, limit).tolist()
        return average_precision(images, dict(zip(order, per_image, strict=True))).AP
