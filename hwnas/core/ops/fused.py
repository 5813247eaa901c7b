"""The fused inverted bottleneck of EfficientNet-EdgeTPU, MobileDets and
EfficientNetV2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, flag, number, register, word
from hwnas.core.ops.blocks import SE_GATES, check_gates, squeeze_excite


@register
@dataclass(frozen=True)
class Fused(Op):
    """k x k expansion with the stride, BN, act; [SE]; 1 x 1 projection, BN. The same as
    timm's ``EdgeResidual``.

    An inverted bottleneck whose expansion and depthwise convolution are fused into one
    full convolution. It needs more multiply-accumulates, but accelerators run full
    convolutions more efficiently than depthwise ones.
    """

    KIND: ClassVar[str] = "fused"

    mid_ch: int = number("m")
    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    se_ch: int = number("q", 0)
    se_gate: str = word(SE_GATES, "sigmoid")
    se_act: bool = flag("qact")
    act: str = activation()
    residual: bool = flag("id")

    def check(self) -> None:
        """Squeeze-and-excitation is complete."""
        check_gates(self, self.se_ch, self.se_gate, self.se_act)

    def write(self, write: ProgramWriter) -> int:
        """Expansion and projection."""
        x = write.conv(
            "expand", INPUT, self.mid_ch, kernel=self.kernel, stride=self.stride, act=self.act
        )
        se_act = self.act if self.se_act else "relu"
        x = squeeze_excite(write, x, self.se_ch, self.se_gate, se_act)
        x = write.conv("project", x, self.out_ch)
        if self.residual:
            x = write.add(INPUT, x)
        return x
