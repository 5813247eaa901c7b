"""SSDLite on any architecture.

Sources: MobileNetV2 (arXiv 1801.04381) for SSDLite; MobileDet (arXiv 2004.14525) with
its configuration and feature extractor (tensorflow/models: object_detection
``ssdlite_mobiledet_cpu_320x320_coco_sync_4x4``) for the taps, the extras and the
scales; TuNAS (arXiv 2008.06120) taps the same blocks of its spaces; torchvision's
``ssdlite`` for the layers and the anchors.

*Difference from MobileDet*: the finest map has all six anchors of a cell, as in
torchvision, where TensorFlow's has three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.arch import Architecture
from hwnas.core.detector import Detector, Scores
from hwnas.core.ops import Conv, DSConv, ExtraLayer, MBConv, Op, SSDPredictor
from hwnas.errors import SpaceError

EXTRAS = (512, 256, 256, 128)
"""Output channels of the layers after the backbone."""
ASPECT_RATIOS = (2.0, 3.0)
"""Of every map: anchors of 1:1 (two scales), 2:1, 1:2, 3:1 and 1:3."""
ANCHORS = 2 + 2 * len(ASPECT_RATIOS)
"""Of every cell."""


class DetectorSpec(BaseModel):
    """SSDLite on all architectures of a space: ``taps`` are indices of stages, each the
    last one at its resolution, the last stage among them; ``extras`` the output
    channels of the layers after it. The classes are the space's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    taps: tuple[int, ...] = Field(min_length=1)
    extras: tuple[Annotated[int, Field(ge=2)], ...] = EXTRAS
    scores: Scores = "softmax"


def with_detector(
    arch: Architecture,
    classes: int,
    *,
    resolution: int = 320,
    extras: Sequence[int] = EXTRAS,
    scores: Scores = "softmax",
) -> Architecture:
    """SSDLite on the backbone of ``arch``, for images of ``resolution`` px. ``classes``
    do not count the background.

    What belongs to the classifier is left out: pooled blocks and the 1 x 1 convolution
    before them. Taps are the last block at each of the last two resolutions, strides 16
    and 32 of networks for 224 px. Raises SpaceError where there is one resolution only.

    Example:
        >>> from hwnas.core.published import published
        >>> arch = with_detector(published("proxylessnas_mobile"), classes=90)
        >>> [(op.out_ch, op.out_size) for op in arch.detector.maps(arch.blocks)]
        [(96, 20), (320, 10), (512, 5), (256, 3), (256, 2), (128, 1)]
    """
    blocks = _resized(_backbone(arch.blocks), resolution)
    sizes = [op.out_size for op in blocks]
    finer = [position for position, size in enumerate(sizes) if size > sizes[-1]]
    if not finer:
        raise SpaceError(
            f"architecture {arch.name!r} cannot carry a detector: it has no two resolutions to tap."
        )
    detector = ssdlite(blocks, (finer[-1], len(blocks) - 1), classes, extras=extras, scores=scores)
    return Architecture(
        name=f"{arch.name}-ssdlite",
        in_channels=arch.in_channels,
        bn_eps=arch.bn_eps,
        blocks=blocks,
        detector=detector,
    )


def ssdlite(
    blocks: Sequence[Op],
    taps: tuple[int, ...],
    classes: int,
    *,
    extras: Sequence[int] = EXTRAS,
    scores: Scores = "softmax",
) -> Detector:
    """SSDLite on the outputs of the blocks at ``taps``: extras of stride 2 and half
    their width inside, ReLU6.
    """
    chain: list[Op] = []
    for width in extras:
        source = chain[-1] if chain else blocks[-1]
        chain.append(extra_op(source.out_size, source.out_ch, width))
    maps = [*(blocks[tap] for tap in taps), *chain]
    heads = tuple(head_op(op.out_size, op.out_ch, classes) for op in maps)
    return Detector(
        taps=taps,
        extras=tuple(chain),
        heads=heads,
        aspect_ratios=(ASPECT_RATIOS,) * len(maps),
        scores=scores,
    )


def extra_op(size: int, in_ch: int, width: int) -> Op:
    """The layer that makes the next feature map, ``width`` channels of it, of one of
    ``size`` px.
    """
    return ExtraLayer(size, in_ch, width, width // 2, kernel=3, stride=2, act="relu6")


def head_op(size: int, in_ch: int, classes: int) -> Op:
    """The predictors on a feature map of ``size`` px."""
    return SSDPredictor(
        size, in_ch, ANCHORS * (classes + 1), kernel=3, act="relu6", anchors=ANCHORS
    )


def split_expansion(op: Op) -> tuple[Op, Op]:
    """An inverted residual as two blocks that compute the same, the first of them its
    expansion: MobileNetV3's SSDLite taps it.

    Example:
        >>> [part.key for part in split_expansion(Op.parse("mbconv-h20-i112-o80-m672-k5-s2-hswish"))]
        ['conv-h20-i112-o672-hswish', 'dsconv-h20-i672-o80-k5-s2-hswish']
    """
    assert isinstance(op, MBConv) and op.groups == 1 and not op.residual, op.key
    kept = {name: getattr(op, name) for name in ("kernel", "stride", "se_ch", "se_gate", "act")}
    return Conv(op.size, op.in_ch, op.mid_ch, act=op.act), DSConv(
        op.size, op.mid_ch, op.out_ch, **kept
    )


def _backbone(blocks: Sequence[Op]) -> tuple[Op, ...]:
    """Without what belongs to a classifier. A network without one is all backbone."""
    kept = [op for op in blocks if not op.pooled]
    head = (
        len(kept) < len(blocks)
        and isinstance(kept[-1], Conv)
        and kept[-1].kernel == kept[-1].stride == 1
    )
    return tuple(kept[:-1] if head else kept)


def _resized(blocks: Sequence[Op], resolution: int) -> tuple[Op, ...]:
    sized: list[Op] = []
    for op in blocks:
        sized.append(replace(op, size=sized[-1].out_size if sized else resolution))
    return tuple(sized)
