"""The published networks against torchvision, timm and the papers' own counts."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from hwnas.core.arch import Architecture
from hwnas.core.published import NETWORKS, resolve_arch
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import (
    fairnas,
    fbnet,
    fbnet_no_expand,
    picks_of_codes,
    proxylessnas,
    published,
)
from hwnas.errors import SpaceError
from hwnas.nn.classifier import ClassificationNetwork

# rounded as in the papers (FBNet in both ways of counting); the exact integers of timm
# and torchvision are compared below
COUNTS = {
    "mobilenet_v2": "300.8M/3.50M",
    "mnasnet_b1": "314.4M/4.38M",
    "mnasnet_a1": "311.6M/3.89M",
    "single_path_nas": "333.5M/4.42M",
    "mobilenet_v3_large": "216.6M/5.48M",
    "mobilenet_v3_small": "56.5M/2.54M",
    "proxylessnas_mobile": "320.4M/4.08M",
    "proxylessnas_cpu": "439.2M/4.36M",
    "proxylessnas_gpu": "465.3M/7.12M",
    "proxylessnas_mobile_14": "580.9M/6.86M",
    "fairnas_a": "388.1M/4.65M",
    "fairnas_b": "345.3M/4.51M",
    "fairnas_c": "321.0M/4.40M",
    "fbnet_a_no_expand": "244.5M/4.30M",
    "fbnet_b_no_expand": "291.0M/4.80M",
    "fbnet_c_no_expand": "378.1M/5.57M",
    "fbnet_a": "249.9M/4.32M",
    "fbnet_b": "306.2M/4.86M",
    "fbnet_c": "385.0M/5.57M",
    "multi_avg": "432.5M/4.95M",  # no published count: ours, for the shapes in TuNAS's archive
    "multi_max": "349.2M/4.42M",
    # timm's parameters; MACs are ours at the published resolutions, those at 224 px
    # exactly timm's (below)
    "efficientnet_lite0": "385.2M/4.65M",
    "efficientnet_lite1": "600.2M/5.42M",
    "efficientnet_lite2": "859.7M/6.09M",
    "efficientnet_lite3": "1383.3M/8.20M",
    "efficientnet_lite4": "2553.0M/13.01M",
    "efficientnet_v2_b0": "718.1M/7.14M",
    "efficientnet_v2_b1": "1196.8M/8.14M",
    "efficientnet_v2_b2": "1697.5M/10.10M",
    "efficientnet_v2_b3": "3011.5M/14.36M",
    "mobilenet_v4_conv_small": "186.0M/3.77M",
    "mobilenet_v4_conv_medium": "827.6M/9.72M",
    "mobilenet_v4_conv_large": "2171.3M/32.59M",
    # 320 px, 91 classes with the background; exact in test_ssdlite.py
    "ssdlite320_mobilenet_v3_large": "583.2M/3.44M",
}
TIMM = {
    "mobilenet_v2": "mobilenetv2_100",
    "mnasnet_b1": "mnasnet_100",
    "mnasnet_a1": "semnasnet_100",
    "single_path_nas": "spnasnet_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "fbnet_c": "fbnetc_100",
    "efficientnet_lite0": "efficientnet_lite0",
    "efficientnet_v2_b0": "tf_efficientnetv2_b0",
    "mobilenet_v4_conv_small": "mobilenetv4_conv_small",
    "mobilenet_v4_conv_medium": "mobilenetv4_conv_medium",
    "mobilenet_v4_conv_large": "mobilenetv4_conv_large",
}


def count(network: nn.Module) -> tuple[int, int]:
    """MACs of convolutions and linear layers on one 224 px image, and parameters."""
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


def test_every_network_is_counted() -> None:
    assert set(COUNTS) == set(NETWORKS)


@pytest.mark.parametrize("name", COUNTS)
def test_macs_and_params_are_those_of_the_papers(name: str) -> None:
    arch = published(name)
    assert f"{arch.macs / 1e6:.1f}M/{arch.params / 1e6:.2f}M" == COUNTS[name]


@pytest.mark.parametrize("name", ["multi_avg", "fbnet_a_no_expand", "proxylessnas_gpu"])
def test_counts_without_another_implementation_are_those_of_our_pytorch_network(name: str) -> None:
    torch.set_num_threads(1)
    arch = published(name)
    assert (arch.macs, arch.params) == count(ClassificationNetwork(arch))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("mobilenet_v2", lambda: torchvision.models.mobilenet_v2()),
        ("mnasnet_b1", lambda: torchvision.models.mnasnet1_0()),
        *((name, lambda theirs=theirs: timm.create_model(theirs)) for name, theirs in TIMM.items()),
    ],
    ids=["torchvision-mobilenet_v2", "torchvision-mnasnet1_0", *TIMM.values()],
)
def test_macs_and_params_are_those_of_other_implementations(name: str, build) -> None:
    torch.set_num_threads(1)
    arch = published(name)
    assert (arch.macs, arch.params) == count(build())


@pytest.mark.parametrize(("name", "theirs"), TIMM.items())
def test_every_convolution_and_every_shortcut_is_where_timm_has_it(name: str, theirs: str) -> None:
    network = timm.create_model(theirs)
    convolutions = [
        (
            part.in_channels,
            part.out_channels,
            part.kernel_size[0],
            part.stride[0],
            part.groups,
            part.bias is None,
        )
        for part in network.modules()
        if isinstance(part, nn.Conv2d)
    ]
    arch = published(name)
    layers = [layer for op in arch.ops() for layer in op.layers if layer.kind == "conv"]
    ours = [
        (layer.in_ch, layer.out_ch, layer.kernel, layer.stride, layer.groups, layer.norm)
        for layer in layers
    ]
    assert ours == convolutions
    blocks = [block for stage in network.blocks for block in stage if hasattr(block, "has_skip")]
    inner = arch.ops()[1 : 1 + len(blocks)]  # after the stem
    assert [op.residual for op in inner] == [block.has_skip for block in blocks]


@pytest.mark.parametrize(
    ("name", "shuffles"), [("fbnet_a", 3), ("fbnet_a_no_expand", 3), ("fbnet_b", 0)]
)
def test_grouped_blocks_of_fbnets_shuffle(name: str, shuffles: int) -> None:
    assert (
        sum(node.kind == "shuffle" for op in published(name).ops() for node in op.program.nodes)
        == shuffles
    )


def test_skips_of_fbnet_are_left_out_where_the_shape_stays() -> None:
    first = published("fbnet_a").ops()[:2]
    assert [op.key for op in first] == [
        "conv-h224-i3-o16-k3-s2-relu",
        "mbconv-h112-i16-o24-m48-k3-s2-relu",
    ]


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mnasnet_b1", "proxylessnas_cpu", "proxylessnas_mobile_14"]
)
def test_a_network_of_proxylessnas_form_is_in_the_space_of_its_widths(name: str) -> None:
    arch = published(name)
    widths = [op.out_ch for op in arch.ops()[:-1]]
    filters = tuple(width for i, width in enumerate(widths) if i == 0 or width != widths[i - 1])
    encodes_back(arch, proxylessnas(filters, name=f"{name}-space", act=arch.ops()[0].act))


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("proxylessnas_mobile", proxylessnas(act="relu6")),
        ("fairnas_a", fairnas()),
        ("fairnas_c", fairnas()),
        ("fbnet_b", fbnet()),
        ("fbnet_c", fbnet()),
        ("fbnet_b_no_expand", fbnet_no_expand()),
    ],
)
def test_a_published_network_is_in_the_built_in_space(name: str, space: MacroSpace) -> None:
    encodes_back(published(name), space.model_copy(update={"name": f"{name}-space"}))


def encodes_back(arch: Architecture, space: MacroSpace) -> None:
    assert arch.origin is not None
    assert space.sha256 == arch.origin.space_sha256
    written_by_hand = Architecture(name=arch.name, blocks=arch.blocks)
    for picks in (space.encode(arch), space.encode(written_by_hand)):
        assert space.decode(picks).blocks == arch.blocks


def test_a_network_that_no_space_holds_has_no_origin() -> None:
    assert published("mobilenet_v3_large").origin is None
    assert Architecture.parse(published("mnasnet_a1").to_json()) == published("mnasnet_a1")


def test_op_codes_are_read_in_the_order_of_the_archive() -> None:
    space = proxylessnas()
    picks = picks_of_codes(space, [2, 0, 1, 6, 3, *[5] * 17])
    slots = [choice.key for choice in space.choices]
    expected = ["ds_k7", "ir_k3_e3", "ir_k5_e3", "skip", "ir_k3_e6", *["ir_k7_e6"] * 17]
    assert picks == dict(zip(slots, expected, strict=True))


def test_classes_and_resolution_shape_a_published_network() -> None:
    small = published("mobilenet_v2", resolution=96, classes=10)
    assert (small.resolution, small.classes, small.ops()[-1].size) == (96, 10, 3)
    # 990 classes fewer, each with 1280 weights and a bias
    assert small.params == published("mobilenet_v2").params - 990 * 1281


def test_an_unknown_network_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(
        SpaceError, match=r"unknown network 'mobilenetv2'; did you mean 'mobilenet_v2'\?"
    ):
        published("mobilenetv2")
    with pytest.raises(
        SpaceError,
        match=r"known: efficientnet_lite0, .*, mobilenet_v2, .*, ssdlite320_mobilenet_v3_large\.",
    ):
        published("x")


def test_a_width_in_the_name_equals_a_width_argument() -> None:
    assert published("mobilenet_v2-w0.35") == published("mobilenet_v2", width=0.35)
    assert (
        published("mobilenet_v2", width=1.0)
        == published("mobilenet_v2-w1")
        == published("mobilenet_v2")
    )
    assert [op.out_ch for op in published("mobilenet_v2-w0.35").ops()][:3] == [16, 8, 8]
    assert published("mobilenet_v2-w0.35").ops()[-1].in_ch == 1280  # the head is never narrowed


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_scaled(name: str) -> None:
    narrow, usual, wide = (published(name, width=width).macs for width in (0.5, 1.0, 1.5))
    assert 0.2 < narrow / usual < 0.6 and 1.5 < wide / usual < 2.4


def test_a_name_and_the_configuration_cannot_set_different_widths() -> None:
    space = proxylessnas()
    assert (
        resolve_arch("mobilenet_v2", space, resolution=32, classes=10, width=0.5).name
        == "mobilenet_v2-w0.5"
    )
    assert (
        resolve_arch("mobilenet_v2-w0.5", space, resolution=32, classes=10, width=0.5).name
        == "mobilenet_v2-w0.5"
    )
    with pytest.raises(
        SpaceError,
        match=r"'mobilenet_v2-w0.5' sets a width, and so does space\.width = 0\.75: remove one",
    ):
        resolve_arch("mobilenet_v2-w0.5", space, resolution=32, classes=10, width=0.75)
    with pytest.raises(
        SpaceError, match=r"unknown network 'mobilenetv2-w0.5'; did you mean 'mobilenet_v2'\?"
    ):
        published("mobilenetv2-w0.5")


def test_grey_images_shape_a_published_network() -> None:
    grey = published("mobilenet_v3_small", resolution=32, classes=10, in_channels=1)
    assert (grey.in_channels, grey.ops()[0].in_ch) == (1, 1)
    # two input channels fewer in the 16 filters of the 3 x 3 stem
    assert (
        grey.params
        == published("mobilenet_v3_small", resolution=32, classes=10).params - 2 * 9 * 16
    )
