"""The steps of a network of cells: everything that it computes, in order, for both
skeletons of ``hwnas.core.cells``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from hwnas.core.choice import Address
from hwnas.core.ops import (
    AvgPool,
    Classifier,
    Conv,
    DilConv,
    FactorizedReduce,
    MaxPool,
    Norm,
    Op,
    Pool,
    ReLUConvBN,
    ResidualReduce,
    SepConv,
)
from hwnas.core.size import square
from hwnas.errors import SpaceError

if TYPE_CHECKING:
    from hwnas.core.cells import CellSpace

NONE = "none"
SKIP_CONNECT = "skip_connect"
KEPT = 2
"""Number of edges that a node of a DARTS cell keeps."""
_OPTION = re.compile(
    r"(?P<name>nor_conv|sep_conv|dil_conv|avg_pool|max_pool)_(?P<kernel>[1-9])x(?P=kernel)"
)
_KINDS: dict[str, type[Pool | ReLUConvBN | SepConv | DilConv]] = {
    "nor_conv": ReLUConvBN,
    "sep_conv": SepConv,
    "dil_conv": DilConv,
    "avg_pool": AvgPool,
    "max_pool": MaxPool,
}


@dataclass(frozen=True)
class CellStep:
    """A step of a network of cells. Every step makes one point (see
    ``hwnas.core.graph``) and reads the points in ``of``.

    Kinds:

    - ``op`` always runs the op ``op``.
    - ``edge`` runs the op of the option that is picked for the choice ``key``.
      ``options`` and ``ops`` are parallel (None: the option computes nothing).
      ``keep_key`` is the choice of the edges that its node keeps, and ``kept`` tells
      for each option of that choice whether this edge is one of them; both are empty if
      the node keeps all.
    - ``sum`` adds up the edges of a node that are connected.
    - ``concat`` concatenates nodes.

    ``slot`` is the name of the step; ``channels`` and ``size`` (height = width)
    are the shape of its point.
    """

    kind: Literal["op", "edge", "sum", "concat"]
    of: tuple[int, ...]
    slot: str
    channels: int
    size: int
    op: Op | None = None
    key: str = ""
    options: tuple[str, ...] = ()
    ops: tuple[Op | None, ...] = ()
    keep_key: str = ""
    kept: tuple[bool, ...] = ()


def edge_op(
    option: str, channels: int, size: int, stride: int, act: str, pool_norm: bool = False
) -> Op | None:
    """The op of an option between nodes of equal width, or None if nothing is computed.
    Raises SpaceError if the option is unknown.
    """
    if option == NONE or (option == SKIP_CONNECT and stride == 1):
        return None
    if option == SKIP_CONNECT:
        # an identity cannot halve the feature map
        return FactorizedReduce(size, channels, channels, stride=2, act=act)
    match = _OPTION.fullmatch(option)
    if match is None:
        raise SpaceError(
            f"option {option!r} of a cell is unknown; write none, skip_connect, or one of"
            f" {', '.join(_KINDS)} with a kernel size, for instance nor_conv_3x3."
        )

    kind = _KINDS[match["name"]]
    kernel = int(match["kernel"])
    if issubclass(kind, Pool):
        return kind(size, channels, channels, kernel, stride, norm=pool_norm)
    return kind(size, channels, channels, kernel, stride, act)


@cache  # called very often during a search
def edge_key(cell: str, source: int, node: int) -> str:
    """The key of the choice of an edge's option."""
    return Address("edge", cell, source=source, node=node).key


@cache
def inputs_key(cell: str, node: int) -> str:
    """The key of the choice of the edges that a node keeps."""
    return Address("inputs", cell, node=node).key


def input_pairs(node: int) -> tuple[str, ...]:
    """All pairs of incoming edges that a node can keep, as options: ``"0+2"``."""
    return tuple("+".join(map(str, pair)) for pair in combinations(range(node), KEPT))


def sources_of(option: str) -> tuple[int, ...]:
    """The source nodes that an option of a node's inputs names: ``"0+2"`` -> (0, 2)."""
    return tuple(int(node) for node in option.split("+"))


@dataclass
class _StepBuilder:
    """Collects steps. Every method returns the index of the point that it makes; point
    0 is the image, so step i makes point i + 1.
    """

    space: CellSpace
    pool_norm: bool
    steps: list[CellStep] = field(default_factory=list)

    def op(self, slot: str, op: Op, of: int) -> int:
        """Add an op that always runs and reads the point ``of``."""
        return self._add(CellStep("op", (of,), slot, op.out_ch, square(op.out_size, slot), op=op))

    def cell(
        self,
        slot: str,
        cell: str,
        sources: Sequence[int],
        channels: int,
        size: int,
        stride: int = 1,
    ) -> list[int]:
        """Add the edges and nodes of a cell. Returns the points of all nodes, including
        the ``sources``. Edges from the sources have the stride.
        """
        points = list(sources)
        inner_size = size // stride
        for node in range(len(sources), self.space.nodes):
            edges = []
            for source in range(node):
                # nodes inside the cell are already reduced
                if source < len(sources):
                    edge = self._edge(cell, source, node, channels, size, stride)
                else:
                    edge = self._edge(cell, source, node, channels, inner_size, 1)
                edge = replace(edge, of=(points[source],), slot=f"{slot}.{edge.key}")
                edges.append(self._add(edge))
            name = f"{slot}.{cell}.n{node}"
            points.append(self._add(CellStep("sum", tuple(edges), name, channels, inner_size)))
        return points

    def _edge(
        self, cell: str, source: int, node: int, channels: int, size: int, stride: int
    ) -> CellStep:
        """An edge, without the fields that differ between cells of a kind."""
        key = edge_key(cell, source, node)
        options = self.space.edges[key]
        ops = []
        for option in options:
            ops.append(edge_op(option, channels, size, stride, self.space.act, self.pool_norm))

        keep_key = inputs_key(cell, node)
        pairs = self.space.inputs.get(keep_key, ())
        kept = tuple(source in sources_of(pair) for pair in pairs)
        return CellStep(
            "edge",
            (),
            "",
            channels,
            size // stride,
            key=key,
            options=options,
            ops=tuple(ops),
            keep_key=keep_key if pairs else "",
            kept=kept,
        )

    def concat(self, slot: str, points: Sequence[int]) -> int:
        """Add the concatenation of points."""
        inputs = [self.steps[point - 1] for point in points]
        channels = sum(step.channels for step in inputs)
        return self._add(CellStep("concat", tuple(points), slot, channels, inputs[0].size))

    def classifier(self, point: int) -> tuple[CellStep, ...]:
        """Add the classifier. Returns all steps."""
        last = self.steps[point - 1]
        self.op("classifier", Classifier(last.size, last.channels, self.space.classes), point)
        return tuple(self.steps)

    def _add(self, step: CellStep) -> int:
        self.steps.append(step)
        return len(self.steps)


def _resnet_steps(builder: _StepBuilder) -> tuple[CellStep, ...]:
    """The skeleton of NAS-Bench-201."""
    space = builder.space
    size = space.side
    channels = space.channels
    number = 0  # reductions are numbered with the cells
    point = builder.op("stem", Conv(size, space.in_channels, channels, kernel=3), 0)
    for stage, count in enumerate(space.cells):
        if stage:
            reduction = ResidualReduce(
                size, channels, 2 * channels, kernel=3, stride=2, act=space.act
            )
            point = builder.op(f"cell{number}", reduction, point)
            size //= 2
            channels *= 2
            number += 1
        for _ in range(count):
            point = builder.cell(f"cell{number}", "c", [point], channels, size)[-1]
            number += 1
    return builder.classifier(
        builder.op("norm", Norm(size, channels, channels, act=space.act), point)
    )


def _darts_steps(builder: _StepBuilder) -> tuple[CellStep, ...]:
    """The skeleton of DARTS: every stage but the first begins with a reduction."""
    kinds: list[str] = []
    for stage, count in enumerate(builder.space.cells):
        if stage:
            kinds.append("reduce")
        kinds += ["normal"] * count

    channels = builder.space.channels
    before_last, last = _darts_stem(builder)
    for number, kind in enumerate(kinds):
        stride = 1
        if kind == "reduce":
            stride = 2
            channels *= 2
        slot = f"cell{number}"
        size = builder.steps[last - 1].size
        sources = [
            _preprocess(builder, f"{slot}.pre{i}", point, channels, size)
            for i, point in enumerate((before_last, last))
        ]
        nodes = builder.cell(slot, kind, sources, channels, size, stride)
        before_last, last = last, builder.concat(slot, nodes[len(sources) :])
    return builder.classifier(last)


def _darts_stem(builder: _StepBuilder) -> tuple[int, int]:
    """Add the stem. Returns the two points that the first cell reads."""
    space = builder.space
    size = space.side
    channels = space.channels
    if space.stem == "small":
        # three times the width of a node, as in DARTS's code (stem_multiplier)
        point = builder.op("stem", Conv(size, space.in_channels, 3 * channels, kernel=3), 0)
        return point, point

    narrow = channels // 2
    stem0 = Conv(size, space.in_channels, narrow, kernel=3, stride=2, act=space.act)
    stem1 = Conv(size // 2, narrow, channels, kernel=3, stride=2)
    stem2 = ReLUConvBN(size // 4, channels, channels, kernel=3, stride=2, act=space.act)
    half = builder.op("stem0", stem0, 0)
    quarter = builder.op("stem1", stem1, half)
    eighth = builder.op("stem2", stem2, quarter)
    return quarter, eighth


def _preprocess(builder: _StepBuilder, slot: str, point: int, channels: int, size: int) -> int:
    """Add the op that brings an input of a cell to the cell's width and size."""
    source = builder.steps[point - 1]
    act = builder.space.act
    op: Op
    if source.size == size:
        op = ReLUConvBN(size, source.channels, channels, act=act)
    else:
        # the last cell (or the ImageNet stem) halved the map after this input was made
        op = FactorizedReduce(source.size, source.channels, channels, stride=2, act=act)
    return builder.op(slot, op, point)


def steps_of(space: CellSpace, pool_norm: bool) -> tuple[CellStep, ...]:
    """All steps of the networks of a space; ``pool_norm`` adds a BN after every
    pooling op.
    """
    builder = _StepBuilder(space, pool_norm)
    if space.skeleton == "nasbench201":
        return _resnet_steps(builder)
    return _darts_steps(builder)
