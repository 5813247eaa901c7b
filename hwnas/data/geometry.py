"""How an image becomes the network's input. A data set has one geometry, which is the
same in training, in evaluation and in the bundle.

squash  Both sides become those of the network's input; the aspect ratio is not kept. So do MediaPipe and ML Kit with a photograph.
crop    The shorter side becomes floor(resolution / crop_fraction), then the middle is cut out: the evaluation of ImageNet.
pad     The longer side becomes the resolution, and the image lies in the middle of a border of the mean colour, which
        normalises to (nearly) 0: the letterbox of detectors.

If the network's input is not square, ``crop`` scales the image to the smallest size that
covers an input enlarged by 1 / crop_fraction, and ``pad`` to the largest one that fits into
the input. For a square, both are what is written above.

In ``crop`` and ``pad``, the other side keeps the aspect ratio and is rounded down; a
middle between two pixels is rounded to the even one. Both are as in torchvision.
Augmentation shifts the network's input over the *scaled* image, so that a shift of 0
gives the evaluated image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from hwnas.config import DataConfig, Interpolation, Resize
from hwnas.core.size import Rectangle, Size, by, sides, size_of
from hwnas.lazy import LazyModule

if TYPE_CHECKING:
    from torch import Tensor

transforms = LazyModule("torchvision.transforms")
F = LazyModule("torchvision.transforms.v2.functional")

Picture = TypeVar("Picture", "Tensor", Image.Image)
"""A PIL image, a tensor [..., C, H, W], or torchvision's bounding boxes on their canvas."""

CROP_FRACTION = 0.875
"""Default of ``crop``: 224 of 256 pixels, the usual evaluation of ImageNet."""


class Frame(NamedTuple):
    """Where a whole image lies in the network's input, in pixels. ``left`` and ``top``
    are negative if it extends beyond the input.
    """

    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class Geometry:
    """Turns any image into the network's input; see the module's docstring."""

    mode: Resize
    interpolation: Interpolation
    crop_fraction: float | None
    """In (0, 1] for ``crop``, else None."""
    resolution: Size
    """Height and width of the network's input, in pixels."""
    border: tuple[int, ...]
    """Colour of the border for ``pad``, 0..255 per channel."""

    @classmethod
    def of(cls, config: DataConfig) -> Geometry:
        """The geometry of a data set. Values that are not configured are the usual ones
        for its augmentation.
        """
        default: Interpolation = "bicubic" if config.augment == "imagenet" else "bilinear"
        crop_fraction = None
        if config.resize_mode == "crop":
            crop_fraction = config.crop_fraction or CROP_FRACTION
        return cls(
            mode=config.resize_mode,
            interpolation=config.interpolation or default,
            crop_fraction=crop_fraction,
            resolution=config.resolution,
            border=tuple(min(255, max(0, round(255 * value))) for value in config.mean),
        )

    @property
    def shorter_side(self) -> int | None:
        """For ``crop`` to a square, the shorter side of the scaled image in pixels, before
        the middle is cut out; else None.
        """
        if self.crop_fraction is None or isinstance(self.resolution, Rectangle):
            return None
        return self._enlarged(min(self.sides))

    def _enlarged(self, side: int) -> int:
        """A side of the input, divided by the crop fraction."""
        assert self.crop_fraction is not None
        # the tolerance is for quotients like 33 / 0.55, which is 59.99999999999999
        return math.floor(side / self.crop_fraction + 1e-9)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return sides(self.resolution)

    @property
    def room(self) -> int:
        """The most pixels by which an augmentation shifts the network's input: an eighth
        of its smaller side, like CIFAR's 4 of 32.
        """
        return max(1, min(self.sides) // 8)

    def frame(self, width: int, height: int) -> Frame:
        """Where an image of ``width`` x ``height`` pixels lies in the network's input."""
        input_height, input_width = self.sides
        if self.mode == "squash":
            return Frame(input_width, input_height, 0, 0)
        if self.mode == "crop":
            target_height, target_width = map(self._enlarged, self.sides)
            # the side that is shorter in proportion to the input is the one that just covers it
            along_width = width * target_height <= height * target_width
        else:
            target_height, target_width = self.sides
            along_width = width * target_height >= height * target_width
        if along_width:
            given_side, scaled_side = width, target_width
        else:
            given_side, scaled_side = height, target_height

        # very long images would otherwise lose all pixels of their shorter side
        scaled_width = max(1, width * scaled_side // given_side)
        scaled_height = max(1, height * scaled_side // given_side)
        left = round((input_width - scaled_width) / 2)
        top = round((input_height - scaled_height) / 2)
        return Frame(scaled_width, scaled_height, left, top)

    @property
    def torchvision_interpolation(self) -> Any:
        """``interpolation`` as torchvision's ``InterpolationMode``."""
        return transforms.InterpolationMode(self.interpolation)

    def scaled(self, image: Picture) -> Picture:
        """A whole image at the network's scale, with the border of ``pad``. With ``crop``
        it is larger than the network's input, else it is the input.
        """
        height, width = F.get_size(image)
        frame = self.frame(width, height)
        scaled: Picture = F.resize(
            image,
            [frame.height, frame.width],
            interpolation=self.torchvision_interpolation,
            antialias=True,
        )
        if self.mode != "pad":
            return scaled
        input_height, input_width = self.sides
        right = input_width - frame.width - frame.left
        bottom = input_height - frame.height - frame.top
        padded: Picture = F.pad(
            scaled, [frame.left, frame.top, right, bottom], fill=list(self.border)
        )
        return padded

    def corner(self, scaled: Picture) -> tuple[int, int]:
        """Left and top of the network's input in a ``scaled`` image, in pixels."""
        height, width = F.get_size(scaled)
        input_height, input_width = self.sides
        return round((width - input_width) / 2), round((height - input_height) / 2)

    def cut(self, scaled: Picture, right: int = 0, down: int = 0) -> Picture:
        """The network's input, cut out of a ``scaled`` image. The window is shifted by
        ``right`` and ``down`` pixels; beyond the image's edges it is black.
        """
        left, top = self.corner(scaled)
        cut: Picture = F.crop(scaled, top + down, left + right, *self.sides)
        return cut

    def fitted(self, image: Picture) -> Picture:
        """An image or boxes as the network gets them in evaluation, without augmentation."""
        scaled = self.scaled(image)
        if self.mode == "crop":
            return self.cut(scaled)
        return scaled

    def to_photograph(self, boxes_N4: np.ndarray, width: int, height: int) -> np.ndarray:
        """Boxes [N, 4] as x1, y1, x2, y2 in pixels of the network's input -> float64 [N,
        4] in pixels of an image of ``width`` x ``height``.

        With ``pad``, boxes are clipped to the image, as a detector's boxes are clipped
        to the edges of its input.
        """
        frame = self.frame(width, height)
        corner = np.tile([frame.left, frame.top], 2)
        factors = np.tile([width / frame.width, height / frame.height], 2)
        boxes_N4 = (np.asarray(boxes_N4, dtype=np.float64).reshape(-1, 4) - corner) * factors
        if self.mode != "pad":
            return boxes_N4
        return boxes_N4.clip(0, np.tile([width, height], 2))

    @property
    def words(self) -> str:
        """The geometry in words, for users of an exported file."""
        # exported files keep this text, so its wording is part of their contents
        size = by(self.resolution)
        resampling = f"{self.interpolation} with antialiasing"
        if self.mode == "squash":
            words = " (height x width)" if isinstance(self.resolution, Rectangle) else ""
            return f"to {size}{words} without keeping the aspect ratio, {resampling}"
        if isinstance(self.resolution, Rectangle):
            return self._words_of_a_rectangle(size, resampling)
        if self.mode == "crop":
            return (
                f"shorter side to {self.shorter_side}, the longer one in proportion (rounded down),"
                f" {resampling}; then the middle {size}"
            )
        return (
            f"longer side to {self.resolution}, the shorter one in proportion (rounded down),"
            f" {resampling}; then in the middle of {size} pixels of the colour"
            f" {', '.join(map(str, self.border))}"
        )

    def _words_of_a_rectangle(self, size: str, resampling: str) -> str:
        """``words`` for ``crop`` and ``pad``; sizes have the height first."""
        if self.mode == "crop":
            covered = by(size_of(*map(self._enlarged, self.sides)))
            return (
                f"to the smallest size that covers {covered} (height x width), in proportion"
                f" (rounded down), {resampling}; then the middle {size}"
            )
        return (
            f"to the largest size that fits into {size} (height x width), in proportion (rounded"
            f" down), {resampling}; then in the middle of {size} pixels of the colour"
            f" {', '.join(map(str, self.border))}"
        )
