"""Cell spaces: choices, notation, decoding and encoding, costs, and DARTS's published
counts.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
from pydantic import ValidationError

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture, Picks
from hwnas.core.cell_steps import NONE, edge_op
from hwnas.core.cells import CellSpace
from hwnas.core.ops import Op
from hwnas.core.spaces import (
    CELL_SPACES,
    darts,
    darts_imagenet,
    load_space,
    nasbench201,
    nds_darts,
    parse_space,
)
from hwnas.errors import DocumentError, SpaceError

SMALL = {
    "nasbench201": nasbench201(width=0.25, resolution=8),
    "darts": darts(channels=4, layers=5, resolution=8),
}
DARTS_V2 = {
    "normal": ("sep_conv_3x3 0, sep_conv_3x3 1", "sep_conv_3x3 0, sep_conv_3x3 1", "sep_conv_3x3 1, skip_connect 0",
               "skip_connect 0, dil_conv_3x3 2"),
    "reduce": ("max_pool_3x3 0, max_pool_3x3 1", "skip_connect 2, max_pool_3x3 1", "max_pool_3x3 0, skip_connect 2",
               "skip_connect 2, max_pool_3x3 1"),
}  # fmt: skip
"""The genotype that DARTS's code calls DARTS_V2: option and source of both edges into
each of the nodes 2 to 5.
"""


def darts_picks(space: CellSpace, genotype: dict[str, tuple[str, ...]]) -> Picks:
    picks: Picks = {choice.key: choice.options[0] for choice in space.choices}
    for cell, nodes in genotype.items():
        for node, edges in enumerate(nodes, 2):
            pairs = [edge.split(" ") for edge in edges.split(", ")]
            picks |= {f"{cell}.e{source}-{node}": option for option, source in pairs}
            if node > 2:
                picks[f"{cell}.n{node}.inputs"] = "+".join(sorted(source for _, source in pairs))
    return picks


def test_the_published_network_of_darts() -> None:
    """DARTS's released code prints 3,349,342 parameters; the paper rounds to 3.3 M.
    The 530 M multiply-adds are from AngleNAS's table.
    """
    assert darts().decode(darts_picks(darts(), DARTS_V2)).params == 3_349_342
    arch = darts_imagenet().decode(darts_picks(darts_imagenet(), DARTS_V2))
    assert (round(arch.params / 1e6, 1), round(arch.macs / 1e6)) == (4.7, 530)


@pytest.mark.parametrize("layers", [3, 4, 8, 12, 16, 20])
def test_where_the_cells_of_nds_reduce(layers: int) -> None:
    """As in NDS's released code (pycls, ``NetworkCIFAR``): cell i is a reduction if i
    is layers // 3 or 2 * layers // 3.
    """
    space = load_space("nds_darts", layers=layers, width=0.5)
    arch = space.decode(darts_picks(cast(CellSpace, space), DARTS_V2))
    slots = [step.slot for step in cast(CellSpace, space).make_steps() if step.kind == "sum"]
    cells = dict.fromkeys((slot.partition(".")[0], slot.split(".")[1]) for slot in slots)
    assert [kind for _, kind in cells] == [
        "reduce" if i in (layers // 3, 2 * layers // 3) else "normal" for i in range(layers)
    ]
    assert [op.out_ch for op in arch.ops() if op.kind == "conv"] == [3 * 16]
    assert next(op.in_ch for op in arch.ops() if op.kind == "classifier") == 4 * 4 * 16


def test_only_spaces_of_darts_cells_take_layers() -> None:
    assert nds_darts() == load_space("nds_darts") and load_space("darts", layers=20) == darts()
    with pytest.raises(SpaceError, match="layers must be at least 3, got 2"):
        load_space("darts", layers=2)
    with pytest.raises(SpaceError, match="does not take the override 'layers'"):
        load_space("nasbench201", layers=8)


def test_the_size_of_darts() -> None:
    """The paper counts every pair of edges and every option except ``none``: the
    product of (k + 1) k / 2 * 7^2 over the nodes, about 10^9 cells.
    """
    space = darts()
    edges = {
        key: [option for option in options if option != NONE]
        for key, options in space.edges.items()
    }
    kept = math.prod(len(options) for options in space.inputs.values())
    assert (
        math.isqrt(kept) * 7**8
        == math.prod((k + 1) * k // 2 * 7**2 for k in range(1, 5))
        == pytest.approx(1e9, rel=0.05)
    )
    assert space.restrict(edges).size == kept * 7**28
    assert len(space.choices) == 2 * (14 + 3)
    cell = math.prod(math.comb(node, 2) * 8**2 for node in range(2, 6))
    assert space.architectures == cell**2 and space.size == math.isqrt(kept) ** 2 * 8**28


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_number_of_architectures_is_that_of_distinct_canonical_forms(name: str) -> None:
    two_options = {
        choice.key: choice.options[:2]
        for choice in SMALL[name].choices
        if choice.kind == "op" and not choice.key.startswith("reduce")
    }
    one_option = {
        choice.key: choice.options[:1]
        for choice in SMALL[name].choices
        if choice.key.startswith("reduce") or choice.key.endswith("-5")
    }
    space = SMALL[name].restrict(two_options | one_option)
    indices = np.array(list(np.ndindex(*(len(choice.options) for choice in space.choices))))
    assert len(indices) == space.size
    assert len({space.canonical(index_C).tobytes() for index_C in indices}) == space.architectures


def test_the_notation_of_darts() -> None:
    picks = darts_picks(darts(), DARTS_V2)
    reduce = (
        "('max_pool_3x3', 0), ('max_pool_3x3', 1), ('max_pool_3x3', 1), ('skip_connect', 2),"
        " ('max_pool_3x3', 0), ('skip_connect', 2), "
    )
    assert (
        darts().write(picks)
        == "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),"
        " ('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('skip_connect', 0),"
        f" ('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[{reduce}('max_pool_3x3', 1),"
        " ('skip_connect', 2)], reduce_concat=range(2, 6))"
    )


PDARTS = """Genotype(normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1),
  ('sep_conv_3x3', 3), ('sep_conv_3x3', 0), ('dil_conv_5x5', 4)], normal_concat=range(2, 6),
  reduce=[('avg_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0), ('dil_conv_3x3', 1),
  ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)], reduce_concat=range(2, 6))"""
"""As in P-DARTS's code (github.com/chenxin061/pdarts, genotypes.py). The paper reports
3.4 M parameters on CIFAR-10 and 4.9 M on ImageNet.
"""


def test_genotypes_are_read() -> None:
    space = darts()
    picks = space.read(PDARTS)
    assert space.decode(picks).params == 3_433_798
    assert round(darts_imagenet().decode(darts_imagenet().read(PDARTS)).params / 1e6, 1) == 4.9
    assert space.read(space.write(picks)) == picks
    random = space.sample(np.random.default_rng(0))
    assert space.decode(space.read(space.write(random))).identity == space.decode(random).identity
    for concat in ("[2, 3, 4, 5]", "(2, 3, 4, 5)", "list(range(2, 6))"):
        assert (
            space.read(
                f"\ngenotype = {PDARTS}".replace("range(2, 6)", concat).replace(
                    "normal=", "normal = "
                )
            )
            == picks
        )
    for wrong, word in (
        (PDARTS.replace("dil_conv_3x3", "dil_conv_33"), "did you mean 'dil_conv_3x3'"),
        (
            PDARTS.replace("('sep_conv_5x5', 1)", "('sep_conv_5x5', 0)"),
            "node 2 of reduce cannot have the inputs 0\\+0",
        ),
        (
            PDARTS.replace("('dil_conv_5x5', 4)", "('dil_conv_5x5', 5)"),
            "node 5 of normal cannot have the inputs 0\\+5",
        ),
        (PDARTS.replace("('skip_connect', 0), ", "", 1), "normal has 7 edges"),
        (
            PDARTS.replace("normal_concat=range(2, 6)", "normal_concat=range(4, 6)"),
            "normal_concat is range",
        ),
        ("Genotype(normal=[])", "instead of 8"),
        ("sep_conv_3x3", r"not an architecture of space darts: give Genotype\(normal="),
    ):
        with pytest.raises(SpaceError, match=word) as caught:
            space.read(wrong)
        assert len(str(caught.value)) < 300
    restricted = space.restrict({"normal.n3.inputs": ["1+2", "0+2"]})
    with pytest.raises(
        SpaceError, match=r"node 3 of normal cannot have the inputs 0\+1; known: 0\+2, 1\+2\."
    ):
        restricted.read(PDARTS)


def test_the_notation_of_nasbench201() -> None:
    space = nasbench201()
    text = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|none~2|"
    picks = space.read(text)
    assert space.write(picks) == text
    assert picks["c.e0-1"] == "avg_pool_3x3" and picks["c.e2-3"] == "none"
    for wrong, word in (
        (text.replace("skip_connect~1", "skip_connect~0", 1), "'~1'"),
        (
            text.replace("avg_pool_3x3", "avg_pool_5x5"),
            "'avg_pool_5x5'; did you mean 'avg_pool_3x3'",
        ),
        (text.rpartition("+")[0], "3 edges instead of 6"),
        ("conv", "'conv' is not an architecture"),
    ):
        with pytest.raises(SpaceError) as raised:
            space.read(wrong)
        assert word in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_encode_undoes_decode(name: str) -> None:
    space, rng = SMALL[name], np.random.default_rng(0)
    for _ in range(5):
        picks = space.sample(rng)
        arch = space.decode(picks)
        assert space.encode(arch) == picks
        bare = arch.model_copy(update={"origin": None})
        # the picks of edges that are not kept may differ
        assert space.decode(space.encode(bare)).identity == arch.identity
        assert Architecture.parse(arch.to_json()) == arch
        canonical = space.at(space.canonical(space.index(picks)))
        assert space.decode(canonical).identity == arch.identity
    other = SMALL[name].changed("wider", channels=8)
    with pytest.raises(SpaceError, match=f"not in space {name}"):
        space.encode(other.decode(other.sample(rng)))


@pytest.mark.parametrize("name", SMALL)
def test_costs_are_those_of_the_networks(name: str) -> None:
    space, rng = SMALL[name], np.random.default_rng(1)
    macs = AdditiveCost.of_ops(space, lambda op: op.macs)
    draws = [space.sample(rng) for _ in range(10)]
    assert [macs.cost(picks) for picks in draws] == [space.decode(picks).macs for picks in draws]
    gates = {
        choice.key: np.full(len(choice.options), 1 / len(choice.options))
        for choice in space.choices
    }
    index_NC = np.stack(
        [rng.integers(len(choice.options), size=20_000) for choice in space.choices], axis=1
    )
    assert macs.expected(gates) == pytest.approx(macs.costs(index_NC).mean(), rel=0.02)
    assert set(space.decode(draws[0]).ops()) <= set(space.ops)


def test_paths_through_a_cell() -> None:
    space = nasbench201()
    whole = space.paths(dict.fromkeys((choice.key for choice in space.choices), "skip_connect"))
    # the paths 0-3, 0-2-3, 0-1-3 and 0-1-2-3
    assert whole == {"c.e0-1": 2, "c.e0-2": 1, "c.e1-2": 1, "c.e0-3": 1, "c.e1-3": 1, "c.e2-3": 2}
    cut = space.paths(
        space.read("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|nor_conv_1x1~1|nor_conv_1x1~2|")
    )
    # node 2 reads nothing
    assert cut == {"c.e0-1": 1, "c.e0-2": 0, "c.e1-2": 0, "c.e0-3": 0, "c.e1-3": 1, "c.e2-3": 0}
    darts_paths = darts().paths(darts_picks(darts(), DARTS_V2))
    assert (darts_paths["normal.e0-2"], darts_paths["normal.e2-5"], darts_paths["normal.e3-4"]) == (
        2,
        2,
        0,
    )


@pytest.mark.parametrize("name", CELL_SPACES)
def test_overrides_restrictions_and_documents(name: str) -> None:
    space = load_space(
        name,
        width=0.5,
        resolution=64,
        classes=7,
        in_channels=1,
        act="relu6",
        bn_eps=1e-3,
        name="small",
    )
    arch = space.decode(space.sample(np.random.default_rng(0)))
    assert (arch.resolution, arch.classes, arch.in_channels, arch.bn_eps, space.name) == (
        64,
        7,
        1,
        1e-3,
        "small",
    )
    assert {op.act for op in arch.ops() if op.kind in ("preconv", "norm")} == {"relu6"}
    assert (
        parse_space(space.to_json()) == space
        and parse_space(space.to_json()).sha256 == space.sha256
    )
    first = space.choices[0]
    fixed = space.restrict({first.key: [first.options[-1]], "resolution": [64]})
    assert [choice.key for choice in fixed.choices] == [choice.key for choice in space.choices[1:]]
    for allowed, word in (
        ({first.key: ["conv"]}, "cannot be restricted"),
        ({"e0": ["none"]}, "no choice 'e0'"),
    ):
        with pytest.raises(SpaceError, match=word):
            space.restrict(allowed)
    with pytest.raises(SpaceError, match=r"'widht'; did you mean 'width'"):
        load_space(name, widht=0.5)


def test_encoding_a_node_whose_edges_are_fixed() -> None:
    space = SMALL["darts"].restrict({"normal.n3.inputs": ["0+2"], "normal.e1-3": ["sep_conv_3x3"]})
    picks = space.sample(np.random.default_rng(0))
    arch = space.decode(picks)
    assert not space.is_kept("normal.e1-3", picks) and space.is_kept("normal.e0-3", picks)
    assert (
        space.decode(space.encode(arch.model_copy(update={"origin": None}))).identity
        == arch.identity
    )


def test_impossible_cell_spaces_are_refused() -> None:
    with pytest.raises(SpaceError, match="multiple of 4"):
        load_space("nasbench201", resolution=30)
    good = nasbench201().model_dump()
    for wrong in (
        {"edges": {**good["edges"], "c.e0-1": ("none", "none")}},
        {"edges": {**good["edges"], "c.e0-1": ("conv_3x3",)}},
        {"edges": {key: options for key, options in good["edges"].items() if key != "c.e0-1"}},
        {"cells": (5, 0)},
        {"stem": "imagenet"},
        {"inputs": {"c.n3.inputs": ("0+1",)}},
    ):
        with pytest.raises((ValidationError, SpaceError)):
            CellSpace.model_validate({**good, **wrong})
    with pytest.raises(DocumentError, match=r"hwnas\.space"):
        parse_space('{"schema": "hwnas.table/1", "kind": "cell"}', "x.json")


def test_options_become_ops() -> None:
    assert edge_op("none", 16, 8, 2, "relu") is None
    assert edge_op("skip_connect", 16, 8, 1, "relu") is None
    keys = {
        "skip_connect": "facreduce-h8-i16-o16-s2-relu",
        "max_pool_3x3": "maxpool-h8-i16-o16-k3-s2",
        "sep_conv_5x5": "sepconv-h8-i16-o16-k5-s2-relu",
        "dil_conv_3x3": "dilconv-h8-i16-o16-k3-s2-relu",
        "nor_conv_1x1": "preconv-h8-i16-o16-s2-relu",
    }
    for option, key in keys.items():
        op = edge_op(option, 16, 8, 2, "relu")
        assert op is not None and op.key == key and Op.parse(key) == op
    pooled = edge_op("avg_pool_3x3", 16, 8, 1, "relu", pool_norm=True)
    assert pooled is not None and pooled.key == "avgpool-h8-i16-o16-k3-bn"
    for key in (
        "conv-h8-i3-o8-bn",
        "preconv-h8-i8-o8-bn-relu",
        "avgpool-h8-i8-o16-k3",
        "facreduce-h7-i8-o8-s2",
        "resreduce-h8-i8-o8-k3",
    ):
        with pytest.raises(SpaceError):
            Op.parse(key)


def test_graphs_that_do_not_fit_are_refused() -> None:
    arch = SMALL["nasbench201"].decode(
        SMALL["nasbench201"].read("|skip_connect~0|+|skip_connect~0|none~1|+|none~0|none~1|none~2|")
    )
    content = arch.model_dump()
    for graph, word in (
        ([*content["graph"], "op 0"], "more op steps"),
        (["op 3", *content["graph"][1:]], "no earlier step makes"),
        (content["graph"][:-1], "one op step for every block"),
        (["op 1", *content["graph"]], "no earlier step makes"),
        (["op 0", "sum 0 1", *content["graph"][1:]], "different shapes"),
        (["op"], "not a step of a graph"),
        (["join 1 2"], "not a step of a graph"),
    ):
        with pytest.raises((ValidationError, SpaceError)) as raised:
            Architecture.model_validate({**content, "graph": graph, "origin": None})
        assert word in str(raised.value)
