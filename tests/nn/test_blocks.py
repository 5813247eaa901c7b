"""Shuffles, gates, pooled heads, initialisation and reductions against torch's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwnas.core.ops import Op
from hwnas.core.spaces import published
from hwnas.nn.blocks import (
    ACTIVATIONS,
    Block,
    ChannelShuffle,
    build,
    initialise,
    set_drop_path,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_are_shuffled_as_in_torch(groups: int, channels_last: bool) -> None:
    x_NCHW = torch.arange(2 * 12 * 3 * 3).reshape(2, 12, 3, 3)
    shuffle = ChannelShuffle(groups)
    shuffle.channels_last = channels_last
    assert torch.equal(shuffle(x_NCHW), nn.functional.channel_shuffle(x_NCHW, groups))
    assert not torch.equal(shuffle(x_NCHW), x_NCHW)


@pytest.mark.parametrize("key", ["mbconv-h4-i4-o4-m8-g2-relu", "dsconv-h4-i4-o4-g2-relu"])
def test_every_input_channel_of_a_grouped_block_reaches_every_group(key: str) -> None:
    block = build(Op.parse(key)).eval()
    with torch.no_grad():
        for part in block.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.fill_(1.0)
        baseline = block(torch.ones(1, 4, 4, 4))
        reached = []
        for channel in range(4):
            x_NCHW = torch.ones(1, 4, 4, 4)
            x_NCHW[:, channel] = 2.0
            reached.append(int(((block(x_NCHW) - baseline).abs() > 1e-3).any(dim=(0, 2, 3)).sum()))
    assert reached == ([4] * 4 if "mbconv" in key else [2] * 4)


def test_the_gates_are_torchs() -> None:
    x_NC11 = torch.linspace(-5, 5, 41).reshape(1, 41, 1, 1)
    assert torch.equal(ACTIVATIONS["sigmoid"](x_NC11, False), torch.sigmoid(x_NC11))
    torch.testing.assert_close(
        ACTIVATIONS["hsig"](x_NC11, False), torch.clamp(x_NC11 + 3, 0, 6) / 6
    )


def test_a_head_pools_before_its_convolution() -> None:
    head = build(Op.parse("head-h5-i8-o16-hswish"))
    x_NCHW = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    conv = next(part for part in head.modules() if isinstance(part, nn.Conv2d))
    expected = nn.functional.hardswish(
        nn.functional.linear(x_NCHW.mean((2, 3)), conv.weight[:, :, 0, 0], conv.bias)
    )
    output = head(x_NCHW)
    assert output.shape == (2, 16, 1, 1)
    torch.testing.assert_close(output[:, :, 0, 0], expected)


def test_weights_are_initialised_as_requested() -> None:
    """He's normal initialisation as in TuNAS, or PyTorch's own: with the spread that
    torch itself gives, drawn from the generator alone.
    """
    own = nn.ModuleList(
        [
            nn.Conv2d(64, 64, 3, bias=True),
            nn.Conv2d(64, 64, 5, groups=64, bias=False),
            nn.Linear(256, 100),
        ]
    )
    spread = [float(tensor.detach().std()) for tensor in own.parameters()]
    copies = [copy.deepcopy(own) for _ in range(3)]
    for module, scheme in zip(copies, ("torch", "torch", "he"), strict=True):
        initialise(module, torch.Generator().manual_seed(0), scheme)  # type: ignore[arg-type]
    torchs, again, he = ([tensor.detach() for tensor in module.parameters()] for module in copies)
    assert all(torch.equal(*pair) for pair in zip(torchs, again, strict=True))
    assert [float(tensor.std()) for tensor in torchs] == pytest.approx(spread, rel=0.2)
    fans = (576, 576, 25, 256, 256)
    assert all(
        float(tensor.abs().max()) <= fan**-0.5 for tensor, fan in zip(torchs, fans, strict=True)
    )
    assert [float(tensor.std()) for tensor in he] == pytest.approx(
        [(2 / 576) ** 0.5, 0, (2 / 25) ** 0.5, 0.01, 0], rel=0.05
    )


def test_the_halves_of_a_factorised_reduction_read_different_pixels() -> None:
    """FactorizedReduce of DARTS: two 1 x 1 convolutions of stride 2, the second one
    shifted by a pixel down and to the right.
    """
    op = Op.parse("facreduce-h8-i4-o6-s2-relu")
    block = build(op).eval()
    initialise(block, torch.Generator().manual_seed(0))
    x_NCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    even, odd = (block.get_parameter(f"layers.{half}.conv.weight") for half in ("even", "odd"))
    read = x_NCHW.relu()
    halves = F.conv2d(read, even, stride=2), F.conv2d(read[:, :, 1:, 1:], odd, stride=2)
    expected = torch.cat(halves, 1) / math.sqrt(1 + block.get_submodule("layers.norm.norm").eps)
    torch.testing.assert_close(block(x_NCHW), expected)
    only_odd = torch.zeros(1, 4, 8, 8)
    only_odd[:, :, 1::2, 1::2] = 1.0
    output = block(only_odd)
    assert not output[:, :3].any()
    assert output[:, 3:].any()


def residual_block() -> Block:
    return Block(Op.parse("mbconv-h4-i8-o8-m16-k3-relu6-id"))


def test_stochastic_depth_drops_the_branch_of_whole_images() -> None:
    block = residual_block().train()
    block.drop_path = 0.25
    x_NCHW = torch.randn(400, 8, 4, 4)
    torch.manual_seed(0)
    branch_NCHW = block(x_NCHW) - x_NCHW
    dropped_N = branch_NCHW.flatten(1).abs().amax(1) < 1e-6
    assert 0.18 < float(dropped_N.float().mean()) < 0.32
    block.drop_path = 0.0
    whole_NCHW = block(x_NCHW) - x_NCHW
    torch.testing.assert_close(
        branch_NCHW[~dropped_N], whole_NCHW[~dropped_N] / 0.75, rtol=1e-4, atol=1e-5
    )


def test_stochastic_depth_is_for_training_only() -> None:
    block = residual_block().eval()
    x_NCHW = torch.randn(4, 8, 4, 4)
    expected = block(x_NCHW)
    block.drop_path = 0.9
    assert torch.equal(block(x_NCHW), expected)


def test_stochastic_depth_rises_to_the_last_residual_block() -> None:
    blocks = [build(op) for op in published("mobilenet_v2-w0.35").ops()]
    set_drop_path(blocks, 0.2)
    rates = [block.drop_path for block in blocks if isinstance(block, Block) and block.residual]
    assert rates == sorted(rates) and 0 < rates[0] < rates[-1] == pytest.approx(0.2)
    assert all(block.drop_path == 0 for block in blocks if not block.residual)
