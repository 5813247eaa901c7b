"""Architectures: one concrete network as a list of blocks, with or without a detector
on top.

A network of cells is not a chain: its ``graph`` says which block reads what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hwnas.core.detectors import AnyDetector
from hwnas.core.graph import StepKey, shapes
from hwnas.core.head import ClassifierHead, DetectorHead, Head
from hwnas.core.ops import Classifier, Op, OpKey, Predictor
from hwnas.core.size import Size, sides
from hwnas.document import Document

Picks = dict[str, str | int]
"""The genotype: choice key -> picked option, such as ``"s2.b1" -> "ir_k5_e6"`` or
``"s2.width" -> 32``.
"""


_ENDS = ((Classifier, "a classifier"), (Predictor, "a head of a detector"))
"""Ops that only the last block may be, and their names in messages."""


class Origin(BaseModel):
    """Where an architecture came from: the space (name, sha256) and the picks that
    decode to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: str
    space_sha256: str
    picks: Picks


@dataclass(frozen=True)
class Position:
    """A position in a network: its name, its op (None if the position is empty), and
    the output shape: ``channels`` and ``size``, its height and width.
    """

    slot: str
    op: Op | None
    channels: int
    size: Size

    @classmethod
    def of(cls, slot: str, op: Op) -> Self:
        """A position with an op."""
        return cls(slot, op, op.out_ch, op.out_size)


class Architecture(Document):
    """A network as a chain of ops, input to output (the phenotype), and its detector,
    if it is not a classifier.

    If there is a ``graph``, it replaces the chain, and ``blocks`` are its ops in the
    order they run.

    Everything downstream needs only this: building, counting, cost, export. ``bn_eps``
    is included because it is part of the function that the weights compute.
    """

    SCHEMA: ClassVar[str] = "hwnas.architecture"

    name: str
    in_channels: int = 3
    bn_eps: float = Field(default=1e-3, gt=0)
    blocks: tuple[OpKey, ...] = Field(min_length=1)
    graph: tuple[StepKey, ...] = ()
    detector: AnyDetector | None = None
    origin: Origin | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels = self.in_channels
        size = self.blocks[0].size
        if self.graph:
            # A graph has its own check of which shape each block gets.
            shapes(self.graph, self.blocks, [(channels, size)])
        for position, op in enumerate(self.blocks):
            if not self.graph and (op.in_ch, op.size) != (channels, size):
                raise ValueError(
                    f"block {position} ({op.key}) takes {op.in_ch} channels at {op.size} px, but"
                    f" gets {channels} at {size} px"
                )
            for kind, name in _ENDS:
                if isinstance(op, kind) and op is not self.blocks[-1]:
                    raise ValueError(
                        f"block {position} ({op.key}) is {name}, but not the last block"
                    )
            channels = op.out_ch
            size = op.out_size
        self.head.check(self.blocks, self.graph)
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out ``detector`` and ``graph`` if empty, so that documents older than
        these fields keep their hash.
        """
        document: dict[str, Any] = handler(self)
        for name in ("detector", "graph"):
            if not document.get(name):
                document.pop(name, None)
        return document

    @property
    def head(self) -> Head:
        """The part that makes the outputs: a classifier or a detector."""
        if self.detector is None:
            return ClassifierHead(self.blocks[-1])
        return DetectorHead(self.detector)

    def ops(self) -> tuple[Op, ...]:
        """The measurable units of the network: its blocks, then the extra layers and
        heads of the detector. Latency is the sum over them.
        """
        return (*self.blocks, *self.head.after.values())

    def positions(self) -> tuple[Position, ...]:
        """Its ops, in the order of ``ops``, with generic names (``block 0``), for
        networks without a space that names its positions.
        """
        blocks = {f"block {i}": op for i, op in enumerate(self.blocks)}
        return tuple(Position.of(name, op) for name, op in (blocks | self.head.after).items())

    @property
    def wiring(self) -> tuple[str, ...]:
        """Everything besides the ops that decides which op reads what; empty for a
        chain.
        """
        return (*self.head.wiring, *(step.key for step in self.graph))

    @property
    def is_chain(self) -> bool:
        """Whether the network is just its ops, one after another."""
        return not self.wiring

    @property
    def identity(self) -> str:
        """Equal for architectures with the same blocks in the same graph."""
        return "|".join([*(op.key for op in self.blocks), *(step.key for step in self.graph)])

    @property
    def task(self) -> str:
        """The name of its task: ``"detect"`` with a detector, else ``"classify"``."""
        return self.head.task

    @property
    def resolution(self) -> int:
        """Input height in pixels, and width unless ``size`` is a rectangle."""
        return self.size_HW[0]

    @property
    def size(self) -> Size:
        """Input height and width in pixels."""
        return self.blocks[0].size

    @property
    def size_HW(self) -> tuple[int, int]:  # noqa: N802 - shapes are written like that
        """The same as two numbers."""
        return sides(self.size)

    @property
    def classes(self) -> int:
        """Number of classes: the outputs of a classifier, or the classes of a detector
        without the background.
        """
        return self.head.classes

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, in convolutions and fully connected
        layers.
        """
        return sum(op.macs for op in self.ops())

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(op.params for op in self.ops())
