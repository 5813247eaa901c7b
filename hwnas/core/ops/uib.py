"""The universal inverted bottleneck of MobileNetV4 (Qin et al., arXiv 2404.10518,
section 4).
"""

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

    Both depthwise convolutions are optional (a kernel of 0: none), which makes four
    known blocks; see ``case``. The stride belongs to the middle convolution or, without
    one, to the start. The same as timm's ``UniversalInvertedResidual`` without layer
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
        """Only 0, which means that there is no middle convolution."""
        return self.kernel == 0

    @property
    def case(self) -> Case:
        """The paper's name of the block, which depends on its depthwise convolutions:
        both, only the middle one, only the start, or none.
        """
        if self.start and self.kernel:
            return "extra_dw"
        if self.kernel:
            return "inverted_bottleneck"
        if self.start:
            return "convnext"
        return "ffn"

    def check(self) -> None:
        """A stride needs a depthwise convolution, and kernels are odd."""
        if self.start and self.start % 2 == 0:
            raise SpaceError(
                f"op {self.key}: kernels must be odd, because they are padded by kernel // 2."
            )
        if self.stride > 1 and self.case == "ffn":
            raise SpaceError(f"op {self.key}: a stride needs a depthwise convolution (b or k).")

    def write(self, write: ProgramWriter) -> int:
        """[start], expansion, [middle], projection."""
        x = INPUT
        if self.start:
            # The middle convolution, if there is one, has the stride.
            start_stride = 1 if self.kernel else self.stride
            x = write.depthwise("start", x, kernel=self.start, stride=start_stride)
        x = write.conv("expand", x, self.mid_ch, act=self.act)
        if self.kernel:
            x = write.depthwise(
                "depthwise", x, kernel=self.kernel, stride=self.stride, act=self.act
            )
        x = write.conv("project", x, self.out_ch)
        if self.residual:
            x = write.add(INPUT, x)
        return x
