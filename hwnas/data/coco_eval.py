"""Evaluation of detections: COCO's 12 numbers and the AP of each class, by pycocotools.

AP is the area under the precision-recall curve, sampled at 101 recalls. A detection is
correct if it matches an object of its class with at least a given IoU. AP is averaged
over the IoUs .50, .55, ..., .95 and over the classes
(https://cocodataset.org/#detection-eval).
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

from hwnas.data.coco_file import sort_key
from hwnas.errors import DataError


class CocoMetrics(BaseModel):
    """COCO's numbers under COCO's names, each in [0, 1]. A number is None if the ground
    truth has no object of that kind, where COCO writes -1.
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
        """The numbers over all classes, AP first."""
        return self.model_dump(exclude={"AP_per_class"})


NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the numbers, in pycocotools' order."""


def evaluate(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> CocoMetrics:
    """Compare detections with a ground truth, both in the format of COCO's files. The
    numbers are exactly pycocotools'; the arguments are not changed.

    ``ground_truth`` has ``images``, ``annotations`` and ``categories``; ``results`` are
    rows of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.
    All images count: in images without objects, every detection is wrong. Objects with
    ``iscrowd`` count neither for nor against a detection. Without any detection, AP is
    0. Ids may be integers of any size or strings; objects and detections with an id that
    no image or category has do not count. Detections with a number that is not finite are dropped, because pycocotools
    would count them as matches.

    Raises DataError if the ground truth has no object to find.
    """
    annotations = ground_truth["annotations"]
    if all(annotation.get("iscrowd", 0) for annotation in annotations):
        raise DataError(
            f"{len(ground_truth['images'])} images have no object to find, so AP is not defined:"
            " evaluate on annotated ones."
        )

    detections = []
    for row in results:
        # a sum is finite only if all its terms are
        if math.isfinite(sum((*row["bbox"], row["score"]))):
            detections.append(
                {key: row[key] for key in ("image_id", "category_id", "bbox", "score")}
            )
    image_ids = {image["id"] for image in ground_truth["images"]}
    assert {row["image_id"] for row in detections} <= image_ids

    images = _ranks(ground_truth["images"])
    categories = _ranks(ground_truth["categories"])
    # pycocotools prints its progress
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _indexed(annotations, images, categories),
            _indexed(detections, images, categories),
            "bbox",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    # IoUs, recalls, classes, areas (the first: all), detections per image (the last: 100)
    precision_TRKAM = evaluation.eval["precision"]
    per_class: dict[str, float | None] = {}
    for category_id, k in categories.items():
        per_class[names[category_id]] = _mean(precision_TRKAM[:, :, k, 0, -1])
    assert len(per_class) == len(names), "two categories have the same name"

    numbers: dict[str, float | None] = {}
    for name, value in zip(NUMBERS, evaluation.stats, strict=True):
        numbers[name] = None if value == -1 else float(value)
    return CocoMetrics.model_validate({**numbers, "AP_per_class": per_class})


def _mean(precision: np.ndarray) -> float | None:
    """The mean of the defined precisions; None if there are none (pycocotools writes -1)."""
    defined = precision[precision > -1]
    if not defined.size:
        return None
    return float(defined.mean())


def _ranks(entries: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Id -> position in the sorted list of ids, numbers before strings.

    pycocotools puts ids into arrays, in which large integers would be rounded. Ranks have
    the order that its results depend on: that of the images decides between detections
    with equal scores.
    """
    ids = sorted({entry["id"] for entry in entries}, key=sort_key)
    return {key: rank for rank, key in enumerate(ids)}


def _indexed(
    rows: Sequence[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> COCO:
    """Objects or detections in pycocotools' form, with ranks as ids.

    pycocotools marks a match by the object's id, so it takes the id 0 for no match and
    mixes up equal ids. Rows are therefore numbered again, from 1.
    """
    annotations = []
    for number, row in enumerate(rows, 1):
        image, category = images.get(row["image_id"]), categories.get(row["category_id"])
        if image is None or category is None:
            continue
        defaults = {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        ranks = {"id": number, "image_id": image, "category_id": category}
        annotations.append({**defaults, **row, **ranks})
    api = COCO()
    api.dataset = {
        "images": [{"id": rank} for rank in images.values()],
        "categories": [{"id": rank} for rank in categories.values()],
        "annotations": annotations,
    }
    api.createIndex()
    return api
