"""Elastic layers: which weights a narrower or smaller layer takes, against a standalone
layer with those weights.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.core.ir import Node
from hwnas.nn.blocks import conv_layer
from hwnas.nn.elastic import Channels, ElasticConv, Kernels, Narrowing, Sharing, narrowing

torch.set_num_threads(1)

DENSE = Node("conv", "conv", 12, 16, size=6, kernel=5, norm=True, act="relu")
DEPTHWISE = Node("depthwise", "conv", 16, 16, size=6, kernel=5, groups=16, norm=True, act="hswish")
PLAIN_BIAS = Node("se.reduce", "conv", 12, 16, bias=True, act="relu")


def elastic(
    widest: Node, sharing: Sharing, kernels: tuple[int, ...] = (3, 5), norms: int = 1
) -> ElasticConv:
    """A layer in float64, with BN and biases away from 1 and 0."""
    torch.manual_seed(0)
    elastic_conv = ElasticConv(
        widest, kernels if widest.kernel > 1 else (1,), 1e-3, sharing, norms
    ).double()
    with torch.no_grad():
        for name, tensor in itertools.chain(
            elastic_conv.named_parameters(), elastic_conv.named_buffers()
        ):
            if tensor.ndim == 1 and "num_batches" not in name:
                tensor.uniform_(0.5, 1.5)
    return elastic_conv


def narrower(widest: Node, out_ch: int) -> Node:
    groups = out_ch if widest.groups > 1 else 1
    return replace(widest, in_ch=out_ch if widest.groups > 1 else 8, out_ch=out_ch, groups=groups)


@pytest.mark.parametrize("channels", ["first", "chunk", "random", "interpolation"])
@pytest.mark.parametrize("kernels", ["own", "ofa", "ofa_transform"])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("widest", [DENSE, DEPTHWISE, PLAIN_BIAS])
def test_it_is_a_standalone_layer_with_the_sliced_weights(
    widest: Node, channels: Channels, kernels: Kernels, track: bool
) -> None:
    """In training and evaluation mode, at every width and kernel, whichever channels
    are drawn.
    """
    elastic_conv = elastic(widest, Sharing(channels, kernels, bn_track=track))
    for training, out_ch, kernel in itertools.product(
        (True, False), (16, 10, 7), {widest.kernel, min(3, widest.kernel)}
    ):
        if training and track and channels in ("random", "interpolation"):
            continue  # refused by the configuration
        layer = replace(narrower(widest, out_ch), kernel=kernel)
        x_NCHW = torch.randn(4, layer.in_ch, 6, 6).double()
        elastic_conv.train(training)
        torch.manual_seed(5)
        ours = elastic_conv(x_NCHW, layer)
        torch.manual_seed(5)
        weights = elastic_conv.sliced(layer, *elastic_conv.narrow(layer))
        standalone = conv_layer(layer, 1e-3).double()
        standalone.load_state_dict({**standalone.state_dict(), **weights})
        standalone.train(training or not track)
        assert torch.allclose(ours, standalone(x_NCHW), atol=1e-12)
        assert ours.shape == (4, out_ch, 6, 6)


def test_which_channels_a_narrower_layer_takes() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(narrowing(6, 4, "first", True).of(weight, 0), weight[:4])
    assert torch.equal(Narrowing(6, 4, start=1).of(weight, 0), weight[1:5])
    assert torch.equal(
        Narrowing(6, 3, index=torch.tensor([0, 2, 5])).of(weight, 0), weight[[0, 2, 5]]
    )
    assert torch.equal(
        Narrowing(6, 3, averaged=True).of(weight, 0), weight.reshape(3, 2, 2).mean(1)
    )
    assert torch.equal(Narrowing(2, 1, averaged=True).of(weight, 1), weight.mean(1, keepdim=True))
    assert Narrowing(6, 6).of(weight, 0) is weight


@pytest.mark.parametrize("channels", ["chunk", "random"])
def test_random_channels_follow_the_seed_and_are_the_first_in_evaluation(
    channels: Channels,
) -> None:
    torch.manual_seed(1)
    drawn = [narrowing(16, 5, channels, True).of(torch.arange(16), 0).tolist() for _ in range(60)]
    torch.manual_seed(1)
    assert drawn == [
        narrowing(16, 5, channels, True).of(torch.arange(16), 0).tolist() for _ in range(60)
    ]
    assert set(itertools.chain(*drawn)) == set(range(16))
    assert all(index == sorted(set(index)) and len(index) == 5 for index in drawn)
    contiguous = [index[-1] - index[0] == 4 for index in drawn]
    assert all(contiguous) == (channels == "chunk")
    assert narrowing(16, 5, channels, False).of(torch.arange(16), 0).tolist() == [0, 1, 2, 3, 4]
    assert narrowing(16, 16, channels, True).of(torch.arange(16), 0).tolist() == list(range(16))


@pytest.mark.parametrize("channels", ["first", "chunk"])
def test_running_statistics_change_for_the_channels_that_ran(channels: Channels) -> None:
    """0.9 times the old value + 0.1 times the batch's in the slice, unchanged outside;
    all unchanged if the pass is not tracked.
    """
    elastic_conv = elastic(DENSE, Sharing(channels, bn_track=True)).train()
    layer = narrower(DENSE, 10)
    x_NCHW = torch.randn(4, 8, 6, 6).double()
    norm: Any = elastic_conv.norms[0]
    before = norm.running_mean.clone()
    elastic_conv(x_NCHW, layer, tracks=False)
    assert torch.equal(norm.running_mean, before)
    torch.manual_seed(2)
    elastic_conv(x_NCHW, layer)
    torch.manual_seed(2)
    weights = elastic_conv.sliced(layer, *elastic_conv.narrow(layer))
    mean = F.conv2d(x_NCHW, weights["conv.weight"], padding=2).mean((0, 2, 3))
    moved = (norm.running_mean != before).nonzero().flatten()
    assert len(moved) == 10
    assert torch.allclose(norm.running_mean[moved], 0.9 * before[moved] + 0.1 * mean, atol=1e-12)


def centre(weight: Tensor, kernel: int) -> Tensor:
    border = (weight.shape[-1] - kernel) // 2
    return weight[:, :, border : weight.shape[-1] - border, border : weight.shape[-1] - border]


def test_kernels_are_cut_out_of_the_largest_and_transformed_one_after_another() -> None:
    """7 -> 5 -> 3: each centre, flattened, times the matrix of its size (once-for-all);
    initially the plain centre.
    """
    elastic_conv = elastic(
        replace(DEPTHWISE, kernel=7), Sharing(kernels="ofa_transform"), (3, 5, 7)
    )
    weight = elastic_conv.conv.weight
    for kernel in (3, 5, 7):
        sliced = elastic_conv.sliced(
            replace(DEPTHWISE, kernel=kernel), *elastic_conv.narrow(DEPTHWISE)
        )["conv.weight"]
        assert torch.equal(sliced, centre(weight, kernel))
    assert set(elastic_conv.transforms) == {"3", "5"}
    with torch.no_grad():
        for matrix in elastic_conv.transforms.values():
            matrix.normal_()
    five = torch.einsum(
        "ij,ocj->oci", elastic_conv.transforms["5"], centre(weight, 5).flatten(2)
    ).unflatten(2, (5, 5))
    three = torch.einsum(
        "ij,ocj->oci", elastic_conv.transforms["3"], centre(five, 3).flatten(2)
    ).unflatten(2, (3, 3))
    for kernel, expected in ((7, weight), (5, five), (3, three)):
        sliced = elastic_conv.sliced(
            replace(DEPTHWISE, kernel=kernel), *elastic_conv.narrow(DEPTHWISE)
        )["conv.weight"]
        assert torch.allclose(sliced, expected, atol=1e-12)


def test_one_of_several_norms_is_applied() -> None:
    elastic_conv = elastic(DENSE, Sharing(), norms=3)
    x_NCHW = torch.randn(4, 12, 6, 6).double()
    convolved = F.conv2d(x_NCHW, elastic_conv.conv.weight, padding=2)
    for number, norm in enumerate(elastic_conv.norms):
        assert isinstance(norm, nn.BatchNorm2d)
        expected = F.relu(
            F.batch_norm(convolved, None, None, norm.weight, norm.bias, training=True, eps=1e-3)
        )
        assert torch.allclose(elastic_conv(x_NCHW, DENSE, number), expected, atol=1e-12)
