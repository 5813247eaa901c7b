"""How good detections are: the 12 numbers of COCO and the AP of each class, by pycocotools.

AP is the area under the precision-recall curve, sampled at 101 recalls, of detections
that match an object of their class by at least a given IoU; averaged over the IoUs .50,
.55, ..., .95 and over the classes (https://cocodataset.org/#detection-eval).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pydantic import BaseModel, ConfigDict, Field

from hwnas.errors import DataError


class CocoMetrics(BaseModel):
    """COCO's numbers, each in 0..1, by COCO's names; none where the ground truth has no
    object of that kind (COCO writes -1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    AP: float = Field(description="mean over IoU .50:.05:.95 and classes")
    AP50: float = Field(description="at IoU .50")
    AP75: float = Field(description="at IoU .75")
    APs: float | None = Field(description="of objects below 32^2 pixels")
    APm: float | None = Field(description="of objects of 32^2 to 96^2 pixels")
    APl: float | None = Field(description="of objects above 96^2 pixels")
    AR1: float = Field(
        description="recall with 1 detection per image, mean over the same IoUs and classes"
    )
    AR10: float = Field(description="recall with 10")
    AR100: float = Field(description="recall with 100")
    ARs: float | None = Field(description="recall with 100, of objects below 32^2 pixels")
    ARm: float | None = Field(description="recall with 100, of objects of 32^2 to 96^2 pixels")
    ARl: float | None = Field(description="recall with 100, of objects above 96^2 pixels")
    AP_per_class: dict[str, float | None] = Field(description="AP by the class's name")

    @property
    def by_name(self) -> dict[str, float | None]:
        """The numbers of all classes together, AP first."""
        return self.model_dump(exclude={"AP_per_class"})


NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The order in which pycocotools gives them."""


def evaluate(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> CocoMetrics:
    """Compare detections with a ground truth, both as COCO's files have them and
    neither changed. Exactly pycocotools' numbers.

    ``ground_truth`` has ``images``, ``annotations`` and ``categories``; ``results`` are
    rows of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.
    All images count: on those without objects every detection is wrong. Objects with
    ``iscrowd`` count neither for nor against a detection. No detections at all are
    worth 0. A detection with a number that is not finite is worth nothing: pycocotools
    would take it for a match.

    Raises DataError where the ground truth has no object to find.
    """
    annotations = ground_truth["annotations"]
    if all(annotation.get("iscrowd", 0) for annotation in annotations):
        raise DataError(
            f"{len(ground_truth['images'])} images have no object to find, so AP is not defined:"
            " evaluate on annotated ones."
        )
    detections = [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "score")}
        for row in results
        if math.isfinite(sum((*row["bbox"], row["score"])))
    ]
    assert {row["image_id"] for row in detections} <= {
        image["id"] for image in ground_truth["images"]
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation = COCOeval(
            _indexed(ground_truth, annotations), _indexed(ground_truth, detections), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    # IoUs, recalls, classes, areas (the first: all), detections per image (the last: 100)
    precision_TRKAM = evaluation.eval["precision"]
    per_class = {
        names[key]: _mean(precision_TRKAM[:, :, k, 0, -1])
        for k, key in enumerate(evaluation.params.catIds)
    }
    assert len(per_class) == len(names), "two categories have the same name"
    numbers = {
        name: None if value == -1 else float(value)
        for name, value in zip(NUMBERS, evaluation.stats, strict=True)
    }
    return CocoMetrics.model_validate({**numbers, "AP_per_class": per_class})


def _mean(precision: np.ndarray) -> float | None:
    found = precision[precision > -1]
    return float(found.mean()) if found.size else None


def _indexed(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> COCO:
    """Objects or detections as pycocotools holds them.

    It marks a match by the object's id, so that an id of 0 is none and ids met twice
    are one: they are numbered anew, from 1.
    """
    api = COCO()
    api.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [
            {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, **row, "id": number}
            for number, row in enumerate(rows, 1)
        ],
    }
    api.createIndex()
    return api
