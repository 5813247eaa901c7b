"""A third party's task: classification, evaluated by whether the right label is among
the two best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from hwnas.core.arch import Architecture
from hwnas.data.images import Images, evaluation_order
from hwnas.nn.network import Network
from hwnas.task import Answers, EvaluationResult, EvaluationSettings, FileAnswers, Metrics
from hwnas.tasks.classification import Classification


class BestTwo(FileAnswers):
    """The labels of the two highest outputs for each image: [N, 2]."""

    def __init__(self, labels: np.ndarray | None = None) -> None:
        self.labels_N2 = np.zeros((0, 2), int) if labels is None else labels

    def __len__(self) -> int:
        return len(self.labels_N2)

    def add(self, outputs: np.ndarray) -> None:
        """Add the labels of logits or probabilities [N, classes]."""
        self.labels_N2 = np.concatenate(
            [self.labels_N2, np.argsort(-outputs, axis=1, kind="stable")[:, :2]]
        )

    def metrics(self, images: Images, limit: int | None) -> dict[str, float]:
        """The metrics top2 and accuracy."""
        labels = images.labels_of(evaluation_order(images, limit))
        right_N2 = self.labels_N2[: len(labels)] == labels[:, None]
        return {
            "top2": float(right_N2.any(axis=1).mean()),
            "accuracy": float(right_N2[:, 0].mean()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The array ``labels``."""
        return {"labels": self.labels_N2}


class TopTwo(Classification):
    """One label per image, evaluated by the two best."""

    name = "classify-top2"
    metric = "top2"
    numbers = ("top2", "accuracy")
    tiles = ("top2", "accuracy")
    words = replace(
        Classification.words,
        metric="top-2",
        metric_note="Top-2: the right label is among the two best.",
    )
    curve: ClassVar[Mapping[str, str]] = {"test_top2": "top2"}

    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """Evaluate the network like a file."""
        metrics: Metrics = dict(
            self.torch_answers(network, images, settings.workers).metrics(images, settings.limit)
        )
        return EvaluationResult(metrics)

    def guess(self, images: Images) -> float | None:
        """The share of the two most frequent labels."""
        return float(np.sort(np.bincount(images.labels))[-2:].sum() / len(images))

    def answers(
        self, graph: str, arch: Architecture, app_score: float | None = None
    ) -> FileAnswers:
        """No answers yet, to be filled with the two best labels."""
        return BestTwo()

    def torch_answers(self, network: Network, images: Images, workers: int) -> Answers:
        """PyTorch's answers, for all images at once."""
        answers = BestTwo()
        x_NCHW, _ = images.__getitems__([(int(index), 0) for index in evaluation_order(images)])
        answers.add(
            self.torch_outputs(network.to(torch.device("cpu")), x_NCHW.permute(0, 2, 3, 1).numpy())
        )
        return answers

    def load_answers(self, arrays: Mapping[str, np.ndarray]) -> Answers:
        """The answers stored in ``labels``."""
        return BestTwo(arrays["labels"])
