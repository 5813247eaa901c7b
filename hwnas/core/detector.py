"""The detector of an architecture: the feature maps it reads, its predictors, and its
anchors.

SSD (Liu et al., ECCV 2016, arXiv 1512.02325) has anchor boxes in every cell of several
feature maps. For each anchor it predicts the class of the object there and the offset
from the anchor to the object's box. SSDLite (MobileNetV2, arXiv 1801.04381) makes the
predictions with depthwise separable convolutions. Feature maps are the outputs of
blocks of the backbone (*taps*) and of layers after its end (*extras*).

Anchors depend only on the fields of ``Detector``, as in torchvision's
``DefaultBoxGenerator``. A map with f x f cells has the following anchors at the centre
of each cell: one of scale s_k, one of scale sqrt(s_k s_k+1), and two of scale s_k per
aspect ratio r, with w:h = r and 1:r. Scales are fractions of the image. They are evenly
spaced from ``min_ratio`` at the first map to ``max_ratio`` at the last; the scale after
the last is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.ops import ExtraLayer, Op, OpKey, SSDPredictor
from hwnas.core.settings import Settings

Scores = Literal["softmax", "sigmoid"]
"""How logits become scores; see ``Detector``."""
Ratio = Annotated[float, Field(gt=0)]

CODE_SIZE = 4
"""Numbers that encode a box."""
JOINED = 4
"""Feature maps whose predictions are joined by one concatenation. XNNPACK, which runs
LiteRT's files, joins at most five tensors; more go to slower kernels.
"""


class Detector(BaseModel):
    """An SSD detector on the blocks of an architecture.

    ``taps`` are the positions of blocks, including the last one; ``extras`` is a chain
    of layers after it. The feature maps are the outputs of the taps and then of the
    extras, fine to coarse; ``heads`` and ``aspect_ratios`` have one entry per map.
    ``scores`` says how logits become scores, which also decides the training loss:
    ``"softmax"`` over the classes and the background (SSD), or one ``"sigmoid"`` per
    class (focal loss), which leaves the background column unused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    taps: tuple[int, ...] = Field(min_length=1)
    extras: tuple[OpKey, ...] = ()
    heads: tuple[OpKey, ...] = Field(min_length=1)
    aspect_ratios: tuple[tuple[Ratio, ...], ...]
    min_ratio: float = Field(default=0.2, gt=0, le=1)
    max_ratio: float = Field(default=0.95, gt=0, le=1)
    scores: Scores = "softmax"

    @property
    def classes(self) -> int:
        """Number of classes, without the background."""
        # a head has one output channel per anchor and class, background included
        return self._ssd[0].out_ch // self._ssd[0].anchors - 1

    @property
    def anchors(self) -> int:
        """Number of anchors per image: the number of rows of the network's outputs."""
        return sum(head.anchors * head.size**2 for head in self._ssd)

    @property
    def _ssd(self) -> tuple[SSDPredictor, ...]:
        return tuple(head for head in self.heads if isinstance(head, SSDPredictor))

    def maps(self, blocks: Sequence[Op]) -> tuple[Op, ...]:
        """The ops whose outputs are the feature maps."""
        return (*(blocks[tap] for tap in self.taps), *self.extras)

    def check(self, blocks: Sequence[Op]) -> None:
        """Raise ValueError if the detector does not fit ``blocks``."""
        last = len(blocks) - 1
        ascending = list(self.taps) == sorted(set(self.taps))
        if not ascending or self.taps[0] < 0 or self.taps[-1] != last:
            raise ValueError(
                f"the taps {list(self.taps)} must be ascending positions of blocks that end with"
                f" {last}, the last block"
            )
        for op in blocks:
            if op.pooled or isinstance(op, SSDPredictor):
                raise ValueError(
                    f"block {op.key} leaves no feature map, so it cannot be part of a network with"
                    " a detector"
                )

        self._check_extras(blocks[-1])
        maps = self.maps(blocks)
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
            _check_input(f"extra {position}", extra, source)
            source = extra

    def _check_head(self, position: int, source: Op, head: Op, anchors: int) -> None:
        if not isinstance(head, SSDPredictor):
            raise ValueError(f"head {position} ({head.key}) is a {head.kind}: write an ssd")
        _check_input(f"head {position}", head, source)
        if head.anchors != anchors:
            raise ValueError(
                f"head {position} ({head.key}) has {head.anchors} anchors, but its aspect ratios"
                f" give {anchors}"
            )
        if head.out_ch != head.anchors * (self.classes + 1):
            raise ValueError(
                f"head {position} ({head.key}) does not have the {self.classes} classes of head 0"
            )


def _check_input(name: str, op: Op, source: Op) -> None:
    """Raise ValueError unless ``op`` fits the feature map that ``source`` makes."""
    if (op.in_ch, op.size) != (source.out_ch, source.out_size):
        raise ValueError(
            f"{name} ({op.key}) takes {op.in_ch} channels at {op.size} px, but its map has"
            f" {source.out_ch} at {source.out_size} px"
        )


class PostProcessing(Settings):
    """Settings for turning scored boxes into detections.

    For each class, the best ``candidates`` boxes with a score above ``min_score`` go
    through non-maximum suppression at an IoU of ``nms_iou``; the best ``detections``
    boxes of all classes remain. Defaults are those of torchvision's SSDLite; MobileDet
    has 1e-8, 100, 0.6 and 100.
    """

    min_score: float = Field(default=0.001, ge=0, lt=1)
    candidates: int = Field(default=300, gt=0, le=1_000_000)
    nms_iou: float = Field(default=0.55, ge=0, le=1)
    detections: int = Field(default=300, gt=0, le=1_000_000)
