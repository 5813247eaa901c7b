"""Limits: memory by hand and by watching real tensors, values against a walk over each
architecture, and refusals that name a fix.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms, weight_bytes
from hwnas.core.graph import GraphBuilder, live_numbers
from hwnas.core.limits import (
    ActivationLimit,
    Compiled,
    LatencyLimit,
    Limit,
    Limits,
    MacsLimit,
    ParamsLimit,
    SizeLimit,
    activation_bytes,
    peak_activation_bytes,
)
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SearchSpace, SpaceStage
from hwnas.core.spaces import darts, mobile32, nasbench201, published
from hwnas.core.table import LatencyTable
from hwnas.errors import CoverageError, TableError, TargetError
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.testing import synthetic_table


def small() -> MacroSpace:
    """A space that is small enough to enumerate, with coupled widths,
    squeeze-and-excitation and a skip.
    """
    stages = (
        SpaceStage(widths=(8, 16), stride=2, slots=(("cn_k3",),)),
        SpaceStage(
            widths=(8, 16, 24),
            slots=(("ir_k3_e3", "ds_k5"), ("ir_k3_e6", "ir_k5_e3_se0.25", "skip")),
            residual="matching",
        ),
        SpaceStage(widths=(16, 24), stride=2, slots=(("ir_k3_e3", "ir_k5_e6"),)),
        SpaceStage(widths=(32,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="small", resolution=16, classes=4, stages=stages)


def every_index(space: SearchSpace) -> np.ndarray:
    return np.array(list(product(*(range(len(choice.options)) for choice in space.choices))))


def other_table(space: SearchSpace) -> LatencyTable:
    """A second device, whose latency depends on parameters instead of MACs."""
    table = synthetic_table(space)
    entries = {
        op.key: table.entries[op.key].model_copy(update={"ms": op.params / 1e3}) for op in space.ops
    }
    return table.model_copy(
        update={"entries": entries, "header": table.header.model_copy(update={"device": "board"})}
    )


def tables(space: SearchSpace) -> Any:
    return {"phone.json": synthetic_table(space), "board.json": other_table(space)}.__getitem__


BY_HAND = {
    # a plain convolution: 3 x 32^2 in, 16 x 16^2 out
    "conv-h32-i3-o16-k3-s2-relu": 3 * 1024 + 16 * 256,
    # expand 16 + 48, depthwise 48 + 48 and the 16 kept for the sum, project 48 + 16 +
    # 16, all at 8 x 8
    "mbconv-h8-i16-o16-m48-k3-relu-id": (48 + 48 + 16) * 64,
    # no sum: expand (8 + 24) * 16^2 = 8192; depthwise 24 * (16^2 + 8^2) = 7680; project
    # (24 + 40) * 8^2 = 4096
    "mbconv-h16-i8-o40-m24-k3-s2-relu": 8192,
    # the depthwise output is kept while its gate is computed, but 48 + 12 + 48 * 64 is
    # less than 2 * 48 * 64
    "mbconv-h8-i16-o24-m48-k3-q12-relu": (48 + 48) * 64,
    # at 1 x 1 the gate is the peak: 48 in, 480 hidden, 48 kept
    "mbconv-h1-i16-o24-m48-k3-q480-relu": 48 + 480 + 48,
    # the first layer's input is the block's input and is counted once; project: 8 in, 8
    # out, 8 kept
    "dsconv-h4-i8-o8-k3-relu-id": (8 + 8 + 8) * 16,
    # without the sum: 8 + 8
    "dsconv-h4-i8-o8-k3-relu": (8 + 8) * 16,
    # pooling reads 320 x 7^2 and writes 320; the fully connected layer has 320 + 1000
    "classifier-h7-i320-o1000": 320 * 49 + 320,
    "classifier-h1-i320-o1000": 320 + 1000,
    # the shuffle copies 32 x 8^2, whatever the stride; 16 are kept if there is a sum
    "mbconv-h8-i16-o16-m32-k3-g2-relu-id": (32 + 32 + 16) * 64,
    "mbconv-h8-i16-o16-m32-k3-s2-g2-relu": (32 + 32) * 64,
    "dsconv-h8-i16-o16-k3-g2-relu-id": (16 + 16 + 16) * 64,
}


@pytest.mark.parametrize("key", BY_HAND)
def test_activation_memory_by_hand(key: str) -> None:
    assert activation_bytes(Op.parse(key), "int8") == BY_HAND[key]
    assert (
        activation_bytes(Op.parse(key))
        == activation_bytes(Op.parse(key), "fp32")
        == 4 * BY_HAND[key]
    )


class Watch:
    """Watches the real tensors of a network, by identity: what each layer reads and
    writes, and what must outlive it.
    """

    def __init__(self, network: ClassificationNetwork) -> None:
        self.peak = 0
        self.kept: list[Tensor] = []
        for block in network.blocks:
            parts = dict(block.named_modules())
            if any(node.kind == "add" for node in block.program.nodes):
                block.register_forward_pre_hook(lambda _, inputs: self.kept.append(inputs[0]))
                block.register_forward_hook(self.drop)
            for part in parts.values():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    part.register_forward_hook(
                        lambda _, inputs, output: self.see(inputs[0], output)
                    )
            if "layers.se" in parts:
                parts["layers.depthwise"].register_forward_hook(
                    lambda _, inputs, output: self.kept.append(output)
                )
                parts["layers.se.expand"].register_forward_hook(self.drop)

    def drop(self, *_: Any) -> None:
        self.kept.pop()

    def see(self, *tensors: Tensor) -> None:
        alive = {
            id(tensor): tensor.numel() * tensor.element_size() for tensor in (*tensors, *self.kept)
        }
        self.peak = max(self.peak, sum(alive.values()))


@pytest.mark.parametrize("seed", range(6))
def test_activation_memory_is_that_of_real_tensors(seed: int) -> None:
    torch.set_num_threads(1)
    space = small() if seed % 2 else mobile32()
    arch = space.decode(space.sample(np.random.default_rng(seed)))
    network = ClassificationNetwork(arch).eval()
    watch = Watch(network)
    with torch.no_grad():
        network(torch.zeros(1, arch.in_channels, arch.resolution, arch.resolution))
    assert peak_activation_bytes(arch) == watch.peak > 0


def test_the_peak_of_mobilenet_v2_is_its_first_strided_depthwise_layer() -> None:
    """96 channels come in at 112 x 112 and leave at 56 x 56, which is more than the 16
    + 96 channels at 112 x 112 of the expansion before it.
    """
    assert (
        peak_activation_bytes(published("mobilenet_v2"), "int8")
        == 96 * (112**2 + 56**2)
        == 1_505_280
    )


def values_by_walk(arch: Architecture, space: SearchSpace) -> list[float]:
    return [
        latency_ms(arch, other_table(space)), arch.macs, arch.params, 4 * arch.params, arch.params, peak_activation_bytes(arch, "int8"),
    ]  # fmt: skip


def all_kinds(*, ms: float = 1e9, count: int = 10**12) -> list[Limit]:
    return [
        LatencyLimit(kind="latency", table="board.json", max_ms=ms),
        MacsLimit(kind="macs", max_macs=count),
        ParamsLimit(kind="params", max_params=count),
        SizeLimit(kind="size_bytes", max_bytes=count),
        SizeLimit(kind="size_bytes", max_bytes=count, dtype="int8"),
        ActivationLimit(kind="activation_bytes", max_bytes=count, dtype="int8"),
    ]


def test_limited_values_are_those_of_the_architecture() -> None:
    space = small()
    limits = Limits(space, all_kinds(), tables(space))
    index_NC = every_index(space)
    archs = [space.decode(space.at(index)) for index in index_NC]
    walked = np.array([values_by_walk(arch, space) for arch in archs])
    assert limits.values(index_NC) == pytest.approx(walked, rel=1e-12)
    described = limits.describe(space.at(index_NC[5]))
    assert list(described) == [
        "latency_ms on board/synthetic-fp32-1t", "macs", "params", "size_bytes in fp32", "size_bytes in int8", "activation_bytes in int8",
    ]  # fmt: skip
    assert list(described.values()) == pytest.approx(walked[5].tolist(), rel=1e-12)
    assert (
        weight_bytes(archs[5].params, "int8")
        == archs[5].params
        == weight_bytes(archs[5].params) / 4
    )


def test_feasible_architectures_meet_all_limits_with_bounds_included() -> None:
    space = small()
    index_NC = every_index(space)
    values = Limits(space, all_kinds(), tables(space)).values(index_NC)
    macs, peak = int(np.median(values[:, 1])), int(np.quantile(values[:, 5], 0.4))
    both: list[Limit] = [
        MacsLimit(kind="macs", max_macs=macs),
        ActivationLimit(kind="activation_bytes", max_bytes=peak, dtype="int8"),
    ]
    limits = Limits(space, both, tables(space))
    expected = (values[:, 1] <= macs) & (values[:, 5] <= peak)
    assert (limits.feasible(index_NC) == expected).all()
    assert 0 < expected.sum() < min((values[:, 1] <= macs).sum(), (values[:, 5] <= peak).sum())
    assert ((limits.excess(index_NC) <= 0).all(axis=1) == expected).all()
    assert limits.excess(index_NC)[:, 0] == pytest.approx(values[:, 1] / macs - 1)
    at_the_bound = Limits(
        space, [MacsLimit(kind="macs", max_macs=int(values[7, 1]))], tables(space)
    )
    assert at_the_bound.feasible(index_NC[[7]]).tolist() == [True]


def test_without_limits_everything_is_feasible() -> None:
    space = small()
    limits = Limits(space, [], tables(space))
    limits.check()
    assert limits.feasible(every_index(space)).all()
    assert limits.feasible(every_index(space)).shape == (space.size,)
    assert limits.describe(space.at(every_index(space)[0])) == {}


def test_adding_a_limit_leaves_the_original_limits_unchanged() -> None:
    space = small()
    index_NC = every_index(space)
    skips = AdditiveCost(
        space, lambda term: np.array([float(op is None) for op in term.ops]).reshape(term.shape)
    )
    first = Limits(space, all_kinds(), tables(space))
    both = first.also(Compiled("skips", "max_skips", 0.0, skips))
    # without a skip: five slots and the classifier
    skipped = np.array([len(space.decode(space.at(index)).ops()) for index in index_NC]) < 6
    assert (both.feasible(index_NC) == ~skipped).all()
    assert first.feasible(index_NC).all()
    assert both.describe(space.at(index_NC[skipped.argmax()]))["skips"] == 1.0


@pytest.mark.slow
def test_two_devices_at_once() -> None:
    space = small()
    index_NC = every_index(space)
    phone, board = (
        np.array([latency_ms(space.decode(space.at(i)), tables(space)(name)) for i in index_NC])
        for name in ("phone.json", "board.json")
    )
    max_ms = {
        "phone.json": float(np.quantile(phone, 0.6)),
        "board.json": float(np.quantile(board, 0.4)),
    }
    limits = Limits(
        space,
        [LatencyLimit(kind="latency", table=name, max_ms=ms) for name, ms in max_ms.items()],
        tables(space),
    )
    expected = (phone <= max_ms["phone.json"] * (1 + 1e-12)) & (
        board <= max_ms["board.json"] * (1 + 1e-12)
    )
    assert (limits.feasible(index_NC) == expected).all()
    assert expected.any()


@pytest.mark.parametrize("position", range(6))
def test_a_limit_out_of_reach_names_the_range_and_the_key(position: int) -> None:
    space = small()
    low, high = (
        extreme(Limits(space, all_kinds(), tables(space)).values(every_index(space))[:, position])
        for extreme in (np.min, np.max)
    )
    limit = all_kinds()[position]
    below = limit.model_copy(update={limit.FIELD: type(getattr(limit, limit.FIELD))(low * 0.99)})
    with pytest.raises(TargetError) as caught:
        Limits(space, [MacsLimit(kind="macs", max_macs=10**9), below], tables(space)).check()
    message = str(caught.value)

    def shown(value: float) -> str:
        # the first limit is in milliseconds, the others are counts
        return str(int(value)) if position else f"{value:.6g}"

    assert (
        f"out of reach of space small: its architectures have {shown(low)} to {shown(high)}; raise"
        f" search.limits[1].{limit.FIELD}" in message
    )
    assert message.startswith(
        f"limit {limit.kind}" if limit.kind != "latency" else "limit latency_ms on board/"
    )
    reachable = limit.model_copy(
        update={limit.FIELD: type(getattr(limit, limit.FIELD))(np.ceil(low))}
    )
    Limits(space, [reachable], tables(space)).check()


def test_unusable_tables_are_refused() -> None:
    space = small()
    table = synthetic_table(space)
    lacking = table.model_copy(
        update={
            "entries": {
                key: entry for key, entry in table.entries.items() if key != space.ops[3].key
            }
        }
    )
    limit = LatencyLimit(kind="latency", table="x.json", max_ms=5)
    with pytest.raises(CoverageError, match=space.ops[3].key):
        Limits(space, [limit], lambda _: lacking)
    raw = table.model_copy(update={"calibration": None})
    with pytest.raises(TableError, match="no calibration"):
        Limits(space, [limit], lambda _: raw)
    Limits(space, [limit], lambda _: raw, allow_uncalibrated=True)


def test_limits_are_read_from_a_configuration() -> None:
    text = """
        [[limits]]
        kind = "latency"
        table = "tables/board.json"
        max_ms = 12.5
        [[limits]]
        kind = "macs"
        max_macs = 3e8
        [[limits]]
        kind = "activation_bytes"
        max_bytes = 500_000
        dtype = "int8"
    """
    read = TypeAdapter(tuple[Limit, ...]).validate_python
    assert read(tomllib.loads(text)["limits"]) == (
        LatencyLimit(kind="latency", table="tables/board.json", max_ms=12.5),
        MacsLimit(kind="macs", max_macs=300_000_000),
        ActivationLimit(kind="activation_bytes", max_bytes=500_000, dtype="int8"),
    )
    wrong = [
        {"kind": "flops", "max_macs": 1}, {"kind": "macs"}, {"kind": "macs", "max_macs": 0}, {"kind": "params", "max_params": 1.5},
        {"kind": "latency", "max_ms": 5}, {"kind": "latency", "table": "t", "max_ms": float("inf")},
        {"kind": "size_bytes", "max_bytes": 1, "dtype": "fp8"}, {"kind": "macs", "max_macs": 1, "table": "t"},
    ]  # fmt: skip
    for limit in wrong:
        with pytest.raises(ValidationError):
            read((limit,))
    with pytest.raises(ValidationError, match="frozen"):
        read(tomllib.loads(text)["limits"])[1].max_macs = 5  # type: ignore[union-attr]


def test_maps_that_are_read_later_stay_alive_in_a_network_of_cells() -> None:
    builder = GraphBuilder()
    conv = Op.parse("conv-h4-i2-o2-relu")  # every map has 32 numbers
    first, second = builder.op(conv, 0), builder.op(conv, 0)
    joined = builder.concat([builder.sum([first, second]), 0])
    builder.op(Op.parse("classifier-h4-i4-o10"), joined)
    alive = live_numbers(builder.steps, builder.blocks, (2, 4))
    # the image and the first map; the image and both maps; the same again, as the sum
    # is in place; the image, the sum and their concatenation; that and the means of its
    # four channels
    assert list(alive) == [64, 96, 96, 128, 64 + 4]
    arch = Architecture(
        name="cells", in_channels=2, blocks=tuple(builder.blocks), graph=tuple(builder.steps)
    )
    assert peak_activation_bytes(arch, "int8") == 128


@pytest.mark.parametrize("build", [nasbench201, lambda: darts(layers=3)])
def test_an_activation_limit_holds_in_a_cell_space(build: Callable[[], SearchSpace]) -> None:
    space, rng = build(), np.random.default_rng(0)
    index_NC = np.stack([space.index(space.sample(rng)) for _ in range(12)])
    peaks = [peak_activation_bytes(space.decode(space.at(index_C)), "int8") for index_C in index_NC]
    limit = ActivationLimit(kind="activation_bytes", max_bytes=int(np.median(peaks)), dtype="int8")
    limits = Limits(space, [limit], LatencyTable.load)
    assert limits.feasible(index_NC).tolist() == [peak <= limit.max_bytes for peak in peaks]
    limits.check()
    assert limits.compiled[0].additive_cost.bounds()[0] <= min(peaks)
    with pytest.raises(TargetError, match="out of reach"):
        Limits(
            space,
            [ActivationLimit(kind="activation_bytes", max_bytes=10, dtype="int8")],
            LatencyTable.load,
        ).check()
