"""Detection: boxes with labels, judged by COCO's AP.

In a search, the AP of a few images is mostly noise, and no gradient has it, so the
quality on one batch is always 1 / (1 + L) of the detector's loss L. Architectures are
judged by their AP on held-out images; with ``search.quality = "loss"`` by 1 / (1 + L)
there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.metric import AP, OF_LOSS
from hwnas.core.search_space import SearchSpace
from hwnas.core.ssdlite import with_detector
from hwnas.core.statistics import NO_AP
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import NUMBERS
from hwnas.data.images import Batch, Images, evaluation_order
from hwnas.engine import Criterion
from hwnas.errors import ConfigError, SpaceError
from hwnas.export.detector import Decoded, columns
from hwnas.export.names import CHOSEN, DETECTIONS, TASK_OUTPUTS
from hwnas.export.post_processing import NMS_COLUMNS
from hwnas.nn.detector import CODE_SIZE, DetectionNetwork, detector_of
from hwnas.nn.network import Network
from hwnas.task import (
    Answers,
    Evaluated,
    Evaluation,
    FileAnswers,
    Metrics,
    Output,
    Parity,
    Quality,
    Task,
    Words,
)
from hwnas.tasks.boxes import (
    Boxes,
    DetectionCriterion,
    FileBoxes,
    average_precision,
    detect,
    detections,
    parity,
)
from hwnas.tasks.losses import of_loss, of_mean_loss
from hwnas.tasks.pictures import pictures_of

ROWS_BYTES = 16 * 2**20
"""What PyTorch's rows of the parity images take in a bundle, at most."""
BATCH = 16
"""Images in which PyTorch finds boxes at once for a bundle."""


class DetectionQuality(Quality):
    """AP or the loss. See the module."""

    def __init__(self, experiment: Experiment, space: SearchSpace) -> None:
        self.by_loss = experiment.search.quality == "loss"
        self.metric = OF_LOSS if self.by_loss else AP
        self.post_processing = experiment.detector.post_processing
        # anchors and classes are those of all
        self.arch = space.decode(space.at([0] * len(space.choices)))
        self._loss = DetectionCriterion(self.arch)

    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """The detector's loss. There are no labels of images to smooth."""
        del label_smoothing
        return DetectionCriterion(self.arch)

    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """1 / (1 + loss)."""
        loss, _ = self._loss.to(y.device)(outputs, y)
        return of_loss(float(loss))

    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """None: that depends on how many anchors have an object."""
        del labels_N, label_smoothing
        return None

    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """An AP of 0."""
        del labels_N
        return None if self.by_loss else 0.0

    def of_network(
        self, network: Network, images: Images, batches: Iterable[Batch], limit: int | None
    ) -> float:
        """AP, or 1 / (1 + mean loss of an image)."""
        assert isinstance(network, DetectionNetwork)
        if self.by_loss:
            return of_mean_loss(network, batches, self._loss)
        if not isinstance(images, CocoImages):
            raise ConfigError(
                "the AP of a search needs annotations in COCO's format: set data.name = 'coco'."
            )
        found = detections(network, batches, self.post_processing)
        return average_precision(
            images, dict(zip(evaluation_order(images, limit).tolist(), found, strict=True))
        ).AP


class Detection(Task):
    """Boxes with labels."""

    name = "detect"
    network_kind = "detect"
    metric = AP
    numbers = NUMBERS
    tiles = (AP, "AP50", "AP75")
    words = Words(
        network="detector",
        metric="AP",
        answer="best detection",
        parity=(
            "largest difference of a coordinate, in parts of the input, or of a score from"
            " PyTorch’s, over all anchors; with NMS in the graph over the best detections"
        ),
        metric_note=(
            "AP: COCO’s average precision, the mean over IoU 0.50 to 0.95 and over classes; AP50"
            " and AP75: at one IoU; s, m, l: of small, medium and large objects; AR: recall with 1,"
            " 10 or 100 detections an image."
        ),
    )
    tables = ("detector",)
    files = ("arch.json", "pictures.json")
    curve: ClassVar[Mapping[str, str]] = {"test_ap": AP, "test_ap50": "AP50"}
    curve_images = 500
    curve_cost = 1.0  # what is saved without a backward pass, NMS at AP's threshold takes
    reference = "rows"
    decodes = True

    def space(self, space: SearchSpace, experiment: Experiment) -> SearchSpace:
        """SSDLite on its networks. Where an architecture is named, a space that carries
        none is good enough for what is left to do.
        """
        if space.task == self.network_kind:
            return space
        try:
            return space.with_detector(
                extras=experiment.detector.extras, scores=experiment.detector.scores
            )
        except SpaceError:
            if experiment.train.arch is None:
                raise
            return space

    def architecture(self, arch: Architecture, experiment: Experiment) -> Architecture:
        """SSDLite on it, where it has no detector."""
        if arch.task == self.network_kind:
            return arch
        data, detector = experiment.data, experiment.detector
        return with_detector(
            arch,
            data.classes,
            resolution=data.resolution,
            extras=detector.extras,
            scores=detector.scores,
        )

    def criterion(self, arch: Architecture, label_smoothing: float = 0.0) -> Criterion:
        """The detector's loss."""
        del label_smoothing
        return DetectionCriterion(arch)

    def quality(self, experiment: Experiment, space: SearchSpace) -> Quality:
        """AP, or 1 / (1 + loss)."""
        return DetectionQuality(experiment, space)

    def evaluate(self, network: Network, images: Images, how: Evaluation) -> Evaluated:
        """COCO's numbers, the AP of each class, and what was found by image index."""
        found = detect(
            _detector(network),
            _coco(images),
            self.post_processing,
            batch_size=how.batch_size,
            limit=how.limit,
            workers=how.workers,
        )
        if (
            how.limit is not None
            and len(images.labels_of(evaluation_order(images, how.limit))) == 0
        ):
            return Evaluated({AP: None}, answers=found)  # a part of the images may have no object
        numbers = average_precision(_coco(images), found)
        return Evaluated(numbers.by_name, dict(numbers.AP_per_class), found)

    def guess(self, images: Images) -> float | None:
        """None: boxes are not guessed."""
        return None

    def caution(self, metrics: Metrics, images: int, guess: float | None) -> Caution | None:
        """By an AP of 0."""
        value = metrics[AP]
        if value is None or value > NO_AP:
            return None
        advice = "raise train.epochs, change train.optimizer.lr, and check the data"
        return Caution(
            headline="the trained network finds nothing",
            text=f"AP {value:.1%} on {images:,} test images: {advice}.",
        )

    def said(self, metrics: Metrics, images: int) -> str:
        """AP and AP50."""
        known = [
            f"{name} {value:.1%}"
            for name in (AP, "AP50")
            if (value := metrics.get(name)) is not None
        ]
        return f"{', '.join(known)} on {images:,} test images"

    def said_of_file(self, value: float, images: int) -> str:
        """AP."""
        return f"finds objects with an AP of {value:.1%} on {images:,} test images"

    def said_on_the_way(self, value: float) -> str:
        """AP."""
        return f"AP {value:.1%} on"

    def record(self, folder: Path, network: Network, images: Images, evaluated: Evaluated) -> None:
        """The architecture, whose detector may be of the training's making, and
        pictures of what was found.
        """
        network.arch.save(folder / "arch.json")
        pictures_of(_coco(images), evaluated.answers).save(folder / "pictures.json")

    def check_images(self, images: Images, name: str, arch: Architecture) -> None:
        """They have boxes."""
        if not isinstance(images, CocoImages):
            raise ConfigError(
                f"data.name = {name!r} has no boxes, but {arch.name!r} is a detector: name the data"
                " it was trained on."
            )

    def reference_images(self, network: Network) -> int | None:
        """As many as fit into ``ROWS_BYTES``."""
        numbers = detector_of(network.arch).anchors * columns(_detector(network))
        return max(1, ROWS_BYTES // (4 * numbers))

    @torch.inference_mode()
    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """Rows [N, anchors, 4 + classes]."""
        decoded = Decoded(_detector(network)).cpu().eval()
        x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
        rows: np.ndarray = torch.cat(
            [decoded(x_NCHW[at : at + BATCH]) for at in range(0, len(x_NCHW), BATCH)]
        ).numpy()
        return rows

    def outputs(self, graph: str, arch: Architecture, output: str) -> tuple[Output, ...]:
        """Rows of anchors, or of detections."""
        limit = self.post_processing.detections
        if graph == "decoded":
            row = (
                "per anchor: x1, y1, x2, y2 in pixels of the model's input, cut off at its edges;"
                " then a score in 0..1 per label"
            )
            shape = (1, detector_of(arch).anchors, CODE_SIZE + arch.classes)
            return (Output(name=DETECTIONS, shape=shape, meaning=row),)
        if graph == "nms":
            row = (
                "best first: x1, y1, x2, y2 in pixels of the model's input, cut off at its edges;"
                " score in 0..1; position of the label; rows after the last detection are 0"
            )
            return (Output(name=CHOSEN, shape=(1, limit, NMS_COLUMNS), meaning=row),)
        shapes = ((1, limit, 4), (1, limit), (1, limit), (1,))
        meanings = (
            (
                "best first: ymin, xmin, ymax, xmax in parts of the model's input, not cut off at"
                " its edges"
            ),
            "position of the label",
            "score in 0..1",
            "number of detections; what follows them is undefined",
        )
        named = zip(TASK_OUTPUTS, shapes, meanings, strict=True)
        return tuple(
            Output(name=name, shape=shape, meaning=meaning) for name, shape, meaning in named
        )

    def parity(
        self, graph: str, outputs: np.ndarray, reference: np.ndarray, arch: Architecture
    ) -> Parity:
        """See ``boxes.parity``."""
        return parity(graph, outputs, reference, self.post_processing, arch.resolution)

    def answers(
        self, graph: str, arch: Architecture, app_score: float | None = None
    ) -> FileAnswers:
        """Boxes."""
        return FileBoxes(graph, arch, self.post_processing, app_score)

    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """What PyTorch finds."""
        found = detect(
            _detector(network),
            _coco(images),
            self.post_processing,
            batch_size=BATCH,
            workers=workers,
        )
        return Boxes.of_torch(found.values())

    def kept(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """Of ``found``, the boxes of all images, and ``counts``, how many each has."""
        return Boxes.of_arrays(arrays["found"], arrays["counts"])

    def min_score(self) -> float | None:
        """The threshold for AP."""
        return self.post_processing.min_score


def _detector(network: Network) -> DetectionNetwork:
    assert isinstance(network, DetectionNetwork)
    return network


def _coco(images: Images) -> CocoImages:
    assert isinstance(images, CocoImages), "see check_images"
    return images
