"""How good a trained network is, as a document and in words."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY, AP
from hwnas.data.coco_eval import CocoMetrics
from hwnas.document import Document
from hwnas.errors import DocumentError
from hwnas.task import Metrics, task_named


class TrainResult(Document):
    """How good the trained network is on the test images.

    Version 1 had ``test_accuracy`` of a classifier, and COCO's numbers of a detector in
    ``test_coco``.
    """

    SCHEMA: ClassVar[str] = "hwnas.train"
    VERSION: ClassVar[int] = 2

    architecture_sha256: str
    weights: str
    steps: int
    seed: int
    task: str
    metric: str = Field(description="what the network is judged by")
    metrics: Metrics = Field(
        description="each in 0..1 by its name; none where the test images have nothing of the kind"
    )
    per_class: Metrics = Field(
        {}, description="the metric by the class's name, where the task has it"
    )
    test_images: int
    guess: float | None = Field(
        None, description="the metric of the best answer that does not look at the image"
    )
    class_names: tuple[str, ...]

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.metrics.get(self.metric) is None:
            raise ValueError(f"metrics lack {self.metric!r}, which is the metric: train again")
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the task does not have."""
        return {name: value for name, value in handler(self).items() if value not in (None, {})}

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """The names of version 1. Its oldest documents knew no better guess than one of
        equally frequent classes.
        """
        accuracy, coco = content.pop("test_accuracy", None), content.pop("test_coco", None)
        guess = content.pop("test_guess", None)
        if accuracy is not None:
            usual = 1 / max(1, len(content.get("class_names", ())))
            content |= {"task": "classify", "metric": ACCURACY, "metrics": {ACCURACY: accuracy}}
            content["guess"] = usual if guess is None else guess
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
                "a training ends in test_accuracy or in test_coco, and this has neither: train"
                " again."
            )
        return content

    @property
    def quality(self) -> str:
        """The quality in words."""
        return task_named(self.task).said(self.metrics, self.test_images)

    @property
    def caution(self) -> Caution | None:
        """Said where the network is no better than a guess."""
        return task_named(self.task).caution(self.metrics, self.test_images, self.guess)
