"""The anchors of detectors: the boxes that box codes are offsets from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from hwnas.core.arch import Architecture
from hwnas.core.detection import detector_of
from hwnas.core.detector import Detector
from hwnas.core.fcos import FCOS
from hwnas.core.size import Size, sides
from hwnas.core.ssdlite import SSDLite


def anchors_of(arch: Architecture) -> Tensor:
    """The anchors of an architecture, float32 [anchors, 4]: x1, y1, x2, y2 in pixels of
    the network's input, in the order of the network's rows. They are not clipped at its
    edges.
    """
    detector = detector_of(arch)
    return ANCHORS[type(detector)](detector, arch.size)


def squares(detector: FCOS, resolution: Size, strides: float) -> Tensor:
    """Squares of that many strides at the centres of all cells, float32 [cells, 4], for
    images of the size ``resolution``.
    """
    boxes = []
    for head in detector.heads:
        rows, columns = sides(head.size)
        height, width = sides(resolution)
        # where a side is rounded up, the strides along both sides differ a little
        down, right = height / rows, width / columns
        y_HW, x_HW = torch.meshgrid(
            (torch.arange(rows) + 0.5) * down,
            (torch.arange(columns) + 0.5) * right,
            indexing="ij",
        )
        points_A2 = torch.stack((x_HW, y_HW), dim=-1).reshape(-1, 2)
        half = strides * max(down, right) / 2
        boxes.append(torch.cat((points_A2 - half, points_A2 + half), dim=1))
    return torch.cat(boxes)


def _default_boxes(detector: SSDLite, resolution: Size) -> Tensor:
    """SSD's, by torchvision."""
    generator = DefaultBoxGenerator(
        [list(ratios) for ratios in detector.aspect_ratios],
        min_ratio=detector.min_ratio,
        max_ratio=detector.max_ratio,
    )
    size = sides(resolution)
    # the generator reads only the shapes of the maps
    maps = [torch.empty(1, 0, *sides(head.size)) for head in detector.heads]
    boxes_A4: Tensor = generator(ImageList(torch.empty(1, 0, *size), [size]), maps)[0]
    return boxes_A4


def _anchor_squares(detector: FCOS, resolution: Size) -> Tensor:
    """One square per cell."""
    return squares(detector, resolution, detector.side)


ANCHORS: Mapping[type[Detector], Callable[[Any, Size], Tensor]] = {
    SSDLite: _default_boxes,
    FCOS: _anchor_squares,
}
"""Kind of a detector -> the function that makes its anchors for a resolution."""
