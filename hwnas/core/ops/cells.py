"""Ops of networks of cells: the edges of DARTS's and NAS-Bench's cells, and the ops
between the cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, flag, number, register
from hwnas.core.size import sides
from hwnas.errors import SpaceError


@register
@dataclass(frozen=True)
class ReLUConvBN(Op):
    """Act, k x k convolution, BN."""

    KIND: ClassVar[str] = "preconv"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """An activation and a convolution."""
        x = write.act(INPUT, self.act)
        return write.conv("conv", x, self.out_ch, kernel=self.kernel, stride=self.stride)


@register
@dataclass(frozen=True)
class SepConv(Op):
    """DARTS's separable convolution: act, depthwise k x k, 1 x 1, BN; then the same
    again with stride 1.
    """

    KIND: ClassVar[str] = "sepconv"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """Two depthwise-separable convolutions."""
        x = write.act(INPUT, self.act)
        x = write.depthwise("depthwise", x, kernel=self.kernel, stride=self.stride, norm=False)
        x = write.conv("pointwise", x, self.in_ch, act=self.act)
        x = write.depthwise("depthwise2", x, kernel=self.kernel, norm=False)
        return write.conv("pointwise2", x, self.out_ch)


@register
@dataclass(frozen=True)
class DilConv(Op):
    """Act, depthwise k x k with dilation 2, 1 x 1, BN."""

    KIND: ClassVar[str] = "dilconv"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def write(self, write: ProgramWriter) -> int:
        """One depthwise-separable convolution, dilated."""
        x = write.act(INPUT, self.act)
        x = write.depthwise(
            "depthwise", x, kernel=self.kernel, stride=self.stride, dilation=2, norm=False
        )
        return write.conv("pointwise", x, self.out_ch)


@dataclass(frozen=True)
class Pool(Op):
    """k x k pooling that ignores its padding. If k is even, it equals the stride, and
    there is no padding.

    ``norm`` adds a BN without scale and shift after the pooling.
    """

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    norm: bool = flag("bn")

    @property
    def even_kernel(self) -> bool:
        """Allowed if windows do not overlap."""
        return self.kernel == self.stride

    def check(self) -> None:
        """Pooling keeps the channels, and even windows tile the map."""
        if self.in_ch != self.out_ch:
            raise SpaceError(f"op {self.key}: a {self.KIND} does not change the width.")
        if self.kernel % 2 == 0 and any(side % self.kernel for side in sides(self.size)):
            raise SpaceError(
                f"op {self.key}: windows of {self.kernel} pixels do not tile {self.size} pixels."
            )

    def pool(self, write: ProgramWriter, kind: Literal["avgpool", "maxpool"]) -> int:
        """Write one pooling node of that kind."""
        return write.pool(
            "pool", kind, INPUT, kernel=self.kernel, stride=self.stride, norm=self.norm
        )


@register
@dataclass(frozen=True)
class AvgPool(Pool):
    """Average pooling."""

    KIND: ClassVar[str] = "avgpool"

    def write(self, write: ProgramWriter) -> int:
        """One node."""
        return self.pool(write, "avgpool")


@register
@dataclass(frozen=True)
class MaxPool(Pool):
    """Maximum pooling."""

    KIND: ClassVar[str] = "maxpool"

    def write(self, write: ProgramWriter) -> int:
        """One node."""
        return self.pool(write, "maxpool")


@dataclass(frozen=True)
class _Halving(Op):
    """An op that halves an even size."""

    def check_halving(self) -> None:
        """Raise SpaceError if the stride is not 2 or the size is odd."""
        if self.stride != 2 or any(side % 2 for side in sides(self.size)):
            raise SpaceError(f"op {self.key}: a {self.KIND} needs stride 2 and an even size.")


@register
@dataclass(frozen=True)
class FactorizedReduce(_Halving):
    """DARTS's reduction: act, two 1 x 1 convolutions of stride 2 to half the channels
    each, the second shifted by one pixel, concatenated, BN.
    """

    KIND: ClassVar[str] = "facreduce"

    stride: int = number("s", 1)
    act: str = activation()

    def check(self) -> None:
        """The size and the number of output channels are even."""
        self.check_halving()
        if self.out_ch % 2:
            raise SpaceError(f"op {self.key}: a facreduce needs an even number of output channels.")

    def write(self, write: ProgramWriter) -> int:
        """Two convolutions side by side."""
        x = write.act(INPUT, self.act)
        half = self.out_ch // 2
        # A 1 x 1 convolution of stride 2 skips every other pixel: the second convolution
        # is shifted so that it sees pixels that the first one skips.
        even = write.conv("even", x, half, stride=2, norm=False)
        odd = write.conv("odd", write.crop(x), half, stride=2, norm=False)
        return write.norm("norm", write.concat([even, odd]))


@register
@dataclass(frozen=True)
class ResidualReduce(_Halving):
    """NAS-Bench-201's reduction: act, k x k with stride 2, BN; act, k x k, BN; plus a
    shortcut of 2 x 2 average pooling and a 1 x 1 convolution.
    """

    KIND: ClassVar[str] = "resreduce"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    act: str = activation()

    def check(self) -> None:
        """The size is even."""
        self.check_halving()

    def write(self, write: ProgramWriter) -> int:
        """Two convolutions and a shortcut."""
        x = write.act(INPUT, self.act)
        x = write.conv("first", x, self.out_ch, kernel=self.kernel, stride=2, act=self.act)
        x = write.conv("second", x, self.out_ch, kernel=self.kernel)
        pooled = write.pool("pool", "avgpool", INPUT, kernel=2, stride=2)
        return write.add(x, write.conv("shortcut", pooled, self.out_ch, norm=False))


@register
@dataclass(frozen=True)
class Norm(Op):
    """BN, activation."""

    KIND: ClassVar[str] = "norm"

    act: str = activation()

    def check(self) -> None:
        """BN keeps the channels."""
        if self.in_ch != self.out_ch:
            raise SpaceError(f"op {self.key}: a norm does not change the width.")

    def write(self, write: ProgramWriter) -> int:
        """One node."""
        return write.norm("norm", INPUT, act=self.act)
