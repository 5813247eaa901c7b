"""Elastic layers: which weights a narrower or smaller layer takes, against a
stand-alone layer with those weights.
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
    """In float64, with BN and biases away from 1 and 0."""
    torch.manual_seed(0)
    made = ElasticConv(
        widest, kernels if widest.kernel > 1 else (1,), 1e-3, sharing, norms
    ).double()
    with torch.no_grad():
        for name, tensor in itertools.chain(made.named_parameters(), made.named_buffers()):
            if tensor.ndim == 1 and "num_batches" not in name:
                tensor.uniform_(0.5, 1.5)
    return made


def narrower(widest: Node, out_ch: int) -> Node:
    groups = out_ch if widest.groups > 1 else 1
    return replace(widest, in_ch=out_ch if widest.groups > 1 else 8, out_ch=out_ch, groups=groups)


@pytest.mark.parametrize("channels", ["first", "chunk", "random", "interpolation"])
@pytest.mark.parametrize("kernels", ["own", "ofa", "ofa_transform"])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("widest", [DENSE, DEPTHWISE, PLAIN_BIAS])
def test_it_is_a_stand_alone_layer_with_the_sliced_weights(
    widest: Node, channels: Channels, kernels: Kernels, track: bool
) -> None:
    """In training and evaluation mode, at every width and kernel, whatever was drawn."""
    made = elastic(widest, Sharing(channels, kernels, bn_track=track))
    for training, out_ch, kernel in itertools.product(
        (True, False), (16, 10, 7), {widest.kernel, min(3, widest.kernel)}
    ):
        if training and track and channels in ("random", "interpolation"):
            continue  # refused by the configuration
        layer = replace(narrower(widest, out_ch), kernel=kernel)
        x_NCHW = torch.randn(4, layer.in_ch, 6, 6).double()
        made.train(training)
        torch.manual_seed(5)
        ours = made(x_NCHW, layer)
        torch.manual_seed(5)
        weights = made.sliced(layer, *made.narrow(layer))
        alone = conv_layer(layer, 1e-3).double()
        alone.load_state_dict({**alone.state_dict(), **weights})
        alone.train(training or not track)
        assert torch.allclose(ours, alone(x_NCHW), atol=1e-12)
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
def test_random_channels_are_drawn_by_the_seed_and_first_when_judged(channels: Channels) -> None:
    torch.manual_seed(1)
    drawn = [narrowing(16, 5, channels, True).of(torch.arange(16), 0).tolist() for _ in range(60)]
    torch.manual_seed(1)
    assert drawn == [
        narrowing(16, 5, channels, True).of(torch.arange(16), 0).tolist() for _ in range(60)
    ]
    assert set(itertools.chain(*drawn)) == set(range(16))
    assert all(each == sorted(set(each)) and len(each) == 5 for each in drawn)
    in_a_row = [each[-1] - each[0] == 4 for each in drawn]
    assert all(in_a_row) == (channels == "chunk")
    assert narrowing(16, 5, channels, False).of(torch.arange(16), 0).tolist() == [0, 1, 2, 3, 4]
    assert narrowing(16, 16, channels, True).of(torch.arange(16), 0).tolist() == list(range(16))


@pytest.mark.parametrize("channels", ["first", "chunk"])
def test_running_statistics_of_the_channels_that_ran(channels: Channels) -> None:
    """0.9 old + 0.1 of the batch in the slice, untouched outside; all untouched where
    the pass is not to be tracked.
    """
    made = elastic(DENSE, Sharing(channels, bn_track=True)).train()
    layer = narrower(DENSE, 10)
    x_NCHW = torch.randn(4, 8, 6, 6).double()
    norm: Any = made.norms[0]
    before = norm.running_mean.clone()
    made(x_NCHW, layer, tracks=False)
    assert torch.equal(norm.running_mean, before)
    torch.manual_seed(2)
    made(x_NCHW, layer)
    torch.manual_seed(2)
    weights = made.sliced(layer, *made.narrow(layer))
    mean = F.conv2d(x_NCHW, weights["conv.weight"], padding=2).mean((0, 2, 3))
    moved = (norm.running_mean != before).nonzero().flatten()
    assert len(moved) == 10
    assert torch.allclose(norm.running_mean[moved], 0.9 * before[moved] + 0.1 * mean, atol=1e-12)


def centre(weight: Tensor, kernel: int) -> Tensor:
    border = (weight.shape[-1] - kernel) // 2
    return weight[:, :, border : weight.shape[-1] - border, border : weight.shape[-1] - border]


def test_kernels_cut_out_of_the_largest_and_transformed_one_after_another() -> None:
    """7 -> 5 -> 3: each centre, flattened, times its size's matrix (once-for-all);
    starts as the plain centre.
    """
    made = elastic(replace(DEPTHWISE, kernel=7), Sharing(kernels="ofa_transform"), (3, 5, 7))
    weight = made.conv.weight
    for kernel in (3, 5, 7):
        sliced = made.sliced(replace(DEPTHWISE, kernel=kernel), *made.narrow(DEPTHWISE))[
            "conv.weight"
        ]
        assert torch.equal(sliced, centre(weight, kernel))
    assert set(made.transforms) == {"3", "5"}
    with torch.no_grad():
        for matrix in made.transforms.values():
            matrix.normal_()
    five = torch.einsum(
        "ij,ocj->oci", made.transforms["5"], centre(weight, 5).flatten(2)
    ).unflatten(2, (5, 5))
    three = torch.einsum("ij,ocj->oci", made.transforms["3"], centre(five, 3).flatten(2)).unflatten(
        2, (3, 3)
    )
    for kernel, expected in ((7, weight), (5, five), (3, three)):
        sliced = made.sliced(replace(DEPTHWISE, kernel=kernel), *made.narrow(DEPTHWISE))[
            "conv.weight"
        ]
        assert torch.allclose(sliced, expected, atol=1e-12)


def test_one_norm_of_several() -> None:
    made = elastic(DENSE, Sharing(), norms=3)
    x_NCHW = torch.randn(4, 12, 6, 6).double()
    convolved = F.conv2d(x_NCHW, made.conv.weight, padding=2)
    for number, norm in enumerate(made.norms):
        assert isinstance(norm, nn.BatchNorm2d)
        expected = F.relu(
            F.batch_norm(convolved, None, None, norm.weight, norm.bias, training=True, eps=1e-3)
        )
        assert torch.allclose(made(x_NCHW, DENSE, number), expected, atol=1e-12)
