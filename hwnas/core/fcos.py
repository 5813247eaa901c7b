"""An anchor-free detector: every cell of three feature maps predicts one box, after a
light path aggregation network (PAN).

Sources: FCOS (Tian et al., arXiv 1904.01355) for what a cell has to predict; PAN (Liu
et al., arXiv 1803.01534) for the neck, in the light form of NanoDet and PicoDet (Yu et
al., arXiv 2111.00902): all maps have one width, and all convolutions but the lateral 1 x
1 ones are separable, 5 x 5; PicoDet's head, whose two outputs share their features. With
the taps L0, L1, L2 at strides 8, 16 and 32::

    T2 = conv(L2)
    T1 = separable(conv(L1) + up(T2))
    T0 = separable(conv(L0) + up(T1))
    P0 = T0
    P1 = separable(T1 + down(P0))
    P2 = separable(T2 + down(P1))

where ``down`` is a separable layer of stride 2 and ``up`` a bilinear interpolation. The
heads read P0 to P2, as in NanoDet.

*Differences* from NanoDet-Plus and PicoDet: there is no fourth map at stride 64, in which
FCOS's ranges of sizes leave nothing to find below 320 px; maps are added as in PAN's
first form, not concatenated; separable layers take the place of ghost and CSP blocks; the head of each
map has weights of its own; boxes are predicted as offsets from a square (YOLOX's form
of a box per cell, arXiv 2107.08430) instead of as distributions of distances, which
spares the app a softmax per side and lets the same post-processing read both kinds of
detectors. For the training, see ``hwnas.nn.detection_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field

from hwnas.core.detector import Detector, DetectorSpec, FeatureShape, Scores, check_input
from hwnas.core.graph import GraphBuilder, Step, StepKey, shapes
from hwnas.core.ops import (
    Conv,
    FCOSPredictor,
    Op,
    OpKey,
    Predictor,
    SeparableLayer,
    Upsample,
)
from hwnas.core.size import Size, each_side
from hwnas.errors import SpaceError

CHANNELS = 96
"""Default width of the neck and the heads: PicoDet-S's."""
KERNEL = 5
"""Kernel of all separable layers, as in PicoDet."""
ACT = "relu6"
"""Activation of the neck and the heads. It is fused in every runtime, in int8 as well."""
SIDE = 8.0
"""Side of the square that boxes are offsets from, in strides of its map: GFL's octave base
scale.
"""


class FCOS(Detector):
    """An anchor-free detector on the blocks of an architecture.

    ``graph`` says what the ops of the neck read: its first points are the taps; ``maps``
    are the points that the ``heads`` read. The anchor of a cell is a square of ``side``
    strides at its centre.
    """

    NECK: ClassVar[str] = "neck"
    code_scales: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 1.0, 1.0)

    kind: Literal["fcos"] = "fcos"
    taps: tuple[int, ...] = Field(min_length=1)
    ops: tuple[OpKey, ...] = Field(min_length=1)
    graph: tuple[StepKey, ...] = Field(min_length=1)
    maps: tuple[int, ...] = Field(min_length=1)
    heads: tuple[OpKey, ...] = Field(min_length=1)
    side: float = Field(default=SIDE, gt=0, le=100)
    scores: Scores = "sigmoid"

    @property
    def neck(self) -> tuple[Op, ...]:
        """``ops``."""
        return self.ops

    @property
    def steps(self) -> tuple[Step, ...]:
        """``graph``."""
        return self.graph

    @property
    def sources(self) -> tuple[int, ...]:
        """``maps``."""
        return self.maps

    @property
    def wiring(self) -> tuple[str, ...]:
        """The steps of the neck, and the points that the heads read."""
        return (*(step.key for step in self.graph), *(f"map{point}" for point in self.maps))

    def check(self, blocks: Sequence[Op]) -> None:
        """Raise ValueError if the detector does not fit ``blocks``."""
        self.check_taps(blocks)
        if self.scores != "sigmoid":
            raise ValueError(f"an anchor-free detector has sigmoid scores, not {self.scores}")
        for op in self.ops:
            if op.pooled or isinstance(op, Predictor):
                raise ValueError(f"op {op.key} of the neck makes no feature map: write another")
        inputs = [(blocks[tap].out_ch, blocks[tap].out_size) for tap in self.taps]
        points = shapes(self.graph, self.ops, inputs)
        if len(self.maps) != len(self.heads):
            raise ValueError(
                f"there are {len(self.maps)} maps, but {len(self.heads)} heads: give one per map"
            )
        for position, (point, head) in enumerate(zip(self.maps, self.heads, strict=True)):
            if not 0 <= point < len(points):
                raise ValueError(f"head {position} reads point {point}, which no step makes")
            if not isinstance(head, FCOSPredictor):
                raise ValueError(f"head {position} ({head.key}) is a {head.kind}: write an fcos")
            check_input(f"head {position}", head, points[point])
            if head.classes != self.classes:
                raise ValueError(
                    f"head {position} ({head.key}) does not have the {self.classes} classes of"
                    " head 0"
                )


class FCOSSpec(DetectorSpec):
    """The anchor-free detector on the architectures of a space; ``channels`` is the
    width of its neck and heads.
    """

    KIND: ClassVar[str] = "fcos"
    LEVELS: ClassVar[int] = 3

    kind: Literal["fcos"] = "fcos"
    channels: int = Field(default=CHANNELS, ge=2, le=2**16)

    def detector(self, taps: tuple[int, ...], maps: Sequence[FeatureShape], classes: int) -> FCOS:
        """The neck of the module's docstring, and one head per map."""
        sizes = [size for _, size in maps]
        for size, coarser in pairwise(sizes):
            if size != each_side(coarser, lambda side: 2 * side):
                raise SpaceError(
                    "an anchor-free detector needs feature maps that halve exactly, but these have"
                    f" {', '.join(map(str, sizes))} px: choose a data.resolution whose"
                    " sides are multiples of the backbone's largest stride, usually 32."
                )
        pan = _PAN(self.channels, len(maps))
        sources = pan.fused(sizes, [channels for channels, _ in maps])
        heads = []
        for _, size in sources:
            head = FCOSPredictor(
                size, self.channels, classes, self.channels, kernel=KERNEL, act=ACT
            )
            heads.append(head)
        return FCOS(
            taps=taps,
            ops=tuple(pan.graph.blocks),
            graph=tuple(pan.graph.steps),
            maps=tuple(point for point, _ in sources),
            heads=tuple(heads),
        )


class _PAN:
    """The neck under construction. Feature maps are points of its graph; the first ones
    are the ``levels`` taps, fine to coarse.
    """

    def __init__(self, channels: int, levels: int) -> None:
        self.channels = channels
        self.graph = GraphBuilder(inputs=levels)

    def fused(self, sizes: Sequence[Size], widths: Sequence[int]) -> list[tuple[int, Size]]:
        """The points that the heads read and their sizes, fine to coarse, for taps of
        these sizes and widths.
        """
        lateral = []
        for tap, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            op = Conv(size, width, self.channels, act=ACT)
            lateral.append(self.graph.op(op, tap))

        # top-down: what coarse maps know reaches the fine ones
        down = [*lateral]
        for level in reversed(range(len(sizes) - 1)):
            coarser = sizes[level + 1]
            up = self.graph.op(Upsample(coarser, self.channels, self.channels), down[level + 1])
            down[level] = self._fused(sizes[level], lateral[level], up)

        # bottom-up: what fine maps know reaches the coarse ones
        points = [down[0]]
        for level in range(1, len(sizes)):
            halved = self._halved(sizes[level - 1], points[-1])
            points.append(self._fused(sizes[level], down[level], halved))
        return [*zip(points, sizes, strict=True)]

    def _fused(self, size: Size, point: int, other: int) -> int:
        """The sum of two maps, mixed by a separable layer."""
        return self._separable(size, self.graph.sum([point, other]), stride=1)

    def _halved(self, size: Size, point: int) -> int:
        """A map of half the size."""
        return self._separable(size, point, stride=2)

    def _separable(self, size: Size, point: int, stride: int) -> int:
        channels = self.channels
        op = SeparableLayer(size, channels, channels, kernel=KERNEL, stride=stride, act=ACT)
        return self.graph.op(op, point)
