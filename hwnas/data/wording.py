"""How messages about data name files and classes, and count them."""

from __future__ import annotations

from collections.abc import Sequence

from hwnas.printable import one_line

EXAMPLES = 3
"""How many names a message lists."""


def shown(name: str) -> str:
    """The name of a file or a class for a message of one line."""
    return one_line(name)


def quoted(names: Sequence[str]) -> str:
    """The first names in quotes, and how many more there are.

    Example:
        >>> quoted(["ant", "bee", "cat", "dog"])
        "'ant', 'bee', 'cat' and 1 more"
    """
    return listed([f"'{shown(name)}'" for name in names])


def listed(examples: Sequence[str]) -> str:
    """The first examples, and how many more there are."""
    first = ", ".join(examples[:EXAMPLES])
    more = len(examples) - EXAMPLES
    return f"{first} and {more:,} more" if more > 0 else first


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number and a noun. ``plural`` is its plural if it does not end with just an s more.

    Example:
        >>> counted(1, "image"), counted(1_200, "image"), counted(2, "box", "boxes")
        ('1 image', '1,200 images', '2 boxes')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
