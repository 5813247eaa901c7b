"""Pictures of what a detector finds: some test images with the boxes of the ground
truth and those found, as a document.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Base64Bytes, BaseModel, ConfigDict

from hwnas.data.coco import CocoImages
from hwnas.document import Document
from hwnas.nn.ssd import Detections

COUNT, SIDE = 8, 320
"""How many images, and their longer side in pixels at most."""
MIN_SCORE, MOST = 0.3, 10
"""Of the detections in an image, the ``MOST`` best from this score on: an evaluation
for AP keeps hundreds that nobody wants to see.
"""


class Box(BaseModel):
    """A labelled box: x1, y1, x2, y2 as fractions of the image, and the score of one
    that was found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corners: tuple[float, float, float, float]
    label: str
    score: float | None = None


class Picture(BaseModel):
    """An image as a JPEG file, what is in it, and what was found, best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jpeg: Base64Bytes
    truth: tuple[Box, ...]
    found: tuple[Box, ...]


class Pictures(Document):
    """Some images of a split, chosen at random once and for all."""

    SCHEMA: ClassVar[str] = "hwnas.pictures"

    pictures: tuple[Picture, ...]


def pictures_of(images: CocoImages, found: Mapping[int, Detections]) -> Pictures:
    """The first images of ``found``, which are in ``evaluation_order``. Crowds are not drawn."""
    return Pictures(
        pictures=tuple(_picture(images, index, found[index]) for index in list(found)[:COUNT])
    )


def _picture(images: CocoImages, index: int, found: Detections) -> Picture:
    annotations, image = images.annotations, int(images.chosen[index])
    objects = annotations.objects(image)
    single = ~annotations.crowds[objects]
    x_y_w_h = annotations.boxes[objects][single]
    sides = np.tile(images.sizes[index], 2)
    truth = np.concatenate([x_y_w_h[:, :2], x_y_w_h[:, :2] + x_y_w_h[:, 2:]], axis=1) / sides
    boxes = images.in_photograph(index, found.boxes_D4.numpy()) / sides
    best = [row for row in range(len(found.scores_D)) if found.scores_D[row] >= MIN_SCORE][:MOST]
    return Picture(
        jpeg=base64.b64encode(_jpeg(images, image)),
        truth=tuple(
            _box(box, images.names[label])
            for box, label in zip(truth, annotations.classes[objects][single], strict=True)
        ),
        found=tuple(
            _box(boxes[row], images.names[int(found.classes_D[row])], float(found.scores_D[row]))
            for row in best
        ),
    )


def _box(corners: np.ndarray, label: str, score: float | None = None) -> Box:
    x1, y1, x2, y2 = (round(float(value), 4) for value in corners)
    return Box(
        corners=(x1, y1, x2, y2), label=label, score=None if score is None else round(score, 4)
    )


def _jpeg(images: CocoImages, image: int) -> bytes:
    buffer = io.BytesIO()
    with Image.open(images.folder / images.annotations.file_names[image]) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
