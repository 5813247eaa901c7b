"""Architectures: one concrete network, as the list of its blocks, with a detector on
them or without.

A network of cells is no chain: its ``graph`` says which block reads what.
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

from hwnas.core.detector import Detector
from hwnas.core.graph import StepKey, shapes
from hwnas.core.head import ClassifierHead, DetectorHead, Head
from hwnas.core.ops import Op, OpKey
from hwnas.document import Document

Picks = dict[str, str | int]
"""Choice key -> the option picked (``"s2.b1" -> "ir_k5_e6"``, ``"s2.width" -> 32``):
the genotype.
"""


_ENDS = {"classifier": "a classifier", "ssd": "a head of a detector"}
"""What only the last block may be."""


class Origin(BaseModel):
    """Where an architecture came from: the space (name, sha256) and the picks that decode to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: str
    space_sha256: str
    picks: Picks


@dataclass(frozen=True)
class Placed:
    """A place of a network: its name, the op in it (None: it is left empty), and the
    shape that leaves it.
    """

    slot: str
    op: Op | None
    channels: int
    size: int

    @classmethod
    def of(cls, slot: str, op: Op) -> Self:
        """A place with an op in it."""
        return cls(slot, op, op.out_ch, op.out_size)


class Architecture(Document):
    """A network as a chain of ops, input to output (the phenotype), and the detector on
    it, if it is not a classifier.

    Where there is a ``graph``, it takes the chain's place, and ``blocks`` are its ops
    in the order they run.

    Everything downstream needs only this: building, counting, pricing, exporting.
    ``bn_eps`` is part of it because it is part of the function the weights compute.
    """

    SCHEMA: ClassVar[str] = "hwnas.architecture"

    name: str
    in_channels: int = 3
    bn_eps: float = Field(default=1e-3, gt=0)
    blocks: tuple[OpKey, ...] = Field(min_length=1)
    graph: tuple[StepKey, ...] = ()
    detector: Detector | None = None
    origin: Origin | None = None

    @model_validator(mode="after")
    def _chain(self) -> Self:
        channels, size = self.in_channels, self.blocks[0].size
        if self.graph:
            shapes(self.graph, self.blocks, (channels, size))
        for position, op in enumerate(self.blocks):
            if not self.graph and (op.in_ch, op.size) != (channels, size):
                raise ValueError(
                    f"block {position} ({op.key}) takes {op.in_ch} channels at {op.size} px, but"
                    f" gets {channels} at {size} px"
                )
            if op.kind in _ENDS and op is not self.blocks[-1]:
                raise ValueError(
                    f"block {position} ({op.key}) is {_ENDS[op.kind]}, but not the last block"
                )
            channels, size = op.out_ch, op.out_size
        self.head.check(self.blocks, self.graph)
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``detector`` and ``graph`` where there are none, so that documents
        from before them keep their hash.
        """
        return {
            name: value
            for name, value in handler(self).items()
            if name not in ("detector", "graph") or value
        }

    @property
    def head(self) -> Head:
        """What makes its outputs."""
        return (
            ClassifierHead(self.blocks[-1])
            if self.detector is None
            else DetectorHead(self.detector)
        )

    def ops(self) -> tuple[Op, ...]:
        """The measurable units of the network: blocks, then extras and heads of the
        detector. Its latency is the sum over them.
        """
        return (*self.blocks, *self.head.after.values())

    def placed(self) -> tuple[Placed, ...]:
        """Its ops, in the order of ``ops``, by what they are called where no space
        names them: ``block 0``.
        """
        blocks = {f"block {i}": op for i, op in enumerate(self.blocks)}
        return tuple(Placed.of(name, op) for name, op in (blocks | self.head.after).items())

    @property
    def wiring(self) -> tuple[str, ...]:
        """What decides beside its ops which of them reads what; nothing for a chain."""
        return (*self.head.wiring, *(step.key for step in self.graph))

    @property
    def is_chain(self) -> bool:
        """Whether its ops, one after another, are all of it."""
        return not self.wiring

    @property
    def identity(self) -> str:
        """Equal for architectures with the same blocks, which read the same."""
        return "|".join([*(op.key for op in self.blocks), *(step.key for step in self.graph)])

    @property
    def task(self) -> str:
        """The name of the task that it is for: ``"detect"`` with a detector on it, else
        ``"classify"``.
        """
        return self.head.task

    @property
    def resolution(self) -> int:
        """Input height = width in pixels."""
        return self.blocks[0].size

    @property
    def classes(self) -> int:
        """Number of classes: outputs of a classifier, or what a detector tells apart
        beside the background.
        """
        return self.head.classes

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions and fully connected layers."""
        return sum(op.macs for op in self.ops())

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(op.params for op in self.ops())
