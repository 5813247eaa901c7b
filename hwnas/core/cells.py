"""Spaces of cells: a small graph of options is searched, and stacked many times into a network.

A *cell* has nodes in a row. Every edge from an earlier node to a later one has a choice
of options, which all cells of its kind share (``"c.e0-1"``: from node 0 to node 1 of
the cell ``c``); a node is the sum of its edges. Two skeletons:

``nasbench201``  (Dong, Yang, ICLR 2020, arXiv 2001.00326) stem, three stages of cells
with one kind ``c`` of cell whose node 0 is what
                 comes before; a residual block halves the map between stages; BN, ReLU,
                 pooling, classifier. The last node is the output.
``darts``        (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055) two kinds of cells, ``normal`` and ``reduce``, whose nodes 0 and 1 are
                 the two cells before, through a 1 x 1 convolution each (or a factorised
                 reduction where the maps' sizes differ). Every further node keeps two
                 of its edges: which ones is a choice of its own
                 (``"normal.n3.inputs"``: ``"0+2"``). The output is all these nodes, one
                 after another. In ``reduce`` the edges from nodes 0 and 1 have stride
                 2.

Options are named as in the papers' code: ``none``, ``skip_connect``, ``nor_conv_3x3``,
``sep_conv_5x5``, ``dil_conv_3x3``, ``avg_pool_3x3``, ``max_pool_3x3``. ``none`` is no
connection; a node without any is zero, and what reads it is computed all the same, as
in the benchmark.

``plan`` is the one walk over such a network: decoding, prices and the super-net all come from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hwnas.core.arch import Architecture, Origin, Picks, Placed
from hwnas.core.cell_plan import KEPT, NONE, CellStep, edge_key, inputs_key, plan_of, sources_of
from hwnas.core.choice import Address
from hwnas.core.graph import GraphBuilder
from hwnas.core.ops import Op
from hwnas.core.search_space import RESOLUTION, Choice, Option, SearchSpace, Term, truncate
from hwnas.document import nearest
from hwnas.errors import SpaceError

_GENOTYPE = re.compile(r"(\w+)\s*=\s*(\[[^\]]*\]|\([^)]*\)|(?:list\()?range\([^)]*\))")
_EDGE = re.compile(r"\(\s*['\"](\w+)['\"],\s*(\d+)\s*\)")


@dataclass(frozen=True)
class PlacedOp:
    """A block of a network, and where it comes from: the position of its place in the
    plan, and the option of an edge.
    """

    place: int
    option: str
    op: Op


class CellSpace(SearchSpace):
    """Networks of cells. ``edges`` holds the options of every edge, ``inputs`` the
    pairs of edges that a DARTS node may keep.

    ``cells`` are the numbers of cells of each stage, reductions not counted;
    ``channels`` is the width of a node in the first stage, which doubles from stage to
    stage. ``stem`` is the skeleton's for small images or DARTS's for ImageNet, which
    halves the image thrice.

    Example:
        >>> from hwnas.core.cell_families import nasbench201
        >>> space = nasbench201()
        >>> space.decode(space.read("|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|skip_connect~2|")).params
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
    def _possible(self) -> Self:
        if self.cells[0] < 1 or min(self.cells) < (1 if self.skeleton == "nasbench201" else 0):
            raise ValueError(
                "every stage needs cells (DARTS's later ones have a reduction), got"
                f" {list(self.cells)}"
            )
        if self.stem == "imagenet" and self.skeleton != "darts":
            raise ValueError("only the skeleton darts has a stem for ImageNet")
        if self.resolution % self.multiple:
            raise ValueError(
                f"resolution {self.resolution} is halved again and again, so it is a multiple of"
                f" {self.multiple}"
            )
        for given, wanted, what in (
            (self.edges, self._edge_keys, "edges"),
            (self.inputs, self._input_keys, "inputs"),
        ):
            if set(given) != set(wanted):
                raise ValueError(
                    f"{what} are {', '.join(sorted(set(wanted) ^ set(given)))} amiss: give options"
                    f" for {', '.join(wanted)}"
                )
            for key, options in given.items():
                if not options or len(set(options)) != len(options):
                    raise ValueError(
                        f"{key} needs one or more different options, got {list(options)}"
                    )
        for key, pairs in self.inputs.items():
            unknown = [pair for pair in pairs if pair not in self._pairs(Address.parse(key).node)]
            if unknown:
                raise ValueError(
                    f"{key} cannot be {unknown[0]!r}: name two earlier nodes, as in '0+1'"
                )
        self.plan()
        return self

    @property
    def multiple(self) -> int:
        """What images' height = width is a multiple of: 2 to the power of how often the
        network halves it.
        """
        halvings = len(self.cells) - 1 + (3 if self.stem == "imagenet" else 0)
        return 1 << halvings

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of cells, in the order of their choices."""
        return ("c",) if self.skeleton == "nasbench201" else ("normal", "reduce")

    @property
    def sources(self) -> int:
        """Nodes of a cell that come from before it."""
        return 1 if self.skeleton == "nasbench201" else 2

    @property
    def _edge_keys(self) -> tuple[str, ...]:
        nodes = range(self.sources, self.nodes)
        return tuple(
            edge_key(cell, source, node)
            for cell in self.kinds
            for node in nodes
            for source in range(node)
        )

    @property
    def _input_keys(self) -> tuple[str, ...]:
        if self.skeleton == "nasbench201":
            return ()
        return tuple(
            inputs_key(cell, node)
            for cell in self.kinds
            for node in range(self.sources + 1, self.nodes)
        )

    @staticmethod
    def _pairs(node: int) -> tuple[str, ...]:
        return tuple("+".join(map(str, pair)) for pair in combinations(range(node), KEPT))

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Cell by cell and node by node: the edges that come in, then which of them are kept."""
        found = []
        for cell in self.kinds:
            for node in range(self.sources, self.nodes):
                found += [
                    Choice(key, self.edges[key], "op")
                    for key in (edge_key(cell, source, node) for source in range(node))
                ]
                key = inputs_key(cell, node)
                found += [Choice(key, self.inputs[key], "inputs")] if key in self.inputs else []
        return tuple(choice for choice in found if len(choice.options) > 1)

    def plan(self, pool_norm: bool = False) -> tuple[CellStep, ...]:
        """All places of the network in order. ``pool_norm``: with the BN that DARTS has
        behind pooling while it searches.
        """
        return plan_of(self, pool_norm)

    @cached_property
    def places(self) -> tuple[CellStep, ...]:
        """The plan of the networks that are trained in the end."""
        return self.plan()

    def terms(self) -> tuple[Term, ...]:
        """One term per op that always runs and per edge of every cell; those of one
        edge depend on the same choices.
        """
        return tuple(_term(place) for place in self.places if place.kind in ("op", "edge"))

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The network of ``picks``."""
        return self.network(picks, self.places, name)

    def network(
        self, picks: Mapping[str, Option], places: Sequence[CellStep], name: str | None = None
    ) -> Architecture:
        """The network of ``picks`` on the ``places`` of a plan."""
        self.check(picks)
        builder, _ = self.walk(picks, places)
        return Architecture(
            name=name or f"{self.name}-sample",
            in_channels=self.in_channels,
            bn_eps=self.bn_eps,
            blocks=tuple(builder.blocks),
            graph=tuple(builder.steps),
            origin=Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks)),
        )

    def walk(
        self, picks: Mapping[str, Option], places: Sequence[CellStep]
    ) -> tuple[GraphBuilder, tuple[PlacedOp, ...]]:
        """The graph of ``picks`` on the ``places`` of a plan, and where each of its
        blocks comes from.
        """
        builder, blocks = GraphBuilder(), []
        points: list[int | None] = [0]
        for position, place in enumerate(places):
            option = str(picks.get(place.key, place.options[0])) if place.kind == "edge" else ""
            before = len(builder.blocks)
            points.append(_step(builder, place, points, option, _keeps(place, picks)))
            blocks += [PlacedOp(position, option, op) for op in builder.blocks[before:]]
        return builder, tuple(blocks)

    def _placed(self, arch: Architecture, picks: Picks) -> tuple[Placed, ...]:
        """A place per block; edges that compute nothing have none."""
        del arch
        _, blocks = self.walk(picks, self.places)
        return tuple(Placed.of(self.places[block.place].slot, block.op) for block in blocks)

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices], those of edges that are not kept at 0."""
        picks, found = self.at(index_C), index_C.copy()
        for position, choice in enumerate(self.choices):
            if choice.kind == "op" and not self.kept(choice.key, picks):
                found[position] = 0
        return found

    @property
    def architectures(self) -> int:
        """Edges that a node does not keep do not count; edges without a connection (``none``) do.

        Example:
            >>> from hwnas.core.cell_families import darts
            >>> f"{darts().size:.3g}", f"{darts().architectures:.3g}"
            ('6.27e+29', '9.12e+18')
        """
        found = 1
        for cell in self.kinds:
            for node in range(self.sources, self.nodes):
                pairs = self.inputs.get(inputs_key(cell, node))
                kept = [tuple(range(node))] if pairs is None else list(map(sources_of, pairs))
                found *= sum(
                    math.prod(len(self.edges[edge_key(cell, source, node)]) for source in sources)
                    for sources in kept
                )
        return found

    def _inputs_of(self, key: str, picks: Mapping[str, Option]) -> tuple[int, ...] | None:
        """The nodes whose edges are kept where an edge ends; None where all are."""
        edge = Address.parse(key)
        into = inputs_key(edge.part, edge.node)
        options = self.inputs.get(into)
        return None if options is None else sources_of(str(picks.get(into, options[0])))

    def paths(self, picks: Mapping[str, Option]) -> dict[str, int]:
        """By edge: how many paths from an input of its cell to the cell's output lead
        over it, which ``none`` does not interrupt.

        Example:
            >>> from hwnas.core.cell_families import nasbench201
            >>> picks = nasbench201().read("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_1x1~2|")
            >>> nasbench201().paths(picks)
            {'c.e0-1': 2, 'c.e0-2': 0, 'c.e1-2': 1, 'c.e0-3': 1, 'c.e1-3': 1, 'c.e2-3': 1}
        """
        self.check(picks)
        found: dict[str, int] = {}
        for cell in self.kinds:
            edges = [
                (source, node) for node in range(self.sources, self.nodes) for source in range(node)
            ]
            keys = {edge: edge_key(cell, *edge) for edge in edges}
            there = [
                edge
                for edge, key in keys.items()
                if self.kept(key, picks) and picks.get(key, self.edges[key][0]) != NONE
            ]
            before = [1] * self.sources + [0] * (self.nodes - self.sources)
            after = [
                int(self.skeleton == "darts" or node == self.nodes - 1)
                for node in range(self.nodes)
            ]
            for source, node in there:
                before[node] += before[source]
            for source, node in reversed(there):
                after[source] += after[node]
            found |= {
                key: before[edge[0]] * after[edge[1]] if edge in there else 0
                for edge, key in keys.items()
            }
        return found

    def kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether the node at its end keeps an edge."""
        kept = self._inputs_of(key, picks)
        return kept is None or Address.parse(key).source in kept

    def encode(self, arch: Architecture) -> Picks:
        """Picks of ``arch``, from its origin where that is this space, else by matching
        its graph. Edges not kept get some option.
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
        """Picks that make the rest of ``arch``, beginning with what ``builder`` has: a
        choice is open until its first place.
        """
        while len(points) <= len(self.places):
            place = self.places[len(points) - 1]
            for key, options in (
                (place.keep_key, self.inputs.get(place.keep_key, ())),
                (place.key, place.options),
            ):
                if key and key not in picks and (key != place.key or _keeps(place, picks)):
                    branches = (
                        self._match(arch, {**picks, key: each}, _copy(builder), list(points))
                        for each in options
                    )
                    return next((found for found in branches if found is not None), None)
            points.append(
                _step(builder, place, points, str(picks.get(place.key, "")), _keeps(place, picks))
            )
            made, blocks = len(builder.steps), len(builder.blocks)
            if arch.graph[:made] != tuple(builder.steps) or arch.blocks[:blocks] != tuple(
                builder.blocks
            ):
                return None
        return picks if len(builder.steps) == len(arch.graph) else None

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options, in this space's order. Fixed
        choices may be named too.
        """
        changed = {"edges": dict(self.edges), "inputs": dict(self.inputs)}
        for key, options in allowed.items():
            if key == RESOLUTION and list(options) == [self.resolution]:
                continue
            part = next((part for part in changed.values() if key in part), None)
            if part is None:
                raise SpaceError(
                    f"space {self.name} has no choice {key!r};"
                    f" {nearest(key, {*self.edges, *self.inputs})}"
                )
            if not options or not set(options) <= set(part[key]):
                raise SpaceError(
                    f"choice {key!r} of space {self.name} cannot be restricted to {list(options)};"
                    f" known: {', '.join(part[key])}."
                )
            part[key] = tuple(option for option in part[key] if option in options)
        return self.changed(name or self.name, **changed)

    def changed(self, name: str, **update: object) -> Self:
        """A new space with other fields: more ``cells``, for instance, or other ``channels``."""
        return type(self).model_validate({**self.model_dump(), **update, "name": name})

    @property
    def notation(self) -> str:
        """See ``read``."""
        return (
            "|option~0|+|option~0|option~1|+..."
            if self.skeleton == "nasbench201"
            else "Genotype(normal=[('option', 0), ...], ...)"
        )

    def read(self, text: str) -> Picks:
        """The cells in their papers' notation, or as in every space. Raises SpaceError
        where the text is none of these.

        NAS-Bench-201's: ``|nor_conv_3x3~0|+|none~0|...|``, node by node
        ``option~source``. DARTS's genotypes, as its code and what followed print them:
        ``Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6),
        reduce=..., ...)``, two edges a node.
        """
        if self.skeleton == "nasbench201" and text.strip().startswith("|"):
            return self._read_nasbench201(text.strip())
        if self.skeleton == "darts" and "Genotype(" in text:
            return self._read_genotype(text)
        return super().read(text)

    def _read_nasbench201(self, text: str) -> Picks:
        picks: Picks = {}
        for node, group in enumerate(text.split("+"), 1):
            for source, part in enumerate(group.strip("|").split("|")):
                option, _, number = part.partition("~")
                if number != str(source) or (key := edge_key("c", source, node)) not in self.edges:
                    raise SpaceError(
                        f"{truncate(text)} is no cell of space {self.name}: {part!r} should be an"
                        f" option and '~{source}'."
                    )
                picks[key] = self._option(key, option, text)
        if len(picks) != len(self.edges):
            raise SpaceError(
                f"{truncate(text)} is no cell of space {self.name}: it has {len(picks)} edges"
                f" instead of {len(self.edges)}."
            )
        return {choice.key: picks[choice.key] for choice in self.choices}

    def _read_genotype(self, text: str) -> Picks:
        """Edges that are not kept get some option."""
        parts = dict(_GENOTYPE.findall(text))
        picks: Picks = {}
        every = list(range(self.sources, self.nodes))
        for cell in self.kinds:
            edges = [(option, int(source)) for option, source in _EDGE.findall(parts.get(cell, ""))]
            if len(edges) != KEPT * len(every):
                raise SpaceError(
                    f"{truncate(text)}: {cell} has {len(edges)} edges ('option', source) instead"
                    f" of {KEPT * len(every)}, {KEPT} a node."
                )
            concat = parts.get(f"{cell}_concat", "").replace(" ", "")
            if concat.removeprefix("list(").strip("[]()") not in (
                f"range({every[0]},{every[-1] + 1}",
                ",".join(map(str, every)),
            ):
                raise SpaceError(
                    f"{truncate(text)}: {cell}_concat is {concat or 'missing'}, but cells of space"
                    f" {self.name} put all nodes together."
                )
            for number, node in enumerate(every):
                into = edges[KEPT * number : KEPT * (number + 1)]
                key, inputs = (
                    inputs_key(cell, node),
                    "+".join(str(source) for source in sorted(source for _, source in into)),
                )
                pairs = self.inputs.get(key, self._pairs(node))
                if inputs not in pairs:
                    raise SpaceError(
                        f"{truncate(text)}: node {node} of {cell} cannot have the inputs {inputs};"
                        f" known: {', '.join(pairs)}."
                    )
                picks |= {key: inputs} | {
                    edge_key(cell, source, node): self._option(
                        edge_key(cell, source, node), option, text
                    )
                    for option, source in into
                }
        return {choice.key: picks.get(choice.key, choice.options[0]) for choice in self.choices}

    def _option(self, key: str, option: str, text: str) -> str:
        if option not in self.edges[key]:
            raise SpaceError(
                f"edge {key} of {truncate(text)} cannot be {option!r};"
                f" {nearest(option, self.edges[key])}"
            )
        return option

    def write(self, picks: Mapping[str, Option]) -> str:
        """The reverse of ``read``, in the papers' notation.

        Example:
            >>> from hwnas.core.cell_families import darts
            >>> space = darts()
            >>> space.write({choice.key: choice.options[-1] for choice in space.choices})[:58]
            "Genotype(normal=[('dil_conv_5x5', 0), ('dil_conv_5x5', 1),"
        """
        self.check(picks)
        nodes = range(self.sources, self.nodes)
        if self.skeleton == "nasbench201":
            return "+".join(
                "|"
                + "|".join(f"{option}~{source}" for option, source in self._into("c", node, picks))
                + "|"
                for node in nodes
            )
        concat = f"range({self.sources}, {self.nodes})"
        cells = {
            cell: [pair for node in nodes for pair in self._into(cell, node, picks)]
            for cell in self.kinds
        }
        return (
            "Genotype("
            + ", ".join(f"{cell}={pairs}, {cell}_concat={concat}" for cell, pairs in cells.items())
            + ")"
        )

    def _into(self, cell: str, node: int, picks: Mapping[str, Option]) -> list[tuple[str, int]]:
        """Option and source of the edges that a node keeps."""
        keys = [edge_key(cell, source, node) for source in range(node)]
        return [
            (str(picks.get(key, self.edges[key][0])), source)
            for source, key in enumerate(keys)
            if self.kept(key, picks)
        ]


def _copy(builder: GraphBuilder) -> GraphBuilder:
    return GraphBuilder(list(builder.blocks), list(builder.steps))


def _keeps(place: CellStep, picks: Mapping[str, Option]) -> bool:
    """Whether the picks keep an edge."""
    if not place.kept:
        return True
    if len(place.kept) == 1:
        return place.kept[0]
    return Address.parse(place.key).source in sources_of(str(picks[place.keep_key]))


def _step(
    builder: GraphBuilder, place: CellStep, points: Sequence[int | None], option: str, kept: bool
) -> int | None:
    """Add a place to a graph; the point it makes, None for no connection."""
    read = [points[point] for point in place.of]
    present = [point for point in read if point is not None]
    if place.kind == "sum":
        return builder.sum(present) if present else builder.zero(place.channels, place.size)
    assert len(present) == len(read), f"{place.slot} reads what is not there"
    if place.kind == "concat":
        return builder.concat(present)
    if place.kind == "op":
        assert place.op is not None
        return builder.op(place.op, present[0])
    if not kept or option == NONE:
        return None
    op = place.ops[place.options.index(option)]
    return present[0] if op is None else builder.op(op, present[0])


def _term(place: CellStep) -> Term:
    """The term of an op or an edge."""
    if place.kind == "op":
        return Term(place.slot, (), (), (place.op,))
    kept = place.kept or (True,)
    ops = tuple(op if keeps else None for op, keeps in product(place.ops, kept))
    shape = {
        key: count
        for key, count in ((place.key, len(place.options)), (place.keep_key, len(kept)))
        if key and count > 1
    }
    return Term(place.slot, tuple(shape), tuple(shape.values()), ops, place.options)
