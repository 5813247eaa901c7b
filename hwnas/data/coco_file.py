"""COCO annotation files, which are read, checked and kept as flat arrays.

The format is that of https://cocodataset.org/#format-data. Only the fields that boxes
need are read::

    {"images":      [{"id": 9, "file_name": "9.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 9, "category_id": 51, "bbox": [x, y, width, height],
     "area": 67532.1, "iscrowd": 0}], "categories":  [{"id": 51, "name": "bowl"}]}

``area`` (default: that of the box) and ``iscrowd`` (default: 0) are optional. The ids
of annotations are ignored: ``ground_truth`` numbers them again from 1, because
pycocotools takes an object with the id 0 for one that was never found.
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
"""Boxes that leave their image by at most this much were rounded. They stay unchanged
in the ground truth, so that its AP is the official one.
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
    """The content of one annotation file. Images are sorted by id, objects by image.

    Classes are indices from 0 in the order of the category ids, which may have gaps.
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
    """Positions where the objects of each image start, and where the last image's end,
    int64 [N + 1].
    """
    boxes: np.ndarray
    """x, y, width and height in pixels of the image, float64 [objects, 4]."""
    classes: np.ndarray
    """int64 [objects]."""
    areas: np.ndarray
    """In pixels, float64 [objects]. The area of the object's outline if the file has
    it, by which COCO classes objects as small, medium and large.
    """
    crowds: np.ndarray
    """True for a box around many objects that are not annotated one by one, bool
    [objects].
    """

    def objects(self, image: int) -> slice:
        """The positions of an image's objects in the arrays of objects."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def ground_truth(self, images: Sequence[int]) -> dict[str, Any]:
        """Some images, their objects (including crowds) and all categories in the format
        of an annotation file, for an evaluation to compare with.
        """
        category_ids = tuple(self.categories)
        image_entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in images:
            image_entries.append(
                {
                    "id": int(self.ids[image]),
                    "file_name": self.file_names[image],
                    "width": int(self.sizes[image, 0]),
                    "height": int(self.sizes[image, 1]),
                }
            )
            for row in range(self.starts[image], self.starts[image + 1]):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": int(self.ids[image]),
                        "category_id": category_ids[self.classes[row]],
                        "bbox": self.boxes[row].tolist(),
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowds[row]),
                    }
                )
        categories = [{"id": key, "name": name} for key, name in self.categories.items()]
        return {"images": image_entries, "annotations": annotations, "categories": categories}


def read_annotations(path: Path) -> Annotations:
    """Read and check an annotation file.

    An unchanged file is not read again: COCO's own takes seconds, and every split needs
    it. Boxes that leave their image are clipped, and boxes without area inside it are
    left out; one warning counts both.

    Raises DataError if the file is missing, is not JSON, is not in COCO's format (also
    for negative sizes and NaN), has no images, categories or objects, has an id twice,
    or has an annotation of an unknown image or category.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from error
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, changed_ns: int, size_bytes: int) -> Annotations:
    # only part of the cache's key: a file that has changed is read again
    del changed_ns, size_bytes
    content = _parsed(path)
    for noun in ("images", "annotations", "categories"):
        if not getattr(content, noun):
            raise DataError(
                f"{path} has no {noun}: export it again with images, annotations and categories."
            )

    images = sorted(content.images, key=lambda image: image.id)
    ids = [image.id for image in images]
    sorted_categories = sorted(content.categories, key=lambda category: category.id)
    categories = {category.id: category.name for category in sorted_categories}
    _check_unique(path, "image ids", ids)
    _check_unique(path, "category ids", [category.id for category in content.categories])
    _check_unique(path, "category names", list(categories.values()))

    image_ids = np.array([annotation.image_id for annotation in content.annotations])
    category_ids = np.array([annotation.category_id for annotation in content.annotations])
    positions = _positions(path, "image", image_ids, np.array(ids))
    classes = _positions(path, "category", category_ids, np.array(list(categories)))
    sizes = np.array([(image.width, image.height) for image in images])

    boxes = np.array([annotation.bbox for annotation in content.annotations], dtype=np.float64)
    boxes, has_area = _clipped(path, boxes, sizes[positions])
    # as floats, the missing areas (None) become NaN
    areas = np.array([annotation.area for annotation in content.annotations], dtype=np.float64)
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    crowds = np.array([annotation.iscrowd for annotation in content.annotations])
    if not (has_area & ~crowds).any():
        raise DataError(
            f"{path} has no single object with a box inside its image: check its boxes, which are"
            " x, y, width and height."
        )

    # by image, and within an image in the file's order
    order = np.flatnonzero(has_area)[np.argsort(positions[has_area], kind="stable")]
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


def _check_unique(path: Path, noun: str, values: Sequence[int | str]) -> None:
    """Raise DataError if a value occurs more than once."""
    if len(set(values)) < len(values):
        [(duplicate, _)] = Counter(values).most_common(1)
        raise DataError(
            f"{path} has {noun} that are not unique ({duplicate!r} occurs more than once): give"
            " each its own."
        )


def _positions(path: Path, noun: str, ids: np.ndarray, known_ids: np.ndarray) -> np.ndarray:
    """The position of each of ``ids`` in ``known_ids``, which are sorted.

    Raises DataError if one of them is not known.
    """
    positions = np.searchsorted(known_ids, ids).clip(max=len(known_ids) - 1)
    unknown = np.flatnonzero(known_ids[positions] != ids)
    if len(unknown):
        raise DataError(
            f"{path} has an annotation (number {unknown[0]} in its list) with {noun}_id"
            f" {ids[unknown[0]]}, but no such {noun}: add the {noun} or remove the annotation."
        )
    return positions


def _clipped(path: Path, boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes clipped to their images, and which of them have an area there. Warns if
    any box is clipped or has no area.
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    clipped = corners.clip(0, np.tile(sizes, 2))
    extents = clipped[:, 2:] - clipped[:, :2]
    has_area = (extents[:, 0] > 0) & (extents[:, 1] > 0)
    outside = np.abs(clipped - corners).max(axis=1) > ROUNDING_PX
    if not has_area.all() or outside.any():
        warnings.warn(
            f"{path}: of {len(boxes)} boxes, {(outside & has_area).sum()} left their image and"
            f" were clipped, {(~has_area).sum()} had no area inside it and were left out.",
            stacklevel=4,
        )
    clipped_boxes = np.concatenate([clipped[:, :2], extents], axis=1)
    return np.where(outside[:, None], clipped_boxes, boxes), has_area
