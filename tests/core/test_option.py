"""Block options: notation, the ops they become, widths by hand, factorisation."""

from __future__ import annotations

from itertools import product
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.ops import Conv, DSConv, Head, MBConv
from hwnas.core.option import (
    BlockOption,
    Factors,
    factorise,
    make_divisible,
    parse_option,
    scale_width,
)
from hwnas.errors import SpaceError

FAST = settings(deadline=None, derandomize=True, max_examples=300)
GRID = ("ir_k3_e3", "ir_k5_e3", "ir_k7_e3", "ir_k3_e6", "ir_k5_e6", "ir_k7_e6")


def test_options_are_read() -> None:
    assert parse_option("ir_k5_e6") == BlockOption("ir", 5, 6.0)
    assert parse_option("ir_k3_e4.5_se0.25") == BlockOption("ir", 3, 4.5, 0.25)
    assert parse_option("ir_k3_e1_g2") == BlockOption("ir", 3, 1.0, 0.0, 2)
    assert parse_option("ds_k7") == BlockOption("ds", 7)
    assert parse_option("cn_k1") == BlockOption("cn", 1)
    assert parse_option("ds_k3_g2") == BlockOption("ds", 3, groups=2)
    assert parse_option("ir_k3_e2.3_se0.25_hsig_g2_nre") == BlockOption(
        "ir", 3, 2.3, 0.25, 2, "hsig", "relu"
    )
    assert parse_option("hd_nr6") == BlockOption("hd", act="relu6")
    assert parse_option("skip") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ir_k3",
        "ds_k3_e3",
        "cn_k1_e2",
        "cn_k3_se0.25",
        "ir_e3_k3",
        "ir_k3_e3_se25",
        "ir_k_e3",
        "IR_k3_e3",
        "ir_k3_e3 ",
        "none",
        "hd_k1",
        "hd_e3",
        "hd_se0.25",
        "ds_k3_hsig",
        "cn_k1_hsig",
        "cn",
        "ir_k3_e3_nxx",
        "ir_k3_e3_nre_g2",
        "ir_k3_e3_hsig_se0.25",
    ],
)
def test_invalid_options_are_refused(text: str) -> None:
    with pytest.raises(SpaceError, match="is not a block option: write for instance 'ir_k3_e6'"):
        parse_option(text)


def test_options_become_ops() -> None:
    plain = parse_option("ir_k5_e6_se0.25_g2")
    assert plain is not None
    assert plain.op(32, 40, 56, 2, "relu", False) == MBConv(
        56, 32, 40, 192, 5, 2, 2, 48, act="relu"
    )
    separable = parse_option("ds_k3_se0.25")
    assert separable is not None
    assert separable.op(32, 32, 56, 1, "relu6", True) == DSConv(
        56, 32, 32, 3, 1, 1, 8, act="relu6", residual=True
    )
    conv = parse_option("cn_k3")
    assert conv is not None
    assert conv.op(3, 32, 224, 2, "relu", False) == Conv(224, 3, 32, 3, 2, act="relu")
    gated = parse_option("ds_k3_se0.25_hsig_g2_nhs")
    assert gated is not None
    assert gated.op(32, 32, 56, 1, "relu6", True) == DSConv(
        56, 32, 32, 3, 1, 2, 8, "hsig", act="hswish", residual=True
    )
    head = parse_option("hd")
    assert head is not None
    assert head.op(960, 1280, 7, 1, "hswish", False) == Head(7, 960, 1280, act="hswish")


@FAST
@given(
    st.sampled_from(("ir_k5_e3", "ds_k3", "cn_k1", "hd")),
    st.sampled_from(("", "_se0.25", "_se0.25_hsig")),
    st.sampled_from(("", "_g2")),
    st.sampled_from(("", "_nre", "_nr6", "_nhs", "_nli")),
)
def test_options_read_back(block: str, squeeze: str, groups: str, act: str) -> None:
    text = block + squeeze + groups + act
    possible = not (squeeze and block in ("cn_k1", "hd")) and not (groups and block == "hd")
    if possible:
        assert str(parse_option(text)) == text
    else:
        with pytest.raises(SpaceError, match="is not a block option"):
            parse_option(text)


@pytest.mark.parametrize(
    ("channels", "multiplier", "width"),
    [(16, 3, 48), (16, 0.5, 8), (16, 0.625, 8), (16, 0.75, 16), (8, 0.1, 8), (24, 2.3, 56), (24, 2.5, 64), (20, 1, 24), (96, 1.25, 120)],
)  # fmt: skip
def test_scaled_widths_by_hand(channels: int, multiplier: float, width: int) -> None:
    assert scale_width(channels, multiplier) == width


def test_scaled_widths_are_those_of_tunas_enlarged_space() -> None:
    multipliers = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)
    expected = {  # rounded to multiples of 8, duplicates merged
        16: [8, 16, 24, 32],
        32: [16, 24, 32, 40, 48, 64],
        64: [32, 40, 48, 64, 80, 96, 128],
        128: [64, 80, 96, 128, 160, 192, 256],
        256: [128, 160, 192, 256, 320, 384, 512],
        512: [256, 320, 384, 512, 640, 768, 1024],
        1024: [512, 640, 768, 1024, 1280, 1536, 2048],
    }
    assert {
        base: sorted({scale_width(base, multiplier) for multiplier in multipliers})
        for base in expected
    } == expected


@pytest.mark.parametrize(
    ("channels", "rounded"),
    [(1, 8), (8, 8), (11, 16), (12, 16), (16, 16), (18, 24), (24, 24), (19.9, 24), (28, 32), (36, 40), (68, 72), (74.9, 72), (60, 64)],
)  # fmt: skip
def test_divisible_widths_by_hand(channels: float, rounded: int) -> None:
    assert make_divisible(channels) == rounded


@FAST
@given(st.floats(1, 5000))
def test_divisible_widths_are_those_of_torchvision_and_lose_at_most_a_tenth(
    channels: float,
) -> None:
    from torchvision.models._utils import _make_divisible

    rounded = make_divisible(channels)
    assert rounded == _make_divisible(channels, 8)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * channels


@FAST
@given(st.integers(1, 2048), st.sampled_from((0.25, 0.5, 0.625, 0.75, 1.0, 1.25, 3.0, 6.0)))
def test_scaled_widths_round_half_up(channels: int, multiplier: float) -> None:
    assert scale_width(channels, multiplier) == max(8, 8 * floor(channels * multiplier / 8 + 0.5))


def test_a_grid_factorises_into_kernel_and_expansion() -> None:
    factors = factorise((*GRID, "skip"))
    assert factors.axes == (("kernel", (3.0, 5.0, 7.0)), ("expansion", (3.0, 6.0)))
    assert factors.grid == ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), None)
    assert factors.skippable
    assert factors.decisions == (2, 3, 2)


def test_kernels_alone_are_one_axis() -> None:
    assert factorise(("ds_k3", "ds_k5", "ds_k7")) == Factors(
        (("kernel", (3.0, 5.0, 7.0)),), ((0,), (1,), (2,))
    )


@pytest.mark.parametrize(
    "options",
    [
        ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6"),  # a hole
        ("ir_k3_e3", "ir_k5_e6"),  # the diagonal
        ("ds_k3", "ir_k3_e3", "ir_k5_e3"),  # two kinds
        ("ds_k3", "cn_k3"),
    ],
)
def test_a_list_that_is_not_a_full_grid_stays_one_decision(options: tuple[str, ...]) -> None:
    count = len(options)
    assert factorise(options) == Factors(
        (("option", tuple(map(float, range(count)))),), tuple((i,) for i in range(count))
    )
    assert factorise((options[0], "skip", *options[1:])).grid == (
        (0,),
        None,
        *((i,) for i in range(1, count)),
    )
    assert factorise(("skip", *options)).decisions == (2, count)


def test_a_single_option_is_not_a_decision() -> None:
    assert factorise(("ir_k3_e3",)).decisions == ()
    assert factorise(("skip",)).decisions == ()
    assert factorise(("ir_k3_e3", "skip")).decisions == (2,)


@pytest.mark.slow
@FAST
@given(
    st.lists(st.sampled_from((3, 5, 7)), min_size=1, unique=True),
    st.lists(st.sampled_from((1, 3, 6)), min_size=1, unique=True),
    st.lists(st.sampled_from(("", "_se0.25")), min_size=1, unique=True),
    st.randoms(use_true_random=False),
)
def test_every_full_grid_factorises_in_any_order(
    kernels: list[int], expansions: list[int], squeezes: list[str], random
) -> None:
    options = [f"ir_k{k}_e{e}{se}" for k, e, se in product(kernels, expansions, squeezes)]
    random.shuffle(options)
    factors = factorise(tuple(options))
    sizes = [len(values) for values in (kernels, expansions, squeezes) if len(values) > 1]
    assert list(factors.decisions) == sizes
    assert sorted(factors.grid) == sorted(product(*(range(n) for n in sizes)))
    for option, cell in zip(options, factors.grid, strict=True):
        parsed = parse_option(option)
        for (axis, values), position in zip(factors.axes, cell or (), strict=True):
            assert values[position] == getattr(parsed, axis)
