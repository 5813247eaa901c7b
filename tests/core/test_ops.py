"""Ops: keys that read back, refusals, and counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.ops import (
    ACTIVATIONS,
    SE_GATES,
    AvgPool,
    Classifier,
    Conv,
    DilConv,
    DSConv,
    ExtraLayer,
    FactorizedReduce,
    Head,
    MaxPool,
    MBConv,
    Norm,
    Op,
    OpKey,
    Pool,
    ReLUConvBN,
    ResidualReduce,
    SepConv,
    SSDPredictor,
    kinds,
    separable,
)
from hwnas.core.size import strided
from hwnas.document import Document
from hwnas.errors import SpaceError

FAST = settings(deadline=None, derandomize=True, max_examples=500)


@st.composite
def ops(draw: st.DrawFn) -> Op:
    """Any valid op."""
    kind = draw(st.sampled_from(kinds()))
    size, act = draw(st.integers(1, 512)), draw(st.sampled_from(ACTIVATIONS))
    if kind == "classifier":
        return Classifier(size, draw(st.integers(1, 4096)), draw(st.integers(1, 20_000)))
    if kind == "head":
        return Head(size, draw(st.integers(1, 4096)), draw(st.integers(1, 4096)), act=act)
    if kind == "ssd":
        in_ch, anchors, classes = (draw(st.integers(1, 500)) for _ in range(3))
        return SSDPredictor(
            size,
            in_ch,
            anchors * (classes + 1),
            kernel=draw(st.sampled_from((1, 3, 5))),
            act=act,
            anchors=anchors,
        )
    if kind in CELLS:
        return draw(ops_of_cells(CELLS[kind], size, act))
    groups = 1 if kind == "extra" else draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
    in_ch, out_ch = (groups * draw(st.integers(1, 500)) for _ in range(2))
    mid_ch = groups * draw(st.integers(1, 500))
    residual = kind != "extra" and draw(st.booleans())
    shape = {
        "kernel": draw(st.sampled_from((1, 3, 5, 7, 9))),
        "stride": 1 if residual else draw(st.integers(1, 3)),
    }
    out_ch = in_ch if residual else out_ch
    if kind == "extra":
        return ExtraLayer(size, in_ch, out_ch, mid_ch, **shape, act=act)
    if kind == "conv":
        return Conv(size, in_ch, out_ch, **shape, groups=groups, act=act, residual=residual)
    se_ch = draw(st.integers(0, 64))
    gate = draw(st.sampled_from(SE_GATES)) if se_ch else SE_GATES[0]
    fields = {
        **shape,
        "groups": groups,
        "se_ch": se_ch,
        "se_gate": gate,
        "act": act,
        "residual": residual,
    }
    return separable(size, in_ch, out_ch, mid_ch if kind == "mbconv" else 0, **fields)


CELLS = {
    kind.KIND: kind
    for kind in (
        ReLUConvBN,
        SepConv,
        DilConv,
        AvgPool,
        MaxPool,
        FactorizedReduce,
        ResidualReduce,
        Norm,
    )
}


@st.composite
def ops_of_cells(draw: st.DrawFn, kind: type[Op], size: int, act: str) -> Op:
    """Any valid op of a kind that cells use."""
    in_ch, out_ch = draw(st.integers(1, 500)), 2 * draw(st.integers(1, 250))
    kernel, stride = draw(st.sampled_from((1, 3, 5))), draw(st.integers(1, 3))
    if issubclass(kind, Pool):
        return kind(size, in_ch, in_ch, kernel, stride, norm=draw(st.booleans()))
    if kind is Norm:
        return Norm(size, in_ch, in_ch, act=act)
    if kind is FactorizedReduce:
        return FactorizedReduce(2 * size, in_ch, out_ch, stride=2, act=act)
    if kind is ResidualReduce:
        return ResidualReduce(2 * size, in_ch, out_ch, kernel, 2, act)
    return kind(size, in_ch, out_ch, kernel, stride, act)  # type: ignore[call-arg]


@FAST
@given(ops())
def test_the_key_of_an_op_reads_back(op: Op) -> None:
    assert Op.parse(op.key) == op
    assert set(op.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.slow
@FAST
@given(ops(), ops())
def test_different_ops_have_different_keys(a: Op, b: Op) -> None:
    assert (a.key == b.key) == (a == b)


def test_keys_are_written_as_documented() -> None:
    assert (
        MBConv(56, 32, 32, 96, 5, act="relu", residual=True).key
        == "mbconv-h56-i32-o32-m96-k5-relu-id"
    )
    assert (
        MBConv(28, 40, 80, 240, 3, 2, 2, 64, act="hswish").key
        == "mbconv-h28-i40-o80-m240-k3-s2-g2-q64-hswish"
    )
    assert (
        MBConv(28, 24, 40, 72, 5, 2, se_ch=24, act="relu", se_gate="hsig").key
        == "mbconv-h28-i24-o40-m72-k5-s2-q24-hsig-relu"
    )
    assert Head(7, 960, 1280, act="hswish").key == "head-h7-i960-o1280-hswish"
    assert Classifier(7, 1280, 1000).key == "classifier-h7-i1280-o1000"
    assert Conv(224, 3, 32, kernel=3, stride=2, act="relu6").key == "conv-h224-i3-o32-k3-s2-relu6"
    assert (
        ExtraLayer(10, 480, 512, 256, 3, 2, act="relu6").key
        == "extra-h10-i480-o512-m256-k3-s2-relu6"
    )
    assert (
        SSDPredictor(20, 672, 546, kernel=3, act="relu6", anchors=6).key
        == "ssd-h20-i672-o546-k3-a6-relu6"
    )


def test_the_key_in_the_docstring_is_valid() -> None:
    import hwnas.core.ops.base as module

    shown = next(
        line.strip()
        for line in (module.__doc__ or "").splitlines()
        if line.strip().startswith("mbconv-")
    )
    assert Op.parse(shown).key == shown


@pytest.mark.parametrize(
    "key",
    [
        "",
        "conv",
        "conv-h8-i3",  # no output channels
        "pool-h8-i3-o3",
        "conv-h8-i3-o8-k3-",
        "conv-h8-i3-o8-x3",
        "conv-h8-i3-o8-k",
        "conv-h8-i3-o8-k-3",
        "conv-h8-i3-o8-k3-gelu",
        "conv-h0-i3-o8",
        "conv-h8-i3-o8-k2",  # even kernel
        "conv-h8-i3-o8-m24",  # an expansion without mbconv
        "mbconv-h8-i8-o8-k3",  # an mbconv without an expansion
        "mbconv-h8-i8-o16-m24-k3-id",  # a residual between different widths
        "mbconv-h8-i8-o8-m24-k3-s2-id",  # a residual across a stride
        "conv-h8-i3-o8-q4",  # SE in a plain convolution
        "conv-h8-i3-o8-g2",  # 2 groups in 3 channels
        "mbconv-h8-i8-o8-m9-k3-g2",  # 2 groups in 9 middle channels
        "classifier-h7-i8-o10-relu",
        "head-h7-i8-o16-k3",
        "head-h7-i8-o8-id",
        "head-h7-i8-o16-s2",
        "head-h7-i8-o16-q4",
        "extra-h8-i8-o16-k3",  # without middle channels
        "extra-h8-i8-o8-m4-k3-id",
        "extra-h8-i8-o8-m4-k3-g2",
        "extra-h8-i8-o8-m4-k3-q4",
        "ssd-h8-i8-o12-k3",  # without anchors
        "ssd-h8-i8-o12-k3-s2-a6",
        "ssd-h8-i8-o12-k3-g2-a6",
        "ssd-h8-i8-o13-k3-a6",  # 6 anchors in 13 channels
        "ssd-h8-i8-o6-k3-a6",  # nothing but background
        "ssd-h8-i8-o12-m4-k3-a6",
        "conv-h8-i8-o12-k3-a6",
        "dsconv-h7-i8-o16-hsig",  # a gate without SE
        "dsconv-h7-i8-o16-q4-sigmoid",  # a default written out
        "dsconv-h7-i8-o16-q4-relu-hsig",  # another order
        "conv-h8-i3-o8-k1",  # a default written out
        "conv-i3-h8-o8",  # another order
        "conv-h08-i3-o8",
        "conv-h8-i3-o8-k3-k3",
        "CONV-h8-i3-o8",
        "conv-h8-i3-o8-k³",
        " conv-h8-i3-o8",
        "conv_h8_i3_o8",
    ],
)
def test_invalid_keys_are_refused_in_a_sentence(key: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Op.parse(key)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(8, 3, 8, groups=-1), "below"),
        (lambda: MBConv(8, 8, 8, 24, 3, 1, 1, -8), "below"),
        (lambda: Conv(8, 3, 8, 3, 0), "below"),
        (lambda: Conv(8, 3, 8, 4), "odd"),
        (
            lambda: DSConv(8, 8, 8, 3, 1, 1, 4, "tanh", "relu"),
            "SE gate 'tanh' is unknown; known: sigmoid, hsig",
        ),
        (lambda: Op.parse("block-h8-i3-o8"), "known: conv, dsconv, mbconv, head, classifier"),
    ],
)
def test_impossible_ops_are_refused(make: Callable[[], Op], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_counts_of_an_mbconv_with_squeeze_and_groups_by_hand() -> None:
    op = MBConv(14, 16, 24, 64, 5, 2, 2, 8, act="relu")
    assert [layer.name for layer in op.layers] == [
        "expand",
        "depthwise",
        "se.reduce",
        "se.expand",
        "project",
    ]
    expand = 14 * 14 * (16 // 2) * 64
    depthwise = 7 * 7 * 25 * 64
    squeeze = 64 * 8 + 8 * 64
    project = 7 * 7 * (64 // 2) * 24
    assert op.macs == expand + depthwise + squeeze + project == 217_408
    weights = 8 * 64 + 25 * 64 + 64 * 8 + 8 * 64 + 32 * 24
    norms, biases = 2 * (64 + 64 + 24), 8 + 64
    assert op.params == weights + norms + biases == 4_280
    assert op.out_size == 7
    assert [layer.act for layer in op.layers] == ["relu", "relu", "relu", "sigmoid", "none"]


def test_counts_of_the_other_kinds_by_hand() -> None:
    conv = Conv(15, 3, 16, kernel=3, stride=2, act="relu")
    assert (conv.out_size, conv.macs, conv.params) == (8, 64 * 9 * 3 * 16, 9 * 3 * 16 + 32)
    separable = DSConv(8, 32, 16, kernel=3, act="relu")
    assert separable.macs == 64 * (9 * 32 + 32 * 16)
    assert separable.params == 9 * 32 + 2 * 32 + 32 * 16 + 2 * 16
    classifier = Classifier(7, 320, 1000)
    assert (classifier.out_size, classifier.macs, classifier.params) == (1, 320_000, 321_000)


def test_counts_of_the_layers_of_a_detector_by_hand() -> None:
    extra = ExtraLayer(10, 480, 512, 256, 3, 2, act="relu6")
    assert extra.out_size == 5
    assert extra.macs == 100 * 480 * 256 + 25 * 9 * 256 + 25 * 256 * 512
    assert extra.params == 480 * 256 + 9 * 256 + 256 * 512 + 2 * (256 + 256 + 512)
    assert [layer.act for layer in extra.layers] == ["relu6"] * 3
    ssd = SSDPredictor(20, 96, 6 * 21, kernel=3, act="relu6", anchors=6)
    assert (ssd.out_size, ssd.pooled) == (20, False)
    assert ssd.macs == 400 * (2 * 9 * 96 + 96 * 126 + 96 * 24)
    assert ssd.params == 2 * (9 * 96 + 2 * 96) + 96 * 126 + 126 + 96 * 24 + 24
    assert [(layer.name, layer.norm, layer.act) for layer in ssd.layers] == [
        ("classes.depthwise", True, "relu6"),
        ("classes.predict", False, "none"),
        ("boxes.depthwise", True, "relu6"),
        ("boxes.predict", False, "none"),
    ]


def test_a_head_pools_and_has_a_bias_instead_of_a_norm() -> None:
    head = Head(7, 960, 1280, act="hswish")
    assert (head.out_size, head.macs, head.params) == (1, 960 * 1280, 960 * 1280 + 1280)
    assert [(layer.size, layer.norm, layer.act) for layer in head.layers] == [(1, False, "hswish")]


def shuffles(op: Op) -> int:
    return sum(node.kind == "shuffle" for node in op.program.nodes)


def test_grouped_blocks_shuffle_between_their_convolutions_at_no_cost() -> None:
    assert shuffles(MBConv(8, 8, 8, 24, 3, groups=2)) == 1
    assert shuffles(DSConv(8, 8, 8, kernel=3, groups=2)) == 1
    assert shuffles(Conv(8, 8, 8, kernel=3, groups=2)) == 0
    assert shuffles(MBConv(8, 8, 8, 24, 3)) == 0
    assert MBConv(8, 8, 8, 24, 3, groups=2).macs == 64 * (4 * 24 + 9 * 24 + 12 * 8)


@pytest.mark.slow
@FAST
@given(st.integers(1, 300), st.sampled_from((1, 3, 5, 7)), st.integers(1, 4))
def test_output_sizes_are_those_of_a_convolution_padded_by_half_its_kernel(
    size: int, kernel: int, stride: int
) -> None:
    assert strided(size, stride) == (size + 2 * (kernel // 2) - kernel) // stride + 1


def test_ops_in_documents_are_their_keys() -> None:
    class Holder(Document):
        SCHEMA = "test.holder"
        op: OpKey

    op = Conv(8, 3, 8, kernel=3)
    assert json.loads(Holder(op=op).to_json())["op"] == op.key
    assert Holder.parse(Holder(op=op).to_json()).op == op
