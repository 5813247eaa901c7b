"""The universal inverted bottleneck of MobileNetV4 (Qin et al., arXiv 2404.10518, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, flag, number, register
from hwnas.errors import SpaceError

Case = Literal["extra_dw", "inverted_bottleneck", "convnext", "ffn"]


@register
@dataclass(frozen=True)
class UIB(Op):
    """[depthwise ``start``, BN]; 1 x 1 expansion, BN, act; [depthwise ``kernel``, BN,
    act]; 1 x 1 projection, BN.

    Which of the two depthwise convolutions there are (a kernel of 0: none) makes four
    known blocks of one; see ``case``. The stride is the middle one's, or the start's
    where there is no middle one. timm's ``UniversalInvertedResidual`` without layer
    scale.
    """

    KIND: ClassVar[str] = "uib"

    mid_ch: int = number("m")
    start: int = number("b", 0)
    kernel: int = number("k", 0)
    stride: int = number("s", 1)
    act: str = activation()
    residual: bool = flag("id")

    @property
    def even_kernel(self) -> bool:
        """No middle convolution."""
        return self.kernel == 0

    @property
    def case(self) -> Case:
        """The paper's name of the block: both convolutions, the middle one, the start, or none."""
        if self.start:
            return "extra_dw" if self.kernel else "convnext"
        return "inverted_bottleneck" if self.kernel else "ffn"

    def check(self) -> None:
        """A stride needs a depthwise convolution, and kernels are odd."""
        if self.start and self.start % 2 == 0:
            raise SpaceError(f"op {self.key}: kernels are odd here, padded by kernel // 2.")
        if self.stride > 1 and self.case == "ffn":
            raise SpaceError(
                f"op {self.key}: without a depthwise convolution (b or k) there is none to have a"
                " stride."
            )

    def write(self, write: ProgramWriter) -> int:
        """What there is of the start, the expansion, the middle, the projection."""
        x, start_stride = INPUT, 1 if self.kernel else self.stride
        if self.start:
            x = write.depthwise("start", x, kernel=self.start, stride=start_stride)
        x = write.conv("expand", x, self.mid_ch, act=self.act)
        if self.kernel:
            x = write.depthwise(
                "depthwise", x, kernel=self.kernel, stride=self.stride, act=self.act
            )
        x = write.conv("project", x, self.out_ch)
        return write.add(INPUT, x) if self.residual else x
