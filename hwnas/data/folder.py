"""Image folders in ImageNet's layout: ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import InterpolationMode, v2

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.images import Batch, Images, Request, split_indices
from hwnas.errors import DataError


class FolderImages(Images):
    """Images decoded on demand. Training: random-area crop 0.08 to 1, flip; evaluation: centre crop of size / (size + 32)."""

    def __init__(self, folder: ImageFolder, chosen: np.ndarray, config: DataConfig, augment: bool) -> None:
        self.folder, self.chosen, self.channels = folder, chosen, config.channels
        self.labels = np.asarray(folder.targets, dtype=np.int64)[chosen]
        self.names = tuple(folder.classes)
        size, bicubic = config.resolution, InterpolationMode.BICUBIC
        self.resizing = f"shorter side to {size + size // 7}, bicubic; centre crop {size}"
        resize_crop = [v2.Resize(size + size // 7, interpolation=bicubic), v2.CenterCrop(size)]
        geometry = {
            "imagenet": [v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip()],
            "crop_flip": [v2.Resize((size, size)), v2.RandomCrop(size, padding=max(1, size // 8)), v2.RandomHorizontalFlip()],
            "crop": [v2.Resize((size, size)), v2.RandomCrop(size, padding=max(1, size // 8))],
            "none": resize_crop,
        }[config.augment if augment else "none"]
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(config.mean), list(config.std))]
        self.transform = v2.Compose([*geometry, *to_tensor])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images = [self._image(index, draw) for index, draw in requests]
        return torch.stack(images), torch.from_numpy(self.labels[[index for index, _ in requests]])

    def _image(self, index: int, draw: int) -> torch.Tensor:
        path, _ = self.folder.samples[self.chosen[index]]
        try:
            image = self.folder.loader(path).convert("RGB" if self.channels == 3 else "L")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(f"image {path} does not decode ({error}): replace or remove it.") from error
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed((draw + index) % 2**63)
            tensor: torch.Tensor = self.transform(image)
        return tensor


def folder(config: DataConfig, split: str, augment: bool) -> Images:
    """``train`` (split into train and held-out) and ``val`` (the test split) below ``data.path``."""
    root = data_folder(config) / ("val" if split == "test" else "train")
    try:
        images = ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        raise DataError(
            f"{root} holds no class folders with images ({error}): lay the images out as {root.name}/<class>/<image>."
        ) from error
    if split == "test" and (root.parent / "train").is_dir() and images.classes != (trained := find_classes(str(root.parent / "train"))[0]):
        odd = ", ".join(sorted({*images.classes} ^ {*trained})[:3])
        raise DataError(f"{root} and its train folder differ in classes ({odd}), so labels would not agree: give both the same folders.")
    total = len(images.samples)
    chosen = np.arange(total) if split == "test" else split_indices(total, config.held_out, split)
    return FolderImages(images, chosen, config, augment)
