"""The measurable unit: one block of a network with everything that decides its latency, and nothing else.

An op is written as a key, for instance::

    mbconv-h56-i32-o32-m96-k5-relu-id

kind, then fields by their letters: ``h`` input height = width, ``i``/``o`` input/output channels, ``m`` channels of the
expanded (middle) part, ``k`` kernel, ``s`` stride, ``g`` groups, ``q`` hidden channels of squeeze-and-excitation, ``a`` anchors
of each cell, ``hsig`` where SE's gate is a hard sigmoid, ``bn`` where BN follows pooling, the activation, and ``id`` where the input is
added to the output. Fields at their defaults are left out, so a field added later leaves old keys as they are.
``Op.parse(op.key) == op``.

Kinds:

- ``conv``: k x k convolution, BN, activation (stem, 1 x 1 head)
- ``dsconv``: [shuffle]; depthwise k x k, BN, activation; [SE]; 1 x 1, BN (MobileNetV2's t=1 block)
- ``mbconv``: 1 x 1 expansion, BN, act; [shuffle]; depthwise k x k, BN, act; [SE]; 1 x 1 projection, BN (inverted bottleneck)
- ``head``: global average pooling, 1 x 1 convolution with bias and no BN, activation (MobileNetV3's last layer but one)
- ``classifier``: global average pooling and a fully connected layer with bias
- ``extra``: 1 x 1, BN, act; depthwise k x k, BN, act; 1 x 1, BN, act (SSDLite's layer that makes the next feature map)
- ``preconv``: act, k x k convolution, BN (an edge of a cell)
- ``sepconv``: act, depthwise k x k, 1 x 1, BN; and again with stride 1 (DARTS's separable convolution)
- ``dilconv``: act, depthwise k x k with dilation 2, 1 x 1, BN
- ``avgpool``, ``maxpool``: k x k pooling that does not count its padding (none where k is even: then it is the stride); with ``bn``,
  a BN without scale and shift behind it
- ``facreduce``: act, two 1 x 1 convolutions of stride 2 to half the channels each, the second one pixel further, BN (DARTS)
- ``resreduce``: act, k x k with a stride, BN; act, k x k, BN; added to 2 x 2 average pooling and 1 x 1 (NAS-Bench-201's reduction)
- ``norm``: BN, act
- ``ssd``: what SSDLite predicts from one feature map, two branches of depthwise k x k, BN, act; 1 x 1 convolution with bias: class
  logits, o = a * (classes + 1 for the background) channels, and box codes, 4 a channels

``g`` groups the 1 x 1 convolutions of a block. The channels are then shuffled before the depthwise convolution, as in
FBNet, or the groups would never mix: channel i of a group g becomes channel i * groups + g (ShuffleNet).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from hwnas.errors import SpaceError

POOLS = ("avgpool", "maxpool")
CELL_KINDS = ("preconv", "sepconv", "dilconv", *POOLS, "facreduce", "resreduce", "norm")
"""Ops of networks of cells, which have no groups and no residual."""
KINDS = ("conv", "dsconv", "mbconv", "head", "classifier", "extra", "ssd", *CELL_KINDS)
ACTIVATIONS = ("none", "relu", "relu6", "hswish")
SE_GATES = ("sigmoid", "hsig")
"""Gates of squeeze-and-excitation: TuNAS's, and MobileNetV3's relu6(x + 3) / 6."""
_LETTERS = {
    "h": "size",
    "i": "in_ch",
    "o": "out_ch",
    "m": "mid_ch",
    "k": "kernel",
    "s": "stride",
    "g": "groups",
    "q": "se_ch",
    "a": "anchors",
}


_FLAGS = {"id": "residual", "bn": "norm"}


@dataclass(frozen=True)
class Layer:
    """One convolution, fully connected layer, local pooling or BN inside an op, the unit of counting and of building.

    ``size`` is the input height = width; padding is ``dilation * (kernel // 2)`` on each side. What has no ``norm`` has a bias, but
    for pooling and what is ``bare``. ``pre`` is an activation before the layer, ``act`` one behind it.
    """

    name: str
    kind: Literal["conv", "linear", "avgpool", "maxpool", "norm"]
    in_ch: int
    out_ch: int
    size: int = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    norm: bool = True
    act: str = "none"
    pre: str = "none"
    dilation: int = 1
    bare: bool = False

    @property
    def out_size(self) -> int:
        """Output height = width."""
        return out_size(self.size, self.stride)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image; pooling and BN have none."""
        if self.kind not in ("conv", "linear"):
            return 0
        return self.out_size**2 * self.kernel**2 * (self.in_ch // self.groups) * self.out_ch

    @property
    def params(self) -> int:
        """Weights, plus BN scale and shift, or a bias where there is no BN. The BN behind pooling has neither."""
        if self.kind in POOLS:
            return 0
        weights = 0 if self.kind == "norm" else self.kernel**2 * (self.in_ch // self.groups) * self.out_ch
        return weights + (0 if self.bare else 2 if self.norm else 1) * self.out_ch


def out_size(size: int, stride: int) -> int:
    """Output height of a layer with padding ``kernel // 2``: ceil(size / stride)."""
    return -(-size // stride)


@dataclass(frozen=True)
class Op:
    """A block and its shape. See the module for the fields and the key."""

    kind: str
    size: int
    in_ch: int
    out_ch: int
    mid_ch: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    se_ch: int = 0
    act: str = "none"
    residual: bool = False
    se_gate: str = "sigmoid"
    anchors: int = 0
    norm: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpaceError(f"op kind {self.kind!r} is unknown; known: {', '.join(KINDS)}.")
        if self.act not in ACTIVATIONS:
            raise SpaceError(f"activation {self.act!r} is unknown; known: {', '.join(ACTIVATIONS)}.")
        if self.se_gate not in SE_GATES:
            raise SpaceError(f"SE gate {self.se_gate!r} is unknown; known: {', '.join(SE_GATES)}.")
        if (
            min(self.size, self.in_ch, self.out_ch, self.kernel, self.stride, self.groups) < 1
            or min(self.mid_ch, self.se_ch, self.anchors) < 0
        ):
            raise SpaceError(f"op {self.key} has a size, width, kernel, stride or group count below 1.")
        if self.kernel % 2 == 0 and not (self.kind in POOLS and self.kernel == self.stride):
            raise SpaceError(f"op {self.key}: kernels are odd here, padded by kernel // 2; those of pooling may be as large as its stride.")
        if (self.kind in ("mbconv", "extra")) != (self.mid_ch > 0):
            raise SpaceError(f"op {self.key}: expanded channels (m) belong to mbconv and extra, and to them alone.")
        if self.se_ch and self.kind not in ("dsconv", "mbconv"):
            raise SpaceError(f"op {self.key}: squeeze-and-excitation (q) belongs to dsconv and mbconv.")
        if self.se_gate != _DEFAULTS["se_gate"] and not self.se_ch:
            raise SpaceError(f"op {self.key}: a gate ({self.se_gate}) needs squeeze-and-excitation (q).")
        if self.pooled and (self.kernel, self.stride, self.groups, self.residual) != (1, 1, 1, False):
            raise SpaceError(f"op {self.key}: a {self.kind} has input size, input and output channels, and no kernel, stride or groups.")
        if self.kind in ("extra", "ssd") and (self.groups, self.residual) != (1, False):
            raise SpaceError(f"op {self.key}: a layer of a detector has no groups and no residual.")
        if (self.kind == "ssd") != (self.anchors > 0) or (self.kind == "ssd" and self.stride > 1):
            raise SpaceError(f"op {self.key}: anchors (a) belong to ssd, and to it alone, which has no stride.")
        if self.anchors and (self.out_ch % self.anchors or self.out_ch < 2 * self.anchors):
            raise SpaceError(
                f"op {self.key}: output channels are anchors (a) x (classes + 1), a multiple of {self.anchors} from {2 * self.anchors} on."
            )
        if self.kind in CELL_KINDS:
            self._check_of_cell()
        elif self.norm:
            raise SpaceError(f"op {self.key}: bn belongs to {' and '.join(POOLS)}.")
        if self.kind == "classifier" and self.act != "none":
            raise SpaceError(f"op {self.key}: a classifier has no activation.")
        if any(layer.in_ch % layer.groups or layer.out_ch % layer.groups for layer in self.layers):
            raise SpaceError(f"op {self.key}: {self.groups} groups do not divide its channels.")
        if self.residual and (self.in_ch != self.out_ch or self.stride != 1):
            raise SpaceError(f"op {self.key}: a residual needs equal input and output shapes.")

    def _check_of_cell(self) -> None:
        """Raise SpaceError where the shape of an op of a cell makes no sense."""
        if (self.groups, self.residual) != (1, False):
            raise SpaceError(f"op {self.key}: an op of a cell has no groups and no residual.")
        if self.norm and self.kind not in POOLS:
            raise SpaceError(f"op {self.key}: bn belongs to {' and '.join(POOLS)}.")
        if self.kind in (*POOLS, "norm") and self.in_ch != self.out_ch:
            raise SpaceError(f"op {self.key}: a {self.kind} does not change the width.")
        if self.kind in POOLS and self.act != "none":
            raise SpaceError(f"op {self.key}: pooling has no activation.")
        if self.kind in ("facreduce", "resreduce") and (self.stride != 2 or self.size % 2):
            raise SpaceError(f"op {self.key}: a {self.kind} halves an even size, so it has stride 2.")
        if self.kind == "facreduce" and (self.kernel > 1 or self.out_ch % 2):
            raise SpaceError(f"op {self.key}: a facreduce has 1 x 1 kernels and an even number of output channels.")
        if self.kind == "norm" and (self.kernel, self.stride) != (1, 1):
            raise SpaceError(f"op {self.key}: a norm has no kernel and no stride.")

    @cached_property
    def key(self) -> str:
        """The op's name in tables and files: ``[a-z0-9-]+``."""
        parts = [self.kind]
        parts += [f"{letter}{getattr(self, name)}" for letter, name in _LETTERS.items() if getattr(self, name) != _DEFAULTS.get(name)]
        parts += [self.se_gate] if self.se_gate != "sigmoid" else []
        parts += ["bn"] if self.norm else []
        parts += [self.act] if self.act != "none" else []
        parts += ["id"] if self.residual else []
        return "-".join(parts)

    @classmethod
    def parse(cls, key: str) -> Self:
        """The op of a key. Raises SpaceError where the key is not one."""
        kind, *parts = key.split("-")
        values: dict[str, int | str | bool] = {}
        for part in parts:
            match = re.fullmatch(r"([a-z])([0-9]+)", part)
            if part in ACTIVATIONS:
                values["act"] = part
            elif part in SE_GATES:
                values["se_gate"] = part
            elif part in _FLAGS:
                values[_FLAGS[part]] = True
            elif match and match[1] in _LETTERS:
                values[_LETTERS[match[1]]] = int(match[2])
            else:
                raise SpaceError(f"{key!r} is not an op key: {part!r} is no field of it.")
        missing = {"size", "in_ch", "out_ch"} - values.keys()
        if missing:
            raise SpaceError(f"{key!r} is not an op key: it lacks {', '.join(sorted(missing))}.")
        op = cls(kind, **values)  # type: ignore[arg-type]
        if op.key != key:
            raise SpaceError(f"{key!r} is not how this op is written; write {op.key!r}.")
        return op

    @property
    def pooled(self) -> bool:
        """Whether the op begins with global average pooling."""
        return self.kind in ("head", "classifier")

    @property
    def shuffled(self) -> bool:
        """Whether the channels are shuffled (in ``groups`` groups) before the depthwise convolution."""
        return self.groups > 1 and self.kind in ("dsconv", "mbconv")

    @property
    def out_size(self) -> int:
        """Output height = width; 1 after pooling."""
        return 1 if self.pooled else out_size(self.size, self.stride)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The op's layers in the order they run. Counting, building and writing files all start here."""
        if self.kind == "classifier":
            return (Layer("linear", "linear", self.in_ch, self.out_ch, norm=False),)
        if self.kind == "conv":
            return (Layer("conv", "conv", self.in_ch, self.out_ch, self.size, self.kernel, self.stride, self.groups, act=self.act),)
        if self.kind == "head":
            return (Layer("conv", "conv", self.in_ch, self.out_ch, norm=False, act=self.act),)
        if self.kind == "ssd":
            return (*self._branch("classes", self.out_ch), *self._branch("boxes", 4 * self.anchors))
        if self.kind in CELL_KINDS:
            return self._cell_layers()
        mid = self.mid_ch or self.in_ch
        inner = out_size(self.size, self.stride)
        layers = [Layer("depthwise", "conv", mid, mid, self.size, self.kernel, self.stride, mid, act=self.act)]
        if self.mid_ch:
            layers.insert(0, Layer("expand", "conv", self.in_ch, mid, self.size, groups=self.groups, act=self.act))
        if self.se_ch:
            layers.append(Layer("se_reduce", "conv", mid, self.se_ch, norm=False, act="relu"))
            layers.append(Layer("se_expand", "conv", self.se_ch, mid, norm=False))
        act = self.act if self.kind == "extra" else "none"
        layers.append(Layer("project", "conv", mid, self.out_ch, inner, groups=self.groups, act=act))
        return tuple(layers)

    def _cell_layers(self) -> tuple[Layer, ...]:
        inner, half = out_size(self.size, self.stride), self.out_ch // 2
        if self.kind == "preconv":
            return (Layer("conv", "conv", self.in_ch, self.out_ch, self.size, self.kernel, self.stride, pre=self.act),)
        if self.kind == "sepconv":
            return (
                self._separable("depthwise", self.size, self.stride),
                Layer("pointwise", "conv", self.in_ch, self.in_ch, inner),
                self._separable("depthwise2", inner),
                Layer("pointwise2", "conv", self.in_ch, self.out_ch, inner),
            )
        if self.kind == "dilconv":
            return (
                self._separable("depthwise", self.size, self.stride, dilation=2),
                Layer("pointwise", "conv", self.in_ch, self.out_ch, inner),
            )
        if self.kind == "facreduce":
            halves = (("even", half), ("odd", self.out_ch - half))
            convs = (Layer(name, "conv", self.in_ch, out, self.size, stride=2, norm=False, bare=True) for name, out in halves)
            return (*convs, Layer("norm", "norm", self.out_ch, self.out_ch, inner))
        if self.kind == "resreduce":
            return (
                Layer("first", "conv", self.in_ch, self.out_ch, self.size, self.kernel, self.stride, pre=self.act),
                Layer("second", "conv", self.out_ch, self.out_ch, inner, self.kernel, pre=self.act),
                Layer("shortcut", "conv", self.in_ch, self.out_ch, inner, norm=False, bare=True),
            )
        if self.kind == "norm":
            return (Layer("norm", "norm", self.in_ch, self.out_ch, self.size, act=self.act),)
        pool: Any = self.kind
        return (Layer("pool", pool, self.in_ch, self.out_ch, self.size, self.kernel, self.stride, norm=self.norm),)

    def _separable(self, name: str, size: int, stride: int = 1, dilation: int = 1) -> Layer:
        """A depthwise convolution with neither BN nor bias, for a 1 x 1 convolution follows."""
        shape: dict[str, Any] = {"kernel": self.kernel, "stride": stride, "groups": self.in_ch, "dilation": dilation}
        return Layer(name, "conv", self.in_ch, self.in_ch, size, **shape, norm=False, bare=True, pre=self.act)

    def _branch(self, name: str, columns: int) -> tuple[Layer, Layer]:
        depthwise = Layer(f"{name}.depthwise", "conv", self.in_ch, self.in_ch, self.size, self.kernel, groups=self.in_ch, act=self.act)
        return depthwise, Layer(f"{name}.predict", "conv", self.in_ch, columns, self.size, norm=False)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and fully connected layers for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        """Trainable parameters, BN scales and shifts included."""
        return sum(layer.params for layer in self.layers)


_DEFAULTS = {field.name: field.default for field in fields(Op)}


def _parsed(value: Any) -> Any:
    return Op.parse(value) if isinstance(value, str) else value


OpKey = Annotated[InstanceOf[Op], BeforeValidator(_parsed), PlainSerializer(lambda op: op.key, return_type=str)]
"""An op inside a document, where it is written as its key."""
