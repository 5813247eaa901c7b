"""Images with boxes in COCO's layout, for detection.

    data.path/annotations/instances_train2017.json   data.path/train2017/*.jpg     (or instances_train.json and train/)
    data.path/annotations/instances_val2017.json     data.path/val2017/*.jpg       (or instances_val.json and val/)

Augmentation uses torchvision's transforms. An augmented image becomes the network's
input in the same way as an evaluated one (``data/geometry.py``): by default without
keeping the aspect ratio.

ssdlite  A crop by IoU and a flip: SSD (Liu et al., ECCV 2016, arXiv 1512.02325, section
         2.2) as in torchvision's reference training, and MobileDet's recipe.
ssd      Photometric distortion, zoom-out, then as ssdlite: another preset of torchvision.
lsj      Large-scale jitter (Ghiasi et al., CVPR 2021, arXiv 2012.07177): the whole image
         at 0.1 to 2 times the network's input, then a window of the input's size, and a flip.
jitter   As lsj with 0.8 to 1.25 times the input, and with photometric distortion: our
         choice, for small data.

*Differences* from MobileDet's recipe (TensorFlow's ``ssd_random_crop``): a crop is
accepted by its IoU with an object, as in SSD, not by how much of the object it covers.
*Differences* from torchvision's ``lsj``: a smaller image lies anywhere in its border
instead of at the top left, and its aspect ratio is the evaluated one.

Images without objects are kept; they are background in training and in evaluation.
Crowds are left out of training targets, which would treat them as single objects. The
ground truth contains them, where they count neither for nor against a detection.

Images in ``data.skip`` keep their places among the training images, so that all others
keep theirs, whether the skipped files still exist or not. In the place of each, the next
image of the split is read, with its boxes. The test split goes without them, and so does
every evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from hwnas import printable
from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.coco_file import Annotations, Id, read_annotations, sort_key
from hwnas.data.coco_paths import image_paths
from hwnas.data.decoding import decode
from hwnas.data.geometry import Geometry
from hwnas.data.images import (
    Batch,
    Images,
    Request,
    are_skipped,
    read_instead,
    split_indices,
)
from hwnas.data.wording import listed, quoted, shown
from hwnas.errors import DataError
from hwnas.lazy import LazyModule, torch

if TYPE_CHECKING:
    from torch import Tensor

augmentations = LazyModule("hwnas.data.augmentations")
tv_tensors = LazyModule("torchvision.tv_tensors")
v2 = LazyModule("torchvision.transforms.v2")

LARGEST = 4
"""Training shrinks images to at most this many times the network's input. A crop of 0.3
of such an image still has the input's size. Zooming out makes an image up to 16 times
as large, which would fill the memory with a photograph of 12 million pixels.
"""

JITTER = (0.8, 1.25)
"""The scales of ``jitter``: at most a quarter larger, or smaller by the same factor."""

LARGE_JITTER = (0.1, 2.0)
"""The scales of ``lsj``: the paper's, and torchvision's default."""


class CocoImages(Images):
    """Images with the boxes of their objects, decoded on demand.

    A batch is ``x`` float32 [N, 3, R, R], normalised, and ``y`` float32 [N, M, 5]: x1,
    y1, x2, y2 in pixels of the network's input and the class index, or -1 in the rows
    that pad images with fewer than M objects. Boxes outside a crop and boxes smaller
    than a pixel of the network's input are left out. ``labels`` holds the class of
    every object, including crowds.

    ``paths`` are the files of all images of ``annotations``, relative to ``data.path``,
    and ``chosen`` the positions of those of the split, int64 [N].
    """

    geometry: Geometry

    def __init__(
        self,
        annotations: Annotations,
        paths: Sequence[str],
        chosen: np.ndarray,
        config: DataConfig,
        augment: bool,
    ) -> None:
        self.annotations = annotations
        self.root = data_folder(config)
        self._files = [paths[position] for position in chosen]
        self.skipped = are_skipped(self._files, config)
        read = read_instead(self.skipped)
        self.chosen = chosen = chosen[read]
        self.paths = [self._files[position] for position in read]
        """What is read for each image."""
        self.channels = config.channels
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.names = tuple(annotations.categories.values())
        self.category_ids = tuple(annotations.categories)
        self.ids = annotations.ids[chosen]
        self.sizes = annotations.sizes[chosen]
        self.labels = self.labels_of(np.arange(len(chosen)))
        self.mean = torch.tensor(config.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(config.std).view(1, -1, 1, 1)
        self.augment = config.augment if augment else "none"

        distort = v2.RandomPhotometricDistort()
        zoom_out = v2.RandomZoomOut(list(geometry.border))
        crop = augmentations.SafeIoUCrop()
        window = v2.RandomCrop(geometry.sides, pad_if_needed=True, fill=list(geometry.border))
        flip = v2.RandomHorizontalFlip()
        augmentation = {
            "ssd": [distort, zoom_out, crop, flip],
            "ssdlite": [crop, flip],
            # distorted when it is small, which is faster, and has no border yet
            "jitter": [augmentations.InputJitter(geometry, JITTER), distort, window, flip],
            "lsj": [augmentations.InputJitter(geometry, LARGE_JITTER), window, flip],
            "none": [],
        }[self.augment]
        fit = v2.Lambda(geometry.fitted, tv_tensors.Image, tv_tensors.BoundingBoxes)
        # last, because the geometry may also cut boxes off
        clean_boxes = [
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(labels_getter=itemgetter(2)),
        ]
        self.transform = v2.Compose([v2.ToImage(), *augmentation, fit, *clean_boxes])

    def __len__(self) -> int:
        return len(self.chosen)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The classes of all objects of the images at ``indices``, image by image."""
        labels: np.ndarray = self.annotations.classes[
            self.annotations.objects_of(self.chosen[indices])
        ]
        return labels

    def files(self) -> list[str]:
        """The images' files, relative to ``data.path``; with those in ``data.skip``."""
        return self._files

    def label_files(self) -> list[Path]:
        """The annotation file."""
        return [self.annotations.path]

    def check_size(self, position: int, size: tuple[int, int]) -> None:
        """Raise DataError if an image, which is stored with ``size`` (width, height) in
        pixels, is annotated with another.
        """
        annotated = tuple(self.sizes[position].tolist())
        if size != annotated:
            raise DataError(
                f"image {shown(str(self.root / self.paths[position]))} is {size[0]} x {size[1]}"
                f" pixels as stored, but {self.annotations.path} says {annotated[0]} x"
                f" {annotated[1]}, so its boxes would be in the wrong place: correct one of them,"
                " and rotate images that rely on their EXIF orientation."
            )

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images: list[Tensor] = []
        targets: list[Tensor] = []
        for index, draw in requests:
            image, target = self._image(index, draw)
            images.append(image)
            targets.append(target)
        x_NCHW = torch.stack(images).float().div_(255.0).sub_(self.mean).div_(self.std)
        return x_NCHW, torch.nn.utils.rnn.pad_sequence(
            targets, batch_first=True, padding_value=-1.0
        )

    def _image(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        """One image uint8 [C, R, R], augmented, and its targets [objects, 5]."""
        image = self._decoded(index)
        width, height = image.size
        objects = self.annotations.objects(self.chosen[index])
        kept = ~self.annotations.crowds[objects]
        # the decoded image may be smaller than the annotated one
        factors = np.tile([width, height], 2) / np.tile(self.sizes[index], 2)
        x, y, w, h = self.annotations.boxes[objects][kept].T * factors[:, None]
        corners = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)).float()
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        classes = torch.from_numpy(self.annotations.classes[objects][kept])
        # torchvision draws from the global generator, whose state must not change
        with torch.random.fork_rng(devices=[]):
            # The batch has one seed, so the index keeps its images apart. Not
            # torch.manual_seed, which takes as long as the rest if PyTorch was built for CUDA.
            torch.default_generator.manual_seed((draw + index) % 2**63)
            pixels, boxes, classes = self.transform(image, boxes, classes)
        return pixels, torch.cat([boxes, classes[:, None].float()], dim=1)

    def _decoded(self, index: int) -> Image:
        """An image in the orientation in which it is stored, in RGB or grey."""
        # an evaluated image is resized once, from all its pixels
        most = None if self.augment == "none" else LARGEST * max(self.geometry.sides)
        image, size = decode(self.root, self.paths[index], self.channels, most=most)
        self.check_size(index, size)
        return image

    def ground_truth(self, indices: Sequence[int] | np.ndarray | None = None) -> dict[str, Any]:
        """The COCO ground truth of the split, or of the images at ``indices``, for
        ``coco_eval.evaluate`` to compare with. Images that are read in the place of others
        are left out: they are already in it.
        """
        positions = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        kept = positions[~self.skipped[positions]]
        return self.annotations.ground_truth(self.chosen[kept])

    def in_photograph(self, index: int, boxes: np.ndarray) -> np.ndarray:
        """Boxes [D, 4] in pixels of the network's input -> float64 [D, 4] in pixels of
        the stored image.
        """
        width, height = self.sizes[index].tolist()
        return self.geometry.to_photograph(boxes, width, height)

    def results(
        self, index: int, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray
    ) -> list[dict[str, Any]]:
        """The detections in one image as rows of a COCO results file.

        ``boxes`` [D, 4] are x1, y1, x2, y2 in pixels of the network's input, and
        ``classes`` [D] are indices from 0. The rows have pixels of the stored image and
        the file's own ids. An image that is read in the place of another has none, see
        ``ground_truth``.
        """
        if self.skipped[index]:
            return []
        x1, y1, x2, y2 = self.in_photograph(index, boxes).T
        bboxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).tolist()
        score_list = np.asarray(scores, dtype=np.float64).tolist()
        class_list = np.asarray(classes).tolist()
        rows: list[dict[str, Any]] = []
        for bbox, score, label in zip(bboxes, score_list, class_list, strict=True):
            rows.append(
                {
                    "image_id": self.ids[index],
                    "category_id": self.category_ids[label],
                    "bbox": bbox,
                    "score": score,
                }
            )
        return rows


def coco(config: DataConfig, split: str, augment: bool) -> Images:
    """The training images (split into train and held-out) and the validation images
    (the test split) below ``data.path``. Warns of categories that cannot be learned.

    Raises DataError if annotations or images are missing, or if the categories of the
    two parts or their number differ.
    """
    root = data_folder(config)
    part = "val" if split == "test" else "train"
    annotations, folder = _annotated(root, part)
    if len(annotations.categories) != config.classes:
        raise DataError(
            f"{annotations.path} has {len(annotations.categories)} categories, but data.classes ="
            f" {config.classes}: set data.classes to {len(annotations.categories)}."
        )
    train_name = _name(root, "train")
    if part == "val" and train_name is not None:
        _check_same_categories(annotations, read_annotations(_file(root, train_name)))
    paths = image_paths(
        annotations.file_names,
        folder,
        annotations.path,
        skip=frozenset(config.skip),
        allow_outside=config.allow_outside,
    )

    skipped = are_skipped(paths, config)
    if split == "test":
        chosen = np.flatnonzero(~skipped)
    else:
        chosen = split_indices(len(paths), config.held_out, split)
        _warn_of_unlearnable(annotations, np.flatnonzero(~skipped))
    # a split without images has other reasons
    if skipped[chosen].all() and (len(chosen) or split == "test"):
        raise DataError(
            f"data.skip leaves no image of the {split} split in {annotations.path}: replace some"
            " of the images, or skip fewer."
        )
    return CocoImages(annotations, paths, chosen, config, augment)


def _warn_of_unlearnable(annotations: Annotations, images: np.ndarray) -> None:
    """Warn if training ``images`` have no objects of some categories, or only crowds."""
    names = list(annotations.categories.values())
    rows = annotations.objects_of(images)
    classes, crowds = annotations.classes[rows], annotations.crowds[rows]
    objects = np.bincount(classes, minlength=len(names))
    single = np.bincount(classes[~crowds], minlength=len(names))
    without = [name for name, count in zip(names, objects, strict=True) if count == 0]
    if without:
        warnings.warn(
            f"{annotations.path} has no objects of {len(without)} of its {len(names)} categories"
            f" ({quoted(without)}), so the network cannot learn to find any: annotate some, or"
            " remove the categories from the files of both parts.",
            stacklevel=2,
        )
    only_crowds = np.flatnonzero((objects > 0) & (single == 0))
    if len(only_crowds):
        crowded = [names[label] for label in only_crowds]
        warnings.warn(
            f"{annotations.path} has only crowds (iscrowd = 1) of {len(crowded)} of its"
            f" {len(names)} categories ({quoted(crowded)}), from which the network cannot learn:"
            " annotate single objects, or remove the categories from the files of both parts.",
            stacklevel=2,
        )


def training_categories(config: DataConfig) -> dict[Id, str]:
    """Category id -> name of all classes of the training images."""
    annotations, _ = _annotated(data_folder(config), "train")
    return annotations.categories


def _annotated(root: Path, part: str) -> tuple[Annotations, Path]:
    """The annotations of ``train`` or ``val``, and the folder of its images.

    Raises DataError if there are no annotations.
    """
    name = _name(root, part)
    if name is None:
        raise DataError(
            f"{root} has no annotations/instances_{part}2017.json (or instances_{part}.json): lay"
            f" the data out as COCO's, with the images in {part}2017 (or {part})."
        )
    return read_annotations(_file(root, name)), root / name


def _name(root: Path, part: str) -> str | None:
    """COCO's own name of ``train`` or ``val`` or the plain one, whichever exists."""
    for name in (f"{part}2017", part):
        if _file(root, name).is_file():
            return name
    return None


def _file(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _check_same_categories(annotations: Annotations, train: Annotations) -> None:
    """Raise DataError if the categories differ from those of training.

    Classes are positions in the sorted list of category ids, so a category that is
    missing in one file would silently shift the others.
    """
    differing = annotations.categories.items() ^ train.categories.items()
    if differing:
        ids = sorted({category_id for category_id, _ in differing}, key=sort_key)
        quoted_ids = listed([printable.quoted(key) for key in ids])
        raise DataError(
            f"{annotations.path} and {train.path} differ in categories (ids {quoted_ids}), so"
            " classes would not agree: give both the same list."
        )
