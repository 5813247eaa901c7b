"""Image folders in ImageNet's layout: ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``.

They are torchvision's, without what people do not see there: hidden files and folders
and those that systems leave behind are neither classes nor images.

Images in ``data.skip`` keep their places among the training images, so that all others
keep theirs, whether the skipped files still exist or not. Another image of the split is
read in the place of each. The test split goes without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL.Image import Image

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.decoding import decode
from hwnas.data.geometry import Geometry
from hwnas.data.images import Batch, Images, Request, are_skipped, read_instead, split_indices
from hwnas.data.wording import counted, quoted, shown
from hwnas.errors import DataError
from hwnas.lazy import LazyModule, torch

transforms = LazyModule("torchvision.transforms")
v2 = LazyModule("torchvision.transforms.v2")
F = LazyModule("torchvision.transforms.v2.functional")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What names of images end in, in any case: torchvision's ``IMG_EXTENSIONS``."""

SYSTEM_FOLDERS = (
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)
"""Folders that macOS, Synology, Windows and Linux make by themselves, besides hidden ones."""

AREA = (0.08, 1.0)
"""Range of the random crops of ``imagenet``: part of the image's area (torchvision's
default).
"""
RATIO = (3 / 4, 4 / 3)
"""Range of the random crops of ``imagenet``: width / height (torchvision's default)."""


class FolderImages(Images):
    """Images that are decoded on demand.

    ``chosen`` are the positions in ``listed`` of the split's own images, int64 [N]. The
    augmentation ``imagenet`` trains on random crops of 0.08 to 1 of the area. The geometry
    describes everything else.
    """

    geometry: Geometry

    def __init__(
        self, listed: Listed, chosen: np.ndarray, config: DataConfig, augment: bool
    ) -> None:
        self.root = data_folder(config)
        self.channels = config.channels
        self._files = [listed.files[position] for position in chosen]
        read = read_instead(are_skipped(self._files, config))
        self.read = [self._files[position] for position in read]
        self.labels = listed.labels[chosen][read]
        self.names = listed.names
        self.notes = listed.notes
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.augment = config.augment if augment else "none"
        self.mean = list(config.mean)
        self.std = list(config.std)

    @cached_property
    def normalised(self) -> Any:
        """The transform of a PIL image to a normalised tensor."""
        return v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )

    def files(self) -> list[str]:
        """The images' files, with those in ``data.skip``."""
        return self._files

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images = [self._image(index, draw) for index, draw in requests]
        labels = self.labels[[index for index, _ in requests]]
        return torch.stack(images), torch.from_numpy(labels)

    def _image(self, index: int, draw: int) -> torch.Tensor:
        """One image, augmented and normalised: float32 [C, size, size]."""
        image, _ = decode(self.root, self.read[index], self.channels)
        # torchvision draws from the global generator, whose state must not change
        with torch.random.fork_rng(devices=[]):
            # The batch has one seed, so the index keeps its images apart. Not
            # torch.manual_seed, which takes as long as the rest if PyTorch was built for CUDA.
            torch.default_generator.manual_seed((draw + index) % 2**63)
            fitted = self._fitted(image)
        further = self.training_augmentation
        if further is None:
            return self._normalised(fitted)
        fitted = further.picture(fitted, draw + index)
        return further.erased(self._normalised(fitted), draw + index)

    def _normalised(self, image: Image) -> torch.Tensor:
        tensor: torch.Tensor = self.normalised(image)
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

        Its aspect ratio is about that of the network's input, or with ``squash`` that of
        the image: then the squashed area has it.
        """
        height, width = self.geometry.sides
        if self.geometry.mode == "squash":
            height, width = image.height, image.width
        aspect = width / height
        area = transforms.RandomResizedCrop.get_params(
            image, [*AREA], [aspect * ratio for ratio in RATIO]
        )
        crop: Image = F.resized_crop(
            image,
            *area,
            size=list(self.geometry.sides),
            interpolation=self.geometry.torchvision_interpolation,
            antialias=True,
        )
        return crop


class Listed:
    """The images in the folder ``part`` below ``data.path``, in the order of torchvision's
    ``ImageFolder``: class by class, then folder by folder.

    ``classes`` are the names of the class folders; None: those on disk. Images of the part
    that are in ``skip`` are listed even if they do not exist.
    """

    def __init__(
        self, root: Path, part: str, classes: Sequence[str] | None, skip: Sequence[str] = ()
    ) -> None:
        self.part = str(root / part)
        names = class_folders(root / part) if classes is None else classes
        self.names = tuple(names)
        label_of_class = {name: label for label, name in enumerate(names)}
        self.notes: tuple[str, ...] = ()
        loose = loose_images(root / part)
        if loose:
            self.notes = (
                f"{counted(loose, 'image')} directly in {shown(self.part)}, not in class folders:"
                " ignored",
            )

        above = len(self.part) - len(part)
        label_of = {}
        for name in sorted(label_of_class):
            for path in self._images_of(name):
                label_of[path[above:].replace(os.sep, "/")] = label_of_class[name]
        missing = {}
        for name in set(skip).difference(label_of):
            parts = PurePosixPath(name).parts
            in_class = len(parts) > 2 and parts[0] == part and parts[1] in label_of_class
            if in_class and self._is_image(str(root / name)):
                missing[name] = label_of_class[parts[1]]
        label_of |= missing

        # torchvision lists class by class, and the files of one folder after another
        def place(name: str) -> tuple[int, str, str]:
            directory, _, file_name = name.rpartition("/")
            return label_of[name], directory, file_name

        self.files = sorted(label_of, key=place) if missing else list(label_of)
        """Paths relative to ``data.path``."""
        self.labels = np.array([label_of[name] for name in self.files], dtype=np.int64)

    def _images_of(self, name: str) -> Iterator[str]:
        """The paths of the images of a class, in its folder and those below."""
        folders = os.walk(f"{self.part}{os.sep}{name}", followlinks=True)
        for folder, _, files in sorted(folders):
            for file in sorted(files):
                path = f"{folder}{os.sep}{file}"
                if self._is_image(path):
                    yield path

    def _is_image(self, path: str) -> bool:
        parts = path[len(self.part) + 1 :].replace(os.sep, "/").split("/")
        return is_image_file(path) and not any(map(_is_hidden, parts))


def is_image_file(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders in ``train`` or ``val``, sorted."""
    with os.scandir(folder) as entries:
        folders = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in folders if not _is_hidden(name))


def loose_images(folder: Path) -> int:
    """How many images are in ``train`` or ``val`` itself, where no class folder says what
    they show.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.is_dir()]
    return sum(bool(is_image_file(name)) and not _is_hidden(name) for name in names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def folder(config: DataConfig, split: str, augment: bool) -> Images:
    """The images in the folders ``train`` (split into train and held-out) and ``val``
    (the test split) below ``data.path``.

    Labels are positions in the sorted list of the class folders in ``train``; ``val`` may
    lack some of them.

    Raises DataError if a folder is missing or has no class folders with images, if a
    class has no training images, or if ``val`` has a class that ``train`` lacks.
    """
    root = data_folder(config)
    try:
        if split == "test":
            listed = _test_images(root)
            chosen = np.flatnonzero(~are_skipped(listed.files, config))
        else:
            listed = _training_images(root, config)
            chosen = split_indices(len(listed.files), config.held_out, split)
    except OSError as error:
        raise DataError(
            f"{shown(str(error.filename))} cannot be read ({error.strerror}): check its"
            " permissions."
        ) from error
    is_skipped = are_skipped(listed.files, config)[chosen]
    if is_skipped.all() and (len(chosen) or split == "test"):
        raise DataError(
            f"data.skip leaves no image of the {split} split in {shown(str(root))}: replace some of"
            " the images, or skip fewer."
        )
    return FolderImages(listed, chosen, config, augment)


def _training_images(root: Path, config: DataConfig) -> Listed:
    train = root / "train"
    _check_exists(train)
    listed = None
    if class_folders(train):
        listed = Listed(root, "train", None, config.skip)
    if listed is None or not listed.files:
        raise _no_images(train)

    kept = set(listed.labels[~are_skipped(listed.files, config)].tolist())
    empty = [name for label, name in enumerate(listed.names) if label not in kept]
    if empty:
        left = " besides those in data.skip" if config.skip else ""
        raise DataError(
            f"{shown(str(train))} has no images of {quoted(empty)}{left}: add some, or remove the"
            " class folders."
        )
    return listed


def _test_images(root: Path) -> Listed:
    val, train = root / "val", root / "train"
    _check_exists(val)
    own = class_folders(val)
    # without training classes, those of val are all there is to know
    classes = (class_folders(train) if train.is_dir() else []) or own
    others = [name for name in own if name not in set(classes)]
    if others:
        _check_empty(root, others, [name for name in classes if name not in set(own)])
    listed = Listed(root, "val", classes) if classes else None
    if listed is None or not listed.files:
        raise _no_images(val)
    return listed


def _check_empty(root: Path, others: Sequence[str], lacking: Sequence[str]) -> None:
    """Raise DataError if ``val`` has images of ``others``, which are no classes of
    training. ``lacking`` are classes that it lacks.
    """
    found = Listed(root, "val", others)
    labels = np.unique(found.labels)
    if len(labels):
        hint = f" (val lacks {quoted(lacking)})" if lacking else ""
        raise DataError(
            f"{shown(str(root / 'val'))} has images of"
            f" {quoted([others[label] for label in labels])},"
            f" but train has no such class{hint}: rename the folder as in train, or remove it."
        )


def _check_exists(part: Path) -> None:
    if not part.is_dir():
        reason = "is not a directory" if part.exists() else "does not exist"
        raise DataError(f"{shown(str(part))} {reason}: {_layout(part)}.")


def _no_images(part: Path) -> DataError:
    """The error of ``train`` or ``val`` without images in class folders."""
    loose = loose_images(part)
    if not loose:
        return DataError(f"{shown(str(part))} holds no class folders with images: {_layout(part)}.")
    return DataError(
        f"{shown(str(part))} holds {counted(loose, 'image')} directly, not in a folder per class"
        " (so"
        f" are the validation images of ImageNet as downloaded): move them into folders,"
        f" {part.name}/<class>/<image>."
    )


def _layout(part: Path) -> str:
    layout = f"lay the images out as {part.name}/<class>/<image>"
    if (part.parent / "annotations").is_dir():
        layout += " (a folder with annotations/ is data.name = 'coco')"
    return layout
