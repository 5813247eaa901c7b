"""How good a trained network is, as a document and in words."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hwnas.core.caution import Caution
from hwnas.core.statistics import NO_AP, better_than_guessing
from hwnas.data.coco_eval import CocoMetrics
from hwnas.document import Document


class TrainResult(Document):
    """How good the trained network is on the test images: ``test_accuracy`` of a classifier, COCO's numbers of a detector."""

    SCHEMA: ClassVar[str] = "hwnas.train"

    architecture_sha256: str
    weights: str
    steps: int
    seed: int
    test_accuracy: float | None = None
    test_coco: CocoMetrics | None = None
    test_images: int
    test_guess: float | None = Field(None, description="what always naming the most frequent class of the test images gets right")
    class_names: tuple[str, ...]

    @model_validator(mode="after")
    def _one_quality(self) -> Self:
        if (self.test_accuracy is None) == (self.test_coco is None):
            raise ValueError("a training ends in test_accuracy or in test_coco: give one of them")
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the quality of the other task."""
        return {name: value for name, value in handler(self).items() if value is not None}

    @property
    def quality(self) -> str:
        """The quality in words."""
        if self.test_coco is not None:
            return f"AP {self.test_coco.AP:.1%}, AP50 {self.test_coco.AP50:.1%} on {self.test_images:,} test images"
        return f"{self.test_accuracy:.2%} of {self.test_images:,} test images right"

    @property
    def caution(self) -> Caution | None:
        """Said where the network is no better than a guess: by a binomial test of its right answers, or by an AP of 0."""
        advice = "raise train.epochs, change train.optimizer.lr, and check the data"
        if self.test_coco is not None:
            if self.test_coco.AP > NO_AP:
                return None
            text = f"AP {self.test_coco.AP:.1%} on {self.test_images:,} test images: {advice}."
            return Caution(headline="the trained network finds nothing", text=text)
        assert self.test_accuracy is not None
        guess = self.test_guess if self.test_guess is not None else 1 / len(self.class_names)
        if better_than_guessing(round(self.test_accuracy * self.test_images), self.test_images, guess):
            return None
        text = f"{self.quality}, where a guess gets {guess:.2%} right: {advice}."
        return Caution(headline="the trained network learned nothing", text=text)
