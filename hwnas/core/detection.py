"""Detectors on the backbone of any architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hwnas.core.arch import Architecture
from hwnas.core.detector import Detector, DetectorSpec
from hwnas.core.ops import Conv, Op
from hwnas.core.size import Size
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.errors import SpaceError

NUMBERS = {2: "two", 3: "three"}
"""Numbers of levels in words, for messages."""
SSDLITE = SSDLiteSpec()
"""SSDLite with its default extras and scores."""


def with_detector(
    arch: Architecture, classes: int, spec: DetectorSpec = SSDLITE, *, resolution: Size = 320
) -> Architecture:
    """Put a detector on the backbone of ``arch``, for images of the size ``resolution``.
    ``classes`` does not include the background.

    Blocks that belong to the classifier are left out: pooled blocks and the 1 x 1
    convolution before them. Taps are the last block at each of the coarsest resolutions:
    two for SSDLite (strides 16 and 32 in networks for 224 px), three for FCOS. Raises
    SpaceError if the backbone has fewer.

    Example:
        >>> from hwnas.core.published import published
        >>> arch = with_detector(published("proxylessnas_mobile"), classes=90)
        >>> [(op.out_ch, op.out_size) for op in arch.detector.extras]
        [(512, 5), (256, 3), (256, 2), (128, 1)]
    """
    blocks = _resized(_backbone(arch.blocks), resolution)
    # later blocks overwrite earlier ones of the same size
    last = {op.out_size: position for position, op in enumerate(blocks)}
    taps = tuple(last.values())[-spec.LEVELS :]
    if len(taps) < spec.LEVELS:
        raise SpaceError(
            f"architecture {arch.name!r} cannot carry a detector: it needs feature maps at"
            f" {NUMBERS[spec.LEVELS]} resolutions."
        )
    maps = [(blocks[tap].out_ch, blocks[tap].out_size) for tap in taps]
    return Architecture(
        name=f"{arch.name}-{spec.KIND}",
        in_channels=arch.in_channels,
        bn_eps=arch.bn_eps,
        blocks=blocks,
        detector=spec.detector(taps, maps, classes),
    )


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


def _resized(blocks: Sequence[Op], resolution: Size) -> tuple[Op, ...]:
    """The blocks for images of another size."""
    resized: list[Op] = []
    size = resolution
    for op in blocks:
        op_resized = replace(op, size=size)
        resized.append(op_resized)
        size = op_resized.out_size
    return tuple(resized)
