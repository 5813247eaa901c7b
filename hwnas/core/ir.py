"""What a block computes, written once: a small graph of nodes that everything which
needs to know walks.

A ``Program`` is a list of nodes in single assignment. Value 0 is the block's input, and
node i makes value i + 1 from values that were made before it. Shapes are inferred while
a program is written (``ProgramWriter``); multiply-accumulates, parameters and live
feature maps are folds over it; torch modules, weight-shared layers, TFLite and ONNX
files are interpreters of it.

======================  =============================================================================================
``conv``                convolution; BN, or a bias, or neither; an activation
``linear``              the map's values as one vector; a fully connected layer with a bias
``avgpool, maxpool``    k x k pooling that does not count its padding (none where k is even); BN without scale and shift
``norm``                BN, an activation
``act``                 an activation
``mean``                global average pooling, to [channels, 1, 1]
``add``                 two maps of the same shape added up
``mul``                 a map times a gate, [channels, 1, 1]
``concat``              channels of several maps one after another
``shuffle``             channel i of group g becomes channel i * groups + g (ShuffleNet)
``crop``                the map without its first row and its first column
``channels``            a 1-D convolution along the channels of [channels, 1, 1], one kernel for all, without a bias; an activation
======================  =============================================================================================

BN and activation belong to the node that they follow, because runtimes fuse them there,
and a narrower node takes the same part of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

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
    "channels",
]
POOLS: tuple[Kind, ...] = ("avgpool", "maxpool")
LAYERS: tuple[Kind, ...] = ("conv", "linear", *POOLS, "norm", "channels")
"""Kinds that hold weights or statistics, or pool: what is called a layer."""
IN_PLACE: tuple[Kind, ...] = ("act", "add", "mul", "norm")
"""Kinds that a runtime computes into the map that they read first."""
INPUT = 0
"""The value that a block reads."""


@dataclass(frozen=True)
class Node:
    """One node of a program: what it reads, its shape, its attributes.

    ``size`` is the input height = width; padding is ``dilation * (kernel // 2)`` on
    each side. ``name`` is where its weights are found in the block's module; a dot
    makes a part of its own (``se.reduce``).
    """

    name: str
    kind: Kind
    in_ch: int
    out_ch: int
    size: int = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    norm: bool = False
    bias: bool = False
    act: str = "none"
    inputs: tuple[int, ...] = (INPUT,)

    @property
    def out_size(self) -> int:
        """Output height = width."""
        if self.kind in ("mean", "linear"):
            return 1
        return out_size(self.size, self.stride) if self.kind != "crop" else self.size - 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone, with as many filters as there are channels."""
        return self.kind == "conv" and self.groups == self.in_ch == self.out_ch > 1

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image, of convolutions and fully
        connected layers.
        """
        if self.kind == "channels":
            return self.kernel * self.in_ch
        if self.kind not in ("conv", "linear"):
            return 0
        return self.out_size**2 * self.kernel**2 * (self.in_ch // self.groups) * self.out_ch

    @property
    def params(self) -> int:
        """Weights and biases, and BN scales and shifts, which the BN behind pooling has not."""
        if self.kind == "channels":
            return self.kernel
        if self.kind == "norm":
            return 2 * self.out_ch
        if self.kind not in ("conv", "linear"):
            return 0
        weights = self.kernel**2 * (self.in_ch // self.groups) * self.out_ch
        return weights + (2 * self.norm + self.bias) * self.out_ch

    @property
    def read(self) -> int:
        """Numbers of the map that it reads first."""
        return self.in_ch * self.size**2

    @property
    def written(self) -> int:
        """Numbers of the map that it makes."""
        return self.out_ch * self.out_size**2


def out_size(size: int, stride: int) -> int:
    """Output height of a layer with padding ``kernel // 2``: ceil(size / stride)."""
    return -(-size // stride)


@dataclass(frozen=True)
class Program:
    """Nodes in the order they run, and the values that are the block's outputs.
    ``in_ch`` and ``size`` are those of its input.
    """

    in_ch: int
    size: int
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        """Nodes that hold weights or statistics, or pool."""
        return tuple(node for node in self.nodes if node.kind in LAYERS)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image."""
        return sum(node.macs for node in self.nodes)

    @cached_property
    def params(self) -> int:
        """Weights and biases, BN scales and shifts."""
        return sum(node.params for node in self.nodes)

    @cached_property
    def endings(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, the values that nobody reads after it. Outputs never end."""
        last = {
            value: position for position, node in enumerate(self.nodes) for value in node.inputs
        }
        ending: list[list[int]] = [[] for _ in self.nodes]
        for value, position in last.items():
            if value not in self.outputs:
                ending[position].append(value)
        return tuple(map(tuple, ending))

    def live_numbers(self, *, keep_input: bool = False) -> Iterator[int]:
        """How many numbers of feature maps are alive while each node runs: what it
        reads, what it writes, what is read later.

        A runtime goes node by node and gives a map's memory back after its last use;
        activations, BN, sums and the scaling by a gate work in place. One that fuses
        nodes, or never reuses buffers, needs less or more. ``keep_input``: somebody
        else reads the block's input afterwards.
        """
        sizes = {
            INPUT: self.in_ch * self.size**2,
            **{i + 1: node.written for i, node in enumerate(self.nodes)},
        }
        alive = {INPUT}
        for position, node in enumerate(self.nodes):
            ending = set(self.endings[position]) - ({INPUT} if keep_input else set())
            in_place = node.kind in IN_PLACE and node.inputs[0] in ending
            yield sum(sizes[value] for value in alive) + (0 if in_place else node.written)
            alive = (alive - ending) | {position + 1}


@dataclass
class ProgramWriter:
    """Writes a program: every method adds a node and returns its value. Shapes follow
    from what is read.

    Example:
        >>> write = ProgramWriter(16, 32)
        >>> wide = write.conv("expand", INPUT, 64, act="relu")
        >>> program = write.program(write.conv("project", wide, 24))
        >>> [(node.name, node.in_ch, node.out_ch) for node in program.nodes]
        [('expand', 16, 64), ('project', 64, 24)]
    """

    in_ch: int
    size: int
    nodes: list[Node] = field(default_factory=list)

    def channels_of(self, value: int) -> int:
        """Channels of a value."""
        return self.in_ch if value == INPUT else self.nodes[value - 1].out_ch

    def size_of(self, value: int) -> int:
        """Height = width of a value."""
        return self.size if value == INPUT else self.nodes[value - 1].out_size

    def conv(
        self,
        name: str,
        value: int,
        out_ch: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        norm: bool = True,
        bias: bool = False,
        act: str = "none",
    ) -> int:
        """A convolution with BN, or with a bias (``norm = False, bias = True``), or
        with neither.
        """
        return self._layer(
            name,
            "conv",
            value,
            out_ch,
            kernel=kernel,
            stride=stride,
            groups=groups,
            dilation=dilation,
            norm=norm,
            bias=bias,
            act=act,
        )

    def depthwise(
        self,
        name: str,
        value: int,
        *,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        norm: bool = True,
        act: str = "none",
    ) -> int:
        """A convolution of every channel alone, with BN or with neither BN nor bias."""
        channels = self.channels_of(value)
        return self.conv(
            name,
            value,
            channels,
            kernel=kernel,
            stride=stride,
            groups=channels,
            dilation=dilation,
            norm=norm,
            act=act,
        )

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
        """k x k pooling, with a BN without scale and shift behind it where ``norm`` says so."""
        return self._layer(
            name, kind, value, self.channels_of(value), kernel=kernel, stride=stride, norm=norm
        )

    def norm(self, name: str, value: int, act: str = "none") -> int:
        """BN and an activation."""
        return self._layer(name, "norm", value, self.channels_of(value), norm=True, act=act)

    def act(self, value: int, act: str) -> int:
        """An activation; the value itself where it is ``none``."""
        return value if act == "none" else self._plain("act", (value,), act=act)

    def mean(self, value: int) -> int:
        """Global average pooling."""
        return self._plain("mean", (value,))

    def add(self, value: int, other: int) -> int:
        """Two maps added up."""
        return self._plain("add", (value, other))

    def mul(self, value: int, gate: int) -> int:
        """A map times a gate."""
        return self._plain("mul", (value, gate))

    def concat(self, values: Sequence[int]) -> int:
        """Channels one after another."""
        return self._plain("concat", tuple(values), out_ch=sum(map(self.channels_of, values)))

    def shuffle(self, value: int, groups: int) -> int:
        """Channels shuffled; the value itself where there is one group."""
        return value if groups == 1 else self._plain("shuffle", (value,), groups=groups)

    def crop(self, value: int) -> int:
        """Without the first row and the first column."""
        return self._plain("crop", (value,))

    def along_channels(self, name: str, value: int, kernel: int, act: str) -> int:
        """A 1-D convolution along the channels of a map of one pixel."""
        return self._layer(name, "channels", value, self.channels_of(value), kernel=kernel, act=act)

    def program(self, *outputs: int) -> Program:
        """The program with these outputs."""
        return Program(self.in_ch, self.size, tuple(self.nodes), outputs)

    def _layer(self, name: str, kind: Kind, value: int, out_ch: int, **attributes: Any) -> int:
        """A node that reads one value; ``attributes`` are those of ``Node``."""
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
        """A node without weights, named by its kind and position among its like."""
        channels = self.channels_of(values[0])
        earlier = sum(node.kind == kind for node in self.nodes)
        name = kind if not earlier else f"{kind}{earlier + 1}"
        out = channels if out_ch is None else out_ch
        return self._add(
            Node(
                name,
                kind,
                channels,
                out,
                self.size_of(values[0]),
                groups=groups,
                act=act,
                inputs=values,
            )
        )

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes)
