"""Ops that a detector adds to a backbone: layers that make further feature maps, and
predictors for each map.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, number, register
from hwnas.core.size import Size, each_side
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
class SeparableLayer(Op):
    """Depthwise k x k, BN, act; 1 x 1, BN, act: MobileNetV1's block, as in the necks and
    heads of light detectors.
    """

    KIND: ClassVar[str] = "separable"
    WORD: ClassVar[str] = "sep"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """One layer."""
        return _separable(self, write, "", INPUT, self.out_ch, self.stride)


@register
@dataclass(frozen=True)
class Upsample(Op):
    """Bilinear interpolation to twice the height and width."""

    KIND: ClassVar[str] = "upsample"
    WORD: ClassVar[str] = "up"

    def check(self) -> None:
        """The channels stay the same."""
        if self.in_ch != self.out_ch:
            raise SpaceError(f"op {self.key}: an upsample does not change the channels.")

    @property
    def out_size(self) -> Size:
        """Twice the input's height and width."""
        return each_side(self.size, lambda side: 2 * side)

    def write(self, write: ProgramWriter) -> int:
        """One node."""
        return write.upsample(INPUT)


class Predictor(Op):
    """What a detector predicts from one feature map: class logits and box codes of the
    ``anchors`` of each cell.

    The class logits have ``out_ch`` = anchors x (background + classes) channels, the box
    codes 4 x anchors.
    """

    WEIGHTS: ClassVar[str] = ""
    background: ClassVar[int]
    """1 if the logits of each anchor begin with one of the background, else 0."""

    @property
    @abstractmethod
    def anchors_per_cell(self) -> int:
        """Number of anchors of each cell."""

    @property
    def classes(self) -> int:
        """Number of classes, without the background."""
        return self.out_ch // self.anchors_per_cell - self.background


@register
@dataclass(frozen=True)
class SSDPredictor(Predictor):
    """SSDLite's predictor for one feature map: class logits and box codes of the
    ``anchors`` of each cell, from separate branches.

    Each branch is depthwise k x k, BN, act; 1 x 1 convolution with bias. The class
    logits have ``out_ch`` = anchors x (classes + 1 for the background) channels, the
    box codes 4 x anchors.
    """

    KIND: ClassVar[str] = "ssd"
    background: ClassVar[int] = 1

    kernel: int = number("k", 1)
    anchors: int = number("a", 0)
    act: str = activation()

    @property
    def anchors_per_cell(self) -> int:
        """``anchors``."""
        return self.anchors

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


@register
@dataclass(frozen=True)
class FCOSPredictor(Predictor):
    """The predictor of an anchor-free detector for one feature map: a tower of ``depth``
    separable layers (k x k) of ``mid_ch`` channels, then two 1 x 1 convolutions with
    bias: class logits, ``out_ch`` of them, and box codes, 4 of them, for each cell.
    """

    KIND: ClassVar[str] = "fcos"
    background: ClassVar[int] = 0

    mid_ch: int = number("m")
    kernel: int = number("k", 1)
    depth: int = number("n", 2)
    act: str = activation()

    @property
    def anchors_per_cell(self) -> int:
        """One: the cell itself."""
        return 1

    def write(self, write: ProgramWriter) -> tuple[int, int]:
        """Class logits and box codes, from the same features as in PicoDet."""
        x = INPUT
        for layer in range(self.depth):
            x = _separable(self, write, f"tower.{layer}.", x, self.mid_ch)
        classes = write.conv("classes.predict", x, self.out_ch, norm=False, bias=True)
        boxes = write.conv("boxes.predict", x, 4, norm=False, bias=True)
        return classes, boxes


def _separable(
    op: Op, write: ProgramWriter, scope: str, value: int, out_ch: int, stride: int = 1
) -> int:
    """A separable layer with the kernel and the activation of ``op``."""
    x = write.depthwise(f"{scope}depthwise", value, kernel=op.kernel, stride=stride, act=op.act)
    return write.conv(f"{scope}project", x, out_ch, act=op.act)
