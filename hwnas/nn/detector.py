"""Detection networks in torch: backbone, neck and heads of an architecture with a
detector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.detection import detector_of
from hwnas.core.detector import CODE_SIZE, JOINED, Scores
from hwnas.nn.blocks import build, initialise
from hwnas.nn.freezing import Freezable
from hwnas.nn.graph import run_graph

Outputs = tuple[Tensor, Tensor]
"""Class logits [N, anchors, classes], with SSDLite [N, anchors, classes + 1] with the
background first, and box codes [N, anchors, 4]. Anchors are ordered by feature map, then
by row, then by cell.
"""

PREDICTOR_STD = 0.03
"""Standard deviation of the initial weights of necks and predictors."""
RARE_CLASS_BIAS = -4.6
"""Initial bias of the class predictors of a focal loss: the logit of a score of 1 %."""


class DetectionNetwork(Freezable):
    """The torch module of an architecture with a detector. Its blocks have the same
    names as those of a ``ClassificationNetwork``, so that it can inherit their weights.

    Example:
        >>> from hwnas.core.published import published
        >>> arch = published("ssdlite320_mobilenet_v3_large")
        >>> network = DetectionNetwork(arch).eval()
        >>> [tuple(output.shape) for output in network(torch.zeros(1, 3, 320, 320))]
        [(1, 3234, 91), (1, 3234, 4)]
    """

    def __init__(self, arch: Architecture, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        detector = detector_of(arch)
        self.arch = arch
        self.taps = frozenset(detector.taps)
        self.blocks = nn.Sequential(*(build(op, bn_eps=arch.bn_eps) for op in arch.blocks))
        self.add_module(
            detector.NECK, nn.Sequential(*(build(op, bn_eps=arch.bn_eps) for op in detector.neck))
        )
        self.heads = nn.ModuleList(build(op, bn_eps=arch.bn_eps) for op in detector.heads)
        if generator is not None:
            initialise(self.blocks, generator)
            initialise_detector(self.neck_layers, self.heads, detector.scores, generator)

    @property
    def neck_layers(self) -> nn.Module:
        """The modules of the neck's ops; their name in checkpoints is the detector's
        ``NECK``.
        """
        return self.get_submodule(detector_of(self.arch).NECK)

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): none, because a
        detector has no classifier.
        """
        return set()

    def forward(self, x_NCHW: Tensor) -> Outputs:
        """Images [N, channels, size, size] -> the ``Outputs``."""
        maps = []
        for position, block in enumerate(self.blocks):
            x_NCHW = block(x_NCHW)
            if position in self.taps:
                maps.append(x_NCHW)
        detector = detector_of(self.arch)
        maps = run_graph(detector.steps, self.neck_layers.children(), maps, detector.sources)
        return predictions(self.heads, maps, detector.logits)


def predictions(heads: nn.ModuleList, maps: Sequence[Tensor], logits: int) -> Outputs:
    """What ``heads`` predict from feature maps [N, C, H, W]: one row per anchor,
    in torchvision's order. Each anchor has that many ``logits``.
    """
    outputs = [head(x_NCHW) for head, x_NCHW in zip(heads, maps, strict=True)]
    return predictions_of(outputs, logits)


def predictions_of(outputs: Sequence[tuple[Tensor, ...]], columns: int) -> Outputs:
    """The heads' outputs (class logits and box codes of each map) with one row per
    anchor, whose logits have ``columns``.
    """
    logits_rows = []
    codes_rows = []
    for logits, codes in outputs:
        logits_rows.append(_rows(logits, columns))
        codes_rows.append(_rows(codes, CODE_SIZE))
    return _joined(logits_rows), _joined(codes_rows)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All rows, concatenated at most ``JOINED`` maps at a time."""
    joined = list(parts)
    while len(joined) > 1:
        joined[:JOINED] = [torch.cat(joined[:JOINED], dim=1)]
    return joined[0]


def _rows(x_NCHW: Tensor, columns: int) -> Tensor:
    """[N, anchors * columns, H, W] -> [N, H * W * anchors, columns]."""
    return x_NCHW.permute(0, 2, 3, 1).reshape(x_NCHW.shape[0], -1, columns)


@torch.no_grad()
def initialise_detector(
    neck: nn.Module, heads: nn.ModuleList, scores: Scores, generator: torch.Generator
) -> None:
    """Initialise neck and heads as torchvision and MobileDet do: weights from
    N(0, 0.03), zero biases, except -4.6 for class predictors with sigmoid scores.
    """
    for part in (*neck.modules(), *heads.modules()):
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0.0, PREDICTOR_STD, generator=generator)
            if part.bias is not None:
                part.bias.zero_()
    if scores == "sigmoid":
        for head in heads:
            head.get_submodule("classes.predict.conv").get_parameter("bias").fill_(RARE_CLASS_BIAS)
