"""The detector of a super-net: extras and predictors that every architecture of the space shares.

They are the same for all architectures, but for their input channels: what reads a
tapped stage is allocated for its widest and narrowed as ``elastic`` says. In a mixture
over widths, the channels arrive weighted; as behind a ``ds`` block, the BN of a
predictor's depthwise convolution scales them up again, and predictors see nothing of
widths that are only probed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.ir import INPUT, Node
from hwnas.core.ops import ExtraLayer, Op, SSDPredictor
from hwnas.core.space import MacroSpace
from hwnas.nn.blocks import place
from hwnas.nn.detector import (
    DetectionNetwork,
    Outputs,
    detector_of,
    initialise_detector,
    predictions_of,
)
from hwnas.nn.elastic import ElasticConv, Sharing
from hwnas.nn.elastic_head import ElasticHead, Maps
from hwnas.nn.slot import fitted


class ElasticOp(nn.Module):
    """An op of a detector allocated for its widest input, run at any narrower one. Its
    layers have the names of the block's.
    """

    def __init__(self, widest: Op, bn_eps: float, sharing: Sharing) -> None:
        super().__init__()
        self.op = widest
        for node in widest.layers:
            place(self, node.name, ElasticConv(node, (node.kernel,), bn_eps, sharing))

    def narrowed(self, in_ch: int) -> Op:
        """The op with so many input channels."""
        return replace(self.op, in_ch=in_ch)

    def forward(self, x_NCHW: Tensor, op: Op, tracks: bool = True) -> tuple[Tensor, ...]:
        """The op's outputs: one feature map, or class logits and box codes, [N,
        columns, size, size] each.
        """
        values = {INPUT: x_NCHW}
        for value, node in enumerate(op.program.nodes, start=1):
            assert node.kind == "conv", f"{node.kind} in {op.key}"
            values[value] = self._conv(node)(values[node.inputs[0]], node, tracks=tracks)
        return tuple(values[value] for value in op.program.outputs)

    def _conv(self, node: Node) -> ElasticConv:
        conv = self.get_submodule(node.name)
        assert isinstance(conv, ElasticConv)
        return conv

    def weights(self, op: Op) -> dict[str, Tensor]:
        """State of a stand-alone block of ``op``, taken from the shared weights."""
        state: dict[str, Tensor] = {}
        for node in op.layers:
            shared = self._conv(node)
            tensors = shared.sliced(node, *shared.narrow(node))
            state |= {f"{op.WEIGHTS}{node.name}.{name}": tensor for name, tensor in tensors.items()}
        return state


class ElasticDetector(ElasticHead):
    """The extras and heads of a space of detectors."""

    NAME = "detector"
    ONE_SIZE = "a detector's anchors are"

    def __init__(self, space: MacroSpace, config: SupernetConfig, sharing: Sharing) -> None:
        del config
        super().__init__()
        assert space.detector is not None, f"{space.name} has no detector"
        self.classes, self.scores = space.classes, space.detector.scores
        last = {slot.stage: position for position, slot in enumerate(space.slots)}
        self.tapped = frozenset(last[tap] for tap in space.detector.taps)
        widest: dict[str, Op] = {}
        for term in space.terms():
            for op in term.ops:
                if (
                    isinstance(op, ExtraLayer | SSDPredictor)
                    and op.in_ch >= widest.get(term.slot, op).in_ch
                ):
                    widest[term.slot] = op
        made = [ElasticOp(op, space.bn_eps, sharing) for op in widest.values()]
        self.extras = nn.ModuleList(module for module in made if isinstance(module.op, ExtraLayer))
        self.heads = nn.ModuleList(module for module in made if isinstance(module.op, SSDPredictor))

    def outputs(self, maps: Maps, tracks: bool = True) -> Outputs:
        """The tapped feature maps with their widths -> class logits [N, anchors,
        classes + 1] and box codes [N, anchors, 4].
        """
        x_NCHW, width = maps[-1]
        sources = [(fitted(x, each.active), each.active) for x, each in maps]
        channels = width.run
        for extra in self._ops(self.extras):
            (x_NCHW,) = extra(x_NCHW, extra.narrowed(channels), tracks)
            channels = extra.op.out_ch
            sources.append((x_NCHW, channels))
        outputs = [
            head(x, head.narrowed(each), tracks)
            for head, (x, each) in zip(self._ops(self.heads), sources, strict=True)
        ]
        return predictions_of(outputs, self.classes)

    def _ops(self, modules: nn.ModuleList) -> list[ElasticOp]:
        return [module for module in modules if isinstance(module, ElasticOp)]

    def copy_into(self, network: DetectionNetwork) -> None:
        """Give a stand-alone detector the weights that it uses. BN statistics stay as
        they are where none are kept here.
        """
        detector = detector_of(network.arch)
        pairs: list[tuple[Any, Any, Op]] = [
            *zip(self.extras, network.extras, detector.extras, strict=True),
            *zip(self.heads, network.heads, detector.heads, strict=True),
        ]
        for shared, block, op in pairs:
            copy_into(block, shared.weights(op))

    def initialise(self, generator: torch.Generator, how: str) -> None:
        """As torchvision's begin, whatever the backbone does."""
        del how
        initialise_detector(self.extras, self.heads, self.scores, generator)

    def no_weight_decay(self) -> set[str]:
        """None: it has no classifier."""
        return set()

    def copy_weights(self, source: ElasticDetector) -> None:
        """Begin with all its weights, of the same widths."""
        self.load_state_dict(source.state_dict())

    def angle_weights(self, width: int) -> list[Tensor]:
        """Never: studies have no detectors."""
        raise AssertionError(f"there is no angle of a detector behind {width} channels")


def copy_into(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load copies of some of a block's tensors; the others, such as BN statistics that
    nobody kept, stay.
    """
    block.load_state_dict(
        {**block.state_dict(), **{name: tensor.clone() for name, tensor in weights.items()}}
    )
