"""SSDLite: anchor boxes of several scales and shapes in every cell of several feature
maps.

SSD (Liu et al., ECCV 2016, arXiv 1512.02325) predicts for each anchor the class of the
object there and the offset from the anchor to the object's box. SSDLite (MobileNetV2,
arXiv 1801.04381) makes the predictions with depthwise separable convolutions. Feature
maps are the outputs of blocks of the backbone (*taps*) and of a chain of layers after
its end (*extras*).

Anchors depend only on the fields of ``SSDLite``, as in torchvision's
``DefaultBoxGenerator``. A map with f x f cells has the following anchors at the centre
of each cell: one of scale s_k, one of scale sqrt(s_k s_k+1), and two of scale s_k per
aspect ratio r, with w:h = r and 1:r. Scales are fractions of the image. They are evenly
spaced from ``min_ratio`` at the first map to ``max_ratio`` at the last; the scale after
the last is 1.

The taps, the extras and the scales are MobileDet's (arXiv 2004.14525), from its
configuration and feature extractor (tensorflow/models: object_detection
``ssdlite_mobiledet_cpu_320x320_coco_sync_4x4``); TuNAS (arXiv 2008.06120) taps the same
blocks of its spaces. The layers and the anchors are those of torchvision's ``ssdlite``.

*Difference from MobileDet*: the finest map has six anchors per cell, as in torchvision;
TensorFlow's has three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from hwnas.core.detector import Detector, DetectorSpec, FeatureShape, Scores, check_input
from hwnas.core.graph import Step
from hwnas.core.ops import Conv, DSConv, ExtraLayer, MBConv, Op, OpKey, SSDPredictor
from hwnas.core.size import Size

Ratio = Annotated[float, Field(gt=0)]

EXTRAS = (512, 256, 256, 128)
"""Output channels of the extra layers after the backbone."""
ASPECT_RATIOS = (2.0, 3.0)
"""Aspect ratios of every map: anchors of 1:1 (two scales), 2:1, 1:2, 3:1 and 1:3."""
ANCHORS = 2 + 2 * len(ASPECT_RATIOS)
"""Number of anchors per cell of a map."""


class SSDLite(Detector):
    """SSDLite on the blocks of an architecture.

    ``extras`` is a chain of layers after the last tap. The feature maps are the outputs
    of the taps and then of the extras, fine to coarse; ``heads`` and ``aspect_ratios``
    have one entry per map. ``scores`` also decides the training loss: SSD's with
    softmax, the focal loss with sigmoid, which leaves the background column unused.
    """

    NECK: ClassVar[str] = "extras"
    # SSD's variances
    code_scales: ClassVar[tuple[float, float, float, float]] = (10.0, 10.0, 5.0, 5.0)

    taps: tuple[int, ...] = Field(min_length=1)
    extras: tuple[OpKey, ...] = ()
    heads: tuple[OpKey, ...] = Field(min_length=1)
    aspect_ratios: tuple[tuple[Ratio, ...], ...]
    min_ratio: float = Field(default=0.2, gt=0, le=1)
    max_ratio: float = Field(default=0.95, gt=0, le=1)
    scores: Scores = "softmax"

    @property
    def neck(self) -> tuple[Op, ...]:
        """The extras."""
        return self.extras

    @property
    def steps(self) -> tuple[Step, ...]:
        """A chain that begins at the last tap."""
        first = len(self.taps) - 1
        return tuple(Step("op", (first + position,)) for position in range(len(self.extras)))

    @property
    def sources(self) -> tuple[int, ...]:
        """All taps and all extras."""
        return tuple(range(len(self.taps) + len(self.extras)))

    def check(self, blocks: Sequence[Op]) -> None:
        """Raise ValueError if the detector does not fit ``blocks``."""
        self.check_taps(blocks)
        self._check_extras(blocks[-1])
        maps = [*(blocks[tap] for tap in self.taps), *self.extras]
        if not len(maps) == len(self.heads) == len(self.aspect_ratios):
            raise ValueError(
                f"there are {len(maps)} feature maps ({len(self.taps)} taps, {len(self.extras)}"
                f" extras), but {len(self.heads)} heads and {len(self.aspect_ratios)} lists of"
                " aspect ratios: give one of each per map"
            )
        for position, source in enumerate(maps):
            # two anchors of 1:1, and two of each aspect ratio
            anchors = 2 + 2 * len(self.aspect_ratios[position])
            self._check_head(position, source, self.heads[position], anchors)
        if self.min_ratio > self.max_ratio:
            raise ValueError(
                f"min_ratio = {self.min_ratio:g} is above max_ratio = {self.max_ratio:g}"
            )

    def _check_extras(self, source: Op) -> None:
        for position, extra in enumerate(self.extras):
            if not isinstance(extra, ExtraLayer):
                raise ValueError(
                    f"extra {position} ({extra.key}) is a {extra.kind}: write an extra"
                )
            check_input(f"extra {position}", extra, (source.out_ch, source.out_size))
            source = extra

    def _check_head(self, position: int, source: Op, head: Op, anchors: int) -> None:
        if not isinstance(head, SSDPredictor):
            raise ValueError(f"head {position} ({head.key}) is a {head.kind}: write an ssd")
        check_input(f"head {position}", head, (source.out_ch, source.out_size))
        if head.anchors != anchors:
            raise ValueError(
                f"head {position} ({head.key}) has {head.anchors} anchors, but its aspect ratios"
                f" give {anchors}"
            )
        if head.out_ch != head.anchors * (self.classes + 1):
            raise ValueError(
                f"head {position} ({head.key}) does not have the {self.classes} classes of head 0"
            )


class SSDLiteSpec(DetectorSpec):
    """SSDLite on the architectures of a space. ``extras`` are the output channels of
    the layers after the last tapped stage.
    """

    KIND: ClassVar[str] = "ssdlite"
    LEVELS: ClassVar[int] = 2

    extras: tuple[Annotated[int, Field(ge=2)], ...] = EXTRAS
    scores: Scores = "softmax"

    def detector(
        self, taps: tuple[int, ...], maps: Sequence[FeatureShape], classes: int
    ) -> SSDLite:
        """Extras have stride 2, half their output width inside, and ReLU6."""
        chain: list[Op] = []
        shapes = [*maps]
        for width in self.extras:
            channels, size = shapes[-1]
            extra = ExtraLayer(size, channels, width, width // 2, kernel=3, stride=2, act="relu6")
            chain.append(extra)
            shapes.append((width, extra.out_size))
        heads: list[Op] = []
        for channels, size in shapes:
            heads.append(_head(size, channels, classes))
        return SSDLite(
            taps=taps,
            extras=tuple(chain),
            heads=tuple(heads),
            aspect_ratios=(ASPECT_RATIOS,) * len(shapes),
            scores=self.scores,
        )


def _head(size: Size, in_ch: int, classes: int) -> SSDPredictor:
    """The predictors on a feature map."""
    out_ch = ANCHORS * (classes + 1)
    return SSDPredictor(size, in_ch, out_ch, kernel=3, act="relu6", anchors=ANCHORS)


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
