"""Architectures: one concrete network, as the list of its blocks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer, model_validator

from hwnas.core.op import Op
from hwnas.document import Document

Picks = dict[str, str | int]
"""Choice key -> the option picked (``"s2.b1" -> "ir_k5_e6"``, ``"s2.width" -> 32``): the genotype."""


def _op(value: Any) -> Any:
    return Op.parse(value) if isinstance(value, str) else value


OpKey = Annotated[InstanceOf[Op], BeforeValidator(_op), PlainSerializer(lambda op: op.key, return_type=str)]


class Origin(BaseModel):
    """Where an architecture came from: the space (name, sha256) and the picks that decode to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: str
    space_sha256: str
    picks: Picks


class Architecture(Document):
    """A network as a chain of ops, input to output (the phenotype).

    Everything downstream needs only this: building, counting, pricing, exporting. ``bn_eps`` is part of it because it
    is part of the function the weights compute.
    """

    SCHEMA: ClassVar[str] = "hwnas.architecture"

    name: str
    in_channels: int = 3
    bn_eps: float = Field(default=1e-3, gt=0)
    blocks: tuple[OpKey, ...] = Field(min_length=1)
    origin: Origin | None = None

    @model_validator(mode="after")
    def _chain(self) -> Self:
        channels, size = self.in_channels, self.blocks[0].size
        for position, op in enumerate(self.blocks):
            if (op.in_ch, op.size) != (channels, size):
                raise ValueError(f"block {position} ({op.key}) takes {op.in_ch} channels at {op.size} px, but gets {channels} at {size} px")
            if op.kind == "classifier" and op is not self.blocks[-1]:
                raise ValueError(f"block {position} ({op.key}) is a classifier, but not the last block")
            channels, size = op.out_ch, op.out_size
        return self

    def ops(self) -> tuple[Op, ...]:
        """The measurable units of the network. Its latency is the sum over them."""
        return self.blocks

    @property
    def resolution(self) -> int:
        """Input height = width in pixels."""
        return self.blocks[0].size

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.blocks[-1].out_ch

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions and fully connected layers."""
        return sum(op.macs for op in self.blocks)

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(op.params for op in self.blocks)
