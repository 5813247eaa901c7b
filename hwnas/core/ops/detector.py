"""Ops that a detector adds to a backbone: layers that make coarser feature maps, and
predictors for each map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, number, register
from hwnas.errors import SpaceError


@register
@dataclass(frozen=True)
class ExtraLayer(Op):
    """SSDLite's layer that makes the next feature map: 1 x 1, BN, act; depthwise k x k,
    BN, act; 1 x 1, BN, act.
    """

    KIND: ClassVar[str] = "extra"

    mid_ch: int = number("m")
    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """An inverted bottleneck whose last layer also has an activation."""
        x = write.conv("expand", INPUT, self.mid_ch, act=self.act)
        x = write.depthwise("depthwise", x, kernel=self.kernel, stride=self.stride, act=self.act)
        return write.conv("project", x, self.out_ch, act=self.act)


@register
@dataclass(frozen=True)
class SSDPredictor(Op):
    """SSDLite's predictor for one feature map: class logits and box codes of the
    ``anchors`` of each cell, from separate branches.

    Each branch is depthwise k x k, BN, act; 1 x 1 convolution with bias. The class
    logits have ``out_ch`` = anchors x (classes + 1 for the background) channels, the
    box codes 4 x anchors.
    """

    KIND: ClassVar[str] = "ssd"
    WEIGHTS: ClassVar[str] = ""

    kernel: int = number("k", 1)
    anchors: int = number("a", 0)
    act: str = activation()

    def check(self) -> None:
        """Each cell has anchors, and each anchor has logits for the background and for
        at least one class.
        """
        if not self.anchors:
            raise SpaceError(
                f"op {self.key}: predictors need the number of anchors of each cell (a)."
            )
        if self.out_ch % self.anchors or self.out_ch < 2 * self.anchors:
            raise SpaceError(
                f"op {self.key}: output channels are anchors (a) x (classes + 1), a multiple of"
                f" {self.anchors} and at least {2 * self.anchors}."
            )

    def write(self, write: ProgramWriter) -> tuple[int, int]:
        """Class logits and box codes."""
        classes = self._branch(write, "classes", self.out_ch)
        # A box code is four numbers.
        boxes = self._branch(write, "boxes", 4 * self.anchors)
        return classes, boxes

    def _branch(self, write: ProgramWriter, name: str, out_ch: int) -> int:
        x = write.depthwise(f"{name}.depthwise", INPUT, kernel=self.kernel, act=self.act)
        return write.conv(f"{name}.predict", x, out_ch, norm=False, bias=True)
