"""Which op of a network reads what, where a chain does not say it: the steps of its graph.

Point 0 is the image, and step i makes point i + 1:

- ``op 4``: the next block of the architecture reads point 4
- ``sum 1 1 3``: points added up, each as often as it is named
- ``concat 5 6``: their channels one after another
- ``cut 3 40``: the first 40 channels of point 3
- ``zero 16 32``: zeros, 16 channels of 32 x 32

The last step is the last block. What is written as a key here is a string in a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from hwnas.core.ops import Op
from hwnas.errors import SpaceError

Shape = tuple[int, int]
"""Channels, and height = width."""


@dataclass(frozen=True)
class Step:
    """One step of a graph: points ``of`` which it reads; the channels of a cut or of
    zeros, and the size of zeros.
    """

    kind: Literal["op", "sum", "concat", "cut", "zero"]
    of: tuple[int, ...] = ()
    channels: int = 0
    size: int = 0

    @property
    def key(self) -> str:
        """How it is written."""
        numbers = [*self.of, *(number for number in (self.channels, self.size) if number)]
        return " ".join([self.kind, *map(str, numbers)])

    @classmethod
    def parse(cls, key: str) -> Self:
        """The step of a key. Raises SpaceError where it is none."""
        kind, *words = key.split(" ")
        if not words or not all(word.isascii() and word.isdigit() for word in words):
            raise SpaceError(
                f"{key!r} is no step of a graph: write a kind and numbers, such as 'sum 1 2'."
            )
        numbers = [int(word) for word in words]
        lengths = {
            "op": range(1, 2),
            "sum": range(2, 1000),
            "concat": range(2, 1000),
            "cut": range(2, 3),
            "zero": range(2, 3),
        }
        if len(numbers) not in lengths.get(kind, ()):
            raise SpaceError(
                f"{key!r} is no step of a graph: known are {', '.join(lengths)}, with as many"
                " numbers as each takes."
            )
        if kind == "zero":
            return cls("zero", (), *numbers)
        if kind == "cut":
            return cls("cut", (numbers[0],), numbers[1])
        return cls(kind, tuple(numbers))  # type: ignore[arg-type]


def _parsed(value: Any) -> Any:
    return Step.parse(value) if isinstance(value, str) else value


StepKey = Annotated[
    InstanceOf[Step],
    BeforeValidator(_parsed),
    PlainSerializer(lambda step: step.key, return_type=str),
]
"""A step inside a document, where it is written as its key."""


def shapes(graph: Sequence[Step], blocks: Sequence[Op], image: Shape) -> list[Shape]:
    """The shape of every point. Raises ValueError where a step reads what is not there
    yet, or what does not fit.
    """
    found, ops = [image], iter(blocks)
    for position, step in enumerate(graph):
        if any(point >= len(found) for point in step.of):
            raise ValueError(
                f"step {position} of the graph ({step.key}) reads a point that is not made"
                " before it"
            )
        read = [found[point] for point in step.of]
        if step.kind == "op":
            op = next(ops, None)
            if op is None:
                raise ValueError(f"the graph has more op steps than the {len(blocks)} blocks")
            if (op.in_ch, op.size) != read[0]:
                raise ValueError(
                    f"block {op.key} takes {op.in_ch} channels at {op.size} px, but step {position}"
                    f" gives {read[0][0]} at {read[0][1]} px"
                )
            found.append((op.out_ch, op.out_size))
        elif step.kind == "zero":
            found.append((step.channels, step.size))
        elif step.kind == "cut":
            found.append((step.channels, read[0][1]))
        elif len({size for _, size in read}) > 1 or (step.kind == "sum" and len(set(read)) > 1):
            raise ValueError(
                f"step {position} of the graph ({step.key}) joins maps of different shapes: {read}"
            )
        else:
            found.append(
                (sum(channels for channels, _ in read), read[0][1])
                if step.kind == "concat"
                else read[0]
            )
    if next(ops, None) is not None or not graph or graph[-1].kind != "op":
        raise ValueError(
            "the graph has one op step for every block, the last step being the last block"
        )
    return found


def used_steps(graph: Sequence[Step]) -> frozenset[int]:
    """The steps that the last one depends on.

    A cell may have others, such as an edge into a node that nobody reads. Files leave them out.
    """
    points = {len(graph)}
    for position in reversed(range(len(graph))):
        if position + 1 in points:
            points.update(graph[position].of)
    return frozenset(point - 1 for point in points if point > 0)


def live_numbers(graph: Sequence[Step], blocks: Sequence[Op], image: Shape) -> Iterator[int]:
    """How many numbers of feature maps are alive at most while each step runs: what it
    needs, and what later steps read.

    A sum works in place where nobody reads its first point afterwards; see
    ``ir.Program.live_numbers`` for what an op needs. Steps that nobody reads count,
    although files leave them out: an upper bound there.
    """
    sizes = [channels * size**2 for channels, size in shapes(graph, blocks, image)]
    last = {point: position for position, step in enumerate(graph) for point in step.of}
    alive, ops = {0}, iter(blocks)
    for position, step in enumerate(graph):
        ending = {point for point in step.of if last[point] == position}
        if step.kind == "op":
            [point] = step.of
            needed = next(ops).program.live_numbers(keep_input=point not in ending)
            yield sum(sizes[each] for each in alive - {point}) + max(needed)
        else:
            in_place = step.kind == "sum" and step.of[0] in ending
            yield sum(sizes[each] for each in alive) + (0 if in_place else sizes[position + 1])
        alive = (alive - ending) | {position + 1}


@dataclass
class GraphBuilder:
    """Collects blocks and steps; every method returns the point that it makes. A sum or
    a concatenation of one point is that point.
    """

    blocks: list[Op] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def op(self, op: Op, point: int) -> int:
        """A block that reads a point."""
        self.blocks.append(op)
        return self._add(Step("op", (point,)))

    def sum(self, points: Sequence[int]) -> int:
        """Points added up."""
        return points[0] if len(points) == 1 else self._add(Step("sum", tuple(points)))

    def concat(self, points: Sequence[int]) -> int:
        """Channels one after another."""
        return points[0] if len(points) == 1 else self._add(Step("concat", tuple(points)))

    def cut(self, point: int, channels: int) -> int:
        """The first channels of a point."""
        return self._add(Step("cut", (point,), channels))

    def zero(self, channels: int, size: int) -> int:
        """Zeros."""
        return self._add(Step("zero", (), channels, size))

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps)
