"""Detection networks in torch: backbone, extras and heads of an architecture with a detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.detector import Detector, Scores
from hwnas.nn.blocks import build, initialise

Outputs = tuple[Tensor, Tensor]
"""Class logits [N, anchors, classes + 1], the background first, and box codes [N,
anchors, 4]: map by map, row by row, cell by cell.
"""

CODE_SIZE = 4
JOINED = 4
"""Maps whose predictions are joined at once: XNNPACK, which runs LiteRT's files, joins
up to five, and leaves more to slower kernels.
"""
PREDICTOR_STD = 0.03
RARE_CLASS_BIAS = -4.6
"""The logit of a score of 1 %, where the class predictors of a focal loss begin."""


class DetectionNetwork(nn.Module):
    """An architecture with a detector in torch. Its blocks have the names of a
    ``ClassificationNetwork``'s, so that their weights can be inherited.

    Example:
        >>> from hwnas.core.published import published
        >>> network = DetectionNetwork(published("ssdlite320_mobilenet_v3_large")).eval()
        >>> [tuple(output.shape) for output in network(torch.zeros(1, 3, 320, 320))]
        [(1, 3234, 91), (1, 3234, 4)]
    """

    def __init__(self, arch: Architecture, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        detector = detector_of(arch)
        self.arch = arch
        self.taps = frozenset(detector.taps)
        self.blocks = nn.Sequential(*(build(op, bn_eps=arch.bn_eps) for op in arch.blocks))
        self.extras = nn.Sequential(*(build(op, bn_eps=arch.bn_eps) for op in detector.extras))
        self.heads = nn.ModuleList(build(op, bn_eps=arch.bn_eps) for op in detector.heads)
        if generator is not None:
            initialise(self.blocks, generator)
            initialise_detector(self.extras, self.heads, detector.scores, generator)

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: a detector has no classifier, and so none."""
        return set()

    def forward(self, x_NCHW: Tensor) -> Outputs:
        """Images [N, channels, size, size] -> class logits [N, anchors, classes + 1]
        and box codes [N, anchors, 4].
        """
        maps = []
        for position, block in enumerate(self.blocks):
            x_NCHW = block(x_NCHW)
            if position in self.taps:
                maps.append(x_NCHW)
        for extra in self.extras:
            x_NCHW = extra(x_NCHW)
            maps.append(x_NCHW)
        return predictions(self.heads, maps, detector_of(self.arch).classes)


def predictions(heads: nn.ModuleList, maps: list[Tensor], classes: int) -> Outputs:
    """What ``heads`` predict from feature maps [N, C, size, size], one row per anchor
    in torchvision's order.
    """
    return predictions_of([head(x_NCHW) for head, x_NCHW in zip(heads, maps, strict=True)], classes)


def predictions_of(outputs: Sequence[tuple[Tensor, ...]], classes: int) -> Outputs:
    """The outputs of the heads, class logits and box codes of each map, as one row per anchor."""
    logits, codes = zip(
        *((_rows(logits, classes + 1), _rows(codes, CODE_SIZE)) for logits, codes in outputs),
        strict=True,
    )
    return _joined(logits), _joined(codes)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one after another."""
    joined = list(parts)
    while len(joined) > 1:
        joined[:JOINED] = [torch.cat(joined[:JOINED], dim=1)]
    return joined[0]


def _rows(x_NCHW: Tensor, columns: int) -> Tensor:
    """[N, anchors * columns, H, W] -> [N, H * W * anchors, columns]."""
    return x_NCHW.permute(0, 2, 3, 1).reshape(x_NCHW.shape[0], -1, columns)


@torch.no_grad()
def initialise_detector(
    extras: nn.Module, heads: nn.ModuleList, scores: Scores, generator: torch.Generator
) -> None:
    """Extras and heads as torchvision and MobileDet begin them: N(0, 0.03), zero
    biases; of a sigmoid's classes -4.6.
    """
    for part in (*extras.modules(), *heads.modules()):
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0.0, PREDICTOR_STD, generator=generator)
            if part.bias is not None:
                part.bias.zero_()
    if scores == "sigmoid":
        for head in heads:
            head.get_submodule("classes.predict.conv").get_parameter("bias").fill_(RARE_CLASS_BIAS)


def detector_of(arch: Architecture) -> Detector:
    """The detector of an architecture that has one."""
    assert arch.detector is not None, f"{arch.name} has no detector"
    return arch.detector
