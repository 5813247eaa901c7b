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

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY
from hwnas.core.search_space import SearchSpace
from hwnas.core.statistics import better_than_guessing
from hwnas.errors import ConfigError
from hwnas.export.names import PROBABILITIES
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

if TYPE_CHECKING:
    from hwnas import engine
    from hwnas.data.images import Images
    from hwnas.engine import Criterion
    from hwnas.nn.network import Network
    from hwnas.tasks import labels
else:  # see hwnas/lazy.py
    engine = LazyModule("hwnas.engine")
    labels = LazyModule("hwnas.tasks.labels")


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
        return engine.CrossEntropy(label_smoothing)

    def quality(self, experiment: Experiment, space: SearchSpace) -> SearchQuality:
        """Accuracy, or 1 / (1 + cross-entropy)."""
        return labels.ClassificationQuality(experiment)

    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """Accuracy."""
        return EvaluationResult({ACCURACY: labels.accuracy_on(network, images, settings)})

    def guess(self, images: Images) -> float | None:
        """The fraction of images in the most frequent class."""
        return labels.most_frequent(images.labels)

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

    def torch_outputs(self, network: Network, images_NHWC: np.ndarray) -> np.ndarray:
        """Logits [N, classes]."""
        return labels.torch_outputs(network, images_NHWC)

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
        return labels.Labels()

    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's labels."""
        return labels.torch_labels(network, images, workers)

    def load_answers(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """Labels from ``predictions``."""
        return labels.Labels(arrays["predictions"])
