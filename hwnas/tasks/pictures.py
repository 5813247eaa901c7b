"""Pictures of a detector's results: some test images with the ground-truth boxes and
the detected ones, as a document.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Base64Bytes, BaseModel, ConfigDict

from hwnas.data.decoding import decode
from hwnas.document import Document

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.data.coco import CocoImages
    from hwnas.nn.post_processor import Detections

COUNT = 8
"""Number of images."""
SIDE = 320
"""The longer side of a picture in pixels, at most."""
MIN_SCORE = 0.3
"""Detections with a lower score are not drawn: an evaluation for AP keeps hundreds of
them, which would hide the image.
"""
MOST = 10
"""Detections drawn per image, at most."""


class Box(BaseModel):
    """A labelled box: x1, y1, x2, y2 as fractions of the image, and the score if it is
    a detection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corners: tuple[float, float, float, float]
    label: str
    score: float | None = None


class Picture(BaseModel):
    """An image as a JPEG file, its objects, and the detections, best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jpeg: Base64Bytes
    truth: tuple[Box, ...]
    found: tuple[Box, ...]


class Pictures(Document):
    """Some images of a split, drawn at random but always the same."""

    SCHEMA: ClassVar[str] = "hwnas.pictures"

    pictures: tuple[Picture, ...]


def pictures_of(images: CocoImages, detected: Mapping[int, Detections]) -> Pictures:
    """The first images of ``detected``, which is in ``evaluation_order``. Crowds are not
    drawn.
    """
    first = list(detected)[:COUNT]
    return Pictures(pictures=tuple(_picture(images, index, detected[index]) for index in first))


def _picture(images: CocoImages, index: int, detected: Detections) -> Picture:
    annotations = images.annotations
    image = int(images.chosen[index])
    objects = annotations.objects(image)
    single = ~annotations.crowds[objects]
    x_y_w_h = annotations.boxes[objects][single]
    sides = np.tile(images.sizes[index], 2)

    corners = np.concatenate([x_y_w_h[:, :2], x_y_w_h[:, :2] + x_y_w_h[:, 2:]], axis=1) / sides
    labels = annotations.classes[objects][single]
    truth = []
    for box, label in zip(corners, labels, strict=True):
        truth.append(_box(box, images.names[label]))

    boxes = images.in_photograph(index, detected.boxes_D4.numpy()) / sides
    best = [row for row in range(len(boxes)) if detected.scores_D[row] >= MIN_SCORE][:MOST]
    drawn = []
    for row in best:
        label = images.names[int(detected.classes_D[row])]
        drawn.append(_box(boxes[row], label, float(detected.scores_D[row])))
    return Picture(
        jpeg=base64.b64encode(_jpeg(images, index)), truth=tuple(truth), found=tuple(drawn)
    )


def _box(corners: np.ndarray, label: str, score: float | None = None) -> Box:
    x1, y1, x2, y2 = (round(float(value), 4) for value in corners)
    rounded = None if score is None else round(score, 4)
    return Box(corners=(x1, y1, x2, y2), label=label, score=rounded)


def _jpeg(images: CocoImages, index: int) -> bytes:
    buffer = io.BytesIO()
    # in colour, even if the network sees it in grey
    picture, _ = decode(images.root, images.paths[index], channels=3)
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
