"""Weights of one network of mobile blocks as the start of another.

Parameter remapping: J. Fang et al., "Fast Neural Network Adaptation via Parameter
Remapping and Architecture Search", ICLR 2020, arXiv 2001.02525, section 3.2. A network
with stages 1, 2, ... of blocks takes the weights W' of a seed network:

    depth    block i of a stage with m blocks in the seed:  W_i = W'_min(i, m)
    width    the channels that both have:                   W[:p, :q] = W'[:p, :q]
    kernel   the centre of a larger kernel, of which the seed's kernel becomes the centre
             with zeros around it; a smaller kernel is the centre of the seed's

*Differences from the paper*:

- the seed is any network of these blocks, not MobileNetV2 with the same stages. Stages
  are matched in order by their widths: the sum of |log2(width / seed width)| is
  smallest, where a stage of another kind of block costs 1, a seed stage that is used
  twice 1, and one that is left out 1/4 (our choice);
- channels are taken in the order of their importance instead of their position, if
  fewer are needed than there are: the L1 norm of what the projection makes of an expanded
  channel, and the sum of the BN scales that write into a channel between blocks. In
  super-nets the order is always that of importance, because narrower options use the
  first channels (as once-for-all sorts them, arXiv 1908.09791);
- a channel that the seed lacks keeps its initial weights, and what reads it starts at 0:
  the remapped part computes what it would without the channel. The paper's code starts
  both at 0, so such channels never learn;
- squeeze-and-excitation is remapped like other layers; one that the seed lacks starts
  as a factor of 1/2 for all channels, which the projection makes up for in networks (in
  super-nets, options with and without it share the projection, and BN makes up for it);
- further blocks of a stage start from the last one of the seed's only if that has a
  block of constant width; the first block of a stage is no start for them.

Stages begin where the width or the resolution changes. Two stages of a super-net that
have the same width and resolution are one stage of a seed, and may not both find it.

Activations and strides of the seed are not compared: training adapts to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hwnas.core.ir import Node
from hwnas.core.ops import Op

State = Mapping[str, Tensor]
"""The state of a block's module, by name; see ``hwnas.nn.blocks``."""

REUSED = 1.0
"""Cost of a seed stage that a second stage uses."""
LEFT_OUT = 0.25
"""Cost of a seed stage that no stage uses."""
OTHER_KIND = 1.0
"""Cost of a seed stage of another kind of block."""

NEW = -1
"""The index of a channel that the seed lacks."""

B = TypeVar("B", "SeedBlock", "TargetBlock")


def begins_stage(op: Op) -> bool:
    """Whether the width or the resolution changes."""
    return op.in_ch != op.out_ch or op.stride > 1


@dataclass(frozen=True)
class SeedBlock:
    """A block of the seed network, and its weights."""

    op: Op
    state: State
    begins_stage: bool


@dataclass(frozen=True)
class TargetBlock:
    """A block that takes weights: its ``variants`` are what it may compute, each with
    weights that are written in place. A block of a network has one; a slot of a
    super-net has one for each option, smallest first, at its largest widths.
    """

    variants: Sequence[tuple[Op, State]]
    begins_stage: bool

    @property
    def op(self) -> Op:
        """The largest variant."""
        return self.variants[-1][0]


@dataclass
class Remapped:
    """What was done. ``layers`` are the convolutions and fully connected layers of the
    target with the number of their weights, ``taken`` those that took weights with the
    number of weights taken, and ``changed`` those of them that have other channels or
    another kernel than in the seed: by the addresses of their weights, because options
    of a super-net share layers. ``classes`` are those of the seed's classifier, if it was
    dropped because the number of classes differs.
    """

    layers: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    classes: int | None = None

    @property
    def share(self) -> float:
        """The fraction of the weights of all layers that were taken."""
        return sum(self.taken.values()) / max(1, sum(self.layers.values()))

    @property
    def text(self) -> str:
        """In words."""
        total = sum(self.layers.values())
        text = (
            f"{len(self.taken)} of {len(self.layers)} layers with {self.share:.0%} of"
            f" {total / 1e6:.2f} M weights"
        )
        if self.changed:
            text += f", {len(self.changed)} of them with other channels or kernels"
        if self.classes is not None:
            text += f", without the classifier of {self.classes:,} classes"
        return text


@dataclass(frozen=True)
class _Stage(Generic[B]):
    """Blocks of one width. Stages of another ``kind`` share hardly any layers."""

    blocks: Sequence[B]

    @property
    def op(self) -> Op:
        return self.blocks[0].op

    @property
    def kind(self) -> tuple[str, bool]:
        op = self.op
        return op.kind, op.kernel > 1


@dataclass(frozen=True)
class _Channels:
    """For each channel of the target, the seed's channel that it continues, or NEW:
    int64 [channels].
    """

    index: Tensor
    known: Tensor = field(init=False)
    """Which channels the seed has: bool [channels]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", self.index >= 0)

    @classmethod
    def same(cls, count: int) -> _Channels:
        """Channels in the seed's order."""
        return cls(torch.arange(count))

    @classmethod
    def none(cls, count: int) -> _Channels:
        """Channels of which the seed has none."""
        return cls(torch.full((count,), NEW))

    @classmethod
    def chosen(cls, importance: Tensor, count: int, sorts: bool) -> _Channels:
        """``count`` channels by their ``importance`` [channels of the seed]."""
        if count == len(importance) and not sorts:
            return cls.same(count)
        index = torch.full((count,), NEW)
        order = importance.argsort(descending=True, stable=True)[:count]
        index[: len(order)] = order
        return cls(index)


@torch.no_grad()
def remap(
    target: Sequence[TargetBlock],
    seed: Sequence[SeedBlock],
    sorts: bool,
) -> Remapped:
    """Write the weights of ``seed`` into ``target``, in place. ``sorts``: the target is a
    super-net, and channels are always in the order of importance.
    """
    done = Remapped()
    target_stages = _stages(target)
    seed_stages = _stages(seed)
    into = _Channels.same(target[0].op.in_ch)
    last = -1
    for stage, position in zip(target_stages, matched(target_stages, seed_stages), strict=True):
        if position != last + 1:
            # the seed's stage reads other channels than those that were written
            into = _Channels.none(stage.op.in_ch)
        into = _remap_stage(stage, seed_stages[position], into, sorts, done)
        last = position
    return done


def _stages(blocks: Sequence[B]) -> list[_Stage[B]]:
    """The blocks of each stage."""
    stages: list[list[B]] = []
    last = blocks[0]
    for block in blocks:
        # a separable block after a stem of the same width is a stage of its own
        if not stages or block.begins_stage or _is_separable(block) != _is_separable(last):
            stages.append([])
        last = block
        stages[-1].append(block)
    return [_Stage(stage) for stage in stages]


def _is_separable(block: SeedBlock | TargetBlock) -> bool:
    return any(node.depthwise for node in block.op.layers)


def matched(target: Sequence[_Stage[TargetBlock]], seed: Sequence[_Stage[SeedBlock]]) -> list[int]:
    """For each stage of the target the position of a stage of the seed, in order, with the
    smallest total cost; see the module's docstring.
    """
    # best[s]: the smallest cost of the stages so far if the last one uses seed stage s
    best = [_difference(target[0], stage) + LEFT_OUT * s for s, stage in enumerate(seed)]
    origins: list[list[int]] = []
    for stage in target[1:]:
        costs = []
        origin = []
        for s, seed_stage in enumerate(seed):
            before = [best[r] + LEFT_OUT * (s - r - 1) for r in range(s)]
            before.append(best[s] + REUSED)
            cheapest = min(range(s + 1), key=before.__getitem__)
            origin.append(cheapest)
            costs.append(before[cheapest] + _difference(stage, seed_stage))
        best = costs
        origins.append(origin)

    ending = [cost + LEFT_OUT * (len(seed) - 1 - s) for s, cost in enumerate(best)]
    positions = [min(range(len(seed)), key=ending.__getitem__)]
    for origin in reversed(origins):
        positions.append(origin[positions[-1]])
    return positions[::-1]


def _difference(stage: _Stage[TargetBlock], seed: _Stage[SeedBlock]) -> float:
    difference = abs(math.log2(stage.op.out_ch / seed.op.out_ch))
    if stage.kind != seed.kind:
        difference += OTHER_KIND
    return difference


def _remap_stage(
    stage: _Stage[TargetBlock],
    seed: _Stage[SeedBlock],
    into: _Channels,
    sorts: bool,
    done: Remapped,
) -> _Channels:
    """Remap the blocks of a stage. ``into`` are the channels of its input; returns those
    of its output.
    """
    seeds = seed.blocks
    out = _output_channels(stage.op, seeds, sorts, done)
    for i, block in enumerate(stage.blocks):
        position = min(i, len(seeds) - 1)
        source = seeds[position]
        for op, state in block.variants:
            for weight in _weights(op, state):
                done.layers[_address(weight)] = _storage_size(weight)
            # a residual block and one that changes the width cannot start from each other
            if (position == 0) == (i == 0):
                _BlockRemapping(op, state, source, into, out, sorts, done).run()
        into = out
    return out


def _output_channels(op: Op, seeds: Sequence[SeedBlock], sorts: bool, done: Remapped) -> _Channels:
    """The channels that a stage writes."""
    seed = seeds[0].op
    if seed.kind == op.kind == "classifier":
        if seed.out_ch == op.out_ch:
            return _Channels.same(op.out_ch)
        done.classes = seed.out_ch
        return _Channels.none(op.out_ch)
    # blocks add to the same channels, so what counts is how much all of them write
    importance = torch.stack([_written(block) for block in seeds]).sum(0)
    return _Channels.chosen(importance, op.out_ch, sorts)


def _written(block: SeedBlock) -> Tensor:
    """How much a block writes into each of its output channels [out_ch]."""
    last = [node for node in block.op.layers if node.out_ch == block.op.out_ch][-1]
    name = block.op.WEIGHTS + last.name
    scale = block.state.get(f"{name}.norm.weight")
    if scale is not None:
        return scale.abs()
    return _weight(block.op, block.state, last).abs().flatten(1).sum(1)


def _weight(op: Op, state: State, node: Node) -> Tensor:
    """The weights of a layer: [out, in / groups, k, k], or [out, in] of a linear one."""
    kind = "" if node.kind == "linear" else ".conv"
    return state[f"{op.WEIGHTS}{node.name}{kind}.weight"]


def _weights(op: Op, state: State) -> list[Tensor]:
    return [_weight(op, state, node) for node in op.layers if node.kind in ("conv", "linear")]


def _address(weight: Tensor) -> int:
    # views of one weight, such as the centre of its kernel, count once
    return weight.untyped_storage().data_ptr()


def _storage_size(weight: Tensor) -> int:
    """The number of weights of a layer of which ``weight`` may be a part."""
    return weight.untyped_storage().nbytes() // weight.element_size()


@dataclass(frozen=True)
class _BlockRemapping:
    """The remapping of one block from the channels ``into`` to ``out``."""

    op: Op
    state: State
    source: SeedBlock
    into: _Channels
    out: _Channels
    sorts: bool
    done: Remapped

    def run(self) -> None:
        """Remap every layer that both blocks have."""
        nodes = {node.name: node for node in self.op.layers}
        seeds = {node.name: node for node in self.source.op.layers}
        # an expanded channel cannot be made of one that is not, nor the reverse
        if ("expand" in nodes) != ("expand" in seeds):
            return

        middle = self._middle(nodes, seeds)
        squeezed = self._squeezed(nodes, seeds)
        channels = {
            "expand": (middle, self.into),
            "depthwise": (middle, None),
            "se.reduce": (squeezed, middle),
            "se.expand": (middle, squeezed),
            "project": (self.out, middle),
            "conv": (self.out, self.into),
            "linear": (self.out, self.into),
        }
        for name, node in nodes.items():
            seed = seeds.get(name)
            if name in channels and seed is not None and _same_groups(node, seed):
                self._remap_layer(node, seed, *channels[name])
        if "se.expand" in nodes and "se.expand" not in seeds:
            self._halve(nodes)

    def _middle(self, nodes: Mapping[str, Node], seeds: Mapping[str, Node]) -> _Channels:
        """The channels of the depthwise convolution."""
        if "expand" not in nodes:
            return self.into
        projection = _weight(self.source.op, self.source.state, seeds["project"])
        importance = projection.abs().sum((0, 2, 3))
        return _Channels.chosen(importance, nodes["expand"].out_ch, self.sorts)

    def _squeezed(self, nodes: Mapping[str, Node], seeds: Mapping[str, Node]) -> _Channels:
        """The channels inside squeeze-and-excitation."""
        if "se.expand" not in nodes:
            return _Channels.none(0)
        count = nodes["se.expand"].in_ch
        if "se.expand" not in seeds:
            return _Channels.none(count)
        gate = _weight(self.source.op, self.source.state, seeds["se.expand"])
        return _Channels.chosen(gate.abs().sum((0, 2, 3)), count, self.sorts)

    def _remap_layer(self, node: Node, seed: Node, out: _Channels, into: _Channels | None) -> None:
        weight = _weight(self.op, self.state, node)
        source = _weight(self.source.op, self.source.state, seed)
        if into is None:
            into = _Channels.same(weight.shape[1])
        if not out.known.any() or not into.known.any():
            return

        rows = source[out.index[out.known]]
        if node.kind == "conv":
            rows = with_kernel(rows, node.kernel)
        # what reads a channel that the seed lacks starts at 0
        remapped = rows.new_zeros(len(rows), *weight.shape[1:])
        remapped[:, into.known] = rows[:, into.index[into.known]]
        weight[out.known] = remapped.to(weight)

        prefix = self.op.WEIGHTS + node.name
        seed_prefix = self.source.op.WEIGHTS + seed.name
        for name, tensor in self.state.items():
            vector = self.source.state.get(seed_prefix + name.removeprefix(prefix))
            if name.startswith(f"{prefix}.") and tensor.dim() == 1 and vector is not None:
                tensor[out.known] = vector[out.index[out.known]].to(tensor)

        address = _address(weight)
        area = min(seed.kernel, node.kernel) ** 2
        taken = int(out.known.sum()) * int(into.known.sum()) * area
        self.done.taken[address] = max(taken, self.done.taken.get(address, 0))
        if source.shape != weight.shape:
            self.done.changed.add(address)

    def _halve(self, nodes: Mapping[str, Node]) -> None:
        """Let squeeze-and-excitation begin as a factor of 1/2 for every channel."""
        prefix = f"{self.op.WEIGHTS}se.expand.conv"
        self.state[f"{prefix}.weight"].zero_()
        self.state[f"{prefix}.bias"].zero_()
        # in a super-net, options without it share the projection
        if not self.sorts:
            _weight(self.op, self.state, nodes["project"]).mul_(2.0)


def _same_groups(node: Node, seed: Node) -> bool:
    if node.depthwise or seed.depthwise:
        return node.depthwise and seed.depthwise
    return node.groups == seed.groups == 1


def with_kernel(weight: Tensor, kernel: int) -> Tensor:
    """Weights [out, in, k, k] with another odd kernel size: the centre, or zeros around."""
    border = (kernel - weight.shape[-1]) // 2
    return torch.nn.functional.pad(weight, (border, border, border, border))
