"""The published networks, judged by torchvision, timm and the papers' own counts."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from hwnas.core.arch import Architecture
from hwnas.core.spaces import picks_of_codes, proxylessnas, published
from hwnas.errors import SpaceError

COUNTS = {  # nas-facts T5; the exact integers are torchvision's and timm's below
    "mobilenet_v2": (300_774_272, 3_504_872, "300.8M/3.50M"),
    "mnasnet_b1": (314_415_872, 4_383_312, "314.4M/4.38M"),
    "proxylessnas_mobile": (320_427_584, 4_080_512, "320.4M/4.08M"),
}


def count(network: nn.Module) -> tuple[int, int]:
    """MACs of convolutions and fully connected layers of one 224 px image, and parameters."""
    macs = 0

    def hook(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(hook)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 224, 224))
    return macs, sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_macs_and_params_are_those_of_the_papers(name: str) -> None:
    arch = published(name)
    assert (arch.macs, arch.params) == COUNTS[name][:2]
    assert f"{arch.macs / 1e6:.1f}M/{arch.params / 1e6:.2f}M" == COUNTS[name][2]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("mobilenet_v2", lambda: torchvision.models.mobilenet_v2()),
        ("mobilenet_v2", lambda: timm.create_model("mobilenetv2_100")),
        ("mnasnet_b1", lambda: torchvision.models.mnasnet1_0()),
        ("mnasnet_b1", lambda: timm.create_model("mnasnet_100")),
    ],
    ids=["torchvision-mobilenet_v2", "timm-mobilenetv2_100", "torchvision-mnasnet1_0", "timm-mnasnet_100"],
)
def test_macs_and_params_are_those_of_other_implementations(name: str, build) -> None:
    torch.set_num_threads(1)
    arch = published(name)
    assert (arch.macs, arch.params) == count(build())


@pytest.mark.parametrize(("name", "theirs"), [("mobilenet_v2", "mobilenetv2_100"), ("mnasnet_b1", "mnasnet_100")])
def test_every_convolution_and_every_shortcut_is_where_timm_has_it(name: str, theirs: str) -> None:
    network = timm.create_model(theirs)
    convolutions = [
        (part.in_channels, part.out_channels, part.kernel_size[0], part.stride[0], part.groups)
        for part in network.modules()
        if isinstance(part, nn.Conv2d)
    ]
    arch = published(name)
    layers = [layer for op in arch.ops() for layer in op.layers if layer.kind == "conv"]
    assert [(layer.in_ch, layer.out_ch, layer.kernel, layer.stride, layer.groups) for layer in layers] == convolutions
    blocks = [block for stage in network.blocks for block in stage]
    assert [op.residual for op in arch.ops() if op.kind in ("dsconv", "mbconv")] == [block.has_skip for block in blocks]


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_network_encodes_back_into_its_space(name: str) -> None:
    arch = published(name)
    widths = [op.out_ch for op in arch.ops()[:-1]]
    filters = tuple(width for i, width in enumerate(widths) if i == 0 or width != widths[i - 1])
    space = proxylessnas(filters, name=f"{name}-space", act=arch.ops()[0].act)
    assert arch.origin is not None
    assert space.sha256 == arch.origin.space_sha256
    written_by_hand = Architecture(name=name, blocks=arch.blocks)
    for found in (space.encode(arch), space.encode(written_by_hand)):
        assert space.decode(found).blocks == arch.blocks


def test_op_codes_are_read_in_the_order_of_the_archive() -> None:
    space = proxylessnas()
    picks = picks_of_codes(space, [2, 0, 1, 6, 3, *[5] * 17])
    slots = [choice.key for choice in space.choices]
    expected = ["ds_k7", "ir_k3_e3", "ir_k5_e3", "skip", "ir_k3_e6", *["ir_k7_e6"] * 17]
    assert picks == dict(zip(slots, expected, strict=True))


def test_classes_and_resolution_shape_a_published_network() -> None:
    small = published("mobilenet_v2", resolution=96, classes=10)
    assert (small.resolution, small.classes, small.ops()[-1].size) == (96, 10, 3)
    assert small.params == COUNTS["mobilenet_v2"][1] - 990 * 1281


def test_an_unknown_network_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpaceError, match=r"unknown network 'mobilenetv2'; did you mean 'mobilenet_v2'\?"):
        published("mobilenetv2")
    with pytest.raises(SpaceError, match="known: mnasnet_b1, mobilenet_v2, proxylessnas_mobile"):
        published("x")
