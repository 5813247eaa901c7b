"""The height and width of images and feature maps.

Nearly all networks see squares, so a ``Size`` is a plain number, the height = width, or
else a ``Rectangle``. A rectangle is never a square, so equal sizes compare equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from hwnas.errors import SpaceError


@dataclass(frozen=True)
class Rectangle:
    """A height and another width, in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        assert self.height != self.width, "a square is a number"

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


Size: TypeAlias = int | Rectangle
"""A height = width, or a rectangle."""


def size_of(height: int, width: int) -> Size:
    """The size of these sides."""
    if height == width:
        return height
    return Rectangle(height, width)


def sides(size: Size) -> tuple[int, int]:
    """Height and width.

    >>> sides(20), sides(Rectangle(20, 40))
    ((20, 20), (20, 40))
    """
    if isinstance(size, Rectangle):
        return size.height, size.width
    return size, size


def by(size: Size, times: str = " x ") -> str:
    """Height and width in words.

    >>> by(20), by(Rectangle(20, 40))
    ('20 x 20', '20 x 40')
    """
    height, width = sides(size)
    return f"{height}{times}{width}"


def square(size: Size, owner: str) -> int:
    """The height = width of a square. Raises SpaceError, which names the ``owner`` of the
    size, if it is none.
    """
    if isinstance(size, Rectangle):
        raise SpaceError(
            f"{owner} takes square images, and {size} px are none: set data.resolution to one"
            " number."
        )
    return size


def area(size: Size) -> int:
    """Number of pixels."""
    height, width = sides(size)
    return height * width


def each_side(size: Size, change: Callable[[int], int]) -> Size:
    """The size whose sides are those of ``size``, changed."""
    height, width = sides(size)
    return size_of(change(height), change(width))


def strided(size: Size, stride: int) -> Size:
    """The output size of a layer with padding ``kernel // 2``: each side divided by the
    ``stride``, rounded up.

    >>> strided(Rectangle(15, 40), 2)
    Rectangle(height=8, width=20)
    """
    return each_side(size, lambda side: -(-side // stride))  # ceil in integer arithmetic


@dataclass(frozen=True)
class Pixels:
    """The annotation of a ``Size`` as a field of a document or a configuration, which
    writes it as a number or as ``[height, width]``. Each side has ``least`` to ``most``
    pixels.
    """

    least: int = 1
    most: int | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """A number, checked like any integer, or two of them."""
        return core_schema.no_info_wrap_validator_function(
            _checked,
            core_schema.int_schema(ge=self.least, le=self.most),
            serialization=core_schema.plain_serializer_function_ser_schema(written),
        )


SizeField = Annotated[Size, Pixels()]
"""A size as a field of a document."""


def _checked(value: Any, side: Callable[[Any], int]) -> Size:
    """A size from what a file has."""
    if isinstance(value, Rectangle):
        value = sides(value)
    if not isinstance(value, list | tuple):
        return side(value)
    if len(value) != 2:
        raise ValueError("input should be a number of pixels, or [height, width]")
    return size_of(side(value[0]), side(value[1]))


def written(size: Size) -> int | list[int]:
    """A size as a file writes it: a number, or ``[height, width]``."""
    if isinstance(size, Rectangle):
        return [size.height, size.width]
    return size
