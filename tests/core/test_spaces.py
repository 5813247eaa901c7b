"""The built-in spaces: their sizes, their corners, and the effect of width and
resolution.
"""

from __future__ import annotations

import numpy as np
import pytest

from hwnas.core.arch import Architecture, Picks
from hwnas.core.families import ENLARGED_FILTERS
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import (
    MACRO_SPACES,
    load_space,
    mobilenet_v3_like,
    ofa_mobilenet_v3,
    picks_of_codes,
    proxylessnas,
)
from hwnas.errors import SpaceError

MOBILENET_V2 = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
# MobileNetV2's blocks as positions in the options of ProxylessNAS
MOBILENET_V2_CODES = [0, 3, 3, 6, 6, 3, 3, 3, 6, 3, 3, 3, 3, 3, 3, 3, 6, 3, 3, 3, 6, 3]


def corner(space: MacroSpace, at: int) -> Picks:
    """Every choice at its first (0) or last (-1) option; the last skips nothing."""
    picks: Picks = {}
    for choice in space.choices:
        options = (
            [option for option in choice.options if option != "skip"] if at else choice.options
        )
        picks[choice.key] = options[at]
    return picks


@pytest.mark.parametrize(
    ("name", "decisions"),
    [
        ("proxylessnas", 3 * 6**6 * 12**15),
        ("proxylessnas_enlarged", 3 * 6**6 * 12**15 * (4 * 4 * 4 * 6 * 7**5)),
        ("mobilenet_v3_like", 36**20 * 2**15 * 2 * 3 * 2 * (4 * 4 * 6 * 7**5)),
    ],
)
def test_tunas_spaces_have_as_many_decisions_as_its_readme_says(name: str, decisions: int) -> None:
    expected = {
        "proxylessnas": "2.16e+21",
        "proxylessnas_enlarged": "1.39e+28",
        "mobilenet_v3_like": "8.48e+42",
    }
    space = MACRO_SPACES[name]()
    assert space.decisions == decisions
    assert f"{space.decisions:.2e}" == expected[name]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("proxylessnas", 3 * 6**6 * 7**15),
        ("proxylessnas_original", 6**6 * 7**15),
        ("fbnet", 9**22),
        ("fbnet_no_expand", 9**22),
        ("fairnas", 6**19),
        ("ofa_mobilenet_v3", (9**4 * 3) ** 5 * 4),
        ("mobile32", 2 * 4**4 * 5**8 * 4),
    ],
)
def test_sizes(name: str, size: int) -> None:
    assert MACRO_SPACES[name]().size == size


def test_hashes_that_tables_and_runs_refer_to_are_stable() -> None:
    """Fields that were added later do not change the hash. A committed table was made
    for the first of these spaces.
    """
    assert proxylessnas().sha256.startswith("03b8e15211a6e774")
    assert MACRO_SPACES["mobile32"]().sha256.startswith("bc5345c2f8be68cd")


@pytest.mark.parametrize("name", MACRO_SPACES)
def test_decode_undoes_encode(name: str) -> None:
    space, rng = MACRO_SPACES[name](), np.random.default_rng(0)
    assert space.name == name
    assert MacroSpace.parse(space.to_json()) == space
    for picks in (corner(space, 0), corner(space, -1), *(space.sample(rng) for _ in range(20))):
        arch = space.decode(picks)
        assert space.encode(arch) == picks
        by_hand = Architecture(name="by hand", bn_eps=space.bn_eps, blocks=arch.blocks)
        encoded = space.encode(by_hand)
        space.check(encoded)
        assert space.decode(encoded).blocks == arch.blocks


@pytest.mark.parametrize("name", MACRO_SPACES)
def test_terms_are_the_ops_of_samples(name: str) -> None:
    space, rng = MACRO_SPACES[name](), np.random.default_rng(1)
    positions = {choice.key: i for i, choice in enumerate(space.choices)}
    terms = space.terms()
    for _ in range(20):
        picks = space.sample(rng)
        index = space.index(picks)
        ops = [
            term.ops[
                (
                    int(
                        np.ravel_multi_index(
                            [index[positions[key]] for key in term.keys], term.shape
                        )
                    )
                    if term.keys
                    else 0
                )
            ]
            for term in terms
        ]
        assert tuple(op for op in ops if op is not None) == space.decode(picks).ops()


@pytest.mark.parametrize("name", MACRO_SPACES)
def test_every_space_takes_all_overrides(name: str) -> None:
    space = load_space(
        name,
        width=0.5,
        resolution=32,
        classes=7,
        in_channels=1,
        act="relu6",
        bn_eps=1e-5,
        name="small",
    )
    assert isinstance(space, MacroSpace)
    whole = MACRO_SPACES[name](resolution=32, classes=7, in_channels=1)
    narrow, wide = space.decode(corner(space, -1)), whole.decode(corner(whole, -1))
    assert (narrow.resolution, narrow.classes, narrow.in_channels, narrow.bn_eps, space.name) == (
        32,
        7,
        1,
        1e-5,
        "small",
    )
    assert (narrow.ops()[0].act, narrow.ops()[-1].in_ch) == ("relu6", wide.ops()[-1].in_ch)
    assert narrow.macs < 0.6 * wide.macs
    with pytest.raises(
        SpaceError, match=r"does not take the override 'widht'; did you mean 'width'\?"
    ):
        load_space(name, widht=0.5)


@pytest.mark.parametrize(
    ("width", "macs"), [(0.35, 59), (0.5, 97), (0.75, 209), (1.0, 300), (1.3, 509), (1.4, 582)]
)
def test_a_scaled_mobilenet_v2_has_the_macs_that_its_authors_report(
    width: float, macs: int
) -> None:
    space = proxylessnas(MOBILENET_V2, act="relu6").scaled(width)
    million_macs = space.decode(picks_of_codes(space, MOBILENET_V2_CODES)).macs / 1e6
    assert million_macs == pytest.approx(macs, rel=0.01)  # slim's README, in whole millions


def test_scaled_widths_merge_and_keep_their_order() -> None:
    space = MACRO_SPACES["proxylessnas_enlarged"]()
    halved = space.scaled(0.25)
    assert space.stages[0].widths == (8, 16, 24, 32)
    assert halved.stages[0].widths == (8,)
    assert halved.stages[3].widths == (8, 16)
    assert halved.stages[-1].widths == space.stages[-1].widths
    assert space.scaled(2.0).stages[-1].widths == tuple(
        2 * width for width in space.stages[-1].widths
    )
    assert (halved.name, space.scaled(0.25, name="q").name) == ("proxylessnas_enlarged-w0.25", "q")
    assert space.scaled(1.0, name=space.name) == space
    for width in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SpaceError, match="give a width above 0"):
            space.scaled(width)


def test_searched_widths_are_tunas_multipliers() -> None:
    widths = [len(stage.widths) for stage in MACRO_SPACES["proxylessnas_enlarged"]().stages]
    assert widths == [4, 4, 4, 6, 7, 7, 7, 7, 7]
    assert all(
        base in stage.widths
        for base, stage in zip(
            ENLARGED_FILTERS, MACRO_SPACES["proxylessnas_enlarged"]().stages, strict=True
        )
    )


def test_the_blocks_of_the_mobilenet_v3_like_space() -> None:
    space = mobilenet_v3_like()
    arch = space.decode({**corner(space, -1), "s0.b0": "cn_k3", "s5.b1": "ir_k3_e1"})
    ops = arch.ops()
    assert ops[0].key == "conv-h224-i3-o32-k3-s2-hswish"
    # ReLU, although the stem has hard-swish
    assert ops[1].key == "dsconv-h112-i32-o32-k7-relu-id"
    assert [op.act for op in ops if op.kind == "mbconv"] == ["relu"] * 8 + ["hswish"] * 12
    # e = 1 keeps its expansion convolution
    assert Op.parse("mbconv-h7-i512-o512-m512-k3-hswish-id") in ops
    assert {op.se_gate for op in ops if op.se_ch} == {"sigmoid"}
    assert all(op.se_ch == op.mid_ch // 4 for op in ops if op.se_ch)
    assert [op.key for op in ops[-3:]] == [
        "conv-h7-i512-o1024-hswish",
        "head-h7-i1024-o2048-hswish",
        "classifier-h1-i2048-o1000",
    ]


def test_the_number_of_once_for_all_networks() -> None:
    """The paper counts 2 x 10^19 networks at each resolution."""
    assert ofa_mobilenet_v3().architectures == 4 * (9**2 + 9**3 + 9**4) ** 5


def test_the_once_for_all_space_is_elastic_in_depth_and_resolution() -> None:
    space = ofa_mobilenet_v3()
    kinds = [choice.kind for choice in space.choices]
    assert (kinds.count("op"), kinds.count("depth"), kinds[-1]) == (20, 5, "resolution")
    assert space.choices[-1].options == (128, 160, 192, 224)
    assert ofa_mobilenet_v3(resolution=32).resolutions == (16, 24, 32)
    assert ofa_mobilenet_v3(resolution=8).resolutions == ()
    smallest, largest = (space.decode(corner(space, at)) for at in (0, -1))
    assert (smallest.resolution, len(smallest.ops())) == (128, 2 + 5 * 2 + 3)
    assert (largest.resolution, len(largest.ops())) == (224, 2 + 5 * 4 + 3)
    squeezed = [op.out_ch for op in largest.ops() if op.se_ch]
    assert squeezed == [40] * 4 + [112] * 4 + [160] * 4
    assert {op.se_gate for op in largest.ops() if op.se_ch} == {"hsig"}
    wide = ofa_mobilenet_v3(width=1.2)  # once-for-all's table of the width-1.2 space
    assert [stage.widths[0] for stage in wide.stages] == [24, 24, 32, 48, 96, 136, 192, 1152, 1536]


def test_fbnet_skips_the_first_layer_and_convolves_where_the_shape_changes() -> None:
    space = MACRO_SPACES["fbnet"]()
    arch = space.decode({choice.key: choice.options[-1] for choice in space.choices})
    assert [op.kind for op in arch.ops()] == ["conv"] * 8 + ["classifier"]
    assert [(op.out_ch, op.stride) for op in arch.ops()[1:7]] == [
        (24, 2),
        (32, 2),
        (64, 2),
        (112, 1),
        (184, 2),
        (352, 1),
    ]
    assert "ds_k3_g2" in MACRO_SPACES["fbnet_no_expand"]().choices[0].options
    assert "ir_k3_e1_g2" in space.choices[0].options
