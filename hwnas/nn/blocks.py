"""Builds the torch module of an op. The same module is timed, trained and exported.

By default, initialisation follows TuNAS: He normal with fan-in (for depthwise kernels
the fan-in of one channel), N(0, 0.01) for the classifier, zero biases. Layers are in
the order of timm and torchvision, so that weights can be copied one after another.
Global pooling is written as ``adaptive_avg_pool2d``, because a mean over two axes
exports with a transpose.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.core.ir import INPUT, POOLS, Node
from hwnas.core.ops import Op

ACTIVATIONS: Mapping[str, Callable[[Tensor, bool], Tensor]] = {
    "none": lambda x, inplace: x,
    "relu": lambda x, inplace: F.relu(x, inplace=inplace),
    "relu6": lambda x, inplace: F.relu6(x, inplace=inplace),
    "hswish": lambda x, inplace: F.hardswish(x, inplace=inplace),
    "silu": lambda x, inplace: F.silu(x, inplace=inplace),
    "sigmoid": lambda x, inplace: torch.sigmoid(x),
    "hsig": lambda x, inplace: F.hardsigmoid(x),
}
"""Name of an activation -> function of a tensor and of whether it may be overwritten.
"""


class Activation(nn.Module):
    """An activation as a module. ``inplace`` is safe if nothing else reads
    its input.
    """

    def __init__(self, name: str, inplace: bool = True) -> None:
        super().__init__()
        self.name = name
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return ACTIVATIONS[self.name](x, self.inplace)

    def extra_repr(self) -> str:
        """The name of the activation, for ``repr``."""
        return self.name


def conv_layer(node: Node, bn_eps: float) -> nn.Sequential:
    """A layer of a program: convolution or pooling, then BN (or a bias), then
    activation.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if node.kind == "conv":
        parts["conv"] = nn.Conv2d(
            node.in_ch,
            node.out_ch,
            node.kernel,
            node.stride,
            padding=node.dilation * (node.kernel // 2),
            dilation=node.dilation,
            groups=node.groups,
            bias=node.bias,
        )
    elif node.kind in POOLS:
        padding = node.kernel // 2 if node.kernel % 2 else 0
        if node.kind == "avgpool":
            parts["pool"] = nn.AvgPool2d(node.kernel, node.stride, padding, count_include_pad=False)
        else:
            parts["pool"] = nn.MaxPool2d(node.kernel, node.stride, padding)
    if node.norm:
        # a BN after pooling has no scale and shift, as in DARTS
        parts["norm"] = nn.BatchNorm2d(node.out_ch, eps=bn_eps, affine=node.kind not in POOLS)
    if node.act != "none":
        parts["act"] = Activation(node.act)
    return nn.Sequential(parts)


def shuffle_channels(x_NCHW: Tensor, groups: int) -> Tensor:
    """Move channel i of group g to channel i * groups + g, so that the next grouped
    convolution sees channels of all groups (ShuffleNet). Keeps the shape.
    """
    batch, channels, height, width = x_NCHW.shape
    return (
        x_NCHW.reshape(batch, groups, channels // groups, height, width)
        .transpose(1, 2)
        .reshape(batch, channels, height, width)
    )


class ChannelShuffle(nn.Module):
    """``shuffle_channels`` as a module.

    ``channels_last`` computes the same in a form for runtimes that keep channels last.
    On the other kind of runtime, either form needs two more transposes, which triple
    the time of a small block.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.channels_last = False

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        if not self.channels_last:
            return shuffle_channels(x_NCHW, self.groups)
        batch, channels, height, width = x_NCHW.shape
        x_NHWGC = x_NCHW.permute(0, 2, 3, 1).reshape(
            batch, height, width, self.groups, channels // self.groups
        )
        return x_NHWGC.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """A fully connected layer on a 1 x 1 map, with ``dropout`` before it."""

    def __init__(self, node: Node, dropout: float) -> None:
        super().__init__(node.in_ch, node.out_ch)
        self.dropout = dropout

    def forward(self, x_NC11: Tensor) -> Tensor:
        """[N, in_ch, 1, 1] -> [N, out_ch]."""
        return super().forward(F.dropout(x_NC11.flatten(1), self.dropout, self.training))


class AlongChannels(nn.Module):
    """A 1-D convolution along the channels of a 1 x 1 map: one kernel for all channels,
    without a bias.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, node.kernel, padding=node.kernel // 2, bias=False)
        self.act = Activation(node.act)

    def forward(self, x_NC11: Tensor) -> Tensor:
        """[N, C, 1, 1] -> the same shape."""
        y_N1C: Tensor = self.act(self.conv(x_NC11.flatten(1).unsqueeze(1)))
        return y_N1C.view_as(x_NC11)


PLAIN: Mapping[str, Callable[[Node, list[Tensor]], Tensor]] = {
    "act": lambda node, inputs: ACTIVATIONS[node.act](inputs[0], False),
    "mean": lambda node, inputs: F.adaptive_avg_pool2d(inputs[0], 1),
    "add": lambda node, inputs: inputs[0] + inputs[1],
    "mul": lambda node, inputs: inputs[0] * inputs[1],
    "concat": lambda node, inputs: torch.cat(inputs, dim=1),
    "shuffle": lambda node, inputs: shuffle_channels(inputs[0], node.groups),
    "crop": lambda node, inputs: inputs[0][:, :, 1:, 1:],
    "upsample": lambda node, inputs: F.interpolate(
        inputs[0], scale_factor=2.0, mode="bilinear", align_corners=False
    ),
}
"""Kind of a node without weights -> what it computes from its inputs."""


class Block(nn.Module):
    """An op as a module, which interprets the op's program.

    The weights of a node are named after the op's ``WEIGHTS`` and the node, for example
    ``layers.expand.conv.weight``.
    """

    drop_path: float = 0.0
    """The probability that an image loses the branch of a residual block in training:
    stochastic depth (Huang et al., arXiv 1603.09382). timm's function draws from torch's
    global generator.
    """

    def __init__(self, op: Op, bn_eps: float = 1e-3, dropout: float = 0.0) -> None:
        super().__init__()
        self.residual = op.residual
        self.program = op.program
        steps: list[tuple[Node, nn.Module | None, tuple[int, ...]]] = []
        for node, ending in zip(self.program.nodes, self.program.endings, strict=True):
            module = _module(node, bn_eps, dropout)
            if module is not None:
                place(self, op.WEIGHTS + node.name, module)
            steps.append((node, module, ending))
        self._steps = tuple(steps)

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, in_ch, size, size] -> [N, out_ch, out_size, out_size], or [N, out_ch] for
        a classifier. An op with several outputs gives a tuple.
        """
        values: dict[int, Tensor] = {INPUT: x_NCHW}
        for number, (node, module, ending) in enumerate(self._steps, start=1):
            inputs = [values[i] for i in node.inputs]
            if module is not None:
                values[number] = module(inputs[0])
            else:
                is_last_addition = node.kind == "add" and number in self.program.outputs
                if self.training and self.drop_path and is_last_addition:
                    from timm.layers import drop_path

                    # it adds the branch to the block's input
                    inputs[1] = drop_path(inputs[1], self.drop_path, True)
                values[number] = PLAIN[node.kind](node, inputs)
            # a map that nobody reads any more would only take up memory
            for i in ending:
                del values[i]

        outputs = tuple(values[i] for i in self.program.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def set_drop_path(blocks: Sequence[nn.Module], probability: float) -> None:
    """Let the probability rise linearly over the ``blocks`` of a network, from 0 at the first
    to ``probability`` at the last one that has a residual (as in timm and EfficientNet).
    """
    last = max(
        (i for i, block in enumerate(blocks) if getattr(block, "residual", False)), default=0
    )
    for i, block in enumerate(blocks):
        if isinstance(block, Block) and block.residual:
            block.drop_path = probability * i / last


def _module(node: Node, bn_eps: float, dropout: float) -> nn.Module | None:
    """The module of a node with weights or settings; None for all other nodes."""
    if node.kind == "linear":
        return Linear(node, dropout)
    if node.kind == "channels":
        return AlongChannels(node)
    # before PLAIN, which has "shuffle" too: exporters switch the module's channels_last
    if node.kind == "shuffle":
        return ChannelShuffle(node.groups)
    if node.kind in PLAIN:
        return None
    return conv_layer(node, bn_eps)


def place(owner: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module at a dotted path below ``owner``, creating containers on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(owner, parent):
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    owner.add_module(name, module)


def build(op: Op, *, bn_eps: float = 1e-3, dropout: float = 0.0) -> nn.Module:
    """The module of an op with PyTorch's default weights; see ``initialise``.
    ``dropout`` goes before a fully connected layer.
    """
    return Block(op, bn_eps, dropout)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, how: str = "he") -> None:
    """Fill a module's weights, drawing from ``generator`` only.

    ``how = "he"`` initialises as TuNAS does, ``"torch"`` as PyTorch does by default:
    uniform within 1 / sqrt(fan-in), including the biases of convolutions and
    classifier. That is a sixth of He's variance.
    """
    for part in module.modules():
        bias = getattr(part, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        fan_in = part.weight[0].numel()
        if how == "torch":
            bound = fan_in**-0.5
            part.weight.uniform_(-bound, bound, generator=generator)
            if part.bias is not None:
                part.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(part, nn.Conv2d):
            part.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
        else:
            part.weight.normal_(0.0, 0.01, generator=generator)
