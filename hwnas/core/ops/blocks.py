"""Blocks of mobile networks: convolutions, MobileNet's separable blocks, and the last
layers of a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, flag, number, register, word
from hwnas.core.size import Size
from hwnas.errors import SpaceError

SE_GATES = ("sigmoid", "hsig")
"""Gates of squeeze-and-excitation: TuNAS's sigmoid, and MobileNetV3's relu6(x + 3) / 6.
"""


@register
@dataclass(frozen=True)
class Conv(Op):
    """k x k convolution, BN, activation: a stem, or the 1 x 1 convolution before the
    classifier.
    """

    KIND: ClassVar[str] = "conv"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    groups: int = number("g", 1)
    act: str = activation()
    residual: bool = flag("id")

    def write(self, write: ProgramWriter) -> int:
        """One convolution."""
        x = write.conv(
            "conv",
            INPUT,
            self.out_ch,
            kernel=self.kernel,
            stride=self.stride,
            groups=self.groups,
            act=self.act,
        )
        if self.residual:
            x = write.add(INPUT, x)
        return x


@register
@dataclass(frozen=True)
class DSConv(Op):
    """[shuffle]; depthwise k x k, BN, activation; [SE]; 1 x 1, BN; [ECA] (MobileNetV2's
    block without an expansion).

    The 1 x 1 convolution has ``groups`` groups. The channels are shuffled before the
    depthwise convolution, because the groups would otherwise never mix (FBNet).
    """

    KIND: ClassVar[str] = "dsconv"
    WORD: ClassVar[str] = "ds"

    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    groups: int = number("g", 1)
    se_ch: int = number("q", 0)
    se_gate: str = word(SE_GATES, "sigmoid")
    se_act: bool = flag("qact")
    eca: int = number("c", 0)
    act: str = activation()
    residual: bool = flag("id")

    def check(self) -> None:
        """Squeeze-and-excitation is complete, and channel attention has an
        odd kernel.
        """
        check_gates(self, self.se_ch, self.se_gate, self.se_act, self.eca)

    def write(self, write: ProgramWriter) -> int:
        """Depthwise convolution and projection."""
        return _from_depthwise(self, write, INPUT)


@register
@dataclass(frozen=True)
class MBConv(Op):
    """1 x 1 expansion, BN, act; [shuffle]; depthwise k x k, BN, act; [SE]; 1 x 1
    projection, BN; [ECA] (inverted bottleneck).

    ``groups`` applies to both 1 x 1 convolutions; see ``DSConv``.
    """

    KIND: ClassVar[str] = "mbconv"
    WORD: ClassVar[str] = "mb"

    mid_ch: int = number("m")
    kernel: int = number("k", 1)
    stride: int = number("s", 1)
    groups: int = number("g", 1)
    se_ch: int = number("q", 0)
    se_gate: str = word(SE_GATES, "sigmoid")
    se_act: bool = flag("qact")
    eca: int = number("c", 0)
    act: str = activation()
    residual: bool = flag("id")

    def check(self) -> None:
        """Squeeze-and-excitation is complete, and channel attention has an
        odd kernel.
        """
        check_gates(self, self.se_ch, self.se_gate, self.se_act, self.eca)

    def write(self, write: ProgramWriter) -> int:
        """Expansion, depthwise convolution, projection."""
        x = write.conv("expand", INPUT, self.mid_ch, groups=self.groups, act=self.act)
        return _from_depthwise(self, write, x)


def _from_depthwise(op: DSConv | MBConv, write: ProgramWriter, value: int) -> int:
    """The part of both blocks that follows the expansion, from the shuffle on."""
    x = write.shuffle(value, op.groups)
    x = write.depthwise("depthwise", x, kernel=op.kernel, stride=op.stride, act=op.act)
    se_act = op.act if op.se_act else "relu"
    x = squeeze_excite(write, x, op.se_ch, op.se_gate, se_act)
    x = write.conv("project", x, op.out_ch, groups=op.groups)
    x = attend_to_channels(write, x, op.eca)
    if op.residual:
        x = write.add(INPUT, x)
    return x


@register
@dataclass(frozen=True)
class Head(Op):
    """Global average pooling, 1 x 1 convolution with bias and no BN, activation
    (MobileNetV3's second-to-last layer).

    ``norm`` replaces the bias by a BN (MobileNetV4).
    """

    KIND: ClassVar[str] = "head"

    norm: bool = flag("bn")
    act: str = activation()

    @property
    def pooled(self) -> bool:
        """Always."""
        return True

    @property
    def out_size(self) -> int:
        """One pixel."""
        return 1

    def write(self, write: ProgramWriter) -> int:
        """Pooling and a convolution."""
        x = write.mean(INPUT)
        return write.conv("conv", x, self.out_ch, norm=self.norm, bias=not self.norm, act=self.act)


@register
@dataclass(frozen=True)
class Classifier(Op):
    """Global average pooling and a fully connected layer with bias."""

    KIND: ClassVar[str] = "classifier"
    WEIGHTS: ClassVar[str] = ""
    WORD: ClassVar[str] = "fc"

    @property
    def pooled(self) -> bool:
        """Always."""
        return True

    @property
    def out_size(self) -> int:
        """One pixel."""
        return 1

    def write(self, write: ProgramWriter) -> int:
        """Pooling and a fully connected layer."""
        return write.linear("linear", write.mean(INPUT), self.out_ch)


def separable(
    size: Size, in_ch: int, out_ch: int, mid_ch: int = 0, **fields: Any
) -> DSConv | MBConv:
    """A separable block: ``MBConv`` with ``mid_ch`` expanded channels, or ``DSConv`` if
    ``mid_ch`` is 0. ``fields`` are further fields of either.
    """
    if mid_ch:
        return MBConv(size, in_ch, out_ch, mid_ch, **fields)
    return DSConv(size, in_ch, out_ch, **fields)


def check_gates(op: Op, se_ch: int, se_gate: str, se_act: bool, eca: int = 0) -> None:
    """Raise SpaceError if squeeze-and-excitation has a gate or an activation but no
    channels, or if ECA has an even kernel.
    """
    if se_gate != SE_GATES[0] and not se_ch:
        raise SpaceError(f"op {op.key}: a gate ({se_gate}) needs squeeze-and-excitation (q).")
    if se_act and not se_ch:
        raise SpaceError(
            f"op {op.key}: an activation inside squeeze-and-excitation (qact) needs its channels"
            " (q)."
        )
    if eca and eca % 2 == 0:
        raise SpaceError(f"op {op.key}: channel attention (c) needs an odd kernel.")


def squeeze_excite(
    write: ProgramWriter, value: int, hidden: int, gate: str, act: str = "relu"
) -> int:
    """Squeeze-and-excitation (Hu et al., arXiv 1709.01507): a map times gate(W2 act(W1
    mean(map))). The map itself if there are no ``hidden`` channels.
    """
    if not hidden:
        return value
    squeezed = write.conv("se.reduce", write.mean(value), hidden, norm=False, bias=True, act=act)
    factor = write.conv(
        "se.expand", squeezed, write.channels_of(value), norm=False, bias=True, act=gate
    )
    return write.mul(value, factor)


def attend_to_channels(write: ProgramWriter, value: int, kernel: int) -> int:
    """Efficient channel attention (ECA-Net, Wang et al., arXiv 1910.03151): a map times
    sigmoid(1-D convolution along the channels of mean(map)). The map itself if
    ``kernel`` is 0.

    One kernel serves all channels, so it has hardly any weights.
    """
    if not kernel:
        return value
    gate = write.along_channels("eca", write.mean(value), kernel, "sigmoid")
    return write.mul(value, gate)
