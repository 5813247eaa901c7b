"""Image folders in ImageNet's layout: ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

AREA = (0.08, 1.0)
"""Range of the random crops of ``imagenet``: part of the image's area (torchvision's
default).
"""
RATIO = (3 / 4, 4 / 3)
"""Range of the random crops of ``imagenet``: width / height (torchvision's default)."""


class FolderImages(Images):
    """Images that are decoded on demand.

    The augmentation ``imagenet`` trains on random crops of 0.08 to 1 of the area. The
    geometry describes everything else.
    """

    geometry: Geometry

    def __init__(
        self, folder: ImageFolder, chosen: np.ndarray, config: DataConfig, augment: bool
    ) -> None:
        self.folder = folder
        self.chosen = chosen
        self.channels = config.channels
        self.labels = np.asarray(folder.targets, dtype=np.int64)[chosen]
        self.names = tuple(folder.classes)
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.augment = config.augment if augment else "none"
        self.normalised = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(config.mean), list(config.std)),
            ]
        )

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images = [self._image(index, draw) for index, draw in requests]
        labels = self.labels[[index for index, _ in requests]]
        return torch.stack(images), torch.from_numpy(labels)

    def _image(self, index: int, draw: int) -> torch.Tensor:
        """One image, augmented and normalised: float32 [C, size, size]."""
        path, _ = self.folder.samples[self.chosen[index]]
        try:
            image = self.folder.loader(path).convert("RGB" if self.channels == 3 else "L")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(
                f"image {path} does not decode ({error}): replace or remove it."
            ) from error
        # torchvision draws from the global generator, whose state must not change
        with torch.random.fork_rng(devices=[]):
            # the batch has one seed, so the index keeps its images apart
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
            down = int(torch.randint(-room, room + 1, ()))
            right = int(torch.randint(-room, room + 1, ()))
            fitted = self.geometry.cut(self.geometry.scaled(image), right, down)
        if self.augment != "crop" and bool(torch.rand(1) < 0.5):
            fitted = F.horizontal_flip(fitted)
        return fitted

    def _random_area(self, image: Image) -> Image:
        """A random crop of an image, resized to the network's size.

        Its aspect ratio is about 1, which with ``squash`` refers to the squashed image.
        """
        aspect = image.width / image.height if self.geometry.mode == "squash" else 1.0
        area = RandomResizedCrop.get_params(image, [*AREA], [aspect * ratio for ratio in RATIO])
        crop: Image = F.resized_crop(
            image,
            *area,
            size=[self.geometry.resolution] * 2,
            interpolation=MODES[self.geometry.interpolation],
            antialias=True,
        )
        return crop


def folder(config: DataConfig, split: str, augment: bool) -> Images:
    """The images in the folders ``train`` (split into train and held-out) and ``val``
    (the test split) below ``data.path``.

    Raises DataError if a folder is missing or has no class folders with images, or if
    the classes of the two differ.
    """
    part = "val" if split == "test" else "train"
    root = data_folder(config) / part
    try:
        images = ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        reason = "does not exist"
        if root.is_dir():
            reason = f"holds no class folders with images ({error})"
        hint = ""
        if (root.parent / "annotations").is_dir():
            hint = " (a folder with annotations/ is data.name = 'coco')"
        raise DataError(
            f"{root} {reason}: lay the images out as {root.name}/<class>/<image>{hint}."
        ) from error

    total = len(images.samples)
    if split != "test":
        return FolderImages(images, split_indices(total, config.held_out, split), config, augment)
    # labels are positions in the sorted list of class folders
    train = root.parent / "train"
    if train.is_dir():
        _check_same_classes(root, images.classes, find_classes(str(train))[0])
    return FolderImages(images, np.arange(total), config, augment)


def _check_same_classes(root: Path, classes: list[str], train_classes: list[str]) -> None:
    """Raise DataError if the class folders of ``root`` differ from those of training."""
    if classes != train_classes:
        differing = ", ".join(sorted({*classes} ^ {*train_classes})[:3])
        raise DataError(
            f"{root} and its train folder differ in classes ({differing}), so labels would not"
            " agree: give both the same folders."
        )
