"""NAS-Bench-101's cells: validity, pruning, channels and counts against the benchmark's
published numbers and cells worked out by hand.
"""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from hwnas.core.arch import Architecture
from hwnas.core.nasbench101 import OPS, NASBench101Space, graph_hash, pruned, vertex_channels
from hwnas.core.spaces import load_space, nasbench101, parse_space
from hwnas.errors import SpaceError
from hwnas.nn.classifier import ClassificationNetwork

SPACE = nasbench101()
C3, C1, P = OPS


def cell(edges: list[tuple[int, int]], ops: list[str]) -> str:
    matrix = np.zeros((len(ops) + 2, len(ops) + 2), dtype=int)
    for source, vertex in edges:
        matrix[source, vertex] = 1
    return json.dumps({"matrix": matrix.tolist(), "ops": ["input", *ops, "output"]})


EXAMPLE = cell(
    [(0, 1), (0, 2), (0, 3), (0, 5), (1, 6), (2, 6), (3, 4), (4, 6), (5, 6)], [C1, C3, C3, C3, P]
)
"""The example cell in the benchmark's README."""
SMALLEST = cell([(0, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 5), (3, 5), (4, 5)], [P] * 4)
FIRST = cell(
    [(0, 1), (0, 4), (0, 5), (1, 2), (2, 3), (2, 6), (3, 5), (4, 5), (5, 6)], [C3, P, C3, C3, C1]
)
"""The first cell of the benchmark's file."""


def test_published_parameters_and_hash() -> None:
    """The benchmark's README prints 2,694,282 for its example; 227,274 is the smallest.
    The other values are from the benchmark's first record.
    """
    assert SPACE.decode(SPACE.read(EXAMPLE)).params == 2_694_282
    assert SPACE.decode(SPACE.read(SMALLEST)).params == 227_274
    assert SPACE.decode(SPACE.read(FIRST)).params == 8_555_530
    assert SPACE.fingerprint(SPACE.read(FIRST)) == "00005c142e6f48ac74fdcf73e3439874"


def test_the_channel_rule() -> None:
    """The output's channels are divided among the vertices that lead to it, the first
    of which get the remainder. Any other vertex is as wide as its widest successor.
    """
    matrix = np.zeros((7, 7), dtype=int)
    for source, vertex in ((0, 1), (1, 2), (1, 3), (2, 6), (3, 6), (1, 4), (4, 5), (5, 6)):
        matrix[source, vertex] = 1
    assert vertex_channels(128, 128, matrix) == [128, 43, 43, 43, 42, 42, 128]
    assert vertex_channels(64, 100, np.array([[0, 1], [0, 0]])) == [64, 100]


def test_wider_maps_are_cut() -> None:
    picks = SPACE.read(
        cell([(0, 1), (1, 2), (1, 3), (2, 6), (3, 6), (1, 4), (4, 5), (5, 6)], [C3, C3, C1, C1, P])
    )
    arch = SPACE.decode(picks)
    assert [step.key for step in arch.graph if step.kind == "cut"][:1] == ["cut 3 42"]
    network = ClassificationNetwork(arch, generator=torch.Generator().manual_seed(0))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(weight.numel() for weight in network.parameters()) == arch.params


def test_pruning() -> None:
    """A dead end and a vertex without an input are removed."""
    disconnected = cell([(0, 1), (1, 3), (0, 2), (4, 5)], [C3, P, C1, C1])
    with pytest.raises(SpaceError, match="no path from the input"):
        SPACE.read(disconnected)
    dangling = cell([(0, 1), (1, 5), (0, 2), (4, 5)], [C3, P, C1, C1])
    remaining = cell([(0, 1), (1, 2)], [C3])
    assert (
        SPACE.decode(SPACE.read(dangling)).identity == SPACE.decode(SPACE.read(remaining)).identity
    )
    assert SPACE.fingerprint(SPACE.read(dangling)) == SPACE.fingerprint(SPACE.read(remaining))
    assert pruned(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])) == [0, 3]


def test_at_most_nine_edges() -> None:
    full = [(source, vertex) for vertex in range(1, 6) for source in range(vertex)]
    with pytest.raises(SpaceError, match="at most 9 edges, and these picks have 15"):
        SPACE.read(cell(full, [C3] * 4))
    rng = np.random.default_rng(0)
    for _ in range(20):
        picks = SPACE.sample(rng)
        assert SPACE.is_cell(picks)
        assert sum(picks[choice.key] for choice in SPACE.choices if choice.key.startswith("e")) <= 9  # type: ignore[misc]
        arch = SPACE.decode(picks)
        assert SPACE.encode(arch) == picks
        assert Architecture.parse(arch.to_json()) == arch


def test_the_notation_reads_back() -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        picks = SPACE.sample(rng)
        assert SPACE.fingerprint(SPACE.read(SPACE.write(picks))) == SPACE.fingerprint(picks)


def test_the_fingerprint_ignores_the_order_of_vertices() -> None:
    matrix = np.array(
        [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    )
    labels = [-1, 0, 1, 2, -2]
    expected = graph_hash(matrix, labels)
    for order in permutations((1, 2, 3)):
        place = [0, *order, 4]
        assert graph_hash(matrix[np.ix_(place, place)], [labels[i] for i in place]) == expected
    assert graph_hash(matrix, [-1, 1, 0, 2, -2]) != expected


@pytest.mark.parametrize("vertices", [2, 3, 4, 5])
def test_the_number_of_different_cells(vertices: int) -> None:
    """The benchmark enumerates 1, 6, 84 and 2,441 unique cells that use all of 2, 3, 4
    and 5 vertices.
    """
    hashes, pairs = (
        set(),
        [(source, vertex) for vertex in range(1, vertices) for source in range(vertex)],
    )
    labellings = (
        np.array(np.meshgrid(*[range(3)] * (vertices - 2), indexing="ij"))
        .reshape(vertices - 2, -1)
        .T
        if vertices > 2
        else [[]]
    )
    for bits in range(2 ** len(pairs)):
        matrix = np.zeros((vertices, vertices), dtype=int)
        for position, pair in enumerate(pairs):
            matrix[pair] = bits >> position & 1
        if matrix.sum() <= 9 and pruned(matrix) == list(range(vertices)):
            hashes |= {graph_hash(matrix, [-1, *map(int, labels), -2]) for labels in labellings}
    assert len(hashes) == {2: 1, 3: 6, 4: 84, 5: 2_441}[vertices]


def test_unsupported_operations_are_refused() -> None:
    assert parse_space(SPACE.to_json()) == SPACE
    assert isinstance(load_space("nasbench101", width=0.25, classes=7), NASBench101Space)
    for call, words in (
        (SPACE.terms, "single choices have no cost"),
        (lambda: SPACE.restrict({"v1": [C3]}), "cannot be restricted"),
        (
            lambda: SPACE.encode(
                SPACE.decode(SPACE.read(EXAMPLE)).model_copy(update={"origin": None})
            ),
            "has no origin in space",
        ),
        (lambda: SPACE.read('{"matrix": []}'), "give matrix and ops"),
        (lambda: SPACE.read("0" * 26), "no path from the input"),
        (lambda: SPACE.read(EXAMPLE.replace(C1, "conv5x5")), "ops between input and output"),
        (lambda: SPACE.read(EXAMPLE.replace(f'"{C1}"', "[]")), "ops between input and output"),
        (lambda: load_space("nasbench101", act="relu6"), "supports no activation except relu"),
    ):
        with pytest.raises(SpaceError, match=words):
            call()
