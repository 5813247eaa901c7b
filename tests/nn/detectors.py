"""A small detector with four feature maps, and images with boxes for it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.detector import DetectorSpec
from hwnas.core.fcos import FCOSSpec
from hwnas.core.ops import Op
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.nn.detector import DetectionNetwork

BLOCKS = tuple(
    Op.parse(key)
    for key in (
        "conv-h64-i3-o16-k3-s2-relu6",
        "mbconv-h32-i16-o24-m48-k3-s2-relu6",
        "mbconv-h16-i24-o24-m72-k3-q24-relu6-id",
        "mbconv-h16-i24-o40-m72-k5-s2-relu6",
    )
)
Kind = Literal["softmax", "sigmoid", "fcos"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPECS: dict[Kind, DetectorSpec] = {
    "softmax": SSDLiteSpec(extras=(32, 16), scores="softmax"),
    "sigmoid": SSDLiteSpec(extras=(32, 16), scores="sigmoid"),
    "fcos": FCOSSpec(channels=16),
}
PADDING = [0.0, 0.0, 0.0, 0.0, -1.0]


def small_arch(classes: int = 3, kind: Kind = "softmax") -> Architecture:
    """A detector with four feature maps, for 64 px images."""
    return with_detector(
        Architecture(name="small", blocks=BLOCKS),
        classes,
        SPECS[kind],
        resolution=64,
    )


def small_network(classes: int = 3, kind: Kind = "softmax", seed: int = 0) -> DetectionNetwork:
    return DetectionNetwork(
        small_arch(classes, kind), generator=torch.Generator().manual_seed(seed)
    )


def batch(classes: int = 3, count: int = 4) -> tuple[Tensor, Tensor]:
    """Random images with one to four boxes each, padded to four."""
    generator = torch.Generator().manual_seed(1)
    x_NCHW = torch.randn(count, 3, 64, 64, generator=generator)
    corner = torch.rand(count, 4, 2, generator=generator) * 40
    size = torch.rand(count, 4, 2, generator=generator) * 20 + 4
    label = torch.randint(0, classes, (count, 4, 1), generator=generator)
    y_NM5 = torch.cat((corner, corner + size, label), dim=-1)
    for image in range(count):
        y_NM5[image, 1 + image % 4 :] = torch.tensor(PADDING)
    return x_NCHW, y_NM5
