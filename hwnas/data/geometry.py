"""How an image becomes the network's input: one geometry of a data set, the same in
training and in evaluation, and in the bundle.

squash  Both sides become the resolution; the aspect ratio is not kept. So do MediaPipe and ML Kit with a photograph.
crop    The shorter side becomes floor(resolution / crop_fraction), then the middle is cut out: the evaluation of ImageNet.
pad     The longer side becomes the resolution, and the image lies in the middle of a border of the mean colour, which
        normalises to (nearly) 0: the letterbox of detectors.

The other side of ``crop`` and ``pad`` is in proportion, rounded down, and a middle
between two pixels is rounded to the even one, all as in torchvision. Augmentation
shifts the network's input over the *scaled* image, so that a shift of 0 is what is
evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hwnas.config import DataConfig, Interpolation, Resize

Picture = TypeVar("Picture", Tensor, Image.Image)
"""A PIL image, a tensor [..., C, H, W], or torchvision's bounding boxes on their canvas."""

CROP_FRACTION = 0.875
"""Of ``crop`` where nothing else is set: 224 of 256 pixels, the usual evaluation of ImageNet."""

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


class Frame(NamedTuple):
    """Where a whole image lies in the network's input, in pixels; ``left`` and ``top``
    are negative where it sticks out.
    """

    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class Geometry:
    """From any image to the network's square input. See the module."""

    mode: Resize
    interpolation: Interpolation
    crop_fraction: float | None
    """Of ``crop``, in (0, 1]; None otherwise."""
    resolution: int
    """Height = width of the network's input, in pixels."""
    border: tuple[int, ...]
    """Colour of the border of ``pad``, 0..255 per channel."""

    @classmethod
    def of(cls, config: DataConfig) -> Geometry:
        """The geometry of a data set: what is configured, else what is usual with its
        augmentation.
        """
        mode = config.resize_mode
        usual: Interpolation = "bicubic" if config.augment == "imagenet" else "bilinear"
        return cls(
            mode=mode,
            interpolation=config.interpolation or usual,
            crop_fraction=(config.crop_fraction or CROP_FRACTION) if mode == "crop" else None,
            resolution=config.resolution,
            border=tuple(min(255, max(0, round(255 * value))) for value in config.mean),
        )

    @property
    def shorter_side(self) -> int | None:
        """Of ``crop``: the shorter side of the scaled image, of which the middle is cut out."""
        if self.crop_fraction is None:
            return None
        # 33 / 0.55 is 59.99999999999999
        return math.floor(self.resolution / self.crop_fraction + 1e-9)

    @property
    def room(self) -> int:
        """By how many pixels an augmentation may shift the network's input at most:
        CIFAR's 4 of 32.
        """
        return max(1, self.resolution // 8)

    def frame(self, width: int, height: int) -> Frame:
        """Where an image of ``width`` x ``height`` pixels lies in the network's input."""
        size = self.resolution
        if self.mode == "squash":
            return Frame(size, size, 0, 0)
        if self.shorter_side is not None:
            given, side = min(width, height), self.shorter_side
        else:
            given, side = max(width, height), size
        scaled_width, scaled_height = max(1, width * side // given), max(1, height * side // given)
        return Frame(
            scaled_width,
            scaled_height,
            round((size - scaled_width) / 2),
            round((size - scaled_height) / 2),
        )

    def scaled(self, image: Picture) -> Picture:
        """A whole image at the network's scale, with its border: the network's input,
        and with ``crop`` what is around it, too.
        """
        height, width = F.get_size(image)
        frame = self.frame(width, height)
        scaled: Picture = F.resize(
            image,
            [frame.height, frame.width],
            interpolation=MODES[self.interpolation],
            antialias=True,
        )
        if self.mode != "pad":
            return scaled
        right, bottom = (
            self.resolution - frame.width - frame.left,
            self.resolution - frame.height - frame.top,
        )
        padded: Picture = F.pad(
            scaled, [frame.left, frame.top, right, bottom], fill=list(self.border)
        )
        return padded

    def corner(self, scaled: Picture) -> tuple[int, int]:
        """Left and top of the network's input in a ``scaled`` image."""
        height, width = F.get_size(scaled)
        return round((width - self.resolution) / 2), round((height - self.resolution) / 2)

    def cut(self, scaled: Picture, right: int = 0, down: int = 0) -> Picture:
        """The network's input out of a ``scaled`` image, or what lies ``right`` and
        ``down`` of it; black beyond the image's edges.
        """
        left, top = self.corner(scaled)
        cut: Picture = F.crop(scaled, top + down, left + right, self.resolution, self.resolution)
        return cut

    def fitted(self, image: Picture) -> Picture:
        """An image, or boxes, as the network gets them: without augmentation, and in evaluation."""
        scaled = self.scaled(image)
        return self.cut(scaled) if self.mode == "crop" else scaled

    def to_photograph(self, boxes_N4: np.ndarray, width: int, height: int) -> np.ndarray:
        """Boxes x1, y1, x2, y2 in pixels of the network's input -> float64 in those of
        an image of ``width`` x ``height``.

        Of ``pad``, what lies in the border is cut off, as a detector's boxes are at the
        edges of its input.
        """
        frame = self.frame(width, height)
        corner, factors = (
            np.tile([frame.left, frame.top], 2),
            np.tile([width / frame.width, height / frame.height], 2),
        )
        boxes_N4 = (np.asarray(boxes_N4, dtype=np.float64).reshape(-1, 4) - corner) * factors
        return boxes_N4.clip(0, np.tile([width, height], 2)) if self.mode == "pad" else boxes_N4

    @property
    def words(self) -> str:
        """The geometry for people who use an exported file."""
        size = f"{self.resolution} x {self.resolution}"
        how = f"{self.interpolation} with antialiasing"
        if self.mode == "squash":
            return f"to {size} without keeping the aspect ratio, {how}"
        if self.mode == "crop":
            return (
                f"shorter side to {self.shorter_side}, the longer one in proportion (rounded down),"
                f" {how}; then the middle {size}"
            )
        return (
            f"longer side to {self.resolution}, the shorter one in proportion (rounded down),"
            f" {how}; then in the middle of {size} pixels of the colour"
            f" {', '.join(map(str, self.border))}"
        )
