"""The result of a training run: the document ``train.json``, and its summary in words."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY, AP
from hwnas.data.coco_eval import CocoMetrics
from hwnas.document import Document
from hwnas.errors import DocumentError
from hwnas.task import Metrics, task_named

WEIGHTS = "model.safetensors"
"""The file of the trained weights, next to the result."""


class TrainResult(Document):
    """How good the trained network is on the test images.

    Version 1 had ``test_accuracy`` for a classifier, and ``test_coco`` with COCO's
    numbers for a detector.
    """

    SCHEMA: ClassVar[str] = "hwnas.train"
    VERSION: ClassVar[int] = 2

    architecture_sha256: str
    weights: str
    steps: int
    seed: int
    task: str
    metric: str = Field(description="the metric that the network is evaluated by")
    metrics: Metrics = Field(
        description="each in 0..1, by name; null if the test images have nothing of the kind"
    )
    per_class: Metrics = Field(
        {}, description="the metric of each class, by the class's name, if the task has it"
    )
    test_images: int
    guess: float | None = Field(
        None, description="the metric of the best guess that does not look at the image"
    )
    class_names: tuple[str, ...]

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.metrics.get(self.metric) is None:
            raise ValueError(
                f"metrics does not contain {self.metric!r}, the metric of the task: train again"
            )
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields that the task does not have."""
        return {name: value for name, value in handler(self).items() if value not in (None, {})}

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Convert version 1 to the names of version 2."""
        accuracy = content.pop("test_accuracy", None)
        coco = content.pop("test_coco", None)
        guess = content.pop("test_guess", None)
        if accuracy is not None:
            if guess is None:
                # The oldest documents have no guess: assume equally frequent classes.
                guess = 1 / max(1, len(content.get("class_names", ())))
            content |= {"task": "classify", "metric": ACCURACY, "metrics": {ACCURACY: accuracy}}
            content["guess"] = guess
        elif coco is not None:
            numbers = CocoMetrics.model_validate(coco)
            content |= {
                "task": "detect",
                "metric": AP,
                "metrics": numbers.by_name,
                "per_class": numbers.AP_per_class,
            }
        else:
            raise DocumentError(
                "a training result of version 1 has test_accuracy or test_coco, and this one has"
                " neither: train again."
            )
        return content

    @property
    def quality(self) -> str:
        """The quality in words."""
        return task_named(self.task).describe_result(self.metrics, self.test_images)

    @property
    def caution(self) -> Caution | None:
        """A caution if the network is no better than a guess."""
        return task_named(self.task).caution(self.metrics, self.test_images, self.guess)
