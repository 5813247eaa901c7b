"""From the outputs of an exported detector to boxes, the same for all runtimes. Needs
only NumPy, so an app can copy this file.

There are three kinds of files, depending on what their graph includes (``READERS``):

- ``decoded``: one row per anchor, with its box and a score per class. ``post_process``
  selects the detections.
- ``nms``: the selected detections, best first, padded with rows of score 0.
- ``tasks``: the four outputs of ``TFLite_Detection_PostProcess``, flattened and
  concatenated.

All readers return boxes float32 [D, 4] as x1, y1, x2, y2 in pixels of the network's
input, scores float32 [D], best first, and classes int64 [D], the positions of labels.
``post_process`` does the same as torchvision's ``SSD.postprocess_detections``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
DetectionArrays = tuple[Floats, Floats, npt.NDArray[np.int64]]
"""Boxes [D, 4], scores [D], classes [D]."""
Reader = Callable[[Floats, "dict[str, Any]", "Resolution", int], DetectionArrays]
"""(outputs of one image, the bundle's post-processing, resolution of the input, number
of classes) -> detections.
"""

Resolution = Union[int, "tuple[int, int]"]
"""As in the bundle: the height = width of the input in pixels, or height and width."""

BOX = 4
"""Values per box."""
NMS_COLUMNS = 6
"""x1, y1, x2, y2, score, class."""


def post_process(
    detections: Floats,
    *,
    min_score: float,
    nms_iou: float,
    candidates: int,
    detections_per_image: int,
) -> DetectionArrays:
    """Select the detections of one image. ``detections`` is the output of a ``decoded``
    file: [1, anchors, 4 + classes] or [anchors, 4 + classes].

    For each class, the ``candidates`` best boxes above ``min_score`` are considered. Of
    boxes that overlap by more than ``nms_iou``, only the best remains. The best
    ``detections_per_image`` of all classes are returned.

    Example:
        >>> two = [[0, 0, 10, 10, 0.9], [0, 0, 10, 9, 0.8]]  # they overlap
        >>> rows = np.array([*two, [20, 20, 30, 30, 0.7]], np.float32)
        >>> _, scores, _ = post_process(
        ...     rows, min_score=0.1, nms_iou=0.5, candidates=10, detections_per_image=10
        ... )
        >>> [f"{score:.1f}" for score in scores]
        ['0.9', '0.7']
    """
    rows = detections.reshape(-1, detections.shape[-1])
    boxes = rows[:, :BOX]
    scores = rows[:, BOX:]
    kept: list[npt.NDArray[np.int64]] = []
    classes: list[npt.NDArray[np.int64]] = []
    for label in np.flatnonzero((scores > min_score).any(axis=0)):
        column = scores[:, label]
        chosen = _best(column, np.flatnonzero(column > min_score), candidates)
        kept.append(chosen[apart(boxes[chosen], nms_iou, detections_per_image)])
        classes.append(np.full(len(kept[-1]), label, np.int64))
    if not kept:
        return np.zeros((0, BOX), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    anchors = np.concatenate(kept)
    labels = np.concatenate(classes)
    # stable, so that ties have the same order on every runtime
    best = np.argsort(-scores[anchors, labels], kind="stable")[:detections_per_image]
    return boxes[anchors[best]], scores[anchors[best], labels[best]], labels[best]


def _best(scores: Floats, chosen: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The ``count`` of the ``chosen`` positions with the highest scores, best first.
    Among equal scores, the first positions are taken.
    """
    values = scores[chosen]
    # Partitioning first leaves less to sort.
    if len(chosen) > count:
        last = np.partition(values, len(values) - count)[len(values) - count]
        is_candidate = values >= last
        chosen = chosen[is_candidate]
        values = values[is_candidate]
    return chosen[np.argsort(-values, kind="stable")[:count]]


def apart(boxes: Floats, nms_iou: float, limit: int | None = None) -> npt.NDArray[np.int64]:
    """NMS of boxes that are sorted best first: each remaining box removes all later
    ones whose IoU with it is above ``nms_iou``. Returns the positions of the remaining
    boxes, at most ``limit``.
    """
    overlaps = iou(boxes) > nms_iou
    removed = np.zeros(len(boxes), bool)
    remaining: list[int] = []
    limit = len(boxes) if limit is None else limit
    position = 0
    while position < len(boxes) and len(remaining) < limit:
        remaining.append(position)
        removed |= overlaps[position]
        removed[: position + 1] = True
        # the distance to the first box that is not removed, or 0 if there is none
        following = removed[position:].argmin()
        if not following:
            break
        position += int(following)
    return np.array(remaining, np.int64)


def iou(boxes: Floats) -> Floats:
    """IoU of all pairs of boxes, [N, N]. For two boxes without area it is NaN, which no
    threshold counts as an overlap.
    """
    # contiguous coordinates make this three times as fast
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    areas = (x2 - x1) * (y2 - y1)
    widths = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
    heights = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
    shared = np.maximum(widths, 0, out=widths)
    shared *= np.maximum(heights, 0, out=heights)
    united = areas[:, None] + areas
    united -= shared
    with np.errstate(invalid="ignore", divide="ignore"):
        ious: Floats = shared / united
    return ious


def read_decoded(
    row: Floats, post_processing: dict[str, Any], resolution: Resolution, classes: int
) -> DetectionArrays:
    """Read the output of a ``decoded`` file for one image, [anchors * (4 + classes)] in
    any shape. ``post_processing`` is the bundle's.
    """
    del resolution
    return post_process(
        row.reshape(-1, BOX + classes),
        min_score=post_processing["min_score"],
        nms_iou=post_processing["nms_iou"],
        candidates=post_processing["candidates"],
        detections_per_image=post_processing["detections"],
    )


def read_nms(
    row: Floats, post_processing: dict[str, Any], resolution: Resolution, classes: int
) -> DetectionArrays:
    """Read the output of an ``nms`` file for one image, [D * 6] in any shape: x1, y1,
    x2, y2, score, class.
    """
    del post_processing, resolution
    rows = row.reshape(-1, NMS_COLUMNS)
    return _valid(rows[:, :BOX], rows[:, BOX], rows[:, BOX + 1], classes)


def read_tasks(
    row: Floats, post_processing: dict[str, Any], resolution: Resolution, classes: int
) -> DetectionArrays:
    """Read the outputs of a ``tasks`` file for one image, flattened and concatenated:
    boxes [D * 4] (ymin, xmin, ymax, xmax as fractions of the input's height and width), classes [D],
    scores [D] and the number of detections. Boxes are clipped to the image, which the
    op does not do.
    """
    del post_processing
    flat = row.reshape(-1)
    size = (len(flat) - 1) // (BOX + 2)
    count = int(np.nan_to_num(flat[-1]))
    # ymin, xmin, ymax, xmax -> x1, y1, x2, y2
    boxes = flat[: BOX * size].reshape(size, BOX)[:count, [1, 0, 3, 2]]
    labels, scores = flat[BOX * size : -1].reshape(2, size)[:, :count]
    edges_4 = edges(resolution)
    return _valid(np.clip(boxes * edges_4, 0, edges_4), scores, labels, classes)


def edges(resolution: Resolution) -> Floats:
    """The upper limits of x1, y1, x2 and y2 in an input of this resolution."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return np.array([width, height, width, height], np.float32)


def _valid(boxes: Floats, scores: Floats, labels: Floats, classes: int) -> DetectionArrays:
    """Drop the rows that are padding, and those whose class does not exist."""
    real = (scores > 0) & (labels >= 0) & (labels < classes)
    return boxes[real], scores[real], labels[real].astype(np.int64)


READERS: dict[str, Reader] = {"decoded": read_decoded, "nms": read_nms, "tasks": read_tasks}
"""Kind of a file, by what its graph includes -> the reader of its outputs."""
