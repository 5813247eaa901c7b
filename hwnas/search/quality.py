"""What a search trains the shared weights by, and how good it takes an architecture to be: a number in 0..1, by the task.

Classification: cross-entropy L. The quality on one batch (the reward of reinforcement learning) is the accuracy, and so is that on the
held-out images by which finders and the last ranking judge. With ``search.quality = "loss"`` all of these are 1 / (1 + L), which is 1 where
nothing is wrong and still tells large losses apart, where exp(-L) has no slope left.

Detection: the detector's loss L. The AP of a few images is mostly noise, and no gradient has it, so the quality on one batch is always
1 / (1 + L). Architectures are judged by their AP on held-out images; with ``search.quality = "loss"`` by 1 / (1 + L) there, too.

Judging by the loss tells architectures apart where images or epochs are few: on NAS-Bench-Macro, tau of a super-net of two epochs on
1,000 images is 0.28 by accuracy and 0.71 by loss (README).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.space import SearchSpace
from hwnas.data.coco import CocoImages
from hwnas.data.images import Batch, Images, evaluation_order
from hwnas.detection import DetectionCriterion, average_precision, detections
from hwnas.engine import Criterion, CrossEntropy, accuracy
from hwnas.errors import ConfigError
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import AnyNetwork
from hwnas.nn.supernet import resized
from hwnas.search.metric import ACCURACY, AP, OF_LOSS


class Quality(ABC):
    """What a task calls good. ``metric`` names what ``of_network`` gives; see ``hwnas.search.metric``."""

    metric: str

    @abstractmethod
    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """What is minimised; a new module each time. Detectors have no labels to smooth."""

    @abstractmethod
    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """The quality in 0..1 of a network's outputs on the targets of one batch."""

    @abstractmethod
    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """The training loss of the best answer that does not look at the image; None where that is no simple number."""

    @abstractmethod
    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """What ``of_network`` gives for a network that does not look at the image, on images of these labels; None: not known."""

    @abstractmethod
    def of_network(self, network: AnyNetwork, images: Images, batches: Iterable[Batch], limit: int | None) -> float:
        """The quality in 0..1 of a network on the evaluation ``batches`` of ``limit`` of the ``images`` (None: all)."""


class ClassificationQuality(Quality):
    """Classification: accuracy or the loss. See the module."""

    def __init__(self, experiment: Experiment) -> None:
        self.by_loss = experiment.search.quality == "loss"
        self.metric = OF_LOSS if self.by_loss else ACCURACY
        self.classes = experiment.data.classes

    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """Cross-entropy."""
        return CrossEntropy(label_smoothing)

    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """Accuracy of the logits [N, classes], or 1 / (1 + mean loss)."""
        if self.by_loss:
            return _of_loss(float(F.cross_entropy(outputs.float(), y)))
        return float((outputs.argmax(1) == y).float().mean())

    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """The entropy of the smoothed class frequencies; ln(classes) where all classes are as frequent, whatever the smoothing."""
        frequencies_K = np.bincount(labels_N, minlength=self.classes) / len(labels_N)
        smoothed_K = (1 - label_smoothing) * frequencies_K + label_smoothing / self.classes
        present = smoothed_K[smoothed_K > 0]
        return float(-(present * np.log(present)).sum())

    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """The share of the most frequent class."""
        return None if self.by_loss else float(np.bincount(labels_N).max() / len(labels_N))

    def of_network(self, network: AnyNetwork, images: Images, batches: Iterable[Batch], limit: int | None) -> float:
        """Accuracy at the network's own resolution, or 1 / (1 + mean loss of an image)."""
        sized = ((resized(x_NCHW, network.arch.resolution), y) for x_NCHW, y in batches)
        return _of_mean_loss(network, sized, self.criterion()) if self.by_loss else accuracy(network, sized)


class DetectionQuality(Quality):
    """Detection: AP or the loss. See the module."""

    def __init__(self, experiment: Experiment, space: SearchSpace) -> None:
        self.by_loss = experiment.search.quality == "loss"
        self.metric = OF_LOSS if self.by_loss else AP
        self.post_processing = experiment.detector.post_processing
        self.arch = space.decode(space.at([0] * len(space.choices)))  # anchors and classes are those of all
        self._loss = DetectionCriterion(self.arch)

    def criterion(self, label_smoothing: float = 0.0) -> Criterion:
        """The detector's loss."""
        del label_smoothing
        return DetectionCriterion(self.arch)

    def of_outputs(self, outputs: Any, y: Tensor) -> float:
        """1 / (1 + loss)."""
        loss, _ = self._loss.to(y.device)(outputs, y)
        return _of_loss(float(loss))

    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """None: that depends on how many anchors have an object."""
        del labels_N, label_smoothing
        return None

    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """An AP of 0."""
        del labels_N
        return None if self.by_loss else 0.0

    def of_network(self, network: AnyNetwork, images: Images, batches: Iterable[Batch], limit: int | None) -> float:
        """AP, or 1 / (1 + mean loss of an image)."""
        assert isinstance(network, DetectionNetwork)
        if self.by_loss:
            return _of_mean_loss(network, batches, self._loss)
        if not isinstance(images, CocoImages):
            raise ConfigError("the AP of a search needs annotations in COCO's format: set data.name = 'coco'.")
        found = detections(network, batches, self.post_processing)
        return average_precision(images, dict(zip(evaluation_order(images, limit).tolist(), found, strict=True))).AP


@torch.inference_mode()
def _of_mean_loss(network: AnyNetwork, batches: Iterable[Batch], criterion: Criterion) -> float:
    """1 / (1 + mean loss of an image)."""
    network.eval()
    device = next(network.parameters()).device
    criterion.to(device)
    total, count = 0.0, 0
    for x_NCHW, y in batches:
        loss, _ = criterion(network(x_NCHW.to(device, memory_format=torch.channels_last)), y.to(device))
        total, count = total + float(loss) * len(y), count + len(y)
    return _of_loss(total / count)


def _of_loss(loss: float) -> float:
    """1 / (1 + loss); a loss that is no number is the worst."""
    return 1 / (1 + loss) if math.isfinite(loss) else 0.0


def quality_of(experiment: Experiment, space: SearchSpace) -> Quality:
    """The quality of an experiment's task."""
    return ClassificationQuality(experiment) if space.detector is None else DetectionQuality(experiment, space)
