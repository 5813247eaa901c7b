"""Mosaics of four training images for detectors: Bochkovskiy et al., YOLOv4 (2020, arXiv
2004.10934), section 3.3.

Four images, each augmented and resized as usual to H x W pixels, are laid out in one of
2H x 2W. A window of the same shape, one to two times as large as an image, is cut out of it
and scaled to H x W, so that the point where the four meet is anywhere in the window, no border is
needed, and objects have 0.5 to 1 times their usual size.

A box moves along with its object and is clipped to the window. It is left out if less
than a tenth of its area remains, or if a side is shorter than a pixel.

The paper gives neither the sizes of the parts nor the rule for boxes that are cut; those are
ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from hwnas.data.images import Batch, Images, Request

LEAST_PART = 0.1
"""The part of a box's area that has to remain."""

CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Where the four images lie, (right, down) in units of their size."""


class Mosaic(Images):
    """Images with boxes, each of which becomes one of the four of a mosaic with the given
    ``probability``.

    The other three are drawn from all images, with repetition. What is drawn follows from
    the request alone, and without a mosaic the image is the one of ``images``.
    """

    def __init__(self, images: Images, probability: float) -> None:
        self.images = images
        self.probability = probability
        self.labels = images.labels
        self.names = images.names
        self.resizing = images.resizing
        self.geometry = images.geometry

    def __len__(self) -> int:
        return len(self.images)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The classes of all objects of the images at ``indices``, image by image."""
        return self.images.labels_of(indices)

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """Read a whole batch, one mosaic after the other: no more than the images of one
        are in memory besides the batch.
        """
        images: list[Tensor] = []
        targets: list[Tensor] = []
        for index, draw in requests:
            # the batch has one seed, so the index keeps its images apart
            rng = np.random.default_rng([draw, index])
            if rng.random() < self.probability:
                x_CHW, y_M5 = self._mosaic((index, draw), rng)
            else:
                x_1CHW, y_1M5 = self.images.__getitems__([(index, draw)])
                x_CHW, y_M5 = x_1CHW[0], y_1M5[0]
            images.append(x_CHW)
            targets.append(y_M5)
        return torch.stack(images), torch.nn.utils.rnn.pad_sequence(
            targets, batch_first=True, padding_value=-1.0
        )

    def _mosaic(self, request: Request, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A mosaic with the requested image at its top left: float32 [C, H, W], and its
        targets [objects, 5].
        """
        others = rng.integers(len(self), size=3).tolist()
        draws = rng.integers(2**62, size=3).tolist()
        requests = [request, *zip(others, draws, strict=True)]
        x_4CHW, y_4M5 = self.images.__getitems__(requests)
        height, width = x_4CHW.shape[-2:]
        upper_CHW = torch.cat([x_4CHW[0], x_4CHW[1]], dim=2)
        lower_CHW = torch.cat([x_4CHW[2], x_4CHW[3]], dim=2)
        canvas_CHW = torch.cat([upper_CHW, lower_CHW], dim=1)
        corners_44 = (torch.tensor(CORNERS) * torch.tensor([width, height])).repeat(1, 2)
        boxes_4M4 = y_4M5[..., :4] + corners_44[:, None]
        is_object_4M = y_4M5[..., 4] >= 0
        boxes = BoundingBoxes(
            boxes_4M4[is_object_4M], format="XYXY", canvas_size=(2 * height, 2 * width)
        )
        classes = y_4M5[..., 4][is_object_4M]

        rows = int(rng.integers(height, 2 * height, endpoint=True))
        columns = round(rows * width / height)
        top = int(rng.integers(2 * height - rows, endpoint=True))
        left = int(rng.integers(2 * width - columns, endpoint=True))
        x_CHW = F.resized_crop(
            canvas_CHW, top, left, rows, columns, [height, width], antialias=True
        )
        cut = F.clamp_bounding_boxes(F.crop(boxes, top, left, rows, columns))
        is_seen = box_area(cut) >= LEAST_PART * box_area(boxes)
        scaled = F.resize(cut, [height, width])
        _, is_large = F.sanitize_bounding_boxes(scaled, min_size=1.0)
        kept = is_seen & is_large
        return x_CHW, torch.cat([scaled[kept], classes[kept, None]], dim=1)
