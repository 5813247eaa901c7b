"""What a detector adds to a backbone: layers that make coarser maps, and predictions
from each map.
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
    """1 x 1, BN, act; depthwise k x k, BN, act; 1 x 1, BN, act: SSDLite's layer that
    makes the next feature map.
    """

    KIND: ClassVar[str] = "extra"

    mid_ch: int = number("m")
    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """An inverted bottleneck whose last layer is activated, too."""
        x = write.conv("expand", INPUT, self.mid_ch, act=self.act)
        x = write.depthwise("depthwise", x, kernel=self.kernel, stride=self.stride, act=self.act)
        return write.conv("project", x, self.out_ch, act=self.act)


@register
@dataclass(frozen=True)
class SSDPredictor(Op):
    """What SSDLite predicts from one feature map: class logits and box codes of each
    cell's ``anchors``, from branches of their own.

    Each is depthwise k x k, BN, act; 1 x 1 convolution with bias. Class logits are
    ``out_ch`` = anchors x (classes + 1 for the background) channels, box codes 4 x
    anchors.
    """

    KIND: ClassVar[str] = "ssd"
    WEIGHTS: ClassVar[str] = ""

    kernel: int = number("k", 1)
    anchors: int = number("a", 0)
    act: str = activation()

    def check(self) -> None:
        """There are anchors, and each has a logit for the background and for one class at least."""
        if not self.anchors:
            raise SpaceError(
                f"op {self.key}: predictors need the number of anchors of each cell (a)."
            )
        if self.out_ch % self.anchors or self.out_ch < 2 * self.anchors:
            raise SpaceError(
                f"op {self.key}: output channels are anchors (a) x (classes + 1), a multiple of"
                f" {self.anchors} from {2 * self.anchors} on."
            )

    def write(self, write: ProgramWriter) -> tuple[int, int]:
        """Class logits and box codes."""
        return self._branch(write, "classes", self.out_ch), self._branch(
            write, "boxes", 4 * self.anchors
        )

    def _branch(self, write: ProgramWriter, name: str, columns: int) -> int:
        x = write.depthwise(f"{name}.depthwise", INPUT, kernel=self.kernel, act=self.act)
        return write.conv(f"{name}.predict", x, columns, norm=False, bias=True)
