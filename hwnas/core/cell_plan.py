"""The walk over a network of cells: every place where something is computed, in order,
for both skeletons of ``hwnas.core.cells``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
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
from hwnas.errors import SpaceError

if TYPE_CHECKING:
    from hwnas.core.cells import CellSpace

NONE, SKIP_CONNECT = "none", "skip_connect"
KEPT = 2
"""Edges that a node of a DARTS cell keeps."""
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
    """One step of a network of cells, which makes a point, as in ``hwnas.core.graph``:
    ``of`` are the points it reads.

    ``op`` always runs; an ``edge`` runs the op of its picked option (None: nothing is
    computed), where ``keep_key`` keeps it; ``sum`` adds up those edges of a node that
    there are; ``concat`` puts nodes together. ``slot`` is the place's name,
    ``channels`` and ``size`` are the shape of the point.
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
    """The op of an option between nodes of equal width; None where nothing is computed.
    Raises SpaceError where there is no such option.
    """
    if option == NONE or (option == SKIP_CONNECT and stride == 1):
        return None
    if option == SKIP_CONNECT:
        return FactorizedReduce(size, channels, channels, stride=2, act=act)
    match = _OPTION.fullmatch(option)
    if match is None:
        raise SpaceError(
            f"option {option!r} of a cell is unknown; write none, skip_connect, or one of"
            f" {', '.join(_KINDS)} with a kernel."
        )
    kind, kernel = _KINDS[match["name"]], int(match["kernel"])
    if issubclass(kind, Pool):
        return kind(size, channels, channels, kernel, stride, norm=pool_norm)
    return kind(size, channels, channels, kernel, stride, act)


@cache  # searches ask for them again and again
def edge_key(cell: str, source: int, node: int) -> str:
    """The choice of an edge."""
    return Address("edge", cell, source=source, node=node).key


@cache
def inputs_key(cell: str, node: int) -> str:
    """The choice of a node's edges."""
    return Address("inputs", cell, node=node).key


def sources_of(option: str) -> tuple[int, ...]:
    """The nodes whose edges an option of a node's inputs keeps: ``"0+2"``."""
    return tuple(int(node) for node in option.split("+"))


@dataclass
class _Plan:
    """Collects places; every method returns the number of the point that it makes."""

    space: CellSpace
    pool_norm: bool
    places: list[CellStep] = field(default_factory=list)

    def op(self, slot: str, op: Op, of: int) -> int:
        return self._add(CellStep("op", (of,), slot, op.out_ch, op.out_size, op=op))

    def cell(
        self,
        slot: str,
        cell: str,
        sources: Sequence[int],
        channels: int,
        size: int,
        stride: int = 1,
    ) -> list[int]:
        """The edges and nodes of a cell; all its nodes, the sources included. Edges
        from sources have the stride.
        """
        points, inner = list(sources), size // stride
        for node in range(len(sources), self.space.nodes):
            edges = []
            for source in range(node):
                first = source < len(sources)
                place = self._edge(
                    cell, source, node, channels, size if first else inner, stride if first else 1
                )
                edges.append(
                    self._add(replace(place, of=(points[source],), slot=f"{slot}.{place.key}"))
                )
            points.append(
                self._add(CellStep("sum", tuple(edges), f"{slot}.{cell}.n{node}", channels, inner))
            )
        return points

    def _edge(
        self, cell: str, source: int, node: int, channels: int, size: int, stride: int
    ) -> CellStep:
        """An edge of a kind of cell, of no place yet."""
        key, keep_key = edge_key(cell, source, node), inputs_key(cell, node)
        options, pairs = self.space.edges[key], self.space.inputs.get(keep_key, ())
        ops = tuple(
            edge_op(option, channels, size, stride, self.space.act, self.pool_norm)
            for option in options
        )
        kept = tuple(source in sources_of(pair) for pair in pairs)
        into = keep_key if pairs else ""
        return CellStep(
            "edge",
            (),
            "",
            channels,
            size // stride,
            key=key,
            options=options,
            ops=ops,
            keep_key=into,
            kept=kept,
        )

    def concat(self, slot: str, points: Sequence[int]) -> int:
        read = [self.places[point - 1] for point in points]
        return self._add(
            CellStep(
                "concat", tuple(points), slot, sum(each.channels for each in read), read[0].size
            )
        )

    def classifier(self, point: int) -> tuple[CellStep, ...]:
        last = self.places[point - 1]
        self.op("classifier", Classifier(last.size, last.channels, self.space.classes), point)
        return tuple(self.places)

    def _add(self, place: CellStep) -> int:
        self.places.append(place)
        return len(self.places)


def _resnet_plan(plan: _Plan) -> tuple[CellStep, ...]:
    """NAS-Bench-201's skeleton."""
    space = plan.space
    size, channels, number = space.resolution, space.channels, 0
    point = plan.op("stem", Conv(size, space.in_channels, channels, kernel=3), 0)
    for stage, count in enumerate(space.cells):
        if stage:
            reduction = ResidualReduce(
                size, channels, 2 * channels, kernel=3, stride=2, act=space.act
            )
            point = plan.op(f"cell{number}", reduction, point)
            size, channels, number = size // 2, 2 * channels, number + 1
        for _ in range(count):
            point = plan.cell(f"cell{number}", "c", [point], channels, size)[-1]
            number += 1
    return plan.classifier(plan.op("norm", Norm(size, channels, channels, act=space.act), point))


def _darts_plan(plan: _Plan) -> tuple[CellStep, ...]:
    """DARTS's skeleton: the first cell of every stage but the first is a reduction."""
    space, channels = plan.space, plan.space.channels
    before, last = _darts_stem(plan)
    number = 0
    for stage, count in enumerate(space.cells):
        for position in range(count + (stage > 0)):
            reduces = stage > 0 and position == 0
            channels = 2 * channels if reduces else channels
            size = plan.places[last - 1].size
            sources = [
                _preprocessed(plan, f"cell{number}.pre{i}", point, channels, size)
                for i, point in enumerate((before, last))
            ]
            nodes = plan.cell(
                f"cell{number}",
                "reduce" if reduces else "normal",
                sources,
                channels,
                size,
                2 if reduces else 1,
            )
            before, last = last, plan.concat(f"cell{number}", nodes[len(sources) :])
            number += 1
    return plan.classifier(last)


def _darts_stem(plan: _Plan) -> tuple[int, int]:
    """The two points that the first cell reads."""
    space, size, channels = plan.space, plan.space.resolution, plan.space.channels
    if space.stem == "small":
        point = plan.op("stem", Conv(size, space.in_channels, 3 * channels, kernel=3), 0)
        return point, point
    half = plan.op(
        "stem0", Conv(size, space.in_channels, channels // 2, kernel=3, stride=2, act=space.act), 0
    )
    quarter = plan.op("stem1", Conv(size // 2, channels // 2, channels, kernel=3, stride=2), half)
    return quarter, plan.op(
        "stem2",
        ReLUConvBN(size // 4, channels, channels, kernel=3, stride=2, act=space.act),
        quarter,
    )


def _preprocessed(plan: _Plan, slot: str, point: int, channels: int, size: int) -> int:
    """An input of a cell at its width and size."""
    given = plan.places[point - 1]
    if given.size == size:
        return plan.op(slot, ReLUConvBN(size, given.channels, channels, act=plan.space.act), point)
    return plan.op(
        slot,
        FactorizedReduce(given.size, given.channels, channels, stride=2, act=plan.space.act),
        point,
    )


def plan_of(space: CellSpace, pool_norm: bool) -> tuple[CellStep, ...]:
    """All places of a space's networks; ``pool_norm``: with BN behind pooling."""
    return (_resnet_plan if space.skeleton == "nasbench201" else _darts_plan)(
        _Plan(space, pool_norm)
    )
