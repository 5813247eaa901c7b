"""From an op to the torch module that is timed, trained and exported: one builder for all three.

Initialisation follows TuNAS, where PyTorch's own is not asked for: He normal with fan-in (for depthwise kernels the fan-in of
one channel), N(0, 0.01) for the classifier, zero biases. Layer order is that of timm and torchvision, so that weights can be copied one
after another. Pooling is written as ``adaptive_avg_pool2d``, because as a mean over two axes it exports with a transpose.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.core.op import POOLS, Layer, Op


def activation(name: str, inplace: bool = True) -> nn.Module:
    """The activation module of an op's ``act``."""
    modules: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hswish": nn.Hardswish, "none": nn.Identity}
    return modules[name](**({} if name == "none" else {"inplace": inplace}))


def conv_layer(layer: Layer, bn_eps: float) -> nn.Sequential:
    """Activation where one comes first; convolution or pooling; BN (or a bias); activation."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if layer.pre != "none":
        parts["pre"] = activation(layer.pre, inplace=False)  # others read the same map
    if layer.kind == "conv":
        parts["conv"] = nn.Conv2d(
            layer.in_ch,
            layer.out_ch,
            layer.kernel,
            layer.stride,
            layer.dilation * (layer.kernel // 2),
            layer.dilation,
            layer.groups,
            bias=not (layer.norm or layer.bare),
        )
    elif layer.kind == "avgpool":
        parts["pool"] = nn.AvgPool2d(layer.kernel, layer.stride, layer.kernel % 2 * (layer.kernel // 2), count_include_pad=False)
    elif layer.kind == "maxpool":
        parts["pool"] = nn.MaxPool2d(layer.kernel, layer.stride, layer.kernel % 2 * (layer.kernel // 2))
    if layer.norm:
        parts["norm"] = nn.BatchNorm2d(layer.out_ch, eps=bn_eps, affine=layer.kind not in POOLS)
    if layer.act != "none":
        parts["act"] = activation(layer.act)
    return nn.Sequential(parts)


def se_gate(x_NC11: Tensor, name: str) -> Tensor:
    """The gate of squeeze-and-excitation by an op's ``se_gate``: TuNAS's sigmoid, or MobileNetV3's relu6(x + 3) / 6."""
    return torch.sigmoid(x_NC11) if name == "sigmoid" else F.hardsigmoid(x_NC11)


def shuffle_channels(x_NCHW: Tensor, groups: int) -> Tensor:
    """Channel i of group g becomes channel i * groups + g, so that the next grouped convolution sees all groups (ShuffleNet)."""
    batch, channels, height, width = x_NCHW.shape
    return x_NCHW.reshape(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ChannelShuffle(nn.Module):
    """``shuffle_channels`` as a module. ``channels_last`` writes the same for a runtime whose channels are last.

    Either form costs the other kind of runtime two more transposes, and three times the time of a small block.
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
        x_NHWGC = x_NCHW.permute(0, 2, 3, 1).reshape(batch, height, width, self.groups, channels // self.groups)
        return x_NHWGC.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """x * gate(W2 relu(W1 mean(x)))."""

    def __init__(self, reduce: Layer, expand: Layer, gate: str, bn_eps: float) -> None:
        super().__init__()
        self.reduce = conv_layer(reduce, bn_eps)
        self.expand = conv_layer(expand, bn_eps)
        self.gate = gate

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return x_NCHW * se_gate(self.expand(self.reduce(F.adaptive_avg_pool2d(x_NCHW, 1))), self.gate)


class Block(nn.Module):
    """An op as a module: its layers in order, plus the input where the op is residual."""

    def __init__(self, op: Op, bn_eps: float = 1e-3) -> None:
        super().__init__()
        self.residual = op.residual
        layers = {layer.name: layer for layer in op.layers}
        parts: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AdaptiveAvgPool2d(1)) if op.pooled else OrderedDict()
        for name, layer in layers.items():
            if name == "depthwise" and op.shuffled:
                parts["shuffle"] = ChannelShuffle(op.groups)
            if name == "se_reduce":
                parts["se"] = SqueezeExcite(layer, layers["se_expand"], op.se_gate, bn_eps)
            elif name != "se_expand":
                parts[name] = conv_layer(layer, bn_eps)
        self.layers = nn.Sequential(parts)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in_ch, size, size] -> [N, out_ch, out_size, out_size]."""
        y_NCHW: Tensor = self.layers(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class FactorizedReduce(nn.Module):
    """DARTS's reduction: every other pixel goes to the first half of the channels, the pixels beside them to the second; BN."""

    def __init__(self, op: Op, bn_eps: float = 1e-3) -> None:
        super().__init__()
        self.act = activation(op.act, inplace=False)
        self.layers = nn.ModuleDict({layer.name: conv_layer(layer, bn_eps) for layer in op.layers})

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in_ch, size, size] -> [N, out_ch, size / 2, size / 2]."""
        x_NCHW = self.act(x_NCHW)
        halves = [self.layers["even"](x_NCHW), self.layers["odd"](x_NCHW[:, :, 1:, 1:])]
        y_NCHW: Tensor = self.layers["norm"](torch.cat(halves, dim=1))
        return y_NCHW


class ResidualReduce(nn.Module):
    """NAS-Bench-201's reduction: two convolutions, added to pooling and a 1 x 1 convolution."""

    def __init__(self, op: Op, bn_eps: float = 1e-3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.layers = nn.ModuleDict({layer.name: conv_layer(layer, bn_eps) for layer in op.layers})

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in_ch, size, size] -> [N, out_ch, size / 2, size / 2]."""
        y_NCHW: Tensor = self.layers["second"](self.layers["first"](x_NCHW)) + self.layers["shortcut"](self.pool(x_NCHW))
        return y_NCHW


class Classifier(nn.Module):
    """Global average pooling, dropout, fully connected layer."""

    def __init__(self, op: Op, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(op.in_ch, op.out_ch)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in_ch, H, W] -> logits [N, out_ch]."""
        logits: Tensor = self.linear(self.dropout(F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1)))
        return logits


class Predictors(nn.Module):
    """What SSDLite predicts from one feature map: class logits and box codes of each cell's anchors, from branches of their own."""

    def __init__(self, op: Op, bn_eps: float = 1e-3) -> None:
        super().__init__()
        layers = {layer.name: conv_layer(layer, bn_eps) for layer in op.layers}
        parts = ("depthwise", "predict")
        self.classes = nn.Sequential(OrderedDict((part, layers[f"classes.{part}"]) for part in parts))
        self.boxes = nn.Sequential(OrderedDict((part, layers[f"boxes.{part}"]) for part in parts))

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """[N, in_ch, size, size] -> class logits [N, out_ch, size, size] and box codes [N, 4 anchors, size, size]."""
        return self.classes(x_NCHW), self.boxes(x_NCHW)


def build(op: Op, *, bn_eps: float = 1e-3, dropout: float = 0.0) -> nn.Module:
    """The module of an op, uninitialised beyond torch's defaults; see ``initialise``."""
    if op.kind == "classifier":
        return Classifier(op, dropout)
    special = {"ssd": Predictors, "facreduce": FactorizedReduce, "resreduce": ResidualReduce}
    return special.get(op.kind, Block)(op, bn_eps)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, how: str = "he") -> None:
    """Fill a module's weights from ``generator`` alone: ``he`` as TuNAS does, ``torch`` as PyTorch does by itself.

    PyTorch's are uniform within 1 / sqrt(fan-in), biases of convolutions and classifier, too: a sixth of He's variance.
    """
    for part in module.modules():
        bias = getattr(part, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        fan_in = part.weight[0].numel()
        if how == "torch":
            for tensor in (part.weight, *([part.bias] if part.bias is not None else [])):
                tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        else:
            part.weight.normal_(0.0, math.sqrt(2.0 / fan_in) if isinstance(part, nn.Conv2d) else 0.01, generator=generator)
