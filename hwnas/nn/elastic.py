"""A layer with the weights of many: allocated at the widest, run at any narrower one.

How a narrower or smaller layer takes its weights is one of the super-net heuristics of
Yu, Ranftl, Salzmann, "How to Train Your Super-Net" (arXiv 2003.04276; arXiv
2110.01154), named here as in ``SupernetConfig``:

- ``channels`` (dynamic channelling): the ``first`` c channels; a random ``chunk`` of c
  in a row; c ``random`` ones; or ``interpolation``, the weights averaged down to c
  channels (adaptive average pooling). Random ones are drawn anew in every forward pass
  while training, and are the first c otherwise, so that a trained network is one
  network.
- ``kernels`` (OFA kernel; Cai et al., arXiv 1908.09791): ``own`` weights and BN per
  kernel size, as in TuNAS; or ``ofa``, the centre of one largest kernel, with one BN;
  ``ofa_transform`` multiplies each smaller centre by a learned matrix, which starts as
  the identity.
- ``bn_affine``, ``bn_track`` (BN setting) and ``wsbn`` (an own BN per producer of the input).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.core.ir import Node
from hwnas.nn.blocks import ACTIVATIONS, AlongChannels

Channels: TypeAlias = Literal["first", "chunk", "random", "interpolation"]
Kernels: TypeAlias = Literal["own", "ofa", "ofa_transform"]

BN_MOMENTUM = 0.1


@dataclass(frozen=True)
class Sharing:
    """How layers share their weights; see the module."""

    channels: Channels = "first"
    kernels: Kernels = "own"
    bn_affine: bool = True
    bn_track: bool = False


@dataclass(frozen=True)
class Narrowing:
    """Which ``kept`` of ``total`` channels a narrower layer uses: a start and a length,
    indices, or an average.
    """

    total: int
    kept: int
    start: int = 0
    index: Tensor | None = None
    averaged: bool = False

    def of(self, weight: Tensor, axis: int) -> Tensor:
        """The narrowed weight."""
        if self.kept == self.total:
            return weight
        if self.index is not None:
            return weight.index_select(axis, self.index.to(weight.device))
        if self.averaged:
            moved = weight.movedim(axis, -1)
            flat = F.adaptive_avg_pool1d(moved.reshape(1, -1, self.total), self.kept)
            return flat.reshape(*moved.shape[:-1], self.kept).movedim(-1, axis)
        return weight.narrow(axis, self.start, self.kept)


def narrowing(total: int, kept: int, channels: Channels, training: bool) -> Narrowing:
    """A narrowing by one of the methods; random ones draw from torch's global
    generator, which the engine seeds per step.
    """
    if kept < total and channels == "interpolation":
        return Narrowing(total, kept, averaged=True)
    if kept < total and training and channels == "chunk":
        return Narrowing(total, kept, start=int(torch.randint(total - kept + 1, ())))
    if kept < total and training and channels == "random":
        return Narrowing(total, kept, index=torch.randperm(total)[:kept].sort().values)
    return Narrowing(total, kept)


class ElasticChannels(nn.Module):
    """A convolution along channels, whose kernel is the same at every width, in the
    form of an ``ElasticConv``.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.along = AlongChannels(node)

    def narrow(self, node: Node) -> tuple[Narrowing, Narrowing]:
        """All of it."""
        return Narrowing(1, 1), Narrowing(1, 1)

    def sliced(
        self, node: Node, out: Narrowing, into: Narrowing, norm: int = 0
    ) -> dict[str, Tensor]:
        """All of it."""
        return {"conv.weight": self.along.conv.weight}

    def forward(self, x_NC11: Tensor, node: Node, norm: int = 0, tracks: bool = True) -> Tensor:
        """[N, C, 1, 1] -> the same shape."""
        y_NC11: Tensor = self.along(x_NC11)
        return y_NC11


class ElasticConv(nn.Module):
    """A convolution and its BN allocated at the widest, used at any narrower node.

    ``weight`` is [max_out, max_in / groups, k, k] with the largest k; depthwise layers
    have one input channel per group. ``norms`` BNs are kept, of which ``forward`` uses
    one (``wsbn``).
    """

    def __init__(
        self,
        widest: Node,
        kernels: tuple[int, ...],
        bn_eps: float,
        sharing: Sharing,
        norms: int = 1,
    ) -> None:
        super().__init__()
        self.sharing, self.widest = sharing, widest
        self.conv = nn.Conv2d(
            widest.in_ch, widest.out_ch, max(kernels), groups=widest.groups, bias=widest.bias
        )
        options: Any = {
            "eps": bn_eps,
            "momentum": BN_MOMENTUM,
            "affine": sharing.bn_affine,
            "track_running_stats": sharing.bn_track,
        }
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(widest.out_ch, **options) for _ in range(norms if widest.norm else 0)
        )
        smaller = (
            [kernel for kernel in sorted(kernels) if kernel < max(kernels)]
            if sharing.kernels == "ofa_transform"
            else []
        )
        self.transforms = nn.ParameterDict(
            {str(kernel): nn.Parameter(torch.eye(kernel**2)) for kernel in smaller}
        )

    def narrow(self, node: Node) -> tuple[Narrowing, Narrowing]:
        """The output and input channels that ``node`` uses."""
        channels, training = self.sharing.channels, self.training
        out = narrowing(self.widest.out_ch, node.out_ch, channels, training)
        return out, narrowing(
            self.widest.in_ch // self.widest.groups, node.in_ch // node.groups, channels, training
        )

    def sliced(
        self, node: Node, out: Narrowing, into: Narrowing, norm: int = 0
    ) -> dict[str, Tensor]:
        """The weights that ``node`` uses, under the names of a stand-alone ``conv_layer``."""
        weights = {"conv.weight": into.of(out.of(self._kernel(node.kernel), 0), 1)}
        if self.conv.bias is not None:
            weights["conv.bias"] = out.of(self.conv.bias, 0)
        if len(self.norms):
            part = self.norms[norm]
            tensors = (
                ("weight", part.weight),
                ("bias", part.bias),
                ("running_mean", part.running_mean),
                ("running_var", part.running_var),
            )
            weights |= {
                f"norm.{name}": out.of(tensor, 0)
                for name, tensor in tensors
                if isinstance(tensor, Tensor)
            }
        return weights

    def _kernel(self, kernel: int) -> Tensor:
        """The weights of a kernel size: all, or the centre, transformed from each size
        to the next where there are transforms.
        """
        weight: Tensor = self.conv.weight
        if kernel == weight.shape[-1]:
            return weight
        sizes = sorted(
            {kernel, *(int(name) for name in self.transforms if int(name) > kernel)}, reverse=True
        )
        for size in sizes:
            border = (weight.shape[-1] - size) // 2
            weight = weight[:, :, border : border + size, border : border + size]
            if str(size) in self.transforms:
                weight = (weight.flatten(2) @ self.transforms[str(size)].T).view_as(weight)
        return weight

    def forward(self, x_NCHW: Tensor, node: Node, norm: int = 0, tracks: bool = True) -> Tensor:
        """Run as ``node``: [N, node.in_ch, H, W] -> [N, node.out_ch, H', W'].
        ``tracks``: BN may update its running statistics.
        """
        weights = self.sliced(node, *self.narrow(node), norm)
        padding = node.dilation * (node.kernel // 2)
        shape = (node.stride, padding, node.dilation, node.groups)
        x_NCHW = F.conv2d(x_NCHW, weights["conv.weight"], weights.get("conv.bias"), *shape)
        if len(self.norms):
            x_NCHW = F.batch_norm(
                x_NCHW,
                weights.get("norm.running_mean"),  # a view of the first channels: updated in place
                weights.get("norm.running_var"),
                weights.get("norm.weight"),
                weights.get("norm.bias"),
                training=self.training or not self.sharing.bn_track,
                momentum=BN_MOMENTUM if tracks else 0.0,
                eps=self.norms[norm].eps,  # type: ignore[arg-type]
            )
        return ACTIVATIONS[node.act](x_NCHW, True)


def elastic(
    widest: Node, kernels: tuple[int, ...], bn_eps: float, sharing: Sharing, norms: int = 1
) -> ElasticConv | ElasticChannels:
    """The shared weights of a layer of a block that options and widths share."""
    if widest.kind == "channels":
        return ElasticChannels(widest)
    assert widest.kind == "conv", f"no weights of a {widest.kind} are shared"
    return ElasticConv(widest, kernels, bn_eps, sharing, norms)
