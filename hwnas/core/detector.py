"""The detector of an architecture: the feature maps that it reads, the layers between
these maps and its predictors, and its anchors.

``Detector`` is the form that all detectors have: *taps*, the blocks of the backbone
whose outputs it reads; a *neck*, a graph of ops that makes further feature maps; and
*heads*, which predict class logits and box codes for the anchors of each cell of some
maps. Box codes are those of SSD and Faster R-CNN: for an anchor with the centre (x, y),
the width w and the height h, the codes tx, ty, tw, th stand for the box with the centre
(x + w tx / sx, y + h ty / sy), the width w exp(tw / sw) and the height h exp(th / sh);
``code_scales`` are sx, sy, sw and sh.

The kinds of detectors are in ``core.ssdlite`` and ``core.fcos``; ``core.detectors`` lists
them. To add a kind, write its two classes there, its anchors (``nn.anchors``) and its
loss (``nn.detection_loss``). Building, weight sharing, pricing, export and validation
follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hwnas.core.graph import Step
from hwnas.core.ops import Op, OpKey, Predictor
from hwnas.core.settings import Settings
from hwnas.core.size import Size, area

Scores = Literal["softmax", "sigmoid"]
"""How logits become scores; see ``Detector``."""
FeatureShape = tuple[int, Size]
"""Channels, and height and width, of a feature map."""

CODE_SIZE = 4
"""Numbers that encode a box."""
JOINED = 4
"""Feature maps whose predictions are joined by one concatenation. XNNPACK, which runs
LiteRT's files, joins at most five tensors; more go to slower kernels.
"""


class Detector(BaseModel):
    """A detector on the blocks of an architecture.

    ``taps`` are the positions of blocks, including the last one; ``heads`` has one
    predictor per map that is searched for objects, fine to coarse. ``scores`` says how
    logits become scores: ``"softmax"`` over the classes and the background, or one
    ``"sigmoid"`` per class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    NECK: ClassVar[str]
    """The name of the neck's ops in weights and reports, such as ``extras``."""
    code_scales: ClassVar[tuple[float, float, float, float]]
    """Divisors of the codes tx, ty, tw, th."""

    taps: tuple[int, ...] = Field(min_length=1)
    heads: tuple[OpKey, ...] = Field(min_length=1)
    scores: Scores

    @property
    @abstractmethod
    def neck(self) -> tuple[Op, ...]:
        """The ops of the neck, in the order they run."""

    @property
    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The graph of the neck; its inputs, points 0, 1, ..., are the taps. See
        ``core.graph``.
        """

    @property
    @abstractmethod
    def sources(self) -> tuple[int, ...]:
        """The points of the graph that the heads read, one per head."""

    @abstractmethod
    def check(self, blocks: Sequence[Op]) -> None:
        """Raise ValueError if the detector does not fit ``blocks``."""

    @cached_property
    def predictors(self) -> tuple[Predictor, ...]:
        """The heads, as predictors."""
        return tuple(head for head in self.heads if isinstance(head, Predictor))

    @property
    def classes(self) -> int:
        """Number of classes, without the background."""
        return self.predictors[0].classes

    @property
    def background(self) -> int:
        """1 if the logits of each anchor begin with one of the background, else 0."""
        return self.predictors[0].background

    @property
    def logits(self) -> int:
        """Number of logits of each anchor."""
        return self.background + self.classes

    @property
    def anchors(self) -> int:
        """Number of anchors per image: the number of rows of the network's outputs."""
        return sum(head.anchors_per_cell * area(head.size) for head in self.predictors)

    @property
    def wiring(self) -> tuple[str, ...]:
        """What decides, besides the taps, which op reads what; empty for a chain of
        extras.
        """
        return ()

    @property
    def readers(self) -> dict[str, int]:
        """The names of the ops that read a tap itself -> the position of that tap among
        the taps. Only these depend on the backbone's widths.
        """
        readers: dict[str, int] = {}
        neck = iter(self.neck_names)
        for step in self.steps:
            if step.kind == "op":
                name = next(neck)
                if step.of[0] < len(self.taps):
                    readers[name] = step.of[0]
        for position, point in enumerate(self.sources):
            if point < len(self.taps):
                readers[f"head {position}"] = point
        return readers

    @property
    def neck_names(self) -> tuple[str, ...]:
        """Names of the neck's ops: ``extra 0``, ``extra 1``, ..., for ``extras``."""
        singular = self.NECK.removesuffix("s")
        return tuple(f"{singular} {i}" for i in range(len(self.neck)))

    def check_taps(self, blocks: Sequence[Op]) -> None:
        """Raise ValueError unless the taps are ascending positions of feature maps that
        end with the last block.
        """
        last = len(blocks) - 1
        ascending = list(self.taps) == sorted(set(self.taps))
        if not ascending or self.taps[0] < 0 or self.taps[-1] != last:
            raise ValueError(
                f"the taps {list(self.taps)} must be ascending positions of blocks that end with"
                f" {last}, the last block"
            )
        for op in blocks:
            if op.pooled or isinstance(op, Predictor):
                raise ValueError(
                    f"block {op.key} leaves no feature map, so it cannot be part of a network with"
                    " a detector"
                )


class DetectorSpec(BaseModel):
    """The detector of all architectures of a space, or one that is to be put on an
    architecture.

    ``taps`` are the indices of the tapped stages; each is the last stage at its
    resolution, and they include the last stage. They are empty before a space or an
    architecture is known. The number of classes is that of the space.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    KIND: ClassVar[str]
    """The name of the detector in configurations and in names of architectures."""
    LEVELS: ClassVar[int]
    """The number of feature maps of the backbone that it reads: those of the coarsest
    resolutions.
    """

    taps: tuple[int, ...] = ()

    @abstractmethod
    def detector(
        self, taps: tuple[int, ...], maps: Sequence[FeatureShape], classes: int
    ) -> Detector:
        """The detector on the outputs of the blocks at positions ``taps``, which have
        the shapes ``maps``. ``classes`` does not include the background. Raises
        SpaceError if the maps do not fit.
        """


def check_input(name: str, op: Op, source: FeatureShape) -> None:
    """Raise ValueError unless ``op`` reads a feature map of the shape ``source``."""
    if (op.in_ch, op.size) != source:
        raise ValueError(
            f"{name} ({op.key}) takes {op.in_ch} channels at {op.size} px, but its map has"
            f" {source[0]} at {source[1]} px"
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
