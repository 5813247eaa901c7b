"""Detection: boxes with labels. The metric is COCO's AP.

In a search, the AP of a few images is mostly noise and has no gradient, so the quality
on one batch is always 1 / (1 + L) with the detector's loss L. On held-out images,
architectures are evaluated by their AP, or by 1 / (1 + L) with ``search.quality =
"loss"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.detection import detector_of, with_detector
from hwnas.core.detector import CODE_SIZE
from hwnas.core.metric import AP
from hwnas.core.search_space import SearchSpace
from hwnas.core.statistics import NO_AP
from hwnas.data.coco_eval import NUMBERS
from hwnas.errors import ConfigError, SpaceError
from hwnas.export.names import CHOSEN, DETECTIONS, TASK_OUTPUTS
from hwnas.export.post_processing import NMS_COLUMNS
from hwnas.lazy import LazyModule
from hwnas.task import (
    Answers,
    EvaluationResult,
    EvaluationSettings,
    FileAnswers,
    Metrics,
    Output,
    Parity,
    SearchQuality,
    Task,
    Words,
)
from hwnas.tasks.pictures import pictures_of

if TYPE_CHECKING:
    from hwnas.data import coco
    from hwnas.data.images import Images
    from hwnas.engine import Criterion
    from hwnas.nn import detector
    from hwnas.nn.network import Network
    from hwnas.tasks import boxes
else:  # see hwnas/lazy.py
    coco = LazyModule("hwnas.data.coco")
    detector = LazyModule("hwnas.nn.detector")
    boxes = LazyModule("hwnas.tasks.boxes")

ROWS_BYTES = 16 * 2**20
"""The most bytes that PyTorch's rows of the parity images may take in a bundle."""


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
            "largest difference of a coordinate, as a fraction of the input, or of a score from"
            " PyTorch’s, over all anchors; with NMS in the graph over the best detections"
        ),
        metric_note=(
            "AP: COCO’s average precision, the mean over IoU 0.50 to 0.95 and over classes; AP50"
            " and AP75: at one IoU; s, m, l: for small, medium and large objects; AR: recall with"
            " 1, 10 or 100 detections per image."
        ),
    )
    tables = ("detector",)
    files = ("arch.json", "pictures.json")
    curve: ClassVar[Mapping[str, str]] = {"test_ap": AP, "test_ap50": "AP50"}
    curve_images = 500
    curve_cost = 1.0  # NMS at AP's threshold takes the time that the backward pass would
    reference = "rows"
    decodes = True

    def space(self, space: SearchSpace, experiment: Experiment) -> SearchSpace:
        """The detector on the networks of the space. If ``train.arch`` names an
        architecture, nothing is searched, and a space that cannot carry a detector is
        returned as is.
        """
        if space.task == self.network_kind:
            return space
        try:
            return space.with_detector(experiment.detector.spec)
        except SpaceError:
            if experiment.train.arch is None:
                raise
            return space

    def architecture(self, arch: Architecture, experiment: Experiment) -> Architecture:
        """The detector on the architecture, unless it already has one."""
        if arch.task == self.network_kind:
            return arch
        data = experiment.data
        spec = experiment.detector.spec
        return with_detector(arch, data.classes, spec, resolution=data.resolution)

    def criterion(self, arch: Architecture, label_smoothing: float = 0.0) -> Criterion:
        """The detector's loss."""
        del label_smoothing
        return boxes.DetectionCriterion(arch)

    def quality(self, experiment: Experiment, space: SearchSpace) -> SearchQuality:
        """AP, or 1 / (1 + loss)."""
        return boxes.DetectionQuality(experiment, space)

    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """COCO's metrics, the AP of each class, and the detections by image index."""
        return boxes.evaluate_detector(
            _detector(network), _coco(images), self.post_processing, settings
        )

    def guess(self, images: Images) -> float | None:
        """None: boxes cannot be guessed."""
        return None

    def caution(self, metrics: Metrics, images: int, guess: float | None) -> Caution | None:
        """If the AP is practically 0."""
        value = metrics[AP]
        if value is None or value > NO_AP:
            return None
        advice = "raise train.epochs, change train.optimizer.lr, and check the data"
        return Caution(
            headline="the trained network finds nothing",
            text=f"AP {value:.1%} on {images:,} test images: {advice}.",
        )

    def describe_result(self, metrics: Metrics, images: int) -> str:
        """AP and AP50."""
        parts = []
        for name in (AP, "AP50"):
            value = metrics.get(name)
            if value is not None:
                parts.append(f"{name} {value:.1%}")
        return f"{', '.join(parts)} on {images:,} test images"

    def describe_file_result(self, value: float, images: int) -> str:
        """AP."""
        return f"finds objects with an AP of {value:.1%} on {images:,} test images"

    def describe_progress(self, value: float) -> str:
        """AP."""
        return f"AP {value:.1%} on"

    def record(
        self, folder: Path, network: Network, images: Images, evaluated: EvaluationResult
    ) -> None:
        """Write the architecture, to which training may have added the detector, and
        pictures of the detections.
        """
        network.arch.save(folder / "arch.json")
        pictures_of(_coco(images), evaluated.answers).save(folder / "pictures.json")

    def check_images(self, images: Images, name: str, arch: Architecture) -> None:
        """Check that the images have boxes."""
        if not isinstance(images, coco.CocoImages):
            raise ConfigError(
                f"data.name = {name!r} has no boxes, but {arch.name!r} is a detector: give the data"
                " it was trained on."
            )

    def reference_images(self, network: Network) -> int | None:
        """As many images as fit into ``ROWS_BYTES``."""
        arch = network.arch
        values_per_image = detector_of(arch).anchors * (CODE_SIZE + arch.classes)
        bytes_per_image = 4 * values_per_image  # float32
        return max(1, ROWS_BYTES // bytes_per_image)

    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """Rows [N, anchors, 4 + classes]."""
        return boxes.torch_rows(_detector(network), images_NHWC)

    def outputs(self, graph: str, arch: Architecture, output: str) -> tuple[Output, ...]:
        """One row per anchor or per detection."""
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
        # These texts are in bundle.json, which the verdict's hash depends on, so "in parts
        # of" (as fractions of) stays.
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
        outputs = []
        for name, dimensions, meaning in named:
            outputs.append(Output(name=name, shape=dimensions, meaning=meaning))
        return tuple(outputs)

    def parity(
        self, graph: str, outputs: np.ndarray, reference: np.ndarray, arch: Architecture
    ) -> Parity:
        """See ``boxes.parity``."""
        return boxes.parity(graph, outputs, reference, self.post_processing, arch.size_HW)

    def answers(
        self, graph: str, arch: Architecture, app_score: float | None = None
    ) -> FileAnswers:
        """Boxes."""
        return boxes.FileBoxes(graph, arch, self.post_processing, app_score)

    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's detections."""
        return boxes.torch_boxes(_detector(network), _coco(images), self.post_processing, workers)

    def load_answers(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """Boxes from ``found``, the boxes of all images, and ``counts``, the number in
        each image.
        """
        return boxes.Boxes.of_arrays(arrays["found"], arrays["counts"])

    def min_score(self) -> float | None:
        """The score threshold for AP."""
        return self.post_processing.min_score


def _detector(network: Network) -> detector.DetectionNetwork:
    assert isinstance(network, detector.DetectionNetwork)
    return network


def _coco(images: Images) -> coco.CocoImages:
    assert isinstance(images, coco.CocoImages), "see check_images"
    return images
