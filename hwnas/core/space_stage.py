"""The parts of a macro space: stages, as its document holds them, and slots, which add
the shapes around each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from hwnas.core.choice import Address
from hwnas.core.ops import Op
from hwnas.core.option import SKIP, Factors, factorise, parse_option
from hwnas.core.size import Size, area, strided

Residual = Literal["after_first", "matching"]
"""Which slots of a stage add their input to their output; see ``SpaceStage``."""


def block_key(stage: int, slot: int) -> str:
    """The key of the choice of a block."""
    return Address("block", f"s{stage}", slot=slot).key


def width_key(stage: int) -> str:
    """The key of the choice of a stage's channels."""
    return Address("width", f"s{stage}").key


def depth_key(stage: int) -> str:
    """The key of the choice of a stage's number of blocks."""
    return Address("depth", f"s{stage}").key


class SpaceStage(BaseModel):
    """A sequence of slots with the same output width. The first slot has the stride and
    changes the width.

    ``slots`` holds the options of every slot. ``residual`` says which slots add their
    input to their output: all but the first (``"after_first"``, as in TuNAS), or every
    slot whose shapes match (``"matching"``, as in MobileNetV2). Several ``widths`` make
    the width a choice; several ``depths`` make the number of slots a choice, as in
    once-for-all: a depth d keeps the first d slots. ``act`` is None if the stage uses
    the activation of the space.
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
        """Omit empty ``depths``: documents written before the field existed keep their
        hash.
        """
        content: dict[str, Any] = handler(self)
        if "depths" in content and not content["depths"]:
            del content["depths"]
        return content

    def check(self, key: str) -> None:
        """Raise ValueError if widths or depths are invalid; ``key`` names the stage in
        the message.
        """
        if len(set(self.widths)) != len(self.widths) or min(self.widths) < 1:
            raise ValueError(f"stage {key} needs different widths above 0, got {list(self.widths)}")
        if self.depths and (
            len(set(self.depths)) != len(self.depths)
            or min(self.depths) < 1
            or max(self.depths) != len(self.slots)
        ):
            raise ValueError(
                f"stage {key} needs different depths, and the largest must be its number of slots,"
                f" {len(self.slots)}, got {list(self.depths)}"
            )


@dataclass(frozen=True)
class Slot:
    """A position for one block: its options, and the possible shapes before and after
    it.

    ``index`` is its position in its stage. ``depths`` are those of the stage (empty if
    all slots are always kept). ``sizes`` holds the input size at every
    resolution of the space, in their order; ``size`` is the one at the largest
    resolution.
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
    sizes: tuple[Size, ...]
    stride: int
    act: str
    residual: Residual

    @property
    def first(self) -> bool:
        """Whether it is the first slot of its stage."""
        return self.index == 0

    @property
    def size(self) -> Size:
        """Input height and width at the largest resolution."""
        return max(self.sizes, key=area)

    @property
    def out_sizes(self) -> tuple[Size, ...]:
        """Output height and width at every resolution."""
        if self.pooled:
            return (1,) * len(self.sizes)
        return tuple(strided(size, self.stride) for size in self.sizes)

    @property
    def pooled(self) -> bool:
        """Whether its blocks begin with global average pooling."""
        return has_pooled_head(self.options)

    @property
    def elective(self) -> bool:
        """Whether some depth leaves it out."""
        return bool(self.depths) and self.index >= min(self.depths)

    def op(self, option: str, in_ch: int, out_ch: int, size: Size | None = None) -> Op | None:
        """The op of ``option`` from ``in_ch`` to ``out_ch`` channels at an input size
        (default: ``self.size``). None for skip.
        """
        block = parse_option(option)
        if block is None:
            return None
        if size is None:
            size = self.size
        # "after_first" leaves out the first slot even if its shapes match
        matching = in_ch == out_ch and self.stride == 1 and block.adds_input
        residual = matching and (not self.first or self.residual == "matching")
        return block.op(in_ch, out_ch, size, self.stride, self.act, residual)

    @property
    def widths(self) -> Iterator[tuple[int, int]]:
        """The possible (input, output) widths."""
        if self.first:
            return product(self.in_widths, self.out_widths)
        # later slots read the output of the same stage
        return iter([(width, width) for width in self.out_widths])

    @property
    def factors(self) -> Factors:
        """The options as independent decisions."""
        return factorise(self.options)

    def check(self) -> None:
        """Raise ValueError if the options are invalid in this slot. Raises SpaceError
        if an option or its op is invalid.
        """
        if len(set(self.options)) != len(self.options) or not self.options:
            raise ValueError(
                f"slot {self.key} needs one or more different options, got {list(self.options)}"
            )

        one_width = len(self.out_widths) == 1 and self.in_widths == self.out_widths
        may_change_shape = self.first and (self.stride > 1 or not one_width)
        if SKIP in self.options and may_change_shape:
            raise ValueError(f"slot {self.key} changes the shape, so it cannot offer 'skip'")

        all_pooled = all(map(_is_pooled_head, self.options))
        if self.pooled and (not all_pooled or self.stride > 1):
            raise ValueError(
                f"slot {self.key} offers a pooled head ('hd'), so it must have stride 1 and offer"
                " nothing else"
            )

        # ops check their own fields: make every one that can occur
        for option in self.options:
            for in_ch, out_ch in self.widths:
                self.op(option, in_ch, out_ch)


def has_pooled_head(options: tuple[str, ...]) -> bool:
    """Whether any of the options is a pooled head (``hd``)."""
    return any(map(_is_pooled_head, options))


def _is_pooled_head(option: str) -> bool:
    block = parse_option(option)
    return block is not None and block.kind == "hd"
