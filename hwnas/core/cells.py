"""Cell-based spaces: a small graph of options is searched, and stacked into a network.

The nodes of a *cell* are numbered. Every edge from an earlier node to a later one has a
choice of options, shared by all cells of its kind (``"c.e0-1"``: from node 0 to node 1
of the cell ``c``). The value of a node is the sum of its incoming edges. There are two
skeletons:

``nasbench201``  (Dong, Yang, ICLR 2020, arXiv 2001.00326) A stem, three stages of
                 cells, then BN, ReLU, pooling and a classifier. A residual block halves
                 the feature map between stages. There is one kind of cell, ``c``; its
                 node 0 is the output of the preceding layer, its last node the output.
``darts``        (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055) Two kinds of cells,
                 ``normal`` and ``reduce``. Nodes 0 and 1 are the outputs of the two
                 preceding cells, each through a 1 x 1 convolution (or a factorised
                 reduction if the sizes of the maps differ). Every other node keeps two
                 of its edges, and which two is a separate choice
                 (``"normal.n3.inputs"``: ``"0+2"``). The output is the concatenation of
                 these nodes. In ``reduce``, edges from nodes 0 and 1 have stride 2.

Options are named as in the papers' code: ``none``, ``skip_connect``, ``nor_conv_3x3``,
``sep_conv_5x5``, ``dil_conv_3x3``, ``avg_pool_3x3``, ``max_pool_3x3``. ``none`` is no
connection. A node without connections is zero, and the ops that read it still run, as
in the benchmark.

Decoding, costs and the super-net are all derived from ``CellSpace.steps``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hwnas.core.arch import Architecture, Origin, Picks, Position
from hwnas.core.cell_steps import (
    KEPT,
    NONE,
    CellStep,
    edge_key,
    input_pairs,
    inputs_key,
    sources_of,
    steps_of,
)
from hwnas.core.choice import Address, open_choices
from hwnas.core.graph import GraphBuilder
from hwnas.core.ops import Op
from hwnas.core.search_space import RESOLUTION, Choice, Option, SearchSpace, Term, truncate
from hwnas.document import nearest
from hwnas.errors import SpaceError

_GENOTYPE_FIELD = re.compile(r"(\w+)\s*=\s*(\[[^\]]*\]|\([^)]*\)|(?:list\()?range\([^)]*\))")
"""One keyword argument of a DARTS genotype: its name and its list, tuple or range."""
_GENOTYPE_EDGE = re.compile(r"\(\s*['\"](\w+)['\"],\s*(\d+)\s*\)")
"""``('sep_conv_3x3', 0)``: the option and the source of an edge."""


@dataclass(frozen=True)
class StepOp:
    """A block of a network and where it comes from: the index of its step, and the
    option that was picked there (empty unless the step is an edge).
    """

    step: int
    option: str
    op: Op


class CellSpace(SearchSpace):
    """A space of networks made of cells.

    ``edges`` maps the key of every edge to its options; ``inputs`` maps the key of
    every DARTS node to the pairs of edges that it may keep. ``cells`` is the number of
    cells in each stage, without reductions. ``channels`` is the width of a node in the
    first stage; it doubles from stage to stage. ``stem`` is the skeleton's own stem for
    small images, or DARTS's ImageNet stem, which halves the image three times.

    Example:
        >>> from hwnas.core.cell_families import nasbench201
        >>> space = nasbench201()
        >>> cell = "|nor_conv_3x3~0|+|none~0|none~1|"
        >>> cell += "+|skip_connect~0|none~1|skip_connect~2|"
        >>> space.decode(space.read(cell)).params
        316346
    """

    SPARSE_FIELDS = ("detector", "inputs")

    kind: Literal["cell"] = "cell"
    skeleton: Literal["nasbench201", "darts"]
    stem: Literal["small", "imagenet"] = "small"
    channels: int = Field(gt=0)
    cells: tuple[int, ...] = Field(min_length=1)
    nodes: int = Field(ge=2)
    edges: dict[str, tuple[str, ...]]
    inputs: dict[str, tuple[str, ...]] = {}
    act: str = "relu"

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        # later DARTS stages begin with a reduction, so they may have no other cells
        fewest = 1 if self.skeleton == "nasbench201" else 0
        if self.cells[0] < 1 or min(self.cells) < fewest:
            raise ValueError(
                "every stage needs at least one cell (in DARTS a reduction counts), got"
                f" {list(self.cells)}"
            )
        if self.stem == "imagenet" and self.skeleton != "darts":
            raise ValueError("only the skeleton 'darts' has a stem for ImageNet")
        if self.side % self.multiple:
            raise ValueError(
                f"resolution {self.resolution} is halved repeatedly, so it must be a multiple of"
                f" {self.multiple}"
            )

        _check_options("edges", self.edges, self._edge_keys)
        _check_options("inputs", self.inputs, self._input_keys)
        for key, pairs in self.inputs.items():
            known = input_pairs(Address.parse(key).node)
            for pair in pairs:
                if pair not in known:
                    raise ValueError(
                        f"{key} cannot be {pair!r}: name two earlier nodes, as in '0+1'"
                    )

        # making the steps makes every op, and so rejects unknown options
        self.make_steps()
        return self

    @property
    def multiple(self) -> int:
        """The height = width of images must be a multiple of this: 2 to the power of
        the number of times that the network halves it.
        """
        halvings = len(self.cells) - 1
        if self.stem == "imagenet":
            halvings += 3
        return 1 << halvings

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of cells, in the order of their choices."""
        if self.skeleton == "nasbench201":
            return ("c",)
        return ("normal", "reduce")

    @property
    def sources(self) -> int:
        """Number of nodes of a cell that are outputs of preceding layers."""
        return 1 if self.skeleton == "nasbench201" else 2

    @property
    def _edge_keys(self) -> tuple[str, ...]:
        """The keys that ``edges`` must have."""
        keys = []
        for cell in self.kinds:
            for node in range(self.sources, self.nodes):
                keys += [edge_key(cell, source, node) for source in range(node)]
        return tuple(keys)

    @property
    def _input_keys(self) -> tuple[str, ...]:
        """The keys that ``inputs`` must have."""
        if self.skeleton == "nasbench201":
            return ()
        keys = []
        for cell in self.kinds:
            # the first inner node has just two edges and keeps both
            keys += [inputs_key(cell, node) for node in range(self.sources + 1, self.nodes)]
        return tuple(keys)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """For every cell and node: the options of the incoming edges, then which edges
        are kept. Decisions with a single option are left out.
        """
        decisions: list[Choice] = []
        for cell in self.kinds:
            for node in range(self.sources, self.nodes):
                for source in range(node):
                    key = edge_key(cell, source, node)
                    decisions.append(Choice(key, self.edges[key], "op"))
                key = inputs_key(cell, node)
                if key in self.inputs:
                    decisions.append(Choice(key, self.inputs[key], "inputs"))
        return open_choices(decisions)

    def make_steps(self, pool_norm: bool = False) -> tuple[CellStep, ...]:
        """All steps of the network in order. ``pool_norm`` adds a BN after every
        pooling op, as DARTS does during the search.
        """
        return steps_of(self, pool_norm)

    @cached_property
    def steps(self) -> tuple[CellStep, ...]:
        """The steps of the final networks, without BN after pooling."""
        return self.make_steps()

    def terms(self) -> tuple[Term, ...]:
        """One term per op that always runs and one per edge of every cell. All cells of
        a kind share the choices of an edge.
        """
        return tuple(_term(step) for step in self.steps if step.kind in ("op", "edge"))

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The network of ``picks``. Raises SpaceError as ``check`` does."""
        return self.network(picks, self.steps, name)

    def network(
        self, picks: Mapping[str, Option], steps: Sequence[CellStep], name: str | None = None
    ) -> Architecture:
        """The network that the ``steps`` make with ``picks``."""
        self.check(picks)
        builder, _ = self.walk(picks, steps)
        return Architecture(
            name=name or f"{self.name}-sample",
            in_channels=self.in_channels,
            bn_eps=self.bn_eps,
            blocks=tuple(builder.blocks),
            graph=tuple(builder.steps),
            origin=Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks)),
        )

    def walk(
        self, picks: Mapping[str, Option], steps: Sequence[CellStep]
    ) -> tuple[GraphBuilder, tuple[StepOp, ...]]:
        """The graph that the ``steps`` make with ``picks``, and where each of its
        blocks comes from.
        """
        builder = GraphBuilder()
        blocks: list[StepOp] = []
        points: list[int | None] = [0]  # the image
        for index, step in enumerate(steps):
            option = ""
            if step.kind == "edge":
                option = str(picks.get(step.key, step.options[0]))
            # a step adds one block or none
            before = len(builder.blocks)
            points.append(_add_step(builder, step, points, option, _is_kept(step, picks)))
            blocks += [StepOp(index, option, op) for op in builder.blocks[before:]]
        return builder, tuple(blocks)

    def _positions(self, arch: Architecture, picks: Picks) -> tuple[Position, ...]:
        """One position per block; edges that compute nothing are left out."""
        del arch
        _, blocks = self.walk(picks, self.steps)
        return tuple(Position.of(self.steps[block.step].slot, block.op) for block in blocks)

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices], set to 0 for edges that are not kept."""
        picks = self.at(index_C)
        canonical_C = index_C.copy()
        for position, choice in enumerate(self.choices):
            if choice.kind == "op" and not self.is_kept(choice.key, picks):
                canonical_C[position] = 0
        return canonical_C

    @property
    def architectures(self) -> int:
        """Number of distinct architectures. Options of edges that a node does not keep
        do not count; the option ``none`` of an edge that is kept does.

        Example:
            >>> from hwnas.core.cell_families import darts
            >>> f"{darts().size:.3g}", f"{darts().architectures:.3g}"
            ('6.27e+29', '9.12e+18')
        """
        count = 1
        for cell in self.kinds:
            for node in range(self.sources, self.nodes):
                pairs = self.inputs.get(inputs_key(cell, node))
                kept = [tuple(range(node))]  # without a choice of inputs: all edges
                if pairs is not None:
                    kept = [sources_of(pair) for pair in pairs]
                count *= sum(self._edge_combinations(cell, node, sources) for sources in kept)
        return count

    def _edge_combinations(self, cell: str, node: int, sources: Sequence[int]) -> int:
        """Number of combinations of options on the edges from ``sources``."""
        return math.prod(len(self.edges[edge_key(cell, source, node)]) for source in sources)

    def _kept_sources(self, key: str, picks: Mapping[str, Option]) -> tuple[int, ...] | None:
        """The sources of the edges that are kept at the node where edge ``key`` ends;
        None if all are.
        """
        edge = Address.parse(key)
        keep_key = inputs_key(edge.part, edge.node)
        pairs = self.inputs.get(keep_key)
        if pairs is None:
            return None
        return sources_of(str(picks.get(keep_key, pairs[0])))

    def paths(self, picks: Mapping[str, Option]) -> dict[str, int]:
        """For every edge: the number of paths through it from an input of its cell to
        the cell's output. Edges with the option ``none`` interrupt a path.

        Example:
            >>> from hwnas.core.cell_families import nasbench201
            >>> cell = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|"
            >>> cell += "+|skip_connect~0|nor_conv_1x1~1|nor_conv_1x1~2|"
            >>> paths = nasbench201().paths(nasbench201().read(cell))
            >>> paths["c.e0-1"], paths["c.e0-2"], paths["c.e1-2"]
            (2, 0, 1)
        """
        self.check(picks)
        counts: dict[str, int] = {}
        for cell in self.kinds:
            counts |= self._paths_of_cell(cell, picks)
        return counts

    def _paths_of_cell(self, cell: str, picks: Mapping[str, Option]) -> dict[str, int]:
        """``paths`` for one kind of cell."""
        counts: dict[str, int] = {}
        connected: list[tuple[int, int]] = []
        for node in range(self.sources, self.nodes):
            for source in range(node):
                key = edge_key(cell, source, node)
                counts[key] = 0
                option = picks.get(key, self.edges[key][0])
                if option != NONE and self.is_kept(key, picks):
                    connected.append((source, node))

        # Paths from an input to each node, then from each node to the output. Edges are
        # ordered by the node they end at, so each pass sees a node's final count.
        before = [1] * self.sources + [0] * (self.nodes - self.sources)
        for source, node in connected:
            before[node] += before[source]
        # DARTS concatenates the nodes, so each of them reaches the output directly
        after = [int(self.skeleton == "darts")] * (self.nodes - 1) + [1]
        for source, node in reversed(connected):
            after[source] += after[node]

        for source, node in connected:
            counts[edge_key(cell, source, node)] = before[source] * after[node]
        return counts

    def is_kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether the node at the end of edge ``key`` keeps the edge."""
        sources = self._kept_sources(key, picks)
        return sources is None or Address.parse(key).source in sources

    def encode(self, arch: Architecture) -> Picks:
        """Picks that decode to ``arch``: those of its origin if that is this space,
        else found by matching its graph. Raises SpaceError if it is not in the space.

        Edges that are not kept may have any option; matching gives their first one.
        """
        if arch.origin is not None and arch.origin.space_sha256 == self.sha256:
            if self.decode(arch.origin.picks).identity != arch.identity:
                raise SpaceError(
                    f"the blocks of architecture {arch.name!r} are not those of its origin's picks:"
                    " correct or remove its origin."
                )
            return dict(arch.origin.picks)

        matched = self._match(arch, {}, GraphBuilder(), [0])
        if matched is None or arch.in_channels != self.in_channels:
            raise SpaceError(
                f"architecture {arch.name!r} is not in space {self.name}: no picks give its"
                f" {len(arch.blocks)} blocks."
            )
        return {choice.key: matched.get(choice.key, choice.options[0]) for choice in self.choices}

    def _match(
        self, arch: Architecture, picks: Picks, builder: GraphBuilder, points: list[int | None]
    ) -> Picks | None:
        """Complete ``picks`` so that they decode to ``arch``. None if that is
        impossible.

        This is a backtracking search. ``builder`` and ``points`` are the part of the
        graph that is already built. A choice is branched on at the first step that
        needs it; later steps of the same kind of cell reuse the pick.
        """
        while len(points) <= len(self.steps):
            step = self.steps[len(points) - 1]

            open_key, options = self._open_choice(step, picks)
            for option in options:
                branch = {**picks, open_key: option}
                matched = self._match(arch, branch, _copy(builder), list(points))
                if matched is not None:
                    return matched
            if open_key:
                return None

            option = str(picks.get(step.key, ""))
            points.append(_add_step(builder, step, points, option, _is_kept(step, picks)))
            # Stop as early as possible: the graph so far must be a prefix of the whole.
            if arch.graph[: len(builder.steps)] != tuple(builder.steps):
                return None
            if arch.blocks[: len(builder.blocks)] != tuple(builder.blocks):
                return None

        return picks if len(builder.steps) == len(arch.graph) else None

    def _open_choice(self, step: CellStep, picks: Picks) -> tuple[str, tuple[str, ...]]:
        """The key and the options of a choice that ``step`` depends on and that
        ``picks`` leave open; an empty key if there is none.
        """
        # the inputs come first: an edge that is not kept needs no option
        if step.keep_key and step.keep_key not in picks:
            return step.keep_key, self.inputs.get(step.keep_key, ())
        if step.key and step.key not in picks and _is_kept(step, picks):
            return step.key, step.options
        return "", ()

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space that keeps only the ``allowed`` options of the named choices, in
        the order of this space. Decisions with a single option may be named as well.

        Raises SpaceError on an unknown choice or option.
        """
        edges = dict(self.edges)
        inputs = dict(self.inputs)
        for key, options in allowed.items():
            # Not a choice of this space, but a restriction to the only value is fine.
            if key == RESOLUTION and list(options) == [self.resolution]:
                continue
            if key in edges:
                decisions = edges
            elif key in inputs:
                decisions = inputs
            else:
                raise SpaceError(
                    f"space {self.name} has no choice {key!r};"
                    f" {nearest(key, {*self.edges, *self.inputs})}"
                )

            known = decisions[key]
            if not options or not set(options) <= set(known):
                raise SpaceError(
                    f"choice {key!r} of space {self.name} cannot be restricted to {list(options)};"
                    f" known: {', '.join(known)}."
                )
            decisions[key] = tuple(option for option in known if option in options)
        return self.changed(name or self.name, edges=edges, inputs=inputs)

    def changed(self, name: str, **update: object) -> Self:
        """A copy with some fields replaced, for instance ``cells`` or ``channels``. It
        is validated again.
        """
        return type(self).model_validate({**self.model_dump(), **update, "name": name})

    @property
    def notation(self) -> str:
        """The pattern of the papers' notation; see ``read``."""
        if self.skeleton == "nasbench201":
            return "|option~0|+|option~0|option~1|+..."
        return "Genotype(normal=[('option', 0), ...], ...)"

    def read(self, text: str) -> Picks:
        """Parse cells in the notation of their paper, or picks as in every space.
        Raises SpaceError if ``text`` is none of these.

        NAS-Bench-201 writes ``option~source`` for every edge, node by node:
        ``|nor_conv_3x3~0|+|none~0|...|``. DARTS and its successors print genotypes with
        two edges per node: ``Genotype(normal=[('sep_conv_3x3', 0), ...],
        normal_concat=range(2, 6), reduce=..., ...)``.
        """
        if self.skeleton == "nasbench201" and text.strip().startswith("|"):
            return self._read_nasbench201(text.strip())
        if self.skeleton == "darts" and "Genotype(" in text:
            return self._read_genotype(text)
        return super().read(text)

    def _read_nasbench201(self, text: str) -> Picks:
        """Picks of a cell of NAS-Bench-201."""
        picks: Picks = {}
        for node, group in enumerate(text.split("+"), 1):
            for source, part in enumerate(group.strip("|").split("|")):
                option, _, number = part.partition("~")
                key = edge_key("c", source, node)
                if number != str(source) or key not in self.edges:
                    raise SpaceError(
                        f"{truncate(text)} is not a cell of space {self.name}: {part!r} must be an"
                        f" option followed by '~{source}'."
                    )
                picks[key] = self._known_option(key, option, text)

        if len(picks) != len(self.edges):
            raise SpaceError(
                f"{truncate(text)} is not a cell of space {self.name}: it has {len(picks)} edges"
                f" instead of {len(self.edges)}."
            )
        return {choice.key: picks[choice.key] for choice in self.choices}

    def _read_genotype(self, text: str) -> Picks:
        """Picks of a DARTS genotype. Edges that are not kept get their first option."""
        fields = dict(_GENOTYPE_FIELD.findall(text))
        picks: Picks = {}
        for cell in self.kinds:
            picks |= self._read_genotype_cell(cell, fields, text)
        return {choice.key: picks.get(choice.key, choice.options[0]) for choice in self.choices}

    def _read_genotype_cell(self, cell: str, fields: Mapping[str, str], text: str) -> Picks:
        """Picks of one kind of cell from the ``fields`` of the genotype ``text``."""
        nodes = range(self.sources, self.nodes)
        edges = [
            (option, int(source)) for option, source in _GENOTYPE_EDGE.findall(fields.get(cell, ""))
        ]
        if len(edges) != KEPT * len(nodes):
            raise SpaceError(
                f"{truncate(text)}: {cell} has {len(edges)} edges ('option', source) instead"
                f" of {KEPT * len(nodes)}, {KEPT} per node."
            )

        # written as range(2, 6), list(range(2, 6)), [2, 3, 4, 5] or (2, 3, 4, 5)
        concat = fields.get(f"{cell}_concat", "").replace(" ", "")
        nodes_text = concat.removeprefix("list(").strip("[]()")
        as_range = f"range({nodes[0]},{nodes[-1] + 1}"
        as_list = ",".join(map(str, nodes))
        if nodes_text not in (as_range, as_list):
            raise SpaceError(
                f"{truncate(text)}: {cell}_concat is {concat or 'missing'}, but cells of space"
                f" {self.name} concatenate all nodes."
            )

        picks: Picks = {}
        for number, node in enumerate(nodes):
            incoming = edges[KEPT * number : KEPT * (number + 1)]
            keep_key = inputs_key(cell, node)
            inputs = "+".join(map(str, sorted(source for _, source in incoming)))
            pairs = self.inputs.get(keep_key, input_pairs(node))
            if inputs not in pairs:
                raise SpaceError(
                    f"{truncate(text)}: node {node} of {cell} cannot have the inputs {inputs};"
                    f" known: {', '.join(pairs)}."
                )
            picks[keep_key] = inputs
            for option, source in incoming:
                key = edge_key(cell, source, node)
                picks[key] = self._known_option(key, option, text)
        return picks

    def _known_option(self, key: str, option: str, text: str) -> str:
        """``option`` if edge ``key`` has it. Raises SpaceError, quoting ``text``, if
        not.
        """
        if option not in self.edges[key]:
            raise SpaceError(
                f"edge {key} of {truncate(text)} cannot be {option!r};"
                f" {nearest(option, self.edges[key])}"
            )
        return option

    def write(self, picks: Mapping[str, Option]) -> str:
        """Format picks in the notation of their paper: the inverse of ``read``. Raises
        SpaceError as ``check`` does.

        Example:
            >>> from hwnas.core.cell_families import darts
            >>> space = darts()
            >>> picks = {choice.key: choice.options[-1] for choice in space.choices}
            >>> space.write(picks)[:58]
            "Genotype(normal=[('dil_conv_5x5', 0), ('dil_conv_5x5', 1),"
        """
        self.check(picks)
        nodes = range(self.sources, self.nodes)

        if self.skeleton == "nasbench201":
            groups = []
            for node in nodes:
                edges = self._kept_edges("c", node, picks)
                parts = [f"{option}~{source}" for option, source in edges]
                groups.append("|" + "|".join(parts) + "|")
            return "+".join(groups)

        fields = []
        for cell in self.kinds:
            edges = []
            for node in nodes:
                edges += self._kept_edges(cell, node, picks)
            fields.append(f"{cell}={edges}, {cell}_concat=range({self.sources}, {self.nodes})")
        return f"Genotype({', '.join(fields)})"

    def _kept_edges(
        self, cell: str, node: int, picks: Mapping[str, Option]
    ) -> list[tuple[str, int]]:
        """Option and source of every edge that a node keeps."""
        edges = []
        for source in range(node):
            key = edge_key(cell, source, node)
            if self.is_kept(key, picks):
                edges.append((str(picks.get(key, self.edges[key][0])), source))
        return edges


def _check_options(field: str, given: Mapping[str, Sequence[str]], keys: Sequence[str]) -> None:
    """Raise ValueError unless ``given`` has different options for all these keys."""
    if set(given) != set(keys):
        raise ValueError(
            f"{field} has missing or unknown keys ({', '.join(sorted(set(keys) ^ set(given)))}):"
            f" give options for {', '.join(keys)}"
        )
    for key, options in given.items():
        if not options or len(set(options)) != len(options):
            raise ValueError(f"{key} needs one or more different options, got {list(options)}")


def _copy(builder: GraphBuilder) -> GraphBuilder:
    # copy.deepcopy would copy the ops as well, which are immutable
    return GraphBuilder(list(builder.blocks), list(builder.steps))


def _is_kept(step: CellStep, picks: Mapping[str, Option]) -> bool:
    """Whether the picks keep the edge of a step. Steps of other kinds are
    always kept.
    """
    if not step.kept:
        return True
    if len(step.kept) == 1:  # a single pair is not a choice: no pick names it
        return step.kept[0]
    return Address.parse(step.key).source in sources_of(str(picks[step.keep_key]))


def _add_step(
    builder: GraphBuilder, step: CellStep, points: Sequence[int | None], option: str, kept: bool
) -> int | None:
    """Add a step to a graph. Returns the point that it makes, or None for no
    connection.
    """
    inputs = [points[point] for point in step.of]
    present = [point for point in inputs if point is not None]
    if step.kind == "sum":
        if not present:
            return builder.zero(step.channels, step.size)
        return builder.sum(present)

    # only edges can be unconnected, and only sums read edges
    assert len(present) == len(inputs), f"{step.slot} reads a point that was not made"
    if step.kind == "concat":
        return builder.concat(present)
    if step.kind == "op":
        assert step.op is not None
        return builder.op(step.op, present[0])
    if not kept or option == NONE:
        return None
    op = step.ops[step.options.index(option)]
    if op is None:  # an identity: the next step reads the same point
        return present[0]
    return builder.op(op, present[0])


def _term(step: CellStep) -> Term:
    """The term of an op or an edge."""
    if step.kind == "op":
        return Term(step.slot, (), (), (step.op,))

    # row-major: the option of the edge first, then the edges that the node keeps
    kept = step.kept or (True,)
    ops: list[Op | None] = []
    for op in step.ops:
        for keeps in kept:
            ops.append(op if keeps else None)

    counts = {step.key: len(step.options), step.keep_key: len(kept)}
    return Term.over(step.slot, counts, ops, step.options)
