"""COCO annotation files: read, checked and kept as flat arrays.

The format is that of https://cocodataset.org/#format-data; of it, this reads what boxes need::

    {"images":      [{"id": 9, "file_name": "9.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 9, "category_id": 51, "bbox": [x, y, width, height],
     "area": 67532.1, "iscrowd": 0}], "categories":  [{"id": 51, "name": "bowl"}]}

``area`` (default: that of the box) and ``iscrowd`` (default: 0) may be left out, as may
the annotations' ids: the ground truth made here has ids of its own, from 1, because
pycocotools takes an object whose id is 0 for one that was never found.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
)

from hwnas.document import explain
from hwnas.errors import DataError

ROUNDING_PX = 1.0
"""Boxes that leave their image by no more were rounded; they stay in the ground truth
as they are, so that its AP is the official one.
"""


class _FileRecord(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Image(_FileRecord):
    id: int
    file_name: str
    width: PositiveInt
    height: PositiveInt


class _Annotation(_FileRecord):
    image_id: int
    category_id: int
    bbox: tuple[float, float, NonNegativeFloat, NonNegativeFloat]
    area: NonNegativeFloat | None = None
    iscrowd: Annotated[bool, Field(strict=False)] = False


class _Category(_FileRecord):
    id: int
    name: str


class _File(_FileRecord):
    images: Annotated[list[_Image], FailFast()]
    annotations: Annotated[list[_Annotation], FailFast()]
    categories: Annotated[list[_Category], FailFast()]


@dataclass(frozen=True)
class Annotations:
    """The content of one annotation file. Images are in the order of their ids, and the
    objects in that of their images.

    Classes are indices from 0, in the order of the category ids, which may have gaps.
    """

    path: Path
    ids: np.ndarray
    """Image ids, int64 [N]."""
    sizes: np.ndarray
    """Width and height of the images in pixels, int64 [N, 2]."""
    file_names: tuple[str, ...]
    categories: dict[int, str]
    """Names by category id, in the order of the ids."""
    starts: np.ndarray
    """Where each image's objects start, and the last one's end, int64 [N + 1]."""
    boxes: np.ndarray
    """x, y, width and height in pixels of the image, float64 [objects, 4]."""
    classes: np.ndarray
    """int64 [objects]."""
    areas: np.ndarray
    """In pixels, float64 [objects]; of the object's outline where the file says so, and
    what COCO calls small, medium and large.
    """
    crowds: np.ndarray
    """True for a box around many objects that were not told apart, bool [objects]."""

    def objects(self, image: int) -> slice:
        """Where the objects of an image are in the arrays of objects."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def ground_truth(self, images: Sequence[int]) -> dict[str, Any]:
        """Some images and all categories as an annotation file has them, crowds
        included: what an evaluation compares with.
        """
        category_ids = tuple(self.categories)
        rows = [
            (image, row)
            for image in images
            for row in range(*self.objects(image).indices(len(self.boxes)))
        ]
        return {
            "images": [
                {
                    "id": int(self.ids[image]),
                    "file_name": self.file_names[image],
                    "width": int(self.sizes[image, 0]),
                    "height": int(self.sizes[image, 1]),
                }
                for image in images
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(self.ids[image]),
                    "category_id": category_ids[self.classes[row]],
                    "bbox": self.boxes[row].tolist(),
                    "area": float(self.areas[row]),
                    "iscrowd": int(self.crowds[row]),
                }
                for number, (image, row) in enumerate(rows, 1)
            ],
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
        }


def read_annotations(path: Path) -> Annotations:
    """Read and check an annotation file; the same file is read once: COCO's own takes
    seconds, and every split of it asks.

    A box that leaves its image is clipped, one that has no area inside it is left out;
    both are counted in one warning. Raises DataError where the file is missing, no
    JSON, not in COCO's format (negative sizes and NaN included), without images,
    categories or objects, has an id twice, or an annotation of an image or a category
    that it does not have.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from error
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, changed_ns: int, size_bytes: int) -> Annotations:
    del changed_ns, size_bytes  # they tell a file from the one that was read before
    content = _parsed(path)
    for noun, entries in (
        ("images", content.images),
        ("annotations", content.annotations),
        ("categories", content.categories),
    ):
        if not entries:
            raise DataError(
                f"{path} has no {noun}: export it again with images, annotations and categories."
            )
    images = sorted(content.images, key=lambda image: image.id)
    categories = {
        category.id: category.name
        for category in sorted(content.categories, key=lambda category: category.id)
    }
    ids = [image.id for image in images]
    _refuse_twins(path, "image ids", ids)
    _refuse_twins(path, "category ids", [category.id for category in content.categories])
    _refuse_twins(path, "category names", list(categories.values()))
    image_ids = np.array([annotation.image_id for annotation in content.annotations])
    category_ids = np.array([annotation.category_id for annotation in content.annotations])
    positions = _positions(path, "image", image_ids, np.array(ids))
    classes = _positions(path, "category", category_ids, np.array(list(categories)))
    sizes = np.array([(image.width, image.height) for image in images])

    boxes = np.array([annotation.bbox for annotation in content.annotations], dtype=np.float64)
    boxes, left = _inside(path, boxes, sizes[positions])
    areas = np.array(
        [
            np.nan if annotation.area is None else annotation.area
            for annotation in content.annotations
        ]
    )
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    crowds = np.array([annotation.iscrowd for annotation in content.annotations])
    if not (left & ~crowds).any():
        raise DataError(
            f"{path} has no single object with a box inside its image: check its boxes, which are"
            " x, y, width and height."
        )
    order = np.flatnonzero(left)[np.argsort(positions[left], kind="stable")]
    return Annotations(
        path=path,
        ids=np.array(ids),
        sizes=sizes,
        file_names=tuple(image.file_name for image in images),
        categories=categories,
        starts=np.searchsorted(positions[order], np.arange(len(ids) + 1)),
        boxes=boxes[order],
        classes=classes[order],
        areas=areas[order],
        crowds=crowds[order],
    )


def _parsed(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise DataError(
                f"{path} is not JSON ({first['msg']}): it is corrupt or was cut off; unpack or"
                " export it again."
            ) from error
        raise DataError(
            f"{path} is not in COCO's format ({explain(error, _File).rstrip('.')}): correct it or"
            " export it again."
        ) from error


def _refuse_twins(path: Path, noun: str, values: Sequence[int | str]) -> None:
    if len(set(values)) < len(values):
        (twin, _), *_ = Counter(values).most_common(1)
        raise DataError(
            f"{path} has {noun} that are not unique ({twin!r} is there twice): give each its own."
        )


def _positions(path: Path, noun: str, found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where each of the ``found`` ids is among the ``known`` ones, which are sorted."""
    positions = np.searchsorted(known, found).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[positions] != found)
    if len(unknown):
        raise DataError(
            f"{path} has an annotation (number {unknown[0]} in its list) with {noun}_id"
            f" {found[unknown[0]]}, but no such {noun}: add the {noun} or remove the annotation."
        )
    return positions


def _inside(path: Path, boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes clipped to their images, and which of them have an area left there.
    Warns where there is anything to say.
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    clipped = corners.clip(0, np.tile(sizes, 2))
    extents = clipped[:, 2:] - clipped[:, :2]
    left = (extents[:, 0] > 0) & (extents[:, 1] > 0)
    outside = np.abs(clipped - corners).max(axis=1) > ROUNDING_PX
    if not left.all() or outside.any():
        warnings.warn(
            f"{path}: of {len(boxes)} boxes, {(outside & left).sum()} left their image and were"
            f" clipped, {(~left).sum()} had no area inside it and were left out.",
            stacklevel=4,
        )
    return (
        np.where(outside[:, None], np.concatenate([clipped[:, :2], extents], axis=1), boxes),
        left,
    )
