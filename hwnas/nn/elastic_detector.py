"""The detector of a super-net: extras and predictors shared by all architectures of a
space.

They differ between architectures only in their input channels: a layer that reads a
tapped stage is allocated for the stage's greatest width and narrowed as described in
``elastic``. In a mixture over widths, channels arrive weighted; as after a ``ds``
block, the BN of a predictor's depthwise convolution scales them up again. Predictors do
not see widths that are only probed.
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
from hwnas.core.ssdlite import detector_of
from hwnas.nn.blocks import place
from hwnas.nn.detector import DetectionNetwork, Outputs, initialise_detector, predictions_of
from hwnas.nn.elastic import ElasticConv, Sharing
from hwnas.nn.elastic_head import ElasticHead, Maps
from hwnas.nn.slot import fitted


class ElasticOp(nn.Module):
    """An op of a detector, allocated for its widest input and run at any narrower one.
    Its layers have the same names as those of the standalone block.
    """

    def __init__(self, widest: Op, bn_eps: float, sharing: Sharing) -> None:
        super().__init__()
        self.op = widest
        for node in widest.layers:
            place(self, node.name, ElasticConv(node, (node.kernel,), bn_eps, sharing))

    def narrowed(self, in_ch: int) -> Op:
        """The op with ``in_ch`` input channels."""
        return replace(self.op, in_ch=in_ch)

    def forward(self, x_NCHW: Tensor, op: Op, tracks: bool = True) -> tuple[Tensor, ...]:
        """The op's outputs, [N, columns, size, size] each: one feature map, or class
        logits and box codes.
        """
        values = {INPUT: x_NCHW}
        for number, node in enumerate(op.program.nodes, start=1):
            assert node.kind == "conv", f"{node.kind} in {op.key}"
            values[number] = self._conv(node)(values[node.inputs[0]], node, tracks=tracks)
        return tuple(values[i] for i in op.program.outputs)

    def _conv(self, node: Node) -> ElasticConv:
        conv = self.get_submodule(node.name)
        assert isinstance(conv, ElasticConv)
        return conv

    def weights(self, op: Op) -> dict[str, Tensor]:
        """The state of a standalone block of ``op``, taken from the shared weights."""
        state: dict[str, Tensor] = {}
        for node in op.layers:
            shared = self._conv(node)
            tensors = shared.sliced(node, *shared.narrow(node))
            for name, tensor in tensors.items():
                state[f"{op.WEIGHTS}{node.name}.{name}"] = tensor
        return state


class ElasticDetector(ElasticHead):
    """The extras and heads of a space of detectors."""

    NAME = "detector"
    ONE_SIZE = "a detector's anchors are"

    def __init__(self, space: MacroSpace, config: SupernetConfig, sharing: Sharing) -> None:
        del config
        super().__init__()
        assert space.detector is not None, f"{space.name} has no detector"
        self.classes = space.classes
        self.scores = space.detector.scores
        # later slots of a stage overwrite earlier ones: detectors tap a stage's last slot
        last_slot = {slot.stage: position for position, slot in enumerate(space.slots)}
        self.tapped = frozenset(last_slot[tap] for tap in space.detector.taps)

        widest: dict[str, Op] = {}
        for term in space.terms():
            for op in term.ops:
                if (
                    isinstance(op, ExtraLayer | SSDPredictor)
                    and op.in_ch >= widest.get(term.slot, op).in_ch
                ):
                    widest[term.slot] = op

        self.extras = nn.ModuleList()
        self.heads = nn.ModuleList()
        for op in widest.values():
            modules = self.extras if isinstance(op, ExtraLayer) else self.heads
            modules.append(ElasticOp(op, space.bn_eps, sharing))

    def outputs(self, maps: Maps, tracks: bool = True) -> Outputs:
        """The tapped feature maps with their widths -> class logits [N, anchors,
        classes + 1] and box codes [N, anchors, 4].
        """
        x_NCHW, last_width = maps[-1]
        # predictors do not see probed channels: their BNs would turn zeros into something
        sources = [(fitted(map_NCHW, width.active), width.active) for map_NCHW, width in maps]
        channels = last_width.computed
        for extra in self._ops(self.extras):
            (x_NCHW,) = extra(x_NCHW, extra.narrowed(channels), tracks)
            channels = extra.op.out_ch
            sources.append((x_NCHW, channels))

        outputs = []
        for head, (source_NCHW, in_ch) in zip(self._ops(self.heads), sources, strict=True):
            outputs.append(head(source_NCHW, head.narrowed(in_ch), tracks))
        return predictions_of(outputs, self.classes)

    def _ops(self, modules: nn.ModuleList) -> list[ElasticOp]:
        return [module for module in modules if isinstance(module, ElasticOp)]

    def copy_into(self, network: DetectionNetwork) -> None:
        """Copy the weights that a standalone detector uses into it. Its BN statistics
        stay unchanged if the super-net keeps none.
        """
        detector = detector_of(network.arch)
        pairs: list[tuple[Any, Any, Op]] = [
            *zip(self.extras, network.extras, detector.extras, strict=True),
            *zip(self.heads, network.heads, detector.heads, strict=True),
        ]
        for shared, block, op in pairs:
            copy_into(block, shared.weights(op))

    def initialise(self, generator: torch.Generator, how: str) -> None:
        """Initialise as torchvision does; ``how`` is for the backbone only."""
        del how
        initialise_detector(self.extras, self.heads, self.scores, generator)

    def no_weight_decay(self) -> set[str]:
        """No weights: a detector has no classifier."""
        return set()

    def copy_weights(self, source: ElasticDetector) -> None:
        """Start from all weights of ``source``, which has the same widths."""
        self.load_state_dict(source.state_dict())

    def angle_weights(self, width: int) -> list[Tensor]:
        """Never called: studies have no detectors."""
        raise AssertionError(f"there is no angle of a detector after {width} channels")


def copy_into(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load copies of some of a block's tensors. The others, such as BN statistics that
    the super-net does not keep, stay unchanged.
    """
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    block.load_state_dict({**block.state_dict(), **copies})
