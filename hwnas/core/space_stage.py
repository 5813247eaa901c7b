"""What a macro space is made of: stages, as they are written in its document, and slots
with the shapes around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from hwnas.core.choice import Address
from hwnas.core.ir import out_size
from hwnas.core.ops import Op
from hwnas.core.option import SKIP, Factors, factorise, parse_option

Residual = Literal["after_first", "matching"]


def block_key(stage: int, slot: int) -> str:
    """The choice of a block."""
    return Address("block", f"s{stage}", slot=slot).key


def width_key(stage: int) -> str:
    """The choice of a stage's channels."""
    return Address("width", f"s{stage}").key


def depth_key(stage: int) -> str:
    """The choice of a stage's number of blocks."""
    return Address("depth", f"s{stage}").key


class SpaceStage(BaseModel):
    """Slots in a row that share an output width. The first slot changes width and stride.

    ``residual`` says which slots add their input to their output: all but the first
    (``"after_first"``: TuNAS), or every slot whose shapes match (``"matching"``:
    MobileNetV2). ``widths`` with several entries makes the width a choice. ``depths``
    with several entries makes the number of slots one (once-for-all): a depth d keeps
    the first d slots.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[int, ...] = Field(min_length=1)
    stride: int = 1
    slots: tuple[tuple[str, ...], ...] = Field(min_length=1)
    act: str | None = None
    residual: Residual = "after_first"
    depths: tuple[int, ...] = ()

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``depths`` where there are none, so that documents from before it
        keep their hash.
        """
        return {name: value for name, value in handler(self).items() if name != "depths" or value}

    def check(self, key: str) -> None:
        """Raise ValueError where widths or depths make no sense; ``key`` is the stage's name."""
        if len(set(self.widths)) != len(self.widths) or min(self.widths) < 1:
            raise ValueError(f"stage {key} needs different widths above 0, got {list(self.widths)}")
        if self.depths and (
            len(set(self.depths)) != len(self.depths)
            or min(self.depths) < 1
            or max(self.depths) != len(self.slots)
        ):
            raise ValueError(
                f"stage {key} needs different depths, the largest of them its {len(self.slots)}"
                f" slots, got {list(self.depths)}"
            )


@dataclass(frozen=True)
class Slot:
    """A place for one block: its options, and the width choices before and after it.

    ``index`` is its position in its stage, whose ``depths`` (empty: always all) may
    leave it out. ``size`` is its input height = width at the space's largest
    resolution, ``sizes`` at every one, in the order of the space's resolutions.
    """

    key: str
    stage: int
    index: int
    options: tuple[str, ...]
    in_key: str
    in_widths: tuple[int, ...]
    out_key: str
    out_widths: tuple[int, ...]
    depth_key: str
    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    stride: int
    act: str
    residual: Residual

    @property
    def first(self) -> bool:
        """Whether it begins its stage."""
        return self.index == 0

    @property
    def size(self) -> int:
        """Input height = width at the largest resolution."""
        return max(self.sizes)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Output height = width at every resolution."""
        return tuple(1 if self.pooled else out_size(size, self.stride) for size in self.sizes)

    @property
    def pooled(self) -> bool:
        """Whether its blocks begin with global average pooling."""
        return any(
            block is not None and block.kind == "hd" for block in map(parse_option, self.options)
        )

    @property
    def elective(self) -> bool:
        """Whether a depth leaves it out."""
        return bool(self.depths) and self.index >= min(self.depths)

    def op(self, option: str, in_ch: int, out_ch: int, size: int | None = None) -> Op | None:
        """The op of ``option`` between two widths at an input size (default: the slot's
        own); None for skip.
        """
        block = parse_option(option)
        if block is None:
            return None
        matching = in_ch == out_ch and self.stride == 1 and block.adds_input
        residual = matching and (not self.first or self.residual == "matching")
        return block.op(
            in_ch, out_ch, self.size if size is None else size, self.stride, self.act, residual
        )

    @property
    def widths(self) -> Iterator[tuple[int, int]]:
        """The possible (input, output) widths."""
        if self.first:
            return product(self.in_widths, self.out_widths)
        return iter([(width, width) for width in self.out_widths])

    @property
    def factors(self) -> Factors:
        """The options taken apart into independent decisions."""
        return factorise(self.options)

    def check(self) -> None:
        """Raise ValueError (or SpaceError, of an op) where the options make no sense here."""
        if len(set(self.options)) != len(self.options) or not self.options:
            raise ValueError(
                f"slot {self.key} needs one or more different options, got {list(self.options)}"
            )
        if (
            SKIP in self.options
            and self.first
            and (self.stride > 1 or len(self.out_widths) > 1 or self.in_widths != self.out_widths)
        ):
            raise ValueError(f"slot {self.key} changes the shape, so it cannot offer 'skip'")
        kinds = {
            block.kind if block is not None else SKIP for block in map(parse_option, self.options)
        }
        if self.pooled and (kinds != {"hd"} or self.stride > 1):
            raise ValueError(
                f"slot {self.key} offers a pooled head ('hd'), so it has stride 1 and offers"
                " nothing else"
            )
        for option in self.options:
            for in_ch, out_ch in self.widths:
                self.op(option, in_ch, out_ch)
