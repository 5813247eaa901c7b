"""Augmentations that torchvision has, made safe for any image."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2

from hwnas.data.geometry import Geometry


class SafeIoUCrop(v2.RandomIoUCrop):  # type: ignore[misc]
    """torchvision's ``RandomIoUCrop``, skipped for some images: it divides by zero if
    they are smaller than 4 pixels, and tries hundreds of crops in vain if they have no
    boxes.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """A crop; nothing for images that are skipped."""
        image, boxes = flat_inputs[:2]
        if len(boxes) and min(image.shape[-2:]) * self.min_scale >= 1:
            return dict(super().make_params(flat_inputs))
        return {}


class InputJitter(v2.ScaleJitter):  # type: ignore[misc]
    """torchvision's ``ScaleJitter``: a whole image, at a random multiple of the size that
    it has in the network's input. With ``resize = "squash"``, that has another aspect
    ratio than the image.
    """

    def __init__(self, geometry: Geometry, scales: tuple[float, float]) -> None:
        super().__init__(geometry.sides, scales, geometry.torchvision_interpolation)
        self.geometry = geometry

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size of the resized image."""
        height, width = flat_inputs[0].shape[-2:]
        frame = self.geometry.frame(width, height)
        low, high = self.scale_range
        scale = low + float(torch.rand(())) * (high - low)
        # very long images would otherwise lose all pixels of their shorter side
        scaled_height = max(1, int(frame.height * scale))
        scaled_width = max(1, int(frame.width * scale))
        return {"size": (scaled_height, scaled_width)}
