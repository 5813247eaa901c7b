"""The intermediate representation of a block: what it computes, as a small graph that
is defined once and used everywhere.

A ``Program`` is a list of nodes in single-assignment form. Value 0 is the block's
input, and node i makes value i + 1 from earlier values. ``ProgramWriter`` infers shapes
while a program is written. Multiply-accumulates, parameters and live feature maps are
computed from the program; torch modules, weight-shared layers, TFLite and ONNX files
are built from it.

======================  ==============================================================
``conv``                convolution; BN, or a bias, or neither; an activation
``linear``              the map flattened to a vector; a fully connected layer with a
                        bias
``avgpool, maxpool``    k x k pooling that ignores its padding (no padding if k is
                        even); BN without scale and shift
``norm``                BN, an activation
``act``                 an activation
``mean``                global average pooling, to [channels, 1, 1]
``add``                 the sum of two maps of the same shape
``mul``                 a map times a gate, [channels, 1, 1]
``concat``              the channels of several maps, concatenated
``shuffle``             channel i of group g becomes channel i * groups + g (ShuffleNet)
``crop``                the map without its first row and its first column
``upsample``            bilinear interpolation to twice the height and width, with half-pixel
                        centres
``channels``            a 1-D convolution along the channels of [channels, 1, 1], one
                        kernel for all, without a bias; an activation
======================  ==============================================================

BN and activation are part of the node that they follow, because runtimes fuse them into
it, and because a narrower node of a super-net slices both in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from hwnas.core.size import Size, area, each_side, strided

Kind: TypeAlias = Literal[
    "conv",
    "linear",
    "avgpool",
    "maxpool",
    "norm",
    "act",
    "mean",
    "add",
    "mul",
    "concat",
    "shuffle",
    "crop",
    "upsample",
    "channels",
]
POOLS: tuple[Kind, ...] = ("avgpool", "maxpool")
LAYERS: tuple[Kind, ...] = ("conv", "linear", *POOLS, "norm", "channels")
"""Kinds with weights or statistics, and pooling. These are called layers."""
IN_PLACE: tuple[Kind, ...] = ("act", "add", "mul", "norm")
"""Kinds whose result a runtime writes over the first map that they read."""
INPUT = 0
"""The input of a block, as a value."""


@dataclass(frozen=True)
class Node:
    """One node of a program: its inputs, shape and attributes.

    ``size`` is the input's height and width in pixels; padding is
    ``dilation * (kernel // 2)`` on each side. ``name`` is the path of its weights in
    the block's torch module; a dot means a submodule (``se.reduce``). ``inputs`` are
    the values that it reads.
    """

    name: str
    kind: Kind
    in_ch: int
    out_ch: int
    size: Size = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    norm: bool = False
    bias: bool = False
    act: str = "none"
    inputs: tuple[int, ...] = (INPUT,)

    @property
    def out_size(self) -> Size:
        """Output height and width."""
        if self.kind in ("mean", "linear"):
            return 1
        if self.kind == "crop":
            return each_side(self.size, lambda side: side - 1)
        if self.kind == "upsample":
            return each_side(self.size, lambda side: 2 * side)
        return strided(self.size, self.stride)

    @property
    def depthwise(self) -> bool:
        """Whether it convolves each channel separately, with one filter per channel."""
        return self.kind == "conv" and self.groups == self.in_ch == self.out_ch > 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, in convolutions and fully connected
        layers. Other nodes count as 0.
        """
        if self.kind == "channels":
            # The kernel is applied once at each channel.
            return self.kernel * self.in_ch
        if self.kind not in ("conv", "linear"):
            return 0
        return area(self.out_size) * self.kernel**2 * (self.in_ch // self.groups) * self.out_ch

    @property
    def params(self) -> int:
        """Weights, biases, BN scales and BN shifts. The BN after pooling
        has neither.
        """
        if self.kind == "channels":
            return self.kernel
        if self.kind == "norm":
            return 2 * self.out_ch
        if self.kind not in ("conv", "linear"):
            return 0
        weights = self.kernel**2 * (self.in_ch // self.groups) * self.out_ch
        # Per channel, BN has a scale and a shift.
        return weights + (2 * self.norm + self.bias) * self.out_ch

    @property
    def read(self) -> int:
        """How many numbers are in the first map that it reads."""
        return self.in_ch * area(self.size)

    @property
    def written(self) -> int:
        """How many numbers are in the map that it makes."""
        return self.out_ch * area(self.out_size)


@dataclass(frozen=True)
class Program:
    """The nodes of a block in the order they run, and the values that are its outputs.

    ``in_ch`` and ``size`` are the channels and the height and width of its input.
    """

    in_ch: int
    size: Size
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with weights or statistics, and pooling."""
        return tuple(node for node in self.nodes if node.kind in LAYERS)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(node.macs for node in self.nodes)

    @cached_property
    def params(self) -> int:
        """Weights, biases, BN scales and BN shifts."""
        return sum(node.params for node in self.nodes)

    @cached_property
    def endings(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the values that are read for the last time there. Outputs stay
        alive, so they are never listed.
        """
        last_read: dict[int, int] = {}
        for position, node in enumerate(self.nodes):
            for value in node.inputs:
                last_read[value] = position

        endings: list[list[int]] = [[] for _ in self.nodes]
        for value, position in last_read.items():
            if value not in self.outputs:
                endings[position].append(value)
        return tuple(map(tuple, endings))

    def live_numbers(self, *, keep_input: bool = False) -> Iterator[int]:
        """How many numbers in feature maps are alive while each node runs: those it
        reads, those it writes, and those that are read later.

        The model is a runtime that runs node by node and frees each map after its last
        use. Activations, BN, sums and scaling by a gate work in place. A runtime that
        fuses nodes needs less; one that never reuses buffers needs more. Set
        ``keep_input`` if another block reads this block's input later.
        """
        # Value 0 is the input, value i + 1 the result of node i.
        sizes = [self.in_ch * area(self.size), *(node.written for node in self.nodes)]
        alive = {INPUT}
        for position, node in enumerate(self.nodes):
            ending = set(self.endings[position])
            if keep_input:
                ending.discard(INPUT)
            live = sum(sizes[value] for value in alive)
            # Overwriting a map is safe only if no later node reads it.
            in_place = node.kind in IN_PLACE and node.inputs[0] in ending
            if not in_place:
                live += node.written
            yield live
            alive = (alive - ending) | {position + 1}


class DepthwiseAttributes(TypedDict, total=False):
    """The optional fields of a depthwise convolution's ``Node``. ``norm`` is True by
    default.
    """

    stride: int
    dilation: int
    norm: bool
    act: str


class ConvAttributes(DepthwiseAttributes, total=False):
    """The optional fields of a convolution's ``Node``."""

    kernel: int
    groups: int
    bias: bool


@dataclass
class ProgramWriter:
    """Writes a program: every method adds a node and returns its value. Shapes follow
    from the values that a node reads.

    Example:
        >>> write = ProgramWriter(16, 32)
        >>> wide = write.conv("expand", INPUT, 64, act="relu")
        >>> program = write.program(write.conv("project", wide, 24))
        >>> [(node.name, node.in_ch, node.out_ch) for node in program.nodes]
        [('expand', 16, 64), ('project', 64, 24)]
    """

    in_ch: int
    size: Size
    nodes: list[Node] = field(default_factory=list)

    def channels_of(self, value: int) -> int:
        """Channels of a value."""
        if value == INPUT:
            return self.in_ch
        return self.nodes[value - 1].out_ch

    def size_of(self, value: int) -> Size:
        """Height and width of a value."""
        if value == INPUT:
            return self.size
        return self.nodes[value - 1].out_size

    def conv(
        self,
        name: str,
        value: int,
        out_ch: int,
        **attributes: Unpack[ConvAttributes],
    ) -> int:
        """A convolution with BN, with a bias (``norm=False, bias=True``), or with
        neither.
        """
        attributes.setdefault("norm", True)  # unlike the default of a node
        return self._layer(name, "conv", value, out_ch, **attributes)

    def depthwise(
        self,
        name: str,
        value: int,
        *,
        kernel: int,
        **attributes: Unpack[DepthwiseAttributes],
    ) -> int:
        """A depthwise convolution, with BN or with neither BN nor bias."""
        channels = self.channels_of(value)
        return self.conv(name, value, channels, kernel=kernel, groups=channels, **attributes)

    def linear(self, name: str, value: int, out_ch: int) -> int:
        """A fully connected layer with a bias."""
        return self._layer(name, "linear", value, out_ch, bias=True)

    def pool(
        self,
        name: str,
        kind: Literal["avgpool", "maxpool"],
        value: int,
        *,
        kernel: int,
        stride: int,
        norm: bool = False,
    ) -> int:
        """k x k pooling. ``norm`` adds a BN without scale and shift after it."""
        return self._layer(
            name, kind, value, self.channels_of(value), kernel=kernel, stride=stride, norm=norm
        )

    def norm(self, name: str, value: int, act: str = "none") -> int:
        """BN and an activation."""
        return self._layer(name, "norm", value, self.channels_of(value), norm=True, act=act)

    def act(self, value: int, act: str) -> int:
        """An activation; ``value`` itself if ``act`` is ``none``."""
        if act == "none":
            return value
        return self._plain("act", (value,), act=act)

    def mean(self, value: int) -> int:
        """Global average pooling."""
        return self._plain("mean", (value,))

    def add(self, value: int, other: int) -> int:
        """The sum of two maps."""
        return self._plain("add", (value, other))

    def mul(self, value: int, gate: int) -> int:
        """A map times a gate."""
        return self._plain("mul", (value, gate))

    def concat(self, values: Sequence[int]) -> int:
        """The channels of several maps, concatenated."""
        return self._plain("concat", tuple(values), out_ch=sum(map(self.channels_of, values)))

    def shuffle(self, value: int, groups: int) -> int:
        """Channels shuffled between groups; ``value`` itself if there is one group."""
        if groups == 1:
            return value
        return self._plain("shuffle", (value,), groups=groups)

    def crop(self, value: int) -> int:
        """The map without its first row and its first column."""
        return self._plain("crop", (value,))

    def upsample(self, value: int) -> int:
        """The map at twice its height and width."""
        return self._plain("upsample", (value,))

    def along_channels(self, name: str, value: int, kernel: int, act: str) -> int:
        """A 1-D convolution along the channels of a one-pixel map."""
        return self._layer(name, "channels", value, self.channels_of(value), kernel=kernel, act=act)

    def program(self, *outputs: int) -> Program:
        """The program with these outputs."""
        return Program(self.in_ch, self.size, tuple(self.nodes), outputs)

    def _layer(self, name: str, kind: Kind, value: int, out_ch: int, **attributes: Any) -> int:
        """A node that reads one value; ``attributes`` are further fields of
        ``Node``.
        """
        node = Node(
            name,
            kind,
            self.channels_of(value),
            out_ch,
            self.size_of(value),
            inputs=(value,),
            **attributes,
        )
        return self._add(node)

    def _plain(
        self,
        kind: Kind,
        values: tuple[int, ...],
        *,
        out_ch: int | None = None,
        groups: int = 1,
        act: str = "none",
    ) -> int:
        """A node without weights, named by its kind: ``add``, ``add2``, ..."""
        channels = self.channels_of(values[0])
        earlier = sum(node.kind == kind for node in self.nodes)
        node = Node(
            f"{kind}{earlier + 1}" if earlier else kind,
            kind,
            channels,
            channels if out_ch is None else out_ch,
            self.size_of(values[0]),
            groups=groups,
            act=act,
            inputs=values,
        )
        return self._add(node)

    def _add(self, node: Node) -> int:
        """Append a node and return its value, which is its position + 1."""
        self.nodes.append(node)
        return len(self.nodes)
