"""The part that all direct file writers share: the walk over programs and networks, and
weights with batch norms folded in.

A latency table needs a file for every op of a search space, and a trained network needs
one at the end. A converter takes 1 to 3 s per block. Since ``core.ir`` defines what a
block computes, ``tflite_writer`` and ``onnx_writer`` write the same graph in
milliseconds. Their tests compare them with the converters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hwnas.core.detection import detector_of
from hwnas.core.detector import CODE_SIZE
from hwnas.core.graph import Step, used_steps
from hwnas.core.ir import INPUT, POOLS, Node, Program
from hwnas.core.ops import Op
from hwnas.errors import ExportError
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import Network

V = TypeVar("V")
"""The type by which a format refers to values of its graph: an index or a name."""

Numbers = npt.NDArray[np.float64]


class BlockWriter(ABC, Generic[V]):
    """Translates programs into operators of a graph. Each subclass implements the
    operators of one format.
    """

    scope = ""
    """Prefix of all names, which makes them unique in a network."""

    def network(self, x: V, network: Network) -> tuple[V, ...]:
        """Add a network. Returns its outputs: logits, or for a detector, class logits
        and box codes with one row per anchor.
        """
        if isinstance(network, DetectionNetwork):
            return self.detector(x, network)
        if network.arch.graph:
            blocks = zip(network.arch.blocks, network.blocks, strict=True)
            last = len(network.arch.graph)
            return tuple(self._graph([x], network.arch.graph, [last], blocks, "blocks"))
        return (self._chain(x, network.arch.blocks, list(network.blocks), "blocks.")[-1],)

    def block(self, x: V, op: Op, module: nn.Module) -> tuple[V, ...]:
        """Add an op, and return its outputs. Raises ExportError if ``module`` was not
        built from ``op``.
        """
        program = op.program
        moved = _moved_norms(program)
        values = {INPUT: x}
        for value, node in enumerate(program.nodes, start=1):
            read = [values[number] for number in node.inputs]
            if node.kind == "conv":
                weight_OIHW, bias_O = folded(node, _part(op, module, node))
                if value in moved:
                    norm, channels = moved[value]
                    scale_C, shift_C = _normed(norm, _part(op, module, norm))
                    weight_OIHW = weight_OIHW * scale_C[channels, None, None, None]
                    bias_O = bias_O * scale_C[channels] + shift_C[channels]
                values[value] = self.conv(read[0], node, weight_OIHW, bias_O)
            elif any(node is norm for norm, _ in moved.values()):
                # the BN itself is in the convolutions now, but its activation is not
                values[value] = self.act(read[0], f"{node.name}.act", node.act)
            elif node.kind == "mean":
                # a linear layer takes [1, channels], everything else a map
                readers = [other for other in program.nodes if value in other.inputs]
                flat = any(reader.kind == "linear" for reader in readers)
                values[value] = self.mean(read[0], node.name, flat=flat)
            else:
                values[value] = self._node(node, read, op, module)
        return tuple(values[number] for number in program.outputs)

    def _node(self, node: Node, read: list[V], op: Op, module: nn.Module) -> V:
        if node.kind == "linear":
            weight_OI, bias_O = _linear(op, node, module)
            return self.linear(read[0], node.name, weight_OI, bias_O)
        if node.kind in POOLS:
            pooled = self.pool(read[0], node)
            if not node.norm:
                return pooled
            return self.scaled(pooled, node, *_normed(node, _part(op, module, node)))
        if node.kind == "norm":
            return self.scaled(read[0], node, *_normed(node, _part(op, module, node)))
        if node.kind == "channels":
            conv = _part(op, module, node).get_submodule("conv")
            kernel_K = float64(conv.get_parameter("weight")).reshape(-1)
            return self.along_channels(read[0], node, kernel_K)
        return self._plain(node, read)

    def _plain(self, node: Node, read: list[V]) -> V:
        """A node without weights."""
        if node.kind == "act":
            return self.act(read[0], node.name, node.act)
        if node.kind == "add":
            return self.add(read[0], read[1], node.name)
        if node.kind == "mul":
            return self.mul(read[0], read[1], node.name)
        if node.kind == "concat":
            return self.channels_joined(read, node.name)
        if node.kind == "shuffle":
            return self.shuffle(read[0], node.name, node.groups)
        if node.kind == "upsample":
            return self.upsample(read[0], node.name)
        assert node.kind == "crop", node.kind
        return self.crop(read[0], node.name)

    def _chain(self, x: V, ops: Sequence[Op], modules: Sequence[nn.Module], scope: str) -> list[V]:
        """Add a chain of ops, and return the outputs of all of them."""
        outputs = []
        for position, (op, module) in enumerate(zip(ops, modules, strict=True)):
            self.scope = f"{scope}{position}."
            (x,) = self.block(x, op, module)
            outputs.append(x)
        self.scope = ""
        return outputs

    def _graph(
        self,
        inputs: Sequence[V],
        graph: Sequence[Step],
        outputs: Sequence[int],
        blocks: Iterator[tuple[Op, nn.Module]],
        name: str,
    ) -> list[V]:
        """Add a graph, and return the values of its points ``outputs``. ``name`` is that
        of the module that contains its ``blocks``.
        """
        points = dict(enumerate(inputs))
        used = used_steps(graph, outputs, len(inputs))
        numbered = enumerate(blocks)
        for number, step in enumerate(graph):
            block = next(numbered) if step.kind == "op" else None
            if number not in used:
                # Runtimes do not run it, so the quantizer would find no range for it.
                continue
            read = [points[point] for point in step.of]
            self.scope = f"steps.{number}."
            if block is not None:
                position, (op, module) = block
                # the names of a chain, so that files of both kinds read alike
                self.scope = f"{name}.{position}."
                (result,) = self.block(read[0], op, module)
            elif step.kind == "sum":
                # runtimes add two maps at a time
                result = read[0]
                for term, other in enumerate(read[1:]):
                    result = self.add(result, other, f"add{term}")
            elif step.kind == "concat":
                result = self.channels_joined(read, "concat")
            elif step.kind == "cut":
                result = self.first_channels(read[0], "cut", step.channels)
            else:
                result = self.zeros("zero", step.channels, step.size)
            points[len(inputs) + number] = result
        self.scope = ""
        return [points[point] for point in outputs]

    def predictions(self, x: V, network: DetectionNetwork) -> list[tuple[V, V]]:
        """Add a detector. Returns the class logits and box codes of each of
        its maps.
        """
        detector = detector_of(network.arch)
        blocks = self._chain(x, network.arch.blocks, list(network.blocks), "blocks.")
        taps = [blocks[tap] for tap in detector.taps]
        neck = zip(detector.neck, network.neck_layers.children(), strict=True)
        maps = self._graph(taps, detector.steps, detector.sources, neck, detector.NECK)
        heads = zip(maps, detector.heads, network.heads, strict=True)
        predictions = []
        for position, (feature_map, op, head) in enumerate(heads):
            self.scope = f"heads.{position}."
            classes, boxes = self.block(feature_map, op, head)
            predictions.append((classes, boxes))
        self.scope = ""
        return predictions

    def detector(self, x: V, network: DetectionNetwork) -> tuple[V, V]:
        """Add a detector. Returns its raw outputs with one row per anchor: class logits
        and box codes.
        """
        logits_per_anchor = detector_of(network.arch).logits
        logits = []
        codes = []
        for position, (classes, boxes) in enumerate(self.predictions(x, network)):
            self.scope = f"heads.{position}."
            logits.append(self.rows("classes", classes, logits_per_anchor))
            codes.append(self.rows("boxes", boxes, CODE_SIZE))
        self.scope = ""
        return self.concatenate("logits", logits), self.concatenate("codes", codes)

    @abstractmethod
    def conv(self, x: V, node: Node, weight_OIHW: Numbers, bias_O: Numbers) -> V:
        """Convolution with a bias, and the node's activation."""

    @abstractmethod
    def linear(self, x: V, name: str, weight_OI: Numbers, bias_O: Numbers) -> V:
        """A fully connected layer on [1, in_ch]."""

    @abstractmethod
    def pool(self, x: V, node: Node) -> V:
        """k x k pooling. Averages do not count the padding."""

    @abstractmethod
    def scaled(self, x: V, node: Node, scale_C: Numbers, shift_C: Numbers) -> V:
        """x * scale + shift per channel, and the node's activation: a BN that cannot be
        folded into a convolution.
        """

    @abstractmethod
    def along_channels(self, x: V, node: Node, kernel_K: Numbers) -> V:
        """A 1-D convolution along the channels of a single pixel, and the node's
        activation.
        """

    @abstractmethod
    def act(self, x: V, name: str, act: str) -> V:
        """An activation."""

    @abstractmethod
    def mean(self, x: V, name: str, *, flat: bool) -> V:
        """Global average pooling to a single pixel, or with ``flat`` to [1,
        channels].
        """

    @abstractmethod
    def add(self, x: V, y: V, name: str) -> V:
        """The sum of two maps."""

    @abstractmethod
    def mul(self, x: V, gate: V, name: str) -> V:
        """The product of a map and a gate of a single pixel."""

    @abstractmethod
    def shuffle(self, x: V, name: str, groups: int) -> V:
        """Channel i of group g becomes channel i * groups + g."""

    @abstractmethod
    def crop(self, x: V, name: str) -> V:
        """The map without its first row and its first column."""

    @abstractmethod
    def upsample(self, x: V, name: str) -> V:
        """Bilinear interpolation to twice the height and width, half-pixel centres."""

    @abstractmethod
    def channels_joined(self, parts: Sequence[V], name: str) -> V:
        """The concatenation of maps along the channels."""

    @abstractmethod
    def first_channels(self, x: V, name: str, channels: int) -> V:
        """The first channels of a map."""

    @abstractmethod
    def zeros(self, name: str, channels: int, size: int) -> V:
        """A map of zeros."""

    @abstractmethod
    def rows(self, name: str, x: V, columns: int) -> V:
        """A map of predictions, reshaped to [1, size * size * anchors, columns], cell
        by cell.
        """

    @abstractmethod
    def concatenate(self, name: str, parts: Sequence[V]) -> V:
        """The concatenation of the rows of all maps."""


def _moved_norms(program: Program) -> dict[int, tuple[Node, slice]]:
    """The BNs after a concatenation of convolutions that can be folded into these
    convolutions: value of a convolution -> node of the BN, and the convolution's
    channels in it.

    A BN scales and shifts each channel, so each convolution takes the part for its own
    channels.
    """
    # how often each value is read: a map that is read twice must stay as it is
    readers = Counter(value for node in program.nodes for value in node.inputs)
    moved: dict[int, tuple[Node, slice]] = {}
    for norm in program.nodes:
        joined = program.nodes[norm.inputs[0] - 1]
        if (
            norm.kind != "norm"
            or norm.inputs[0] == INPUT
            or joined.kind != "concat"
            or readers[norm.inputs[0]] > 1
        ):
            continue
        parts = [program.nodes[value - 1] for value in joined.inputs]
        # an activation between convolution and BN is not linear: nothing can be folded
        plain = all(part.kind == "conv" and not part.norm and part.act == "none" for part in parts)
        # A convolution that something else reads must keep its own output.
        if plain and all(readers[value] == 1 for value in joined.inputs):
            start = 0
            # the channels of the concatenation are those of its parts, in order
            for value, part in zip(joined.inputs, parts, strict=True):
                moved[value] = (norm, slice(start, start + part.out_ch))
                start += part.out_ch
    return moved


def folded(node: Node, module: nn.Module) -> tuple[Numbers, Numbers]:
    """The weights [O, I / groups, k, k] and the bias [O] of a convolution, with the BN
    after it folded in.

    BN(Wx) = sWx + beta - s mean, with s = gamma / sqrt(var + eps). Without BN and bias,
    the bias is 0. Raises ExportError if the module does not fit the node.
    """
    conv = module.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    _require_shape(
        conv.weight, (node.out_ch, node.in_ch // node.groups, node.kernel, node.kernel), node.name
    )
    weight_OIHW = float64(conv.weight)
    if node.norm:
        scale_O, shift_O = _normed(node, module)
        return weight_OIHW * scale_O[:, None, None, None], shift_O
    bias_O = np.zeros(node.out_ch) if conv.bias is None else float64(conv.bias)
    return weight_OIHW, bias_O


def _normed(node: Node, module: nn.Module) -> tuple[Numbers, Numbers]:
    """The scale and the shift [C] of a node's BN in eval mode."""
    norm = module.get_submodule("norm")
    assert (
        isinstance(norm, nn.BatchNorm2d)
        and norm.running_mean is not None
        and norm.running_var is not None
    )
    _require_shape(norm.running_mean, (node.out_ch,), node.name)
    scale_C = 1 / np.sqrt(float64(norm.running_var) + norm.eps)
    # the BN after pooling has no scale and shift of its own
    if not norm.affine:
        return scale_C, -scale_C * float64(norm.running_mean)
    scale_C = float64(norm.weight) * scale_C
    return scale_C, float64(norm.bias) - scale_C * float64(norm.running_mean)


def _linear(op: Op, node: Node, module: nn.Module) -> tuple[Numbers, Numbers]:
    linear = _part(op, module, node)
    assert isinstance(linear, nn.Linear)
    _require_shape(linear.weight, (node.out_ch, node.in_ch), op.key)
    return float64(linear.weight), float64(linear.bias)


def float64(values: Tensor) -> Numbers:
    """The values of a tensor as float64. Folding in float32 would add
    rounding errors.
    """
    array: Numbers = values.detach().to("cpu", torch.float64).numpy()
    return array


def _part(op: Op, module: nn.Module, node: Node) -> nn.Module:
    """The submodule of an op's module with the weights of a node. Raises
    ExportError if there is none.
    """
    path = op.WEIGHTS + node.name
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ExportError(
            f"The {type(module).__name__} has no {path}, so it was not built from {op.key}:"
            " build it with hwnas.nn.blocks.build"
        ) from None


def _require_shape(weight: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(weight.shape) != shape:
        raise ExportError(
            f"The weights of {name} are {list(weight.shape)} in the module, but {list(shape)} in"
            " the op: build the module from this op"
        )
