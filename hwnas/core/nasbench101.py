"""NAS-Bench-101 as a space (Ying, Klein, Real, Christiansen, Murphy, Hutter, ICML 2019,
arXiv 1902.09635; google-research/nasbench).

A cell is a graph of up to seven vertices, the first its input and the last its output,
with at most nine edges; every vertex between is one of three ops. Of these 3^5 * 2^21
picks, 423,624 cells are different and connected, and all are trained on CIFAR-10.

- What is not on a way from the input to the output is pruned.
- The output is the vertices that lead to it, one after another; its channels are
  divided among them, and the first vertices get one more where they do not divide. A
  vertex inside has as many channels as the widest that it leads to; wider maps are cut
  to the reader's channels. Maps that meet in a vertex are added up.
- The input is projected (1 x 1 convolution, BN, ReLU) on every edge that leaves it; the
  projection on an edge to the output is added.

The network: a 3 x 3 stem of 128 channels, three stacks of three cells, 2 x 2
max-pooling and twice the channels between stacks, pooling, classifier.

Widths depend on the whole cell, so prices are no sums over choices, and there is no
super-net of this space yet: ``terms`` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import combinations
from typing import Literal, Self

import numpy as np
from pydantic import Field

from hwnas.core.arch import Architecture, Origin, Picks
from hwnas.core.choice import Address
from hwnas.core.graph import GraphBuilder
from hwnas.core.ops import Classifier, Conv, MaxPool, Op
from hwnas.core.search_space import Choice, Option, SearchSpace, Term, truncate
from hwnas.errors import SpaceError

CONV3, CONV1, POOL3 = "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"
OPS = (CONV3, CONV1, POOL3)
"""Options of a vertex, named and ordered as in the benchmark."""
VERTICES, EDGES = 7, 9
CELLS = 423_624
"""Different cells, as published."""


class NASBench101Space(SearchSpace):
    """The cells of NAS-Bench-101 in a network of ``stacks`` times ``cells``.

    Example:
        >>> space = NASBench101Space(name="nasbench101", resolution=32, classes=10)
        >>> cell = {"matrix": [[0, 1, 0], [0, 0, 1], [0, 0, 0]], "ops": ["input", "conv3x3-bn-relu", "output"]}
        >>> space.decode(space.read(json.dumps(cell))).params
        10177674
    """

    ADDITIVE = False

    kind: Literal["nasbench101"] = "nasbench101"
    channels: int = Field(128, gt=0)
    stacks: int = Field(3, ge=1)
    cells: int = Field(3, ge=1)
    bn_eps: float = Field(default=1e-5, gt=0)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The op of every vertex between input and output, then the edges by their ends."""
        vertices = tuple(
            Choice(_vertex_key(vertex), OPS, "op") for vertex in range(1, VERTICES - 1)
        )
        return (
            *vertices,
            *(
                Choice(_link_key(*ends), (0, 1), "inputs")
                for ends in combinations(range(VERTICES), 2)
            ),
        )

    def terms(self) -> tuple[Term, ...]:
        """Raises SpaceError: see the module."""
        raise SpaceError(
            f"in space {self.name} a vertex's width depends on the whole cell, so nothing is priced"
            " by choice: decode the cells that you mean, and train or count those."
        )

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The network of ``picks``. Raises SpaceError where the cell has too many
        edges, or none of its ways leads to the output.
        """
        self.check(picks)
        matrix_VV, ops = self._cell(picks)
        builder = GraphBuilder()
        size, channels, into = self.resolution, self.channels, self.channels
        point = builder.op(Conv(size, self.in_channels, channels, kernel=3, act="relu"), 0)
        for stack in range(self.stacks):
            if stack:
                point = builder.op(MaxPool(size, channels, channels, kernel=2, stride=2), point)
                size, channels = size // 2, 2 * channels
            for _ in range(self.cells):
                point = _add_cell(builder, point, matrix_VV, ops, into, channels, size)
                into = channels
        builder.op(Classifier(size, channels, self.classes), point)
        return Architecture(
            name=name or f"{self.name}-sample",
            in_channels=self.in_channels,
            bn_eps=self.bn_eps,
            blocks=tuple(builder.blocks),
            graph=tuple(builder.steps),
            origin=Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks)),
        )

    def encode(self, arch: Architecture) -> Picks:
        """Picks of ``arch``, from its origin, which has to be this space."""
        if arch.origin is None or arch.origin.space_sha256 != self.sha256:
            raise SpaceError(
                f"architecture {arch.name!r} does not come from space {self.name}: name its picks."
            )
        if self.decode(arch.origin.picks).identity != arch.identity:
            raise SpaceError(
                f"the blocks of architecture {arch.name!r} are not those of its origin's picks:"
                " correct or remove its origin."
            )
        return dict(arch.origin.picks)

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """Raises SpaceError: the benchmark's cells have no options to leave out one by one."""
        raise SpaceError(
            f"space {self.name} cannot be restricted to {dict(allowed)}: it is NAS-Bench-101 as"
            " it is."
        )

    def sample(self, rng: np.random.Generator) -> Picks:
        """Uniform random picks among those that are cells."""
        while True:
            picks = super().sample(rng)
            if self.is_cell(picks):
                return picks

    def is_cell(self, picks: Mapping[str, Option]) -> bool:
        """Whether picks are a cell: at most nine edges, and a way from the input to the output."""
        matrix_VV, _ = self._drawn(picks)
        return int(matrix_VV.sum()) <= EDGES and pruned(matrix_VV) is not None

    @property
    def notation(self) -> str:
        """See ``read``."""
        return '{"matrix": [[0, 1], [0, 0]], "ops": ["input", "output"]}'

    def read(self, text: str) -> Picks:
        """A cell in the benchmark's terms, as JSON: ``{"matrix": [[0, 1], [0, 0]],
        "ops": ["input", "output"]}``, of up to 7 vertices.

        Or picks or positions, as in every space. Raises SpaceError where they make no cell.
        """
        if "matrix" not in text:
            given = super().read(text)
            self._cell(given)
            return given
        try:
            content = json.loads(text)
            matrix_VV, ops = np.array(content["matrix"], dtype=np.int64), list(content["ops"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SpaceError(
                f"{truncate(text)} is no cell of space {self.name}: give matrix and ops as a JSON"
                " object."
            ) from error
        count = len(ops)
        fits = (
            matrix_VV.shape == (count, count)
            and 2 <= count <= VERTICES
            and not np.tril(matrix_VV).any()
        )
        if (
            not fits
            or not set(matrix_VV.ravel().tolist()) <= {0, 1}
            or not set(ops[1:-1]) <= set(OPS)
        ):
            raise SpaceError(
                f"{truncate(text)} is no cell of space {self.name}: the matrix has 0 and 1 above"
                f" its diagonal, a row for each of 2 to {VERTICES} vertices, and the ops between"
                f" input and output are {', '.join(OPS)}."
            )
        place = [*range(count - 1), VERTICES - 1]  # the output is always the last
        picks: Picks = {choice.key: choice.options[0] for choice in self.choices}
        picks |= {_vertex_key(vertex): str(op) for vertex, op in enumerate(ops[1:-1], 1)}
        picks |= {
            _link_key(place[source], place[vertex]): 1 for source, vertex in np.argwhere(matrix_VV)
        }
        self._cell(picks)
        return picks

    def write(self, picks: Mapping[str, Option]) -> str:
        """The reverse of ``read``, without the vertices that no way from the input to
        the output leads over.
        """
        self.check(picks)
        matrix_VV, ops = self._cell(picks)
        return json.dumps({"matrix": matrix_VV.tolist(), "ops": ops})

    @property
    def architectures(self) -> int:
        """Cells that differ by ``fingerprint``, as published. Most picks are no cell,
        or one of these in another order.
        """
        return CELLS

    def fingerprint(self, picks: Mapping[str, Option]) -> str:
        """Equal for cells that are the same but for the order of their vertices: the
        benchmark's hash of the pruned graph (MD5).
        """
        matrix_VV, ops = self._cell(picks)
        return graph_hash(matrix_VV, [-1, *(OPS.index(op) for op in ops[1:-1]), -2])

    def _drawn(self, picks: Mapping[str, Option]) -> tuple[np.ndarray, list[str]]:
        """Adjacency matrix int64 [7, 7], and the ops of all vertices, as they are picked."""
        matrix_VV = np.zeros((VERTICES, VERTICES), dtype=np.int64)
        for source, vertex in combinations(range(VERTICES), 2):
            matrix_VV[source, vertex] = int(picks[_link_key(source, vertex)])
        return matrix_VV, [
            "input",
            *(str(picks[_vertex_key(vertex)]) for vertex in range(1, VERTICES - 1)),
            "output",
        ]

    def _cell(self, picks: Mapping[str, Option]) -> tuple[np.ndarray, list[str]]:
        """The pruned cell. Raises SpaceError where it is none."""
        matrix_VV, ops = self._drawn(picks)
        edges, kept = int(matrix_VV.sum()), pruned(matrix_VV)
        if edges > EDGES:
            raise SpaceError(
                f"a cell of space {self.name} has at most {EDGES} edges, and these picks have"
                f" {edges}: pick fewer."
            )
        if kept is None:
            raise SpaceError(
                "no way of these picks leads from the input to the output of a cell of space"
                f" {self.name}: pick more edges."
            )
        return matrix_VV[np.ix_(kept, kept)], [ops[vertex] for vertex in kept]


@cache  # samples are drawn by the thousand
def _vertex_key(vertex: int) -> str:
    return Address("vertex", node=vertex).key


@cache
def _link_key(source: int, vertex: int) -> str:
    return Address("link", source=source, node=vertex).key


def pruned(matrix_VV: np.ndarray) -> list[int] | None:
    """The vertices on ways from the first to the last; None where there is no way.

    Example:
        >>> pruned(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]))
        [0, 3]
    """
    last = len(matrix_VV) - 1
    forward, backward = {0}, {last}
    for vertex in range(last + 1):
        forward |= (
            {int(target) for target in np.flatnonzero(matrix_VV[vertex])}
            if vertex in forward
            else set()
        )
    for vertex in reversed(range(last + 1)):
        backward |= (
            {int(source) for source in np.flatnonzero(matrix_VV[:, vertex])}
            if vertex in backward
            else set()
        )
    return sorted(forward & backward) if last in forward else None


def vertex_channels(into: int, out: int, matrix_VV: np.ndarray) -> list[int]:
    """Channels of every vertex of a pruned cell between two widths; see the module."""
    last = len(matrix_VV) - 1
    found = [into, *[0] * (last - 1), out]
    leading = [vertex for vertex in range(1, last) if matrix_VV[vertex, last]]
    for position, vertex in enumerate(leading):
        found[vertex] = out // len(leading) + (position < out % len(leading))
    for vertex in reversed(range(1, last)):
        if not matrix_VV[vertex, last]:
            found[vertex] = max(
                found[target] for target in range(vertex + 1, last) if matrix_VV[vertex, target]
            )
    return found


def graph_hash(matrix_VV: np.ndarray, labels: Sequence[int]) -> str:
    """The benchmark's hash of a labelled graph, the same for isomorphic ones: as many
    rounds of hashing neighbours as vertices.
    """
    count = len(labels)
    degrees = zip(
        matrix_VV.sum(axis=1).tolist(), matrix_VV.sum(axis=0).tolist(), labels, strict=True
    )
    hashes = [_md5(str(each)) for each in degrees]
    for _ in range(count):
        before = [
            sorted(hashes[source] for source in range(count) if matrix_VV[source, vertex])
            for vertex in range(count)
        ]
        after = [
            sorted(hashes[target] for target in range(count) if matrix_VV[vertex, target])
            for vertex in range(count)
        ]
        parts = zip(before, after, hashes, strict=True)
        hashes = [_md5("".join(ins) + "|" + "".join(outs) + "|" + own) for ins, outs, own in parts]
    return _md5(str(sorted(hashes)))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _add_cell(
    builder: GraphBuilder,
    entry: int,
    matrix_VV: np.ndarray,
    ops: Sequence[str],
    into: int,
    out: int,
    size: int,
) -> int:
    """A cell behind a point; its output's point."""
    last, widths = len(ops) - 1, vertex_channels(into, out, matrix_VV)
    points = [entry]

    def projected(vertex: int) -> list[int]:
        if not matrix_VV[0, vertex]:
            return []
        return [builder.op(Conv(size, into, widths[vertex], act="relu"), entry)]

    for vertex in range(1, last):
        sources = [source for source in range(1, vertex) if matrix_VV[source, vertex]]
        narrowed = [
            points[s] if widths[s] == widths[vertex] else builder.cut(points[s], widths[vertex])
            for s in sources
        ]
        points.append(
            builder.op(
                _vertex_op(ops[vertex], widths[vertex], size),
                builder.sum([*narrowed, *projected(vertex)]),
            )
        )
    leading = [points[vertex] for vertex in range(1, last) if matrix_VV[vertex, last]]
    return builder.sum([*([builder.concat(leading)] if leading else []), *projected(last)])


def _vertex_op(op: str, channels: int, size: int) -> Op:
    if op == POOL3:
        return MaxPool(size, channels, channels, kernel=3)
    return Conv(size, channels, channels, kernel=3 if op == CONV3 else 1, act="relu")
