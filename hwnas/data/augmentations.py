"""Augmentations that torchvision has, made safe for any image."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2


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
