"""What an exported detector computes after its network: scores from logits, and boxes
from codes, for all kinds of detectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hwnas.core.detection import detector_of
from hwnas.core.detector import CODE_SIZE
from hwnas.nn.anchors import anchors_of
from hwnas.nn.detector import DetectionNetwork

LARGEST_GROWTH = math.log(1000 / 16)
"""Upper limit of the codes of width and height after scaling, as in torchvision."""


class Decoded(nn.Module):
    """A detector with one output [N, anchors, 4 + classes]: x1, y1, x2, y2 in pixels,
    clipped to the image, then a score per class.

    Anchors and classes are in the network's order. There is no score for the
    background.
    """

    def __init__(self, network: DetectionNetwork) -> None:
        super().__init__()
        self.network = network
        height, width = network.arch.size_HW
        detector = detector_of(network.arch)
        self.sigmoid = detector.scores == "sigmoid"
        self.background = detector.background
        self.register_buffer("edges_4", torch.tensor([width, height, width, height]).float())
        self.register_buffer("centres_A4", centres(network))
        self.register_buffer("scales_4", torch.tensor(detector.code_scales))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images [N, channels, H, W] -> [N, anchors, 4 + classes]."""
        logits, codes = self.network(x_NCHW)
        # the softmax needs the background, so it is dropped only afterwards
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        scores = scores[..., self.background :]
        centres_A4 = self.get_buffer("centres_A4")
        codes = codes / self.get_buffer("scales_4")
        centre = codes[..., :2] * centres_A4[:, 2:] + centres_A4[:, :2]
        half = codes[..., 2:].clamp(max=LARGEST_GROWTH).exp() * (0.5 * centres_A4[:, 2:])
        boxes = torch.cat((centre - half, centre + half), dim=-1).clamp(min=0.0)
        boxes = torch.minimum(boxes, self.get_buffer("edges_4"))
        return torch.cat((boxes, scores), dim=-1)


def centres(network: DetectionNetwork) -> Tensor:
    """The anchors [A, 4]: centre x, centre y, width, height in pixels."""
    boxes_A4 = anchors_of(network.arch)
    sides = boxes_A4[:, 2:] - boxes_A4[:, :2]
    return torch.cat((boxes_A4[:, :2] + 0.5 * sides, sides), dim=1)


def columns(network: DetectionNetwork) -> int:
    """The number of values per anchor in the decoded output."""
    return CODE_SIZE + network.arch.classes
