"""Image folders in ImageNet's layout: ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import UnidentifiedImageError
from PIL.Image import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.geometry import MODES, Geometry
from hwnas.data.images import Batch, Images, Request, split_indices
from hwnas.errors import DataError

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of the random parts that ``imagenet`` trains on: part of the image's area, and width
/ height (torchvision's defaults).
"""


class FolderImages(Images):
    """Images decoded on demand. ``imagenet`` trains on crops of a random part, 0.08 to
    1 of the area; see the geometry for all else.
    """

    geometry: Geometry

    def __init__(
        self, folder: ImageFolder, chosen: np.ndarray, config: DataConfig, augment: bool
    ) -> None:
        self.folder, self.chosen, self.channels = folder, chosen, config.channels
        self.labels = np.asarray(folder.targets, dtype=np.int64)[chosen]
        self.names = tuple(folder.classes)
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.augment = config.augment if augment else "none"
        to_tensor = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(config.mean), list(config.std)),
        ]
        self.normalised = v2.Compose(to_tensor)

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images = [self._image(index, draw) for index, draw in requests]
        return torch.stack(images), torch.from_numpy(self.labels[[index for index, _ in requests]])

    def _image(self, index: int, draw: int) -> torch.Tensor:
        path, _ = self.folder.samples[self.chosen[index]]
        try:
            image = self.folder.loader(path).convert("RGB" if self.channels == 3 else "L")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(
                f"image {path} does not decode ({error}): replace or remove it."
            ) from error
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed((draw + index) % 2**63)
            tensor: torch.Tensor = self.normalised(self._fitted(image))
        return tensor

    def _fitted(self, image: Image) -> Image:
        """An image at the network's size, augmented."""
        if self.augment == "none":
            return self.geometry.fitted(image)
        if self.augment == "imagenet":
            fitted = self._random_area(image)
        else:
            room = self.geometry.room
            down, right = (int(torch.randint(-room, room + 1, ())) for _ in range(2))
            fitted = self.geometry.cut(self.geometry.scaled(image), right, down)
        flipped = self.augment != "crop" and bool(torch.rand(1) < 0.5)
        return F.horizontal_flip(fitted) if flipped else fitted

    def _random_area(self, image: Image) -> Image:
        """A random part of an image, which is about as wide as it is high where it is
        looked at: squashed, with ``squash``.
        """
        aspect = image.width / image.height if self.geometry.mode == "squash" else 1.0
        area = RandomResizedCrop.get_params(image, [*AREA], [aspect * ratio for ratio in RATIO])
        size, interpolation = [self.geometry.resolution] * 2, MODES[self.geometry.interpolation]
        cut: Image = F.resized_crop(
            image, *area, size=size, interpolation=interpolation, antialias=True
        )
        return cut


def folder(config: DataConfig, split: str, augment: bool) -> Images:
    """``train`` (split into train and held-out) and ``val`` (the test split) below
    ``data.path``.
    """
    root = data_folder(config) / ("val" if split == "test" else "train")
    try:
        images = ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        reason = (
            f"holds no class folders with images ({error})" if root.is_dir() else "does not exist"
        )
        boxes = (
            " (a folder with annotations/ is data.name = 'coco')"
            if (root.parent / "annotations").is_dir()
            else ""
        )
        raise DataError(
            f"{root} {reason}: lay the images out as {root.name}/<class>/<image>{boxes}."
        ) from error
    if (
        split == "test"
        and (root.parent / "train").is_dir()
        and images.classes != (trained := find_classes(str(root.parent / "train"))[0])
    ):
        odd = ", ".join(sorted({*images.classes} ^ {*trained})[:3])
        raise DataError(
            f"{root} and its train folder differ in classes ({odd}), so labels would not agree:"
            " give both the same folders."
        )
    total = len(images.samples)
    chosen = np.arange(total) if split == "test" else split_indices(total, config.held_out, split)
    return FolderImages(images, chosen, config, augment)
