"""Labels in training and evaluation: what a search maximises, and the answers of networks
and files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.metric import ACCURACY, OF_LOSS
from hwnas.data.images import Batch, Images, evaluation_batches, evaluation_order
from hwnas.engine import Criterion, CrossEntropy, accuracy
from hwnas.nn.network import Network
from hwnas.nn.shared import resized
from hwnas.task import EvaluationSettings, FileAnswers, SearchQuality
from hwnas.tasks.losses import of_loss, of_mean_loss

BATCH = 256
"""Batch size of PyTorch's predictions for a bundle."""


class ClassificationQuality(SearchQuality):
    """Accuracy or the loss; see ``hwnas.tasks.classification``."""

    of_cross_entropy = True

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
            return of_loss(float(F.cross_entropy(outputs.float(), y)))
        return float((outputs.argmax(1) == y).float().mean())

    def loss_of_a_guess(self, labels_N: np.ndarray, label_smoothing: float) -> float | None:
        """The entropy of the smoothed class frequencies; ln(classes) for any smoothing
        if all classes are equally frequent.
        """
        frequencies_K = np.bincount(labels_N, minlength=self.classes) / len(labels_N)
        smoothed_K = (1 - label_smoothing) * frequencies_K + label_smoothing / self.classes
        present = smoothed_K[smoothed_K > 0]
        return float(-(present * np.log(present)).sum())

    def of_a_guess(self, labels_N: np.ndarray) -> float | None:
        """The fraction of images in the most frequent class."""
        return None if self.by_loss else most_frequent(labels_N)

    def of_network(
        self, network: Network, images: Images, batches: Iterable[Batch], limit: int | None
    ) -> float:
        """Accuracy at the network's own resolution, or 1 / (1 + mean loss of an image)."""
        # lazily, so that only one resized batch is in memory
        sized = ((resized(x_NCHW, network.arch.size), y) for x_NCHW, y in batches)
        if self.by_loss:
            return of_mean_loss(network, sized, self.criterion())
        return accuracy(network, sized)


class Labels(FileAnswers):
    """The label of the highest output for each image."""

    def __init__(self, predictions: np.ndarray | None = None) -> None:
        self._parts = [np.zeros(0, np.int16) if predictions is None else predictions]

    @property
    def predictions(self) -> np.ndarray:
        """All predicted labels so far: int16 [N]."""
        return np.concatenate(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, outputs: np.ndarray) -> None:
        """Add logits or probabilities [N, classes]."""
        self._parts.append(outputs.argmax(1).astype(np.int16))

    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """Accuracy."""
        labels = images.labels_of(evaluation_order(images, limit))
        return {ACCURACY: float((self.predictions[: len(labels)] == labels).mean())}

    def arrays(self) -> dict[str, np.ndarray]:
        """``predictions``."""
        return {"predictions": self.predictions}


def most_frequent(labels_N: np.ndarray) -> float:
    """The fraction of the most frequent label: what the best guess gets right."""
    return float(np.bincount(labels_N).max() / len(labels_N))


@torch.inference_mode()
def torch_outputs(network: Network, images_NHWC: np.ndarray) -> np.ndarray:
    """Logits [N, classes] of ``network`` on the CPU, for channels-last images."""
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    logits: np.ndarray = network.cpu().eval()(x_NCHW).numpy()
    return logits


@torch.inference_mode()
def torch_labels(network: Network, images: Images, workers: int) -> Labels:
    """The labels of ``network`` on the CPU, for all images."""
    labels = Labels()
    network = network.cpu().eval()
    for x_NCHW, _ in evaluation_batches(images, BATCH, workers=workers):
        labels.add(network(x_NCHW).numpy())
    return labels


def accuracy_on(network: Network, images: Images, settings: EvaluationSettings) -> float:
    """The fraction of right answers on test images."""
    # evaluation keeps no activations for a backward pass: larger batches fit
    batches = evaluation_batches(
        images, 4 * settings.batch_size, limit=settings.limit, workers=settings.workers
    )
    return accuracy(network, batches)
