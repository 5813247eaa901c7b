"""The detector of a super-net: neck and predictors shared by all architectures of a
space.

They differ between architectures only in their input channels: a layer that reads a
tapped stage is allocated for the stage's greatest width and narrowed as described in
``elastic``. In a mixture over widths, channels arrive weighted; as after a ``ds``
block, the BN of a predictor's depthwise convolution scales them up again. Predictors do
not see widths that are only probed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.detection import detector_of
from hwnas.core.ir import INPUT, Node
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace
from hwnas.nn.blocks import PLAIN, place
from hwnas.nn.detector import DetectionNetwork, Outputs, initialise_detector, predictions_of
from hwnas.nn.elastic import ElasticConv, Sharing
from hwnas.nn.elastic_head import ElasticHead, Maps
from hwnas.nn.graph import run_graph
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
        if in_ch == self.op.in_ch:
            return self.op
        return replace(self.op, in_ch=in_ch)

    def forward(self, x_NCHW: Tensor, op: Op, tracks: bool = True) -> tuple[Tensor, ...]:
        """The op's outputs, [N, columns, size, size] each: one feature map, or class
        logits and box codes.
        """
        values = {INPUT: x_NCHW}
        for number, node in enumerate(op.program.nodes, start=1):
            if node.kind == "conv":
                values[number] = self._conv(node)(values[node.inputs[0]], node, tracks=tracks)
            else:
                values[number] = PLAIN[node.kind](node, [values[i] for i in node.inputs])
        return tuple(values[i] for i in op.program.outputs)

    def only(self, x_NCHW: Tensor, op: Op, tracks: bool) -> Tensor:
        """``forward`` of an op with a single output."""
        (y_NCHW,) = self(x_NCHW, op, tracks)
        output: Tensor = y_NCHW
        return output

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
    """The neck and the heads of a space of detectors."""

    NAME = "detector"
    ONE_SIZE = "a detector's anchors are"

    def __init__(self, space: MacroSpace, config: SupernetConfig, sharing: Sharing) -> None:
        del config
        super().__init__()
        assert space.detector is not None, f"{space.name} has no detector"
        # later slots of a stage overwrite earlier ones: detectors tap a stage's last slot
        last_slot = {slot.stage: slot for slot in space.slots}
        tapped = [last_slot[tap] for tap in space.detector.taps]
        self.tapped = frozenset(space.slots.index(slot) for slot in tapped)

        widest = [(max(slot.out_widths), slot.out_sizes[0]) for slot in tapped]
        # the positions of the taps' blocks differ between architectures and do not matter
        positions = tuple(range(len(tapped)))
        self.detector = space.detector.detector(positions, widest, space.classes)
        neck = [ElasticOp(op, space.bn_eps, sharing) for op in self.detector.neck]
        self.add_module(self.detector.NECK, nn.ModuleList(neck))
        heads = [ElasticOp(op, space.bn_eps, sharing) for op in self.detector.heads]
        self.heads = nn.ModuleList(heads)

    @property
    def neck_layers(self) -> nn.ModuleList:
        """The layers of the neck, under the name that they have in standalone
        detectors.
        """
        neck = self.get_submodule(self.detector.NECK)
        assert isinstance(neck, nn.ModuleList)
        return neck

    def outputs(self, maps: Maps, tracks: bool = True) -> Outputs:
        """The tapped feature maps with their widths -> the ``Outputs``."""
        readers = self.detector.readers
        neck: list[Callable[[Tensor], Tensor]] = []
        for name, op in zip(self.detector.neck_names, self._ops(self.neck_layers), strict=True):
            in_ch = op.op.in_ch
            if name in readers:
                in_ch = maps[readers[name]][1].computed
            neck.append(partial(op.only, op=op.narrowed(in_ch), tracks=tracks))
        taps = [map_NCHW for map_NCHW, _ in maps]
        sources = run_graph(self.detector.steps, neck, taps, self.detector.sources)

        outputs = []
        for position, head in enumerate(self._ops(self.heads)):
            source_NCHW = sources[position]
            in_ch = head.op.in_ch
            name = f"head {position}"
            if name in readers:
                # probed channels are left out: BN would turn their zeros into something
                in_ch = maps[readers[name]][1].active
                source_NCHW = fitted(source_NCHW, in_ch)
            outputs.append(head(source_NCHW, head.narrowed(in_ch), tracks))
        return predictions_of(outputs, self.detector.logits)

    def _ops(self, modules: nn.ModuleList) -> list[ElasticOp]:
        return [module for module in modules if isinstance(module, ElasticOp)]

    def copy_into(self, network: DetectionNetwork) -> None:
        """Copy the weights that a standalone detector uses into it. Its BN statistics
        stay unchanged if the super-net keeps none.
        """
        detector = detector_of(network.arch)
        pairs: list[tuple[Any, Any, Op]] = [
            *zip(self.neck_layers, network.neck_layers.children(), detector.neck, strict=True),
            *zip(self.heads, network.heads, detector.heads, strict=True),
        ]
        for shared, block, op in pairs:
            copy_into(block, shared.weights(op))

    def initialise(self, generator: torch.Generator, how: str) -> None:
        """Initialise as torchvision does; ``how`` is for the backbone only."""
        del how
        initialise_detector(self.neck_layers, self.heads, self.detector.scores, generator)

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
