"""Data sets that fit into memory: scikit-learn's digits, ``x``/``y`` arrays in npz
files, CIFAR-10 in torchvision's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.geometry import Geometry
from hwnas.data.images import Batch, Images, Request, split_indices
from hwnas.errors import DataError
from hwnas.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class ArrayImages(Images):
    """uint8 images [N, H, W, C] in memory, resized and augmented per batch on the fly."""

    geometry: Geometry

    def __init__(
        self,
        x_NHWC: np.ndarray,
        labels: np.ndarray,
        names: tuple[str, ...],
        config: DataConfig,
        augment: bool,
    ) -> None:
        pixels = x_NHWC.transpose(0, 3, 1, 2)
        channels = pixels.shape[1]
        if channels == 1 and config.channels == 3:
            pixels = np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:]))
        elif channels != config.channels:
            raise DataError(
                f"data {config.name!r} has {channels} channels, but data.channels ="
                f" {config.channels}: set it to {channels}."
            )
        self.pixels_NCHW = np.ascontiguousarray(pixels)
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.labels = labels.astype(np.int64)
        self.names = names
        self.mean = config.mean
        self.std = config.std
        self.augment = config.augment if augment else "none"
        if self.augment == "imagenet":
            raise DataError(
                "data.augment = 'imagenet' needs a folder of images: choose 'crop_flip', 'crop' or"
                " 'none' here."
            )

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        indices = [index for index, _ in requests]
        x_NCHW = _scaled(torch.from_numpy(self.pixels_NCHW[indices]), self.geometry)
        if self.augment == "none":
            x_NCHW = self.geometry.cut(x_NCHW)
        else:
            # the first request of a batch has the seed of its step
            rng = np.random.default_rng(requests[0][1])
            x_NCHW = _shifted(x_NCHW, self.geometry, self.augment == "crop_flip", rng)
        further = self.training_augmentation
        seeds = [draw + index for index, draw in requests]
        if further is not None:
            x_NCHW = further.pictures(x_NCHW, seeds)
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        normalised = (x_NCHW.float() / 255.0 - mean) / std
        if further is not None:
            for x_CHW, seed in zip(normalised, seeds, strict=True):
                further.erased(x_CHW, seed)  # in place
        return normalised.contiguous(), torch.from_numpy(self.labels[indices])


def _scaled(pixels_NCHW: Tensor, geometry: Geometry) -> Tensor:
    """Images at the network's scale, uint8. Resizing is computed in float32."""
    height, width = pixels_NCHW.shape[-2:]
    # without resizing, the conversion to float would only cost time
    if geometry.frame(width, height)[:2] == (width, height):
        return geometry.scaled(pixels_NCHW)
    return geometry.scaled(pixels_NCHW.float()).round().clamp(0, 255).to(torch.uint8)


def _shifted(x_NCHW: Tensor, geometry: Geometry, flip: bool, rng: np.random.Generator) -> Tensor:
    """Each scaled image shifted by up to ``geometry.room`` pixels, with black beyond its
    edges. With ``flip``, a random half of the images is mirrored.
    """
    count, room = len(x_NCHW), geometry.room
    height, width = geometry.sides
    left, top = geometry.corner(x_NCHW)
    padded = torch.nn.functional.pad(x_NCHW, (room, room, room, room))
    downs, rights = torch.from_numpy(rng.integers(0, 2 * room + 1, size=(2, count)))
    flips = torch.zeros(count, dtype=torch.bool)
    if flip:
        flips = torch.from_numpy(rng.random(count) < 0.5)

    # one gather for the whole batch: indices [count, rows, columns]
    rows = top + downs[:, None] + torch.arange(height)
    offsets = torch.arange(width)
    columns = left + rights[:, None] + torch.where(flips[:, None], width - 1 - offsets, offsets)
    images = torch.arange(count)[:, None, None]
    shifted_NHWC = padded[images, :, rows[:, :, None], columns[:, None, :]]
    return shifted_NHWC.permute(0, 3, 1, 2)


def _part(
    x_NHWC: np.ndarray,
    y: np.ndarray,
    config: DataConfig,
    split: str,
    augment: bool,
    names: tuple[str, ...],
) -> ArrayImages:
    """The images of a split, selected from all training images unless the split is
    ``test``: then the arrays are the test images.
    """
    if split != "test":
        chosen = split_indices(len(y), config.held_out, split)
        x_NHWC, y = x_NHWC[chosen], y[chosen]
    return ArrayImages(x_NHWC, y, names, config, augment)


def digits(config: DataConfig, split: str, augment: bool) -> Images:
    """The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn. Every
    fifth image is a test image.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # scikit-learn's grey levels are 0..16
    x_NHWC = (bunch.images * (255 / 16)).round().astype(np.uint8)[..., None]
    test = np.arange(len(x_NHWC)) % 5 == 4
    chosen = test if split == "test" else ~test
    return _part(x_NHWC[chosen], bunch.target[chosen], config, split, augment, tuple("0123456789"))


def npz(config: DataConfig, split: str, augment: bool) -> Images:
    """``train.npz`` and ``test.npz`` in the folder ``data.path``, each with ``x`` uint8
    [N, H, W, C] (or [N, H, W]) and ``y`` [N], integers.

    Raises DataError if a file is missing or does not hold these arrays.
    """
    file_name = "test.npz" if split == "test" else "train.npz"
    path = data_folder(config) / file_name
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x_NHWC, y = arrays["x"], arrays["y"]
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: set data.path to the folder that holds train.npz and test.npz."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{path} does not hold arrays 'x' and 'y' ({error}): write it with numpy.savez(path,"
            " x=images, y=labels)."
        ) from error

    if x_NHWC.ndim == 3:
        x_NHWC = x_NHWC[..., None]
    images_valid = x_NHWC.dtype == np.uint8 and x_NHWC.ndim == 4
    labels_valid = y.shape == x_NHWC.shape[:1] and y.dtype.kind in "iu"
    if not (images_valid and labels_valid):
        raise DataError(
            f"{path} has x {x_NHWC.dtype} {list(x_NHWC.shape)} and y {y.dtype} {list(y.shape)}: "
            "x must be uint8 [N, H, W, C], y integers [N]."
        )

    names = tuple(map(str, range(config.classes)))
    # npz files have no class names, but this shape is CIFAR-10's
    if config.classes == 10 and x_NHWC.shape[1:] == (32, 32, 3):
        names = CIFAR10_NAMES
    return _part(x_NHWC, y, config, split, augment, names)


def cifar10(config: DataConfig, split: str, augment: bool) -> Images:
    """CIFAR-10 in torchvision's layout: ``cifar-10-batches-py`` in the folder
    ``data.path``.

    Raises DataError if files are missing or have a wrong md5, which torchvision checks.
    """
    from torchvision.datasets import CIFAR10

    folder = data_folder(config)
    try:
        dataset = CIFAR10(str(folder), train=split != "test", download=False)
    except RuntimeError as error:
        raise DataError(
            f"{folder} holds no intact cifar-10-batches-py folder: download CIFAR-10 (python"
            " version) and unpack it there."
        ) from error
    return _part(dataset.data, np.asarray(dataset.targets), config, split, augment, CIFAR10_NAMES)
