"""What the direct writers of files share: the walk over an op's layers, and the weights with batch norms folded in.

A latency table needs a file for every op of a search space. Converting a block takes a converter 1 to 3 s; since our blocks are
few and known, ``tflite_writer`` and ``onnx_writer`` write the same graph in milliseconds. The converters judge them, in their tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hwnas.core.op import Layer, Op
from hwnas.errors import ExportError
from hwnas.nn.detector import CODE_SIZE, DetectionNetwork, detector_of

V = TypeVar("V")
"""How a format refers to a value of its graph: by index or by name."""


class BlockWriter(ABC, Generic[V]):
    """Adds ops to a graph, in the order of ``nn.blocks.Block``. A subclass knows the operators of one format."""

    scope = ""
    """Goes before all names, so that they are unique in a network."""

    def chain(self, x: V, ops: Sequence[Op], modules: Sequence[nn.Module]) -> V:
        """Add ops one after another, and return the last one's output. Raises ExportError where a module is not its op's."""
        return self.outputs(x, ops, modules, "blocks." if len(ops) > 1 else None)[-1]

    def outputs(self, x: V, ops: Sequence[Op], modules: Sequence[nn.Module], scope: str | None) -> list[V]:
        """Add ops one after another, and return the outputs of all. Without a ``scope`` there is one op, and its names stand alone."""
        outputs = []
        for position, (op, module) in enumerate(zip(ops, modules, strict=True)):
            self.scope = "" if scope is None else f"{scope}{position}."
            x = self._op(x, op, module)
            outputs.append(x)
        return outputs

    def predictors(self, x: V, op: Op, module: nn.Module, scope: str = "") -> tuple[V, V]:
        """Add an ``ssd`` op, and return its outputs: class logits and box codes of each cell's anchors."""
        self.scope = scope
        branches = {"classes": x, "boxes": x}
        for layer in op.layers:
            branch = layer.name.partition(".")[0]
            branches[branch] = self.conv(branches[branch], layer, _part(op, module, layer.name))
        return branches["classes"], branches["boxes"]

    def predictions(self, x: V, network: DetectionNetwork) -> list[tuple[V, V]]:
        """Add a whole detector, and return the class logits and box codes of each of its maps."""
        detector = detector_of(network.arch)
        blocks = self.outputs(x, network.arch.blocks, list(network.blocks), "blocks.")
        extras = self.outputs(blocks[-1], detector.extras, list(network.extras), "extras.")
        maps = [*(blocks[tap] for tap in detector.taps), *extras]
        heads = enumerate(zip(maps, detector.heads, network.heads, strict=True))
        return [self.predictors(each, op, head, f"heads.{position}.") for position, (each, op, head) in heads]

    def detector(self, x: V, network: DetectionNetwork) -> tuple[V, V]:
        """Add a whole detector, and return its raw outputs: class logits [1, anchors, classes + 1] and box codes [1, anchors, 4]."""
        logits, codes = [], []
        for position, (classes, boxes) in enumerate(self.predictions(x, network)):
            self.scope = f"heads.{position}."
            logits.append(self.rows("classes", classes, network.arch.classes + 1))
            codes.append(self.rows("boxes", boxes, CODE_SIZE))
        self.scope = ""
        return self.concatenated("logits", logits), self.concatenated("codes", codes)

    def _op(self, x: V, op: Op, module: nn.Module) -> V:
        if op.kind == "classifier":
            linear = _part(op, module, "linear")
            assert isinstance(linear, nn.Linear)
            _require_shape(linear.weight, (op.out_ch, op.in_ch), op.key)
            return self.classifier(x, float64(linear.weight), float64(linear.bias))
        entry = x
        if op.pooled:
            x = self.pool(x)
        layers = {layer.name: layer for layer in op.layers}
        for name, layer in layers.items():
            if name == "depthwise" and op.shuffled:
                x = self.shuffle(x, op.groups)
            if name == "se_reduce":
                x = self.squeeze_excite(x, layer, layers["se_expand"], op.se_gate, _part(op, module, "layers.se"))
            elif name != "se_expand":
                x = self.conv(x, layer, _part(op, module, f"layers.{name}"))
        return self.add(entry, x) if op.residual else x

    @abstractmethod
    def conv(self, x: V, layer: Layer, module: nn.Module) -> V:
        """Convolution, BN (or bias) and activation; ``folded(layer, module)`` gives the weights."""

    @abstractmethod
    def shuffle(self, x: V, groups: int) -> V:
        """Channel i of group g becomes channel i * groups + g."""

    @abstractmethod
    def squeeze_excite(self, x: V, reduce: Layer, expand: Layer, gate: str, module: nn.Module) -> V:
        """x * gate(W2 relu(W1 mean(x))). ``module`` has the parts ``reduce`` and ``expand``."""

    @abstractmethod
    def pool(self, x: V) -> V:
        """Global average pooling that keeps the axes."""

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """The residual connection."""

    @abstractmethod
    def classifier(self, x: V, weight_OI: npt.NDArray[np.float64], bias_O: npt.NDArray[np.float64]) -> V:
        """Global average pooling and a fully connected layer."""

    @abstractmethod
    def rows(self, name: str, x: V, columns: int) -> V:
        """A map of predictions as [1, size * size * anchors, columns], cell by cell."""

    @abstractmethod
    def concatenated(self, name: str, parts: Sequence[V]) -> V:
        """The rows of all maps one after another."""


def folded(layer: Layer, module: nn.Module) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weights [O, I / groups, k, k] and bias [O] of a convolution with the BN after it, if any, folded in.

    A layer has a BN or a bias. BN(Wx) = sWx + beta - s mean, with s = gamma / sqrt(var + eps). Raises ExportError where the
    module is not that layer's.
    """
    conv = module.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    _require_shape(conv.weight, (layer.out_ch, layer.in_ch // layer.groups, layer.kernel, layer.kernel), layer.name)
    weight_OIHW = float64(conv.weight)
    if not layer.norm:
        assert conv.bias is not None
        return weight_OIHW, float64(conv.bias)
    norm = module.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    scale_O = float64(norm.weight) / np.sqrt(float64(norm.running_var) + norm.eps)
    return weight_OIHW * scale_O[:, None, None, None], float64(norm.bias) - scale_O * float64(norm.running_mean)


def float64(values: Tensor) -> npt.NDArray[np.float64]:
    """A tensor's values, on the CPU and apart from its graph."""
    array: npt.NDArray[np.float64] = values.detach().to("cpu", torch.float64).numpy()
    return array


def _part(op: Op, module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ExportError(f"A {type(module).__name__} without {path} is not the module of {op.key}: build the one with the other") from None


def _require_shape(weight: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(weight.shape) != shape:
        raise ExportError(f"The weights of {name} are {list(weight.shape)} in the module and {list(shape)} in the op")
