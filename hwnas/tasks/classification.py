"""Classification: one label per image. The metric is the fraction of test images whose
highest logit is the right class.

In a search, the quality on one batch (the reward of reinforcement learning) is the
accuracy, and so is the quality on the held-out images, which finders and the final
ranking use. With ``search.quality = "loss"``, all of these are 1 / (1 + L) with the
cross-entropy L. That is 1 for a perfect network, and it still tells large losses apart,
where exp(-L) is flat.

The loss distinguishes architectures when images or epochs are few: on NAS-Bench-Macro,
tau of a super-net of two epochs on 1,000 images is 0.28 by accuracy and 0.71 by loss
(docs/results).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY, OF_LOSS
from hwnas.core.search_space import SearchSpace
from hwnas.core.statistics import better_than_guessing
from hwnas.data.images import Batch, Images, evaluation_batches, evaluation_order
from hwnas.engine import Criterion, CrossEntropy, accuracy
from hwnas.errors import ConfigError
from hwnas.export.names import PROBABILITIES
from hwnas.nn.network import Network
from hwnas.nn.supernet import resized
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
from hwnas.tasks.losses import of_loss, of_mean_loss

BATCH = 256
"""Batch size of PyTorch's predictions for a bundle."""


class ClassificationQuality(SearchQuality):
    """Accuracy or the loss; see the module docstring."""

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
        sized = ((resized(x_NCHW, network.arch.resolution), y) for x_NCHW, y in batches)
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


class Classification(Task):
    """One label per image."""

    name = "classify"
    network_kind = "classify"
    metric = ACCURACY
    numbers = (ACCURACY,)
    tiles = (ACCURACY,)
    words = Words(
        network="classifier",
        metric="top-1",
        answer="top-1",
        parity="largest difference of a logit from PyTorch’s over the largest logit",
        metric_note="Top-1: the share of test images whose highest logit is the right class.",
    )
    curve: ClassVar[Mapping[str, str]] = {"test_accuracy": ACCURACY}
    curve_cost = 1 / 3  # a training step's forward pass without its backward pass
    reference = "logits"
    studied = True

    def space(self, space: SearchSpace, experiment: Experiment) -> SearchSpace:
        """The space unchanged. Raises ConfigError if its networks are detectors."""
        if space.task != self.network_kind:
            name = experiment.space.name
            raise ConfigError(
                f"the networks of space {name!r} are detectors: set task = 'detect' and name data"
                " with boxes, or search another space."
            )
        return space

    def architecture(self, arch: Architecture, experiment: Experiment) -> Architecture:
        """The architecture unchanged. Raises ConfigError if it is a detector."""
        del experiment
        if arch.task != self.network_kind:
            raise ConfigError(
                f"architecture {arch.name!r} is a detector: set task = 'detect' and name data with"
                " boxes, or train another architecture."
            )
        return arch

    def criterion(self, arch: Architecture, label_smoothing: float = 0.0) -> Criterion:
        """Cross-entropy."""
        return CrossEntropy(label_smoothing)

    def quality(self, experiment: Experiment, space: SearchSpace) -> SearchQuality:
        """Accuracy, or 1 / (1 + cross-entropy)."""
        return ClassificationQuality(experiment)

    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """Accuracy."""
        # evaluation keeps no activations for a backward pass: larger batches fit
        batches = evaluation_batches(
            images, 4 * settings.batch_size, limit=settings.limit, workers=settings.workers
        )
        return EvaluationResult({ACCURACY: accuracy(network, batches)})

    def guess(self, images: Images) -> float | None:
        """The fraction of images in the most frequent class."""
        return most_frequent(images.labels)

    def caution(self, metrics: Metrics, images: int, guess: float | None) -> Caution | None:
        """By a binomial test of the number of right answers."""
        value = metrics[self.metric]
        if (
            value is None
            or guess is None
            or better_than_guessing(round(value * images), images, guess)
        ):
            return None
        advice = "raise train.epochs, change train.optimizer.lr, and check the data"
        # Validation depends on the hash of this text, so its wording stays: another one
        # would validate finished runs again.
        result = self.describe_result(metrics, images)
        text = f"{result}, where a guess gets {guess:.2%} right: {advice}."
        return Caution(headline="the trained network learned nothing", text=text)

    def describe_result(self, metrics: Metrics, images: int) -> str:
        """The fraction of right answers."""
        return f"{metrics[self.metric]:.2%} of {images:,} test images right"

    def describe_file_result(self, value: float, images: int) -> str:
        """The fraction of right answers."""
        return f"gets {value:.1%} of {images:,} test images right"

    def describe_progress(self, value: float) -> str:
        """The fraction of right answers."""
        return f"{value:.1%} of"

    @torch.inference_mode()
    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """Logits [N, classes]."""
        x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
        logits: np.ndarray = network.cpu().eval()(x_NCHW).numpy()
        return logits

    def outputs(self, graph: str, arch: Architecture, output: str) -> tuple[Output, ...]:
        """One number per label."""
        note = "to be turned into probabilities by a softmax"
        if output == PROBABILITIES:
            note = "between 0 and 1, and their sum is 1"
        meaning = f"one number per label, {note}"
        return (Output(name=output, shape=(1, arch.classes), meaning=meaning),)

    def parity(
        self, graph: str, outputs: np.ndarray, reference: np.ndarray, arch: Architecture
    ) -> Parity:
        """``relative_error`` is max |file - torch| / max |torch|; ``agreement`` is the
        fraction of images with the same highest output.
        """
        return Parity(
            images=len(outputs),
            relative_error=float(np.abs(outputs - reference).max() / np.abs(reference).max()),
            agreement=float((outputs.argmax(1) == reference.argmax(1)).mean()),
        )

    def answers(
        self, graph: str, arch: Architecture, app_score: float | None = None
    ) -> FileAnswers:
        """Labels."""
        return Labels()

    @torch.inference_mode()
    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's labels."""
        labels = Labels()
        network = network.cpu().eval()
        for x_NCHW, _ in evaluation_batches(images, BATCH, workers=workers):
            labels.add(network(x_NCHW).numpy())
        return labels

    def load_answers(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """Labels from ``predictions``."""
        return Labels(arrays["predictions"])


def most_frequent(labels_N: np.ndarray) -> float:
    """The fraction of the most frequent label: what the best guess gets right."""
    return float(np.bincount(labels_N).max() / len(labels_N))
