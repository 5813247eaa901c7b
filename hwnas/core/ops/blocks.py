"""Blocks of mobile networks: convolutions, MobileNet's separable blocks, and the ends
of a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hwnas.core.ir import INPUT, ProgramWriter
from hwnas.core.ops.base import Op, activation, flag, number, register, word
from hwnas.errors import SpaceError

SE_GATES = ("sigmoid", "hsig")
"""Gates of squeeze-and-excitation: TuNAS's, and MobileNetV3's relu6(x + 3) / 6."""


@register
@dataclass(frozen=True)
class Conv(Op):
    """k x k convolution, BN, activation: a stem, or the 1 x 1 convolution before the classifier."""

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
        return write.add(INPUT, x) if self.residual else x


@register
@dataclass(frozen=True)
class DSConv(Op):
    """[shuffle]; depthwise k x k, BN, activation; [SE]; 1 x 1, BN (MobileNetV2's block
    without an expansion).

    The 1 x 1 convolution is in ``groups`` groups, and the channels are shuffled before
    the depthwise one, or the groups would never mix (FBNet).
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
        """Squeeze-and-excitation is whole, and channels are attended to by an odd kernel."""
        check_gates(self, self.se_ch, self.se_gate, self.se_act, self.eca)

    def write(self, write: ProgramWriter) -> int:
        """From the depthwise convolution on."""
        return _from_depthwise(self, write, INPUT)


@register
@dataclass(frozen=True)
class MBConv(Op):
    """1 x 1 expansion, BN, act; [shuffle]; depthwise k x k, BN, act; [SE]; 1 x 1
    projection, BN (inverted bottleneck).

    ``groups`` holds for both 1 x 1 convolutions; see ``DSConv``.
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
        """Squeeze-and-excitation is whole, and channels are attended to by an odd kernel."""
        check_gates(self, self.se_ch, self.se_gate, self.se_act, self.eca)

    def write(self, write: ProgramWriter) -> int:
        """Expansion, depthwise convolution, projection."""
        return _from_depthwise(
            self, write, write.conv("expand", INPUT, self.mid_ch, groups=self.groups, act=self.act)
        )


def _from_depthwise(op: DSConv | MBConv, write: ProgramWriter, value: int) -> int:
    """What follows the expansion, where there is one."""
    x = write.shuffle(value, op.groups)
    x = write.depthwise("depthwise", x, kernel=op.kernel, stride=op.stride, act=op.act)
    x = squeeze_excite(write, x, op.se_ch, op.se_gate, op.act if op.se_act else "relu")
    x = write.conv("project", x, op.out_ch, groups=op.groups)
    x = attend_to_channels(write, x, op.eca)
    return write.add(INPUT, x) if op.residual else x


@register
@dataclass(frozen=True)
class Head(Op):
    """Global average pooling, 1 x 1 convolution with bias and no BN, activation
    (MobileNetV3's last layer but one).

    ``norm`` has a BN instead of the bias (MobileNetV4).
    """

    KIND: ClassVar[str] = "head"

    norm: bool = flag("bn")
    act: str = activation()

    @property
    def pooled(self) -> bool:
        """It is."""
        return True

    @property
    def out_size(self) -> int:
        """One pixel."""
        return 1

    def write(self, write: ProgramWriter) -> int:
        """Pooling and a convolution."""
        return write.conv(
            "conv", write.mean(INPUT), self.out_ch, norm=self.norm, bias=not self.norm, act=self.act
        )


@register
@dataclass(frozen=True)
class Classifier(Op):
    """Global average pooling and a fully connected layer with bias."""

    KIND: ClassVar[str] = "classifier"
    WEIGHTS: ClassVar[str] = ""
    WORD: ClassVar[str] = "fc"

    @property
    def pooled(self) -> bool:
        """It is."""
        return True

    @property
    def out_size(self) -> int:
        """One pixel."""
        return 1

    def write(self, write: ProgramWriter) -> int:
        """Pooling and a fully connected layer."""
        return write.linear("linear", write.mean(INPUT), self.out_ch)


def separable(
    size: int, in_ch: int, out_ch: int, mid_ch: int = 0, **fields: Any
) -> DSConv | MBConv:
    """An inverted bottleneck, or without middle channels a block that has no expansion.
    ``fields`` are those of both.
    """
    return (
        MBConv(size, in_ch, out_ch, mid_ch, **fields)
        if mid_ch
        else DSConv(size, in_ch, out_ch, **fields)
    )


def check_gates(op: Op, se_ch: int, se_gate: str, se_act: bool, eca: int = 0) -> None:
    """Raise SpaceError where squeeze-and-excitation has a gate or an activation, but no
    channels, or ECA an even kernel.
    """
    if se_gate != SE_GATES[0] and not se_ch:
        raise SpaceError(f"op {op.key}: a gate ({se_gate}) needs squeeze-and-excitation (q).")
    if se_act and not se_ch:
        raise SpaceError(
            f"op {op.key}: an activation inside squeeze-and-excitation (qact) needs its channels"
            " (q)."
        )
    if eca and eca % 2 == 0:
        raise SpaceError(f"op {op.key}: channels are attended to (c) by an odd kernel.")


def squeeze_excite(
    write: ProgramWriter, value: int, hidden: int, gate: str, act: str = "relu"
) -> int:
    """A map times gate(W2 act(W1 mean(map))); the map itself where there are no
    ``hidden`` channels (Hu et al., arXiv 1709.01507).
    """
    if not hidden:
        return value
    squeezed = write.conv("se.reduce", write.mean(value), hidden, norm=False, bias=True, act=act)
    factor = write.conv(
        "se.expand", squeezed, write.channels_of(value), norm=False, bias=True, act=gate
    )
    return write.mul(value, factor)


def attend_to_channels(write: ProgramWriter, value: int, kernel: int) -> int:
    """A map times sigmoid(1-D convolution along the channels of mean(map)); the map
    itself without a kernel.

    Efficient channel attention (ECA-Net, Wang et al., arXiv 1910.03151): one kernel for
    all channels, so it has as good as no weights.
    """
    if not kernel:
        return value
    return write.mul(value, write.along_channels("eca", write.mean(value), kernel, "sigmoid"))
