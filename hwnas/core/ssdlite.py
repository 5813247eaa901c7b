"""SSDLite detectors on the backbone of any architecture.

Sources: SSDLite is from MobileNetV2 (arXiv 1801.04381). The taps, the extras and the
scales are MobileDet's (arXiv 2004.14525), from its configuration and feature extractor
(tensorflow/models: object_detection ``ssdlite_mobiledet_cpu_320x320_coco_sync_4x4``);
TuNAS (arXiv 2008.06120) taps the same blocks of its spaces. The layers and the anchors
are those of torchvision's ``ssdlite``.

*Difference from MobileDet*: the finest map has six anchors per cell, as in torchvision;
TensorFlow's has three.
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
"""Output channels of the extra layers after the backbone."""
ASPECT_RATIOS = (2.0, 3.0)
"""Aspect ratios of every map: anchors of 1:1 (two scales), 2:1, 1:2, 3:1 and 1:3."""
ANCHORS = 2 + 2 * len(ASPECT_RATIOS)
"""Number of anchors per cell of a map."""


class DetectorSpec(BaseModel):
    """The SSDLite detector of all architectures of a space.

    ``taps`` are the indices of the tapped stages; each is the last stage at its
    resolution, and they include the last stage. ``extras`` are the output channels of
    the layers after it. The number of classes is that of the space.
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
    """Put SSDLite on the backbone of ``arch``, for images of ``resolution`` px.
    ``classes`` does not include the background.

    Blocks that belong to the classifier are left out: pooled blocks and the 1 x 1
    convolution before them. Taps are the last block at each of the last two resolutions
    (strides 16 and 32 in networks for 224 px). Raises SpaceError if the backbone has
    just one resolution.

    Example:
        >>> from hwnas.core.published import published
        >>> arch = with_detector(published("proxylessnas_mobile"), classes=90)
        >>> [(op.out_ch, op.out_size) for op in arch.detector.maps(arch.blocks)]
        [(96, 20), (320, 10), (512, 5), (256, 3), (256, 2), (128, 1)]
    """
    blocks = _resized(_backbone(arch.blocks), resolution)
    # the last block at the next finer resolution is the first tap
    coarsest = blocks[-1].out_size
    finer = [position for position, op in enumerate(blocks) if op.out_size > coarsest]
    if not finer:
        raise SpaceError(
            f"architecture {arch.name!r} cannot carry a detector: it needs feature maps at two"
            " resolutions."
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
    """SSDLite on the outputs of the blocks at positions ``taps``. Extras have stride 2,
    half their output width inside, and ReLU6. ``classes`` does not include the
    background.
    """
    chain: list[Op] = []
    source = blocks[-1]
    for width in extras:
        source = extra_op(source.out_size, source.out_ch, width)
        chain.append(source)
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
    """The extra layer that reads a feature map of ``in_ch`` channels with height =
    width ``size`` and makes the next one, of ``width`` channels and half the size.
    """
    return ExtraLayer(size, in_ch, width, width // 2, kernel=3, stride=2, act="relu6")


def head_op(size: int, in_ch: int, classes: int) -> Op:
    """The predictors on a feature map of ``in_ch`` channels with height = width
    ``size``. ``classes`` does not include the background.
    """
    return SSDPredictor(
        size, in_ch, ANCHORS * (classes + 1), kernel=3, act="relu6", anchors=ANCHORS
    )


def split_expansion(op: Op) -> tuple[Op, Op]:
    """Split an inverted residual into two blocks that compute the same: its expansion
    and the rest. MobileNetV3's SSDLite taps the expansion.

    Example:
        >>> op = Op.parse("mbconv-h20-i112-o80-m672-k5-s2-hswish")
        >>> [part.key for part in split_expansion(op)]
        ['conv-h20-i112-o672-hswish', 'dsconv-h20-i672-o80-k5-s2-hswish']
    """
    # A residual spans both blocks, and a grouped block shuffles channels between them.
    assert isinstance(op, MBConv) and op.groups == 1 and not op.residual, op.key
    expansion = Conv(op.size, op.in_ch, op.mid_ch, act=op.act)
    kept = {name: getattr(op, name) for name in ("kernel", "stride", "se_ch", "se_gate", "act")}
    return expansion, DSConv(op.size, op.mid_ch, op.out_ch, **kept)


def detector_of(arch: Architecture) -> Detector:
    """The detector of an architecture that has one."""
    assert arch.detector is not None, f"{arch.name} has no detector"
    return arch.detector


def _backbone(blocks: Sequence[Op]) -> tuple[Op, ...]:
    """The blocks that do not belong to a classifier: all, if there is no classifier."""
    kept = [op for op in blocks if not op.pooled]
    if len(kept) < len(blocks):
        # a 1 x 1 convolution before the pooling makes the features of the classifier
        last = kept[-1]
        if isinstance(last, Conv) and last.kernel == last.stride == 1:
            kept.pop()
    return tuple(kept)


def _resized(blocks: Sequence[Op], resolution: int) -> tuple[Op, ...]:
    """The blocks for images of another height = width ``resolution``."""
    resized: list[Op] = []
    size = resolution
    for op in blocks:
        op_resized = replace(op, size=size)
        resized.append(op_resized)
        size = op_resized.out_size
    return tuple(resized)
