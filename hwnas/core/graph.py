"""The graph of a network, or of a part of one, that is not a chain: steps that say
which op reads what.

The first points are the inputs: of a network of cells the image, of a detector's neck
the feature maps of the backbone. Each step makes the next point. In a network of cells,
point 0 is thus the image, and step i makes point i + 1. Steps are written as keys:

- ``op 4``: the next block of the architecture, reading point 4
- ``sum 1 1 3``: the sum of points; a point that is named twice is added twice
- ``concat 5 6``: the concatenation of points along the channels
- ``cut 3 40``: the first 40 channels of point 3
- ``zero 16 32``: zeros, 16 channels of 32 x 32

The last step is the last block. In a document every step is a string, its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from hwnas.core.ops import Op
from hwnas.core.size import Size, area
from hwnas.errors import SpaceError

Shape = tuple[int, Size]
"""Channels, and height and width, of a feature map."""

_NUMBERS = {
    "op": range(1, 2),
    "sum": range(2, 1000),
    "concat": range(2, 1000),
    "cut": range(2, 3),
    "zero": range(2, 3),
}
"""How many numbers a step of each kind may have."""


@dataclass(frozen=True)
class Step:
    """One step of a graph. ``of`` are the points that it reads, ``channels`` is set for
    cuts and zeros, ``size`` (height = width) for zeros.
    """

    kind: Literal["op", "sum", "concat", "cut", "zero"]
    of: tuple[int, ...] = ()
    channels: int = 0
    size: int = 0

    @property
    def key(self) -> str:
        """The step as documents write it; see the module."""
        numbers = [*self.of]
        if self.channels:
            numbers.append(self.channels)
        if self.size:
            numbers.append(self.size)
        return " ".join([self.kind, *map(str, numbers)])

    @classmethod
    def parse(cls, key: str) -> Self:
        """Parse the key of a step. Raises SpaceError if it is not one."""
        kind, *words = key.split(" ")
        if not words or not all(word.isascii() and word.isdigit() for word in words):
            raise SpaceError(
                f"{key!r} is not a step of a graph: write a kind and numbers, such as 'sum 1 2'."
            )

        numbers = [int(word) for word in words]
        if len(numbers) not in _NUMBERS.get(kind, ()):
            raise SpaceError(
                f"{key!r} is not a step of a graph: write op and one number, cut or zero and two"
                " numbers, or sum or concat and two or more numbers."
            )
        if kind == "zero":
            return cls("zero", (), *numbers)
        if kind == "cut":
            return cls("cut", (numbers[0],), numbers[1])
        return cls(kind, tuple(numbers))  # type: ignore[arg-type]


def _parsed(value: Any) -> Any:
    """A step from its key; other values are left to pydantic's own check."""
    if isinstance(value, str):
        return Step.parse(value)
    return value


StepKey = Annotated[
    InstanceOf[Step],
    BeforeValidator(_parsed),
    PlainSerializer(lambda step: step.key, return_type=str),
]
"""A step in a pydantic model; documents hold its key."""


def shapes(graph: Sequence[Step], blocks: Sequence[Op], inputs: Sequence[Shape]) -> list[Shape]:
    """The shape of every point: those of the ``inputs``, then one per step.

    Raises ValueError if a step reads a later point, if shapes do not fit, or if steps
    and blocks do not correspond.
    """
    point_shapes = [*inputs]
    ops = iter(blocks)
    for position, step in enumerate(graph):
        if any(point >= len(point_shapes) for point in step.of):
            raise ValueError(
                f"step {position} of the graph ({step.key}) reads a point that no earlier step"
                " makes"
            )

        read = [point_shapes[point] for point in step.of]
        if step.kind == "op":
            op = next(ops, None)
            if op is None:
                raise ValueError(f"the graph has more op steps than the {len(blocks)} blocks")
            if (op.in_ch, op.size) != read[0]:
                channels, size = read[0]
                raise ValueError(
                    f"block {op.key} takes {op.in_ch} channels at {op.size} px, but step {position}"
                    f" reads {channels} at {size} px"
                )
            point_shapes.append((op.out_ch, op.out_size))
        elif step.kind == "zero":
            point_shapes.append((step.channels, step.size))
        elif step.kind == "cut":
            point_shapes.append((step.channels, read[0][1]))
        else:
            point_shapes.append(_joined(position, step, read))

    if next(ops, None) is not None or not graph or graph[-1].kind != "op":
        raise ValueError(
            "the graph must have one op step for every block, and the last step must be the last"
            " block"
        )
    return point_shapes


def _joined(position: int, step: Step, inputs: Sequence[Shape]) -> Shape:
    """The shape of a sum or a concatenation. Raises ValueError if the inputs do not
    fit.
    """
    sizes = {size for _, size in inputs}
    # a concatenation needs equal sizes, a sum equal channels as well
    if len(sizes) > 1 or (step.kind == "sum" and len(set(inputs)) > 1):
        raise ValueError(
            f"step {position} of the graph ({step.key}) joins maps of different shapes: {inputs}"
        )
    channels, size = inputs[0]
    if step.kind == "concat":
        channels = sum(channels for channels, _ in inputs)
    return channels, size


def used_steps(graph: Sequence[Step], outputs: Iterable[int], inputs: int = 1) -> frozenset[int]:
    """The positions of the steps that the points ``outputs`` depend on, in a graph with
    that many ``inputs``.

    A cell may have unused steps, such as an edge into a node that nothing reads.
    Exported files leave them out.
    """
    points = {*outputs}
    for position in reversed(range(len(graph))):
        if position + inputs in points:
            points.update(graph[position].of)
    return frozenset(point - inputs for point in points if point >= inputs)


def live_numbers(graph: Sequence[Step], blocks: Sequence[Op], image: Shape) -> Iterator[int]:
    """For every step the peak number of feature-map values that are alive while it
    runs: those it needs itself and those that later steps read.

    A sum works in place if no later step reads its first point; see
    ``ir.Program.live_numbers`` for ops. Unused steps count although exported files
    leave them out, so the result is an upper bound for them.
    """
    values = [channels * area(size) for channels, size in shapes(graph, blocks, [image])]
    last_reader: dict[int, int] = {}
    for position, step in enumerate(graph):
        for point in step.of:
            last_reader[point] = position

    alive = {0}
    ops = iter(blocks)
    for position, step in enumerate(graph):
        ending = {point for point in step.of if last_reader[point] == position}
        if step.kind == "op":
            [point] = step.of
            # the op counts its own input
            needed = next(ops).program.live_numbers(keep_input=point not in ending)
            yield sum(values[other] for other in alive - {point}) + max(needed)
        else:
            held = sum(values[point] for point in alive)
            in_place = step.kind == "sum" and step.of[0] in ending
            if not in_place:
                held += values[position + 1]
            yield held
        alive = (alive - ending) | {position + 1}


@dataclass
class GraphBuilder:
    """Collects the blocks and steps of a graph. Every method returns the point that it
    makes. The sum or concatenation of a single point is that point, without a step.
    ``inputs`` is the number of points that are there at the start.
    """

    blocks: list[Op] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: int = 1

    def op(self, op: Op, point: int) -> int:
        """Add a block that reads ``point``."""
        self.blocks.append(op)
        return self._add(Step("op", (point,)))

    def sum(self, points: Sequence[int]) -> int:
        """Add up points."""
        if len(points) == 1:
            return points[0]
        return self._add(Step("sum", tuple(points)))

    def concat(self, points: Sequence[int]) -> int:
        """Concatenate the channels of points."""
        if len(points) == 1:
            return points[0]
        return self._add(Step("concat", tuple(points)))

    def cut(self, point: int, channels: int) -> int:
        """Take the first ``channels`` of a point."""
        return self._add(Step("cut", (point,), channels))

    def zero(self, channels: int, size: int) -> int:
        """Make zeros of ``channels`` x ``size`` x ``size``."""
        return self._add(Step("zero", (), channels, size))

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return self.inputs + len(self.steps) - 1
