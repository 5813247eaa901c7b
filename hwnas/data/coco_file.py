"""COCO annotation files, which are read, checked and kept as flat arrays.

The format is that of https://cocodataset.org/#format-data. Only the fields that boxes
need are read::

    {"images":      [{"id": 9, "file_name": "9.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 9, "category_id": 51, "bbox": [x, y, width, height],
     "area": 67532.1, "iscrowd": 0}], "categories":  [{"id": 51, "name": "bowl"}]}

``area`` (default: that of the box) and ``iscrowd`` (default: 0) are optional, and null
means the same as leaving them out. The ids of images and categories are integers of any
size or strings; 9 and "9" are different ids. The ids of annotations are ignored:
``ground_truth`` numbers them again from 1, because pycocotools takes an object with the
id 0 for one that was never found.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from hwnas.data.coco_text import parsed
from hwnas.document import explain
from hwnas.errors import DataError
from hwnas.printable import quoted

ROUNDING_PX = 1.0
"""Boxes that leave their image by at most this much were rounded. They stay unchanged
in the ground truth, so that its AP is the official one.
"""

Id: TypeAlias = int | str

LARGEST_FLOAT_ID = 2**53
"""Above this, two integers can be the same float."""

_Side = Annotated[float, Field(gt=0, lt=2**31, multiple_of=1)]


class _FileRecord(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Image(_FileRecord):
    id: Any
    file_name: str
    width: _Side
    height: _Side

    def row(self) -> tuple[Any, ...]:
        return self.id, self.file_name, int(self.width), int(self.height)


class _Annotation(_FileRecord):
    image_id: Any
    category_id: Any
    # a list, which pydantic takes for a tuple only if it is not strict
    bbox: Annotated[tuple[float, float, NonNegativeFloat, NonNegativeFloat], Field(strict=False)]
    area: NonNegativeFloat | None = None
    iscrowd: Annotated[bool, Field(strict=False)] | None = None

    def row(self) -> tuple[Any, ...]:
        return self.image_id, self.category_id, self.bbox, self.area, bool(self.iscrowd)


class _Category(_FileRecord):
    id: Any
    name: str

    def row(self) -> tuple[Any, ...]:
        return self.id, self.name


# without the wrappers of pydantic's methods, because there may be a million entries
_VALIDATORS = {
    "images": _Image.__pydantic_validator__.validate_python,
    "annotations": _Annotation.__pydantic_validator__.validate_python,
    "categories": _Category.__pydantic_validator__.validate_python,
}


class _Entry(_FileRecord):
    """One entry of a list, under its position, which messages name."""

    images: dict[int, _Image] = {}
    annotations: dict[int, _Annotation] = {}
    categories: dict[int, _Category] = {}


@dataclass(frozen=True)
class _Objects:
    """Entries of the list of annotations by column, as they are in the file."""

    image_ids: list[Any]
    category_ids: list[Any]
    boxes: np.ndarray
    """float64 [objects, 4]."""
    areas: np.ndarray
    """float64 [objects], NaN if there is none."""
    crowds: np.ndarray
    """bool [objects]."""

    @classmethod
    def of_columns(cls, columns: Sequence[Sequence[Any]]) -> _Objects:
        """From the columns of ``_Annotation.row``. None in the last two is no value."""
        image_ids, category_ids, bboxes, areas, crowds = columns
        boxes = np.array(list(chain.from_iterable(bboxes)), dtype=np.float64).reshape(-1, 4)
        # as floats, the missing areas (None) become NaN, and as bools, None becomes False
        return cls(
            list(image_ids),
            list(category_ids),
            boxes,
            np.array(areas, dtype=np.float64),
            np.array(crowds, dtype=bool),
        )

    @classmethod
    def joined(cls, parts: Sequence[_Objects]) -> _Objects:
        """Several in one."""
        return cls(
            list(chain.from_iterable(part.image_ids for part in parts)),
            list(chain.from_iterable(part.category_ids for part in parts)),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.areas for part in parts]),
            np.concatenate([part.crowds for part in parts]),
        )


@dataclass(frozen=True)
class Annotations:
    """The content of one annotation file. Images are sorted by id, numbers before
    strings, and objects by image.

    Classes are indices from 0 in the order of the category ids, which may have gaps.
    """

    path: Path
    ids: np.ndarray
    """Image ids, object [N]: integers of any size or strings, as in the file."""
    sizes: np.ndarray
    """Width and height of the images in pixels, int64 [N, 2]."""
    file_names: tuple[str, ...]
    """As in the file. ``coco_paths`` finds the files."""
    categories: dict[Id, str]
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

    def objects_of(self, images: np.ndarray) -> np.ndarray:
        """The positions of the objects of several images, image by image: int64 [objects]."""
        starts = self.starts[images]
        counts = self.starts[images + 1] - starts
        # how far each position is from that of its image's first object
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions: np.ndarray = np.repeat(starts, counts) + steps
        return positions

    def ground_truth(self, images: np.ndarray) -> dict[str, Any]:
        """Some images, their objects (including crowds) and all categories in the format
        of an annotation file, for an evaluation to compare with.
        """
        ids, sizes = self.ids[images].tolist(), self.sizes[images].tolist()
        image_entries: list[dict[str, Any]] = []
        for image, image_id, (width, height) in zip(images.tolist(), ids, sizes, strict=True):
            image_entries.append(
                {
                    "id": image_id,
                    "file_name": self.file_names[image],
                    "width": width,
                    "height": height,
                }
            )

        rows = self.objects_of(images)
        counts = self.starts[images + 1] - self.starts[images]
        category_ids = tuple(self.categories)
        columns = (
            np.repeat(self.ids[images], counts),
            self.classes[rows],
            self.boxes[rows],
            self.areas[rows],
            self.crowds[rows].astype(int),
        )
        annotations: list[dict[str, Any]] = []
        for image_id, label, box, area, crowd in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowd,
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
    or has an annotation without a box or of an unknown image or category.
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
    content, pieces = parsed(path, "annotations", _objects_of)
    ids, file_names, widths, heights = _columns(path, "images", _listed(path, content, "images"))
    objects = _all_objects(path, pieces, _listed(path, content, "annotations", pieces))
    known_ids, names = _columns(path, "categories", _listed(path, content, "categories"))
    del content, pieces

    ids = _ids(path, "images", "id", ids)
    _check_unique(path, "image ids", ids)
    order = sorted(range(len(ids)), key=lambda position: sort_key(ids[position]))
    ids = [ids[position] for position in order]
    sizes = np.array([widths, heights], dtype=np.int64).T[order]
    known_ids = _ids(path, "categories", "id", known_ids)
    _check_unique(path, "category ids", known_ids)
    _check_unique(path, "category names", names)
    by_id = dict(zip(known_ids, names, strict=True))
    categories = {key: by_id[key] for key in sorted(by_id, key=sort_key)}

    image_ids = _ids(path, "annotations", "image_id", objects.image_ids)
    category_ids = _ids(path, "annotations", "category_id", objects.category_ids)
    positions = _positions(path, "image", image_ids, ids)
    classes = _positions(path, "category", category_ids, list(categories))

    boxes, has_area = _clipped(path, objects.boxes, sizes[positions])
    areas = np.where(np.isnan(objects.areas), boxes[:, 2] * boxes[:, 3], objects.areas)
    if not (has_area & ~objects.crowds).any():
        raise DataError(
            f"{path} has no single object with a box inside its image: check its boxes, which are"
            " x, y, width and height."
        )

    # by image, and within an image in the file's order
    kept = np.flatnonzero(has_area)[np.argsort(positions[has_area], kind="stable")]
    id_array = np.empty(len(ids), dtype=object)
    id_array[:] = ids
    return Annotations(
        path=path,
        ids=id_array,
        sizes=sizes,
        file_names=tuple(file_names[position] for position in order),
        categories=categories,
        starts=np.searchsorted(positions[kept], np.arange(len(ids) + 1)),
        boxes=boxes[kept],
        classes=classes[kept],
        areas=areas[kept],
        crowds=objects.crowds[kept],
    )


def _objects_of(entries: list[Any]) -> _Objects | list[Any]:
    """Entries of the list of annotations by column, or as they are if one is wrong: a
    message about it needs its position in the whole list.
    """
    objects = _plain_objects(entries)
    if objects is not None:
        return objects
    validate = _VALIDATORS["annotations"]
    try:
        rows = [validate(entry).row() for entry in entries]
    except ValidationError:
        return entries
    return _Objects.of_columns([list(column) for column in zip(*rows, strict=True)])


def _plain_objects(entries: list[Any]) -> _Objects | None:
    """Annotations that are all right as they are, by column; None if one may not be. For
    a whole column at once, that takes a third of the time that pydantic takes.
    """
    try:
        columns = [
            [entry["image_id"] for entry in entries],
            [entry["category_id"] for entry in entries],
            [entry["bbox"] for entry in entries],
            [entry.get("area") for entry in entries],
            [entry.get("iscrowd") for entry in entries],
        ]
        _, _, bboxes, areas, crowds = columns
        is_plain = (
            {*map(type, bboxes)} == {list}
            and {*map(len, bboxes)} == {4}
            and {*map(type, chain.from_iterable(bboxes))} <= {int, float}
            and {*map(type, areas)} <= {int, float, NoneType}
            and {*map(type, crowds)} <= {int, bool, NoneType}
            and {*crowds} <= {0, 1, None}
        )
        if not is_plain:
            return None
        objects = _Objects.of_columns(columns)
    # lists in place of objects, keys that are missing, integers too large for a float
    except (AttributeError, KeyError, OverflowError, TypeError):
        return None
    is_finite = np.isfinite(objects.boxes).all() and not np.isinf(objects.areas).any()
    is_negative = (objects.boxes[:, 2:] < 0).any() or (objects.areas < 0).any()
    # NaN stands for None, so there may not be others
    is_given = np.isnan(objects.areas).sum() == areas.count(None)
    return objects if is_finite and is_given and not is_negative else None


def _all_objects(path: Path, pieces: list[_Objects | list[Any]], rest: list[Any]) -> _Objects:
    """All entries of the list of annotations. Raises DataError if one is wrong."""
    parts: list[_Objects] = []
    position = 0
    for piece in [*pieces, _objects_of(rest)]:
        if isinstance(piece, list):
            piece = _Objects.of_columns(_columns(path, "annotations", piece, position))
        parts.append(piece)
        position += len(piece.image_ids)
    return _Objects.joined(parts)


def _listed(path: Path, content: Any, noun: str, pieces: Sequence[Any] = ()) -> list[Any]:
    """One of the file's lists, without the ``pieces`` that were taken out of it. Raises
    DataError if it is missing, empty or no list.
    """
    if not isinstance(content, dict):
        raise _malformed(path, f"it holds a JSON {type(content).__name__}, not an object")
    if noun not in content:
        raise _malformed(path, f"key {noun!r} is missing; add it")
    entries = content[noun]
    if not isinstance(entries, list):
        raise _malformed(path, f"{noun} = {quoted(entries)}: input should be a valid list")
    if not entries and not pieces:
        raise DataError(
            f"{path} has no {noun}: export it again with images, annotations and categories."
        )
    return entries


def _columns(path: Path, noun: str, entries: list[Any], start: int = 0) -> list[list[Any]]:
    """The columns of one of the file's lists, or of its part from position ``start`` on.
    Raises DataError if an entry is wrong.
    """
    rows = []
    for position, entry in enumerate(entries, start):
        try:
            rows.append(_VALIDATORS[noun](entry).row())
        except ValidationError as error:
            raise _wrong(path, noun, position, entry) from error
    return [list(column) for column in zip(*rows, strict=True)]


def _wrong(path: Path, noun: str, position: int, entry: Any) -> DataError:
    """What is wrong with an entry of a list."""
    if noun == "annotations" and isinstance(entry, dict) and entry.get("bbox") in (None, []):
        name = f"number {position} in its list"
        if "id" in entry:
            name += f", id {quoted(entry['id'])}"
        return DataError(
            f"{path} has an annotation without a bbox ({name}): export boxes as well as outlines,"
            " or remove the annotation."
        )
    try:
        _Entry.model_validate({noun: {position: entry}})
    except ValidationError as error:
        return _malformed(path, explain(error, _Entry).rstrip("."))
    raise AssertionError("the entry is right in its list")


def _malformed(path: Path, problem: str) -> DataError:
    return DataError(f"{path} is not in COCO's format ({problem}): correct it or export it again.")


def _ids(path: Path, noun: str, key: str, values: list[Any]) -> list[Id]:
    """The ids in a column of one of the lists, as they are; floats as the integers that
    they stand for. Raises DataError if one is neither an integer nor a string.
    """
    if {*map(type, values)} <= {int, str}:
        return values
    ids: list[Id] = []
    for position, value in enumerate(values):
        is_whole = type(value) is float and value.is_integer()
        if is_whole and abs(value) <= LARGEST_FLOAT_ID:
            value = int(value)
        # True is an integer to Python
        if type(value) not in (int, str):
            raise _malformed(
                path,
                f"{noun}.{position}.{key} = {quoted(value)}: input should be an integer or a"
                " string",
            )
        ids.append(value)
    return ids


def sort_key(value: Id) -> tuple[bool, Id]:
    """For sorting numbers before strings, which cannot be compared with them."""
    return isinstance(value, str), value


def _check_unique(path: Path, noun: str, values: Sequence[Id]) -> None:
    """Raise DataError if a value occurs more than once."""
    if len(set(values)) < len(values):
        [(duplicate, _)] = Counter(values).most_common(1)
        raise DataError(
            f"{path} has {noun} that are not unique ({quoted(duplicate)} occurs more than once):"
            " give each its own."
        )


def _positions(path: Path, noun: str, ids: list[Id], known_ids: list[Id]) -> np.ndarray:
    """The position of each of ``ids`` in ``known_ids``. Raises DataError if one of them
    is not known.
    """
    position_of = {known: position for position, known in enumerate(known_ids)}
    positions = np.fromiter(map(position_of.get, ids, repeat(-1)), np.int64, len(ids))
    unknown = np.flatnonzero(positions < 0)
    if len(unknown):
        wrong = ids[unknown[0]]
        problem = f"no such {noun}: add the {noun} or remove the annotation"
        for known in known_ids:
            if str(known) == str(wrong):
                problem = (
                    f"the {noun} has the id {quoted(known)}: write both as numbers or both as"
                    " strings"
                )
        raise DataError(
            f"{path} has an annotation (number {unknown[0]} in its list) with {noun}_id"
            f" {quoted(wrong)}, but {problem}."
        )
    return positions


def _clipped(path: Path, boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes clipped to their images, and which of them have an area there. Warns if
    any box is clipped or has no area.
    """
    # the far corner of a box that leaves its image may be beyond the largest float
    with np.errstate(over="ignore"):
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
