"""Images with boxes, in COCO's layout: the data of detection.

    data.path/annotations/instances_train2017.json   data.path/train2017/*.jpg     (or instances_train.json and train/)
    data.path/annotations/instances_val2017.json     data.path/val2017/*.jpg       (or instances_val.json and val/)

Augmentation is that of SSD (Liu et al., ECCV 2016, arXiv 1512.02325, section 2.2) by
torchvision's transforms, in the two presets of torchvision's reference training:
``ssd`` (photometric distortion, zoom-out, crop by IoU, flip) and ``ssdlite`` (crop and
flip), which is also MobileDet's recipe. What comes out of it becomes the network's
input as an evaluated image does (``data/geometry.py``): by default without keeping the
aspect ratio.

*Differences* from MobileDet's recipe (TensorFlow's ``ssd_random_crop``): a crop is
accepted by its IoU with an object, as in SSD, not by how much of the object it covers.

Images without objects are kept: they are background, in training and in evaluation.
Crowds are left out of training targets, where they would be taken for single objects,
and go into the ground truth, where they count neither for nor against a detection.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision import tv_tensors
from torchvision.transforms import v2

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.coco_file import Annotations, read_annotations
from hwnas.data.geometry import Geometry
from hwnas.data.images import Batch, Images, Request, split_indices
from hwnas.errors import DataError

LARGEST = 4
"""Training shrinks images to this many times the network's input: a crop of 0.3 of one
still has the input's size, and zooming out of a photograph of 12 million pixels, to 16
times its area, does not fill the memory.
"""


class CocoImages(Images):
    """Images decoded on demand, with the boxes of their objects.

    A batch is ``x`` float32 [N, 3, R, R], normalised, and ``y`` float32 [N, M, 5]: x1,
    y1, x2, y2 in pixels of the network's input and the class index, -1 in the rows that
    fill up images with less than M objects. Boxes that a crop cuts off, and those
    smaller than a pixel of the network's input, are left out. ``labels`` holds the
    class of every object, crowds included.
    """

    geometry: Geometry

    def __init__(
        self,
        annotations: Annotations,
        chosen: np.ndarray,
        folder: Path,
        config: DataConfig,
        augment: bool,
    ) -> None:
        self.annotations, self.chosen, self.folder = annotations, chosen, folder
        self.channels = config.channels
        self.geometry = geometry = Geometry.of(config)
        self.resizing = geometry.words
        self.names = tuple(annotations.categories.values())
        self.category_ids = tuple(annotations.categories)
        self.ids, self.sizes = annotations.ids[chosen], annotations.sizes[chosen]
        self.labels = self.labels_of(np.arange(len(chosen)))
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (config.mean, config.std)
        )
        self.augment = config.augment if augment else "none"
        crop, out = [_Crop(), v2.RandomHorizontalFlip()], v2.RandomZoomOut(list(geometry.border))
        augmented = {
            "ssd": [v2.RandomPhotometricDistort(), out, *crop],
            "ssdlite": crop,
            "none": [],
        }[self.augment]
        fitted = v2.Lambda(geometry.fitted, tv_tensors.Image, tv_tensors.BoundingBoxes)
        tidy = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=itemgetter(2))]
        self.transform = v2.Compose([v2.ToImage(), *augmented, fitted, *tidy])

    def __len__(self) -> int:
        return len(self.chosen)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The classes of the objects of some images, one after another."""
        classes = [
            self.annotations.classes[self.annotations.objects(image)]
            for image in self.chosen[indices]
        ]
        return np.concatenate([*classes, np.empty(0, dtype=np.int64)])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        images, targets = zip(*(self._image(index, draw) for index, draw in requests), strict=True)
        x_NCHW = torch.stack(images).float().div_(255.0).sub_(self.mean).div_(self.std)
        return x_NCHW, pad_sequence(list(targets), batch_first=True, padding_value=-1.0)

    def _image(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        """One image uint8 [C, R, R], augmented, and its targets [objects, 5]."""
        image = self._decoded(index)
        width, height = image.size
        objects = self.annotations.objects(self.chosen[index])
        kept = ~self.annotations.crowds[objects]
        x, y, w, h = (
            self.annotations.boxes[objects][kept].T
            * (np.tile([width, height], 2) / np.tile(self.sizes[index], 2))[:, None]
        )
        corners = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)).float()
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        classes = torch.from_numpy(self.annotations.classes[objects][kept])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed((draw + index) % 2**63)
            pixels, boxes, classes = self.transform(image, boxes, classes)
        return pixels, torch.cat([boxes, classes[:, None].float()], dim=1)

    def _decoded(self, index: int) -> Image.Image:
        """An image as it is stored: like torchvision's, it is not turned as its EXIF
        data say, and all kinds become RGB.
        """
        path = self.folder / self.annotations.file_names[self.chosen[index]]
        try:
            with Image.open(path) as image:
                size = image.size
                if self.augment != "none":
                    image.thumbnail(
                        (LARGEST * self.geometry.resolution,) * 2, Image.Resampling.BILINEAR
                    )
                decoded = image.convert("RGB" if self.channels == 3 else "L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {path} does not decode ({error}): replace it, or remove it from"
                f" {self.annotations.path}."
            ) from error
        if size != tuple(self.sizes[index]):
            raise DataError(
                f"image {path} is {size[0]} x {size[1]} pixels as stored, but"
                f" {self.annotations.path} says {self.sizes[index][0]} x {self.sizes[index][1]}, so"
                " its boxes would be elsewhere: correct one of them, and save images turned that"
                " rely on their EXIF orientation."
            )
        return decoded

    def ground_truth(self, indices: Sequence[int] | np.ndarray | None = None) -> dict[str, Any]:
        """The COCO ground truth of the split, or of some of its images: what
        ``coco_eval.evaluate`` compares with.
        """
        return self.annotations.ground_truth(
            (self.chosen if indices is None else self.chosen[indices]).tolist()
        )

    def in_photograph(self, index: int, boxes: np.ndarray) -> np.ndarray:
        """Boxes [D, 4] in pixels of the network's input -> float64 [D, 4] in pixels of
        the image as it is stored.
        """
        width, height = self.sizes[index].tolist()
        return self.geometry.to_photograph(boxes, width, height)

    def results(
        self, index: int, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray
    ) -> list[dict[str, Any]]:
        """The detections in one image as rows of a COCO results file.

        ``boxes`` [D, 4] are x1, y1, x2, y2 in pixels of the network's input,
        ``classes`` [D] indices from 0; the rows have pixels of the image as it is
        stored, and COCO's category ids.
        """
        x1, y1, x2, y2 = self.in_photograph(index, boxes).T
        return [
            {
                "image_id": int(self.ids[index]),
                "category_id": self.category_ids[label],
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(
                np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).tolist(),
                np.asarray(scores, dtype=np.float64).tolist(),
                np.asarray(classes).tolist(),
                strict=True,
            )
        ]


class _Crop(v2.RandomIoUCrop):  # type: ignore[misc]
    """torchvision's, which divides by zero on images below 4 pixels, and tries hundreds
    of crops in vain where there is no box.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image, boxes = flat_inputs[:2]
        possible = len(boxes) and min(image.shape[-2:]) * self.min_scale >= 1
        return dict(super().make_params(flat_inputs)) if possible else {}


def coco(config: DataConfig, split: str, augment: bool) -> Images:
    """The training images (split into train and held-out) and the validation images
    (the test split) below ``data.path``.
    """
    root, part = data_folder(config), "val" if split == "test" else "train"
    annotations, folder = _annotated(root, part)
    if len(annotations.categories) != config.classes:
        raise DataError(
            f"{annotations.path} has {len(annotations.categories)} categories, but data.classes ="
            f" {config.classes}: set data.classes to {len(annotations.categories)}."
        )
    if part == "val" and (trained := _name(root, "train")) is not None:
        _refuse_other_categories(annotations, read_annotations(_file(root, trained)))
    absent = [name for name in annotations.file_names if not (folder / name).is_file()]
    if absent:
        raise DataError(
            f"{annotations.path} names {len(annotations.file_names)} images, of which {len(absent)}"
            f" are not in {folder} (first: {absent[0]!r}): add them there, or remove them from the"
            " file."
        )
    total = len(annotations.ids)
    chosen = np.arange(total) if split == "test" else split_indices(total, config.held_out, split)
    return CocoImages(annotations, chosen, folder, config, augment)


def training_categories(config: DataConfig) -> dict[int, str]:
    """Names by category id of the training images: the classes there are."""
    annotations, _ = _annotated(data_folder(config), "train")
    return annotations.categories


def _annotated(root: Path, part: str) -> tuple[Annotations, Path]:
    """The annotations of ``train`` or ``val``, and the folder of its images. Raises
    DataError where there are none.
    """
    name = _name(root, part)
    if name is None:
        raise DataError(
            f"{root} has no annotations/instances_{part}2017.json (or instances_{part}.json): lay"
            f" the data out as COCO's, with the images in {part}2017 (or {part})."
        )
    return read_annotations(_file(root, name)), root / name


def _name(root: Path, part: str) -> str | None:
    """COCO's name of ``train`` or ``val``, or the plain one, whichever is there."""
    return next((name for name in (f"{part}2017", part) if _file(root, name).is_file()), None)


def _file(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _refuse_other_categories(found: Annotations, trained: Annotations) -> None:
    """Classes are positions in the sorted list of category ids: one less in one file
    would shift them in silence.
    """
    odd = sorted({key for key, _ in found.categories.items() ^ trained.categories.items()})
    if odd:
        raise DataError(
            f"{found.path} and {trained.path} differ in categories (ids"
            f" {', '.join(map(str, odd[:3]))}), so classes would not agree: give both the same"
            " list."
        )
