"""The decisions of a search, and what each adds to the cost of a network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

from hwnas.core.ops import Op
from hwnas.errors import SpaceError

Option = str | int
RESOLUTION = "resolution"
"""The key of the choice of the image size."""

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
"""How each kind of address is written. No key is of two kinds."""
_NUMBERS = {name: rf"(?P<{name}>0|[1-9]\d*)" for name in ("slot", "source", "node")}
_PATTERNS = {
    kind: re.compile(form.replace(".", r"\.").format(part=r"(?P<part>\w+)", **_NUMBERS), re.ASCII)
    for kind, form in _KEYS.items()
}


@dataclass(frozen=True)
class Address:
    """Where in a network a choice decides: what its key says, in fields. Those that a
    ``kind`` does not have stay as they are here.

    ``part`` is a stage (``"s2"``), where ``slot`` counts its blocks, or a kind of cell
    (``"normal"``), where an edge leads from node ``source`` to ``node``, and ``inputs``
    says which edges into ``node`` are kept. ``vertex`` and ``link`` are of
    NAS-Bench-101's one cell.

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
        """How it is written in picks and documents."""
        return _KEYS[self.kind].format(
            part=self.part, slot=self.slot, source=self.source, node=self.node
        )

    @classmethod
    @cache
    def parse(cls, key: str) -> Self:
        """The address that is written so. Raises SpaceError where there is none."""
        for kind, pattern in _PATTERNS.items():
            match = pattern.fullmatch(key)
            if match is not None:
                part, *numbers = (match.groupdict().get(name) for name in ("part", *_NUMBERS))
                return cls(kind, part or "", *(int(number or 0) for number in numbers))
        raise SpaceError(
            f"{key!r} is no key of a choice: keys are like {', '.join(_KEYS.values())}."
        )


@dataclass(frozen=True)
class Choice:
    """One decision of a search.

    ``kind`` is ``"op"`` for a slot's block, ``"width"`` for a stage's channels,
    ``"depth"`` for a stage's number of slots, ``"resolution"`` for the height = width
    of the image and ``"inputs"`` for the edges that a node of a cell keeps.
    """

    key: str
    options: tuple[Option, ...]
    kind: Literal["op", "width", "depth", "resolution", "inputs"]

    @property
    def address(self) -> Address:
        """Where it decides. Raises SpaceError where the key is none of this package's spaces."""
        return Address.parse(self.key)


@dataclass(frozen=True)
class Term:
    """What one slot adds to a network's latency.

    ``keys`` are the choices its cost depends on, ``shape`` their option counts, and
    ``ops`` the op for each combination (row-major; None where the slot is skipped, or
    left out by the depth). The open ones come in this order: the slot's block, the
    width before it, the width after it, the depth, the resolution. ``options`` are the
    slot's own, one of which may be all there is.
    """

    slot: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    ops: tuple[Op | None, ...]
    options: tuple[str, ...] = ()
