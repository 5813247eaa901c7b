"""NAS-Bench-101 as a search space (Ying, Klein, Real, Christiansen, Murphy, Hutter,
ICML 2019, arXiv 1902.09635; google-research/nasbench).

A cell is a directed acyclic graph of up to seven vertices and nine edges. The first
vertex is the input, the last one the output, and every vertex in between has one of
three ops. The 3^5 * 2^21 picks contain 423,624 distinct connected cells; the benchmark
has trained all of them on CIFAR-10.

- Vertices that are not on a path from the input to the output are pruned.
- The output is the concatenation of the vertices that lead to it. Its channels are
  divided evenly among them; the first vertices get one more channel if there is a
  remainder. Any other vertex has as many channels as the widest vertex that it leads
  to, and is truncated for narrower ones. Inputs of a vertex are added up.
- The input is projected (1 x 1 convolution, BN, ReLU) on every edge that leaves it. The
  projection on an edge to the output is added to the concatenation.

The network has a 3 x 3 stem of 128 channels and three stacks of three cells, then
pooling and a classifier. Between stacks, 2 x 2 max-pooling halves the map and the
channels double.

Widths depend on the whole cell, so the cost of a network is not a sum over choices:
``terms`` raises SpaceError. There is no super-net of this space yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""The options of a vertex, named and ordered as in the benchmark."""
VERTICES = 7
EDGES = 9
"""The most edges that a cell may have."""
CELLS = 423_624
"""Number of distinct cells, as published."""


class NASBench101Space(SearchSpace):
    """Networks of ``stacks`` stacks of ``cells`` NAS-Bench-101 cells. ``channels`` is
    the width of the first stack.

    Example:
        >>> space = NASBench101Space(name="nasbench101", resolution=32, classes=10)
        >>> matrix = [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
        >>> ops = ["input", "conv3x3-bn-relu", "output"]
        >>> space.decode(space.read(json.dumps({"matrix": matrix, "ops": ops}))).params
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
        """The op of every vertex between input and output, then whether each edge
        exists (0 or 1), ordered by source and target.
        """
        vertices = range(1, VERTICES - 1)
        edges = combinations(range(VERTICES), 2)
        return (
            *(Choice(_vertex_key(vertex), OPS, "op") for vertex in vertices),
            *(Choice(_link_key(*edge), (0, 1), "inputs") for edge in edges),
        )

    def terms(self) -> tuple[Term, ...]:
        """Raises SpaceError: the cost is not a sum over choices; see the module."""
        raise SpaceError(
            f"in space {self.name} the width of a vertex depends on the whole cell, so single"
            " choices have no cost: decode the cells of interest, and train or count those."
        )

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The network of ``picks``. Raises SpaceError if the cell has too many edges,
        or no path from its input to its output.
        """
        self.check(picks)
        matrix_VV, ops = self._cell(picks)
        builder = GraphBuilder()
        size = self.side
        channels = self.channels
        in_channels = channels
        point = builder.op(Conv(size, self.in_channels, channels, kernel=3, act="relu"), 0)
        for stack in range(self.stacks):
            if stack:
                point = builder.op(MaxPool(size, channels, channels, kernel=2, stride=2), point)
                size //= 2
                channels *= 2
            for _ in range(self.cells):
                widths = vertex_channels(in_channels, channels, matrix_VV)
                point = _add_cell(builder, point, _Cell(matrix_VV, ops, widths, size))
                in_channels = channels
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
        """Picks that decode to ``arch``: those of its origin. Raises SpaceError unless
        the origin is this space.
        """
        if arch.origin is None or arch.origin.space_sha256 != self.sha256:
            raise SpaceError(
                f"architecture {arch.name!r} has no origin in space {self.name}: give its picks"
                " instead."
            )
        if self.decode(arch.origin.picks).identity != arch.identity:
            raise SpaceError(
                f"the blocks of architecture {arch.name!r} are not those of its origin's picks:"
                " correct or remove its origin."
            )
        return dict(arch.origin.picks)

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """Raises SpaceError: the space is the published benchmark, which is fixed."""
        raise SpaceError(
            f"space {self.name} cannot be restricted to {dict(allowed)}: the cells of"
            " NAS-Bench-101 are fixed."
        )

    def sample(self, rng: np.random.Generator) -> Picks:
        """Draw picks uniformly at random from those that are cells."""
        # rejection sampling keeps the distribution uniform
        while True:
            picks = super().sample(rng)
            if self.is_cell(picks):
                return picks

    def is_cell(self, picks: Mapping[str, Option]) -> bool:
        """Whether picks form a cell: at most nine edges, and a path from the input to
        the output.
        """
        matrix_VV, _ = self._full_graph(picks)
        few_enough = int(matrix_VV.sum()) <= EDGES
        return few_enough and pruned(matrix_VV) is not None

    @property
    def notation(self) -> str:
        """The pattern of a cell; see ``read``."""
        return '{"matrix": [[0, 1], [0, 0]], "ops": ["input", "output"]}'

    def read(self, text: str) -> Picks:
        """Parse a cell of up to 7 vertices in the benchmark's terms, as JSON:
        ``{"matrix": [[0, 1], [0, 0]], "ops": ["input", "output"]}``.

        Picks and positions are accepted as in every space. Raises SpaceError if
        ``text`` is none of these, or if the cell is not valid.
        """
        if "matrix" not in text:
            given = super().read(text)
            self._cell(given)  # raises if it is not a cell
            return given

        try:
            content = json.loads(text)
            matrix_VV = np.array(content["matrix"], dtype=np.int64)
            ops = list(content["ops"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SpaceError(
                f"{truncate(text)} is not a cell of space {self.name}: give matrix and ops as a"
                " JSON object."
            ) from error
        known_ops = all(op in OPS for op in ops[1:-1])
        if not _is_matrix(matrix_VV, len(ops)) or not known_ops:
            raise SpaceError(
                f"{truncate(text)} is not a cell of space {self.name}: write an upper"
                f" triangular 0/1 matrix of 2 to {VERTICES} vertices, and ops between input and"
                f" output from {', '.join(OPS)}."
            )

        # a smaller cell leaves out inner vertices: its output is still the last vertex
        vertex_of = [*range(len(ops) - 1), VERTICES - 1]
        picks: Picks = {choice.key: choice.options[0] for choice in self.choices}
        for row, op in enumerate(ops[1:-1], 1):
            picks[_vertex_key(row)] = str(op)
        for source, target in np.argwhere(matrix_VV):
            picks[_link_key(vertex_of[source], vertex_of[target])] = 1
        self._cell(picks)
        return picks

    def write(self, picks: Mapping[str, Option]) -> str:
        """Format the pruned cell as JSON: the inverse of ``read``. Raises SpaceError if
        picks are not a cell.
        """
        self.check(picks)
        matrix_VV, ops = self._cell(picks)
        return json.dumps({"matrix": matrix_VV.tolist(), "ops": ops})

    @property
    def architectures(self) -> int:
        """Number of cells with distinct ``fingerprint``, as published. Most picks are
        not a cell, or the same cell with its vertices in a different order.
        """
        return CELLS

    def fingerprint(self, picks: Mapping[str, Option]) -> str:
        """The benchmark's hash of the pruned graph (MD5). Equal for isomorphic cells.
        Raises SpaceError if picks are not a cell.
        """
        matrix_VV, ops = self._cell(picks)
        # -1 and -2 are the benchmark's labels of input and output
        return graph_hash(matrix_VV, [-1, *(OPS.index(op) for op in ops[1:-1]), -2])

    def _full_graph(self, picks: Mapping[str, Option]) -> tuple[np.ndarray, list[str]]:
        """The adjacency matrix (int64 [7, 7]) and the ops of all vertices, before
        pruning.
        """
        matrix_VV = np.zeros((VERTICES, VERTICES), dtype=np.int64)
        for source, target in combinations(range(VERTICES), 2):
            matrix_VV[source, target] = int(picks[_link_key(source, target)])
        inner = [str(picks[_vertex_key(vertex)]) for vertex in range(1, VERTICES - 1)]
        return matrix_VV, ["input", *inner, "output"]

    def _cell(self, picks: Mapping[str, Option]) -> tuple[np.ndarray, list[str]]:
        """The adjacency matrix and the ops of the pruned cell. Raises SpaceError if
        picks are not a cell.
        """
        matrix_VV, ops = self._full_graph(picks)
        # counted before pruning: the limit is on the edges that are picked
        edges = int(matrix_VV.sum())
        if edges > EDGES:
            raise SpaceError(
                f"a cell of space {self.name} has at most {EDGES} edges, and these picks have"
                f" {edges}: pick fewer."
            )
        kept = pruned(matrix_VV)
        if kept is None:
            raise SpaceError(
                "these picks have no path from the input to the output of a cell of space"
                f" {self.name}: pick more edges."
            )
        return matrix_VV[np.ix_(kept, kept)], [ops[vertex] for vertex in kept]


@cache  # called very often when cells are sampled
def _vertex_key(vertex: int) -> str:
    return Address("vertex", node=vertex).key


@cache
def _link_key(source: int, vertex: int) -> str:
    return Address("link", source=source, node=vertex).key


def _is_matrix(matrix_VV: np.ndarray, vertices: int) -> bool:
    """Whether an array is the adjacency matrix of a cell with that many vertices."""
    return (
        2 <= vertices <= VERTICES
        and matrix_VV.shape == (vertices, vertices)
        and not np.tril(matrix_VV).any()
        and set(matrix_VV.ravel().tolist()) <= {0, 1}
    )


def pruned(matrix_VV: np.ndarray) -> list[int] | None:
    """The vertices on paths from the first vertex to the last; None if there is no
    path. Edges lead from lower to higher numbers.

    Example:
        >>> pruned(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]))
        [0, 3]
    """
    last = len(matrix_VV) - 1
    from_input = {0}
    to_output = {last}
    # vertices are in topological order, so one pass in each direction is enough
    for vertex in range(last + 1):
        if vertex in from_input:
            from_input.update(np.flatnonzero(matrix_VV[vertex]).tolist())
    for vertex in reversed(range(last + 1)):
        if vertex in to_output:
            to_output.update(np.flatnonzero(matrix_VV[:, vertex]).tolist())
    if last not in from_input:
        return None
    return sorted(from_input & to_output)


def vertex_channels(in_channels: int, out_channels: int, matrix_VV: np.ndarray) -> list[int]:
    """The channels of every vertex of a pruned cell with these input and output widths;
    see the module for the rule.
    """
    last = len(matrix_VV) - 1
    widths = [in_channels, *[0] * (last - 1), out_channels]

    # vertices that lead to the output share its channels: it concatenates them
    concatenated = [vertex for vertex in range(1, last) if matrix_VV[vertex, last]]
    for position, vertex in enumerate(concatenated):
        share, remainder = divmod(out_channels, len(concatenated))
        widths[vertex] = share + (position < remainder)

    # backwards: the widths of the targets have to be known
    for vertex in reversed(range(1, last)):
        if not matrix_VV[vertex, last]:
            targets = np.flatnonzero(matrix_VV[vertex])
            widths[vertex] = max(widths[target] for target in targets)
    return widths


def graph_hash(matrix_VV: np.ndarray, labels: Sequence[int]) -> str:
    """The benchmark's hash of a labelled graph, equal for isomorphic graphs.

    Every vertex starts with a hash of its degrees and its label. There are as many
    rounds as vertices; each of them hashes a vertex together with its neighbours.
    """
    count = len(labels)
    out_degrees = matrix_VV.sum(axis=1).tolist()
    in_degrees = matrix_VV.sum(axis=0).tolist()
    # hashes of the tuples' text, as in the benchmark: the spelling matters
    hashes = [_md5(str(vertex)) for vertex in zip(out_degrees, in_degrees, labels, strict=True)]

    sources = [np.flatnonzero(matrix_VV[:, vertex]) for vertex in range(count)]
    targets = [np.flatnonzero(matrix_VV[vertex]) for vertex in range(count)]
    for _ in range(count):
        updated = []
        for vertex in range(count):
            before = "".join(sorted(hashes[source] for source in sources[vertex]))
            after = "".join(sorted(hashes[target] for target in targets[vertex]))
            updated.append(_md5(f"{before}|{after}|{hashes[vertex]}"))
        hashes = updated
    return _md5(str(sorted(hashes)))


def _md5(text: str) -> str:
    # not for security: Python builds that forbid MD5 for that still allow it here
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class _Cell:
    """A pruned cell at one place of a network: the ``widths`` of its vertices in
    channels, and the height = width ``size`` of its maps.
    """

    matrix_VV: np.ndarray
    ops: Sequence[str]
    widths: Sequence[int]
    size: int


def _add_cell(builder: GraphBuilder, entry: int, cell: _Cell) -> int:
    """Add a cell whose input is the point ``entry``. Returns its output point."""
    matrix_VV = cell.matrix_VV
    widths = cell.widths
    last = len(cell.ops) - 1
    points = [entry]
    for vertex in range(1, last):
        inputs = []
        for source in range(1, vertex):
            if not matrix_VV[source, vertex]:
                continue
            # widths never grow from a vertex to its targets, so a cut is enough
            if widths[source] == widths[vertex]:
                inputs.append(points[source])
            else:
                inputs.append(builder.cut(points[source], widths[vertex]))
        if matrix_VV[0, vertex]:
            inputs.append(_add_projection(builder, entry, cell, vertex))
        point = builder.sum(inputs)
        points.append(builder.op(_vertex_op(cell.ops[vertex], widths[vertex], cell.size), point))

    outputs = []
    concatenated = [points[vertex] for vertex in range(1, last) if matrix_VV[vertex, last]]
    if concatenated:
        outputs.append(builder.concat(concatenated))
    if matrix_VV[0, last]:
        outputs.append(_add_projection(builder, entry, cell, last))
    return builder.sum(outputs)


def _add_projection(builder: GraphBuilder, entry: int, cell: _Cell, vertex: int) -> int:
    """Add the projection of the input of a cell to the width of a vertex."""
    return builder.op(Conv(cell.size, cell.widths[0], cell.widths[vertex], act="relu"), entry)


def _vertex_op(op: str, channels: int, size: int) -> Op:
    if op == POOL3:
        return MaxPool(size, channels, channels, kernel=3)
    kernel = 3 if op == CONV3 else 1
    return Conv(size, channels, channels, kernel=kernel, act="relu")
