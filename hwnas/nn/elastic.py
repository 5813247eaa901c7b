"""Elastic layers: allocated at the greatest width, run at any narrower one.

How a narrower or smaller layer takes its weights is one of the super-net heuristics of
Yu, Ranftl, Salzmann, "How to Train Your Super-Net" (arXiv 2003.04276; arXiv
2110.01154), named here as in ``SupernetConfig``:

- ``channels`` (dynamic channelling): the ``first`` c channels; a random ``chunk`` of c
  consecutive ones; c ``random`` ones; or ``interpolation``, the weights averaged down
  to c channels (adaptive average pooling). Random channels are drawn again in every
  forward pass while training, and are the first c otherwise, so that every trained
  network is well defined.
- ``kernels`` (OFA kernel; Cai et al., arXiv 1908.09791): ``own`` weights and BN per
  kernel size, as in TuNAS; or ``ofa``, the centre of the one largest kernel, with one
  BN; ``ofa_transform`` multiplies each smaller centre by a learned matrix, which starts
  as the identity.
- ``bn_affine``, ``bn_track`` (BN setting) and ``wsbn`` (one BN per producer of the
  input).
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
    """How layers share their weights; see the module's docstring."""

    channels: Channels = "first"
    kernels: Kernels = "own"
    bn_affine: bool = True
    bn_track: bool = False


@dataclass(frozen=True)
class Narrowing:
    """Which ``kept`` of ``total`` channels a narrower layer uses: consecutive ones from
    ``start`` on, those at ``index``, or an average of all.
    """

    total: int
    kept: int
    start: int = 0
    index: Tensor | None = None
    averaged: bool = False

    def of(self, weight: Tensor, axis: int) -> Tensor:
        """``weight`` narrowed along ``axis``."""
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
    """A narrowing by the method ``channels``. Random methods draw from torch's global
    generator, which the engine seeds per step.
    """
    if kept >= total:
        return Narrowing(total, kept)
    if channels == "interpolation":
        return Narrowing(total, kept, averaged=True)
    if training and channels == "chunk":
        return Narrowing(total, kept, start=int(torch.randint(total - kept + 1, ())))
    if training and channels == "random":
        return Narrowing(total, kept, index=torch.randperm(total)[:kept].sort().values)
    return Narrowing(total, kept)


class ElasticChannels(nn.Module):
    """A convolution along channels with the interface of an ``ElasticConv``. Its kernel
    is the same at every width.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.along = AlongChannels(node)

    def narrow(self, node: Node) -> tuple[Narrowing, Narrowing]:
        """Narrowings that keep everything."""
        return Narrowing(1, 1), Narrowing(1, 1)

    def sliced(
        self, node: Node, out: Narrowing, into: Narrowing, norm: int = 0
    ) -> dict[str, Tensor]:
        """The whole kernel, which all widths share."""
        return {"conv.weight": self.along.conv.weight}

    def forward(self, x_NC11: Tensor, node: Node, norm: int = 0, tracks: bool = True) -> Tensor:
        """[N, C, 1, 1] -> the same shape."""
        y_NC11: Tensor = self.along(x_NC11)
        return y_NC11


class ElasticConv(nn.Module):
    """A convolution and its BN, allocated for the widest node and run as any narrower
    one.

    The weight is [max_out, max_in / groups, k, k] with the largest k; depthwise layers
    have one input channel per group. There are ``norms`` BNs, of which ``forward`` uses
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
        self.sharing = sharing
        self.widest = widest
        self.conv = nn.Conv2d(
            widest.in_ch, widest.out_ch, max(kernels), groups=widest.groups, bias=widest.bias
        )
        options: Any = {
            "eps": bn_eps,
            "momentum": BN_MOMENTUM,
            "affine": sharing.bn_affine,
            "track_running_stats": sharing.bn_track,
        }
        norm_count = norms if widest.norm else 0
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(widest.out_ch, **options) for _ in range(norm_count)
        )
        transforms: dict[str, nn.Parameter] = {}
        if sharing.kernels == "ofa_transform":
            for kernel in sorted(kernels):
                if kernel < max(kernels):
                    transforms[str(kernel)] = nn.Parameter(torch.eye(kernel**2))
        self.transforms = nn.ParameterDict(transforms)

    def narrow(self, node: Node) -> tuple[Narrowing, Narrowing]:
        """The output and input channels that ``node`` uses."""
        channels = self.sharing.channels
        max_in = self.widest.in_ch // self.widest.groups
        # the output is drawn first: the order of random draws is part of reproducibility
        out = narrowing(self.widest.out_ch, node.out_ch, channels, self.training)
        into = narrowing(max_in, node.in_ch // node.groups, channels, self.training)
        return out, into

    def sliced(
        self, node: Node, out: Narrowing, into: Narrowing, norm: int = 0
    ) -> dict[str, Tensor]:
        """The weights that ``node`` uses, named as in a standalone ``conv_layer``."""
        weights = {"conv.weight": into.of(out.of(self._kernel(node.kernel), 0), 1)}
        if self.conv.bias is not None:
            weights["conv.bias"] = out.of(self.conv.bias, 0)
        if len(self.norms):
            batch_norm = self.norms[norm]
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(batch_norm, name)
                # None without bn_affine or bn_track
                if isinstance(tensor, Tensor):
                    weights[f"norm.{name}"] = out.of(tensor, 0)
        return weights

    def _kernel(self, kernel: int) -> Tensor:
        """The weights of a kernel size: the whole kernel or its centre. With
        transforms, the kernel shrinks size by size, and each centre is transformed.
        """
        weight: Tensor = self.conv.weight
        if kernel == weight.shape[-1]:
            return weight
        between = [int(name) for name in self.transforms if int(name) > kernel]
        for size in sorted({kernel, *between}, reverse=True):
            border = (weight.shape[-1] - size) // 2
            weight = weight[:, :, border : border + size, border : border + size]
            if str(size) in self.transforms:
                weight = (weight.flatten(2) @ self.transforms[str(size)].T).view_as(weight)
        return weight

    def forward(self, x_NCHW: Tensor, node: Node, norm: int = 0, tracks: bool = True) -> Tensor:
        """Run as ``node``: [N, node.in_ch, H, W] -> [N, node.out_ch, H', W'].

        ``norm`` is the index of the BN to use; ``tracks`` lets it update its running
        statistics.
        """
        weights = self.sliced(node, *self.narrow(node), norm)
        x_NCHW = F.conv2d(
            x_NCHW,
            weights["conv.weight"],
            weights.get("conv.bias"),
            stride=node.stride,
            padding=node.dilation * (node.kernel // 2),
            dilation=node.dilation,
            groups=node.groups,
        )
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
    """The layer whose weights several options and widths of a block share."""
    if widest.kind == "channels":
        return ElasticChannels(widest)
    assert widest.kind == "conv", f"no weights of a {widest.kind} are shared"
    return ElasticConv(widest, kernels, bn_eps, sharing, norms)
