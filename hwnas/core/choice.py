"""The choices of a search space, and the terms of the cost of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

from hwnas.core.ops import Op
from hwnas.errors import SpaceError

Option = str | int
RESOLUTION = "resolution"
"""The key of the choice of the input resolution."""

Kind = Literal["block", "width", "depth", "resolution", "edge", "inputs", "vertex", "link"]
_KEYS: dict[Kind, str] = {
    "block": "{part}.b{slot}",
    "width": "{part}.width",
    "depth": "{part}.depth",
    "resolution": RESOLUTION,
    "edge": "{part}.e{source}-{node}",
    "inputs": "{part}.n{node}.inputs",
    "vertex": "v{node}",
    "link": "e{source}-{node}",
}
"""The format of each kind of key. No key matches two formats."""
# no leading zeros: every address has exactly one key
_NUMBERS = {name: rf"(?P<{name}>0|[1-9]\d*)" for name in ("slot", "source", "node")}


def _key_pattern(key_format: str) -> re.Pattern[str]:
    """A regular expression for the keys of a format."""
    # only the dot is special in both keys and regular expressions; re.escape would also
    # escape the braces
    escaped = key_format.replace(".", r"\.")
    return re.compile(escaped.format(part=r"(?P<part>\w+)", **_NUMBERS), re.ASCII)


_PATTERNS = {kind: _key_pattern(key_format) for kind, key_format in _KEYS.items()}


@dataclass(frozen=True)
class Address:
    """The part of a network that a choice decides: its key, parsed into fields. Fields
    that a ``kind`` does not use keep their defaults.

    For ``block``, ``width`` and ``depth``, ``part`` is a stage (``"s2"``) and ``slot``
    the index of a block in it. For ``edge`` and ``inputs``, ``part`` is a kind of cell
    (``"normal"``); an edge leads from node ``source`` to ``node``, and ``inputs``
    decides which edges into ``node`` are kept. ``vertex`` and ``link`` belong to the
    single kind of cell of NAS-Bench-101.

    Example:
        >>> Address.parse("s2.b1")
        Address(kind='block', part='s2', slot=1, source=0, node=0)
        >>> Address("edge", "normal", source=1, node=3).key
        'normal.e1-3'
    """

    kind: Kind
    part: str = ""
    slot: int = 0
    source: int = 0
    node: int = 0

    @property
    def key(self) -> str:
        """The key of the choice in picks and documents."""
        return _KEYS[self.kind].format(
            part=self.part, slot=self.slot, source=self.source, node=self.node
        )

    @classmethod
    @cache
    def parse(cls, key: str) -> Self:
        """Parse the key of a choice. Raises SpaceError if it is not one."""
        for kind, pattern in _PATTERNS.items():
            match = pattern.fullmatch(key)
            if match is not None:
                fields = match.groupdict(default="")
                part = fields.pop("part", "")
                numbers = {name: int(digits) for name, digits in fields.items()}
                return cls(kind, part, **numbers)
        raise SpaceError(
            f"{key!r} is not the key of a choice: keys look like {', '.join(_KEYS.values())}."
        )


@dataclass(frozen=True)
class Choice:
    """One decision of a search.

    ``kind`` is ``"op"`` for the block of a slot or the op of an edge, ``"width"`` for
    the channels of a stage, ``"depth"`` for its number of slots, ``"resolution"`` for
    the height = width of the image in pixels, and ``"inputs"`` for the edges that a
    node of a cell keeps.
    """

    key: str
    options: tuple[Option, ...]
    kind: Literal["op", "width", "depth", "resolution", "inputs"]

    @property
    def address(self) -> Address:
        """The part of a network that it decides. Raises SpaceError if the key has an
        unknown format.
        """
        return Address.parse(self.key)


def open_choices(decisions: Sequence[Choice]) -> tuple[Choice, ...]:
    """The decisions with more than one option."""
    return tuple(choice for choice in decisions if len(choice.options) > 1)


@dataclass(frozen=True)
class Term:
    """What one slot adds to the cost of a network.

    ``keys`` are the choices that the cost depends on and ``shape`` their option counts.
    ``ops`` has the op for every combination of these options, in row-major order; None
    if the slot is skipped or left out by the depth. In a chain of blocks the keys come
    in this order: the block of the slot, the width before it, the width after it, the
    depth, the resolution; those with a single option are left out. ``options`` are the
    options of the slot itself, even if there is just one.
    """

    slot: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    ops: tuple[Op | None, ...]
    options: tuple[str, ...] = ()

    @classmethod
    def over(
        cls,
        slot: str,
        counts: Mapping[str, int],
        ops: Iterable[Op | None],
        options: tuple[str, ...] = (),
    ) -> Self:
        """The term of a slot whose cost depends on decisions with these option counts.
        Decisions with a single option are not choices, so they are left out.
        """
        shape = {key: count for key, count in counts.items() if count > 1}
        return cls(slot, tuple(shape), tuple(shape.values()), tuple(ops), options)
