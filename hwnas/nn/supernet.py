"""The weight-shared super-net of a macro space.

Sharing is TuNAS's "collapsed" form (arXiv 2008.06120, section 4): per slot one expansion and one projection
convolution for all kernel sizes and expansions, and one depthwise convolution with its own BN per kernel size. Narrower
options use the first channels of the shared weights.

BN always uses the statistics of the batch, also when scoring; nothing is tracked, as in TuNAS's code.

*Differences from the paper*: TuNAS masks channels of the widest weights; here weights are **sliced**, which computes the same
and costs what the sampled path costs. Shared weights that a step does not touch at all get no decay and no momentum; of those it
does touch, the channels outside the slice do. A mixture over kernels is averaged before the shared projection, as in TuNAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.core.op import Layer, Op
from hwnas.core.option import BlockOption, parse_option
from hwnas.core.space import MacroSpace, Option, Slot
from hwnas.nn.blocks import activation, initialise
from hwnas.nn.network import Network

Gates = Mapping[str, Any]
"""Choice key -> weight vector [options], numpy or torch. Options at zero are not executed."""


class ElasticConv(nn.Module):
    """A convolution and its BN allocated at the widest, used at any narrower layer by slicing the first channels.

    ``weight`` is [max_out, max_in / groups, k, k]; depthwise layers have one input channel per group.
    """

    def __init__(self, widest: Layer, bn_eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(widest.in_ch, widest.out_ch, widest.kernel, groups=widest.groups, bias=not widest.norm)
        self.norm = nn.BatchNorm2d(widest.out_ch, eps=bn_eps, track_running_stats=False) if widest.norm else None
        self.acts = nn.ModuleDict({widest.act: activation(widest.act)})

    def sliced(self, layer: Layer) -> dict[str, Tensor]:
        """The weights that ``layer`` uses, under the names of a stand-alone ``conv_layer``."""
        weights = {"conv.weight": self.conv.weight[: layer.out_ch, : layer.in_ch // layer.groups]}
        if self.conv.bias is not None:
            weights["conv.bias"] = self.conv.bias[: layer.out_ch]
        if self.norm is not None:
            weights |= {"norm.weight": self.norm.weight[: layer.out_ch], "norm.bias": self.norm.bias[: layer.out_ch]}
        return weights

    def forward(self, x_NCHW: Tensor, layer: Layer) -> Tensor:
        """Run as ``layer``: [N, layer.in_ch, H, W] -> [N, layer.out_ch, H', W']."""
        weights = self.sliced(layer)
        x_NCHW = F.conv2d(x_NCHW, weights["conv.weight"], weights.get("conv.bias"), layer.stride, layer.kernel // 2, groups=layer.groups)
        if self.norm is not None:
            x_NCHW = F.batch_norm(x_NCHW, None, None, weights["norm.weight"], weights["norm.bias"], training=True, eps=self.norm.eps)
        y_NCHW: Tensor = self.acts[layer.act](x_NCHW)
        return y_NCHW


def _shared_name(layer: Layer) -> str:
    """Which shared weights a layer uses: depthwise and plain convolutions have their own per kernel size, grouped ones per group count."""
    kernel = f"_k{layer.kernel}" if layer.name in ("depthwise", "conv") else ""
    groups = f"_g{layer.groups}" if layer.groups > 1 and layer.name != "depthwise" else ""
    return f"{layer.name}{kernel}{groups}"


class ElasticSlot(nn.Module):
    """One slot with the shared weights of all its options and widths."""

    def __init__(self, slot: Slot, bn_eps: float) -> None:
        super().__init__()
        self.slot = slot
        widest: dict[str, Layer] = {}
        for option in slot.options:
            for in_ch, out_ch in slot.widths:
                op = slot.op(option, in_ch, out_ch)
                for layer in op.layers if op is not None else ():
                    name = _shared_name(layer)
                    known = widest.get(name, layer)
                    widest[name] = replace(
                        layer,
                        in_ch=max(layer.in_ch, known.in_ch),
                        out_ch=max(layer.out_ch, known.out_ch),
                        groups=max(layer.groups, known.groups),  # equal, but for depthwise layers: their widest has most groups
                    )
        self.shared = nn.ModuleDict({name: ElasticConv(layer, bn_eps) for name, layer in widest.items()})

    def forward(self, x_NCHW: Tensor, gate: Any, out_ch: int) -> Tensor:
        """The gated sum of the slot's options at an output width: [N, C, H, W] -> [N, out_ch, H', W']."""
        in_ch = x_NCHW.shape[1]
        groups: dict[tuple[str, float, float, int], list[tuple[Op, Any]]] = {}
        identity: Any = 0.0  # how much of the input passes: the weights of skip and of options with a residual
        for option, weight in zip(self.slot.options, gate, strict=True):
            if _value(weight) == 0.0:
                continue
            block, op = parse_option(option), self.slot.op(option, in_ch, out_ch)
            if block is None or op is None or op.residual:
                identity = identity + weight
            if block is not None and op is not None:
                groups.setdefault(_same_but_kernel(block), []).append((op, weight))
        if not groups:  # skipped
            return x_NCHW
        parts = [self._group(x_NCHW, members) for members in groups.values()]
        total: Tensor = sum(parts[1:], parts[0])
        if isinstance(identity, Tensor) or identity not in (0.0, 1.0):
            total = total + identity * x_NCHW
        elif identity:
            total = x_NCHW + total
        return total

    def _group(self, x_NCHW: Tensor, members: list[tuple[Op, Any]]) -> Tensor:
        """Options that differ in their kernel only: their depthwise outputs are mixed, the rest runs once."""
        weight_sum = sum(weight for _, weight in members)
        for position, layer in enumerate(members[0][0].layers):
            if layer.name == "se_expand":
                continue
            if layer.name == "se_reduce":
                x_NCHW = self._squeeze_excite(x_NCHW, layer, members[0][0].layers[position + 1])
            elif len(members) > 1 and layer.name in ("depthwise", "conv"):
                kernels = [op.layers[position] for op, _ in members]
                mixed = [weight / weight_sum * self._run(x_NCHW, kernel) for kernel, (_, weight) in zip(kernels, members, strict=True)]
                x_NCHW = sum(mixed[1:], mixed[0])
            else:
                x_NCHW = self._run(x_NCHW, layer)
        is_one = not isinstance(weight_sum, Tensor) and float(weight_sum) == 1.0
        return x_NCHW if is_one else x_NCHW * weight_sum

    def _run(self, x_NCHW: Tensor, layer: Layer) -> Tensor:
        y_NCHW: Tensor = self.shared[_shared_name(layer)](x_NCHW, layer)
        return y_NCHW

    def _squeeze_excite(self, x_NCHW: Tensor, reduce: Layer, expand: Layer) -> Tensor:
        pooled = self._run(F.adaptive_avg_pool2d(x_NCHW, 1), reduce)
        return x_NCHW * torch.sigmoid(self._run(pooled, expand))

    def weights(self, op: Op) -> dict[str, Tensor]:
        """State of a stand-alone block of ``op``, taken from the shared weights."""
        state: dict[str, Tensor] = {}
        for layer in op.layers:
            prefix = layer.name.replace("se_", "se.")
            shared: Any = self.shared[_shared_name(layer)]
            state |= {f"layers.{prefix}.{name}": tensor for name, tensor in shared.sliced(layer).items()}
        return state


def _same_but_kernel(block: BlockOption) -> tuple[str, float, float, int]:
    return block.kind, block.expansion, block.se_ratio, block.groups


class Supernet(nn.Module):
    """All architectures of a macro space in one module.

    Example:
        >>> supernet = Supernet(space, torch.Generator().manual_seed(0))      # doctest: +SKIP
        >>> logits = supernet(images, one_hot(picks, space))            # doctest: +SKIP
    """

    def __init__(self, space: MacroSpace, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        self.slots = nn.ModuleList(ElasticSlot(slot, space.bn_eps) for slot in space.slots)
        self.classifier = nn.Linear(max(space.stages[-1].widths), space.classes)
        initialise(self, generator)

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifier's (as in TuNAS's code)."""
        return {"classifier.weight"}

    def forward(self, x_NCHW: Tensor, gates: Gates) -> Tensor:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes]. Width gates must be one-hot."""
        for module, slot in zip(self.slots, self.space.slots, strict=True):
            x_NCHW = module(x_NCHW, gates.get(slot.key, (1.0,)), _width(slot, gates))
        pooled_NC = F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1)
        return F.linear(pooled_NC, self.classifier.weight[:, : pooled_NC.shape[1]], self.classifier.bias)

    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A stand-alone network with copies of the weights that ``picks`` use. Its BN statistics are not estimated yet."""
        arch = self.space.decode(picks)
        network = Network(arch)
        kept = [
            (module, op) for module, slot in zip(self.slots, self.space.slots, strict=True) if (op := self._picked(slot, picks)) is not None
        ]
        with torch.no_grad():
            for block, (module, op) in zip(network.blocks, kept, strict=False):
                elastic: Any = module
                state = dict(block.state_dict())
                state.update({name: tensor.clone() for name, tensor in elastic.weights(op).items()})
                block.load_state_dict(state)
            head: Any = network.blocks[-1]
            head.linear.weight.copy_(self.classifier.weight[:, : head.linear.in_features])
            head.linear.bias.copy_(self.classifier.bias)
        return network.to(self.classifier.weight.device)

    def _picked(self, slot: Slot, picks: Mapping[str, Option]) -> Op | None:
        out_ch = int(picks.get(slot.out_key, slot.out_widths[0]))
        in_ch = int(picks.get(slot.in_key, slot.in_widths[0])) if slot.first else out_ch
        return slot.op(str(picks.get(slot.key, slot.options[0])), in_ch, out_ch)


def _value(weight: Any) -> float:
    return float(weight.detach() if isinstance(weight, Tensor) else weight)


def _width(slot: Slot, gates: Gates) -> int:
    gate = gates.get(slot.out_key)
    return slot.out_widths[0] if gate is None else slot.out_widths[int(np.argmax([_value(weight) for weight in gate]))]
