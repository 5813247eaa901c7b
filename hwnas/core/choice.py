"""The decisions of a search, and what each adds to the cost of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hwnas.core.ops import Op

Option = str | int
RESOLUTION = "resolution"
"""The key of the choice of the image size."""


@dataclass(frozen=True)
class Choice:
    """One decision of a search.

    ``kind`` is ``"op"`` for a slot's block, ``"width"`` for a stage's channels, ``"depth"`` for a stage's number of slots,
    ``"resolution"`` for the height = width of the image and ``"inputs"`` for the edges that a node of a cell keeps.
    """

    key: str
    options: tuple[Option, ...]
    kind: Literal["op", "width", "depth", "resolution", "inputs"]


@dataclass(frozen=True)
class Term:
    """What one slot adds to a network's latency.

    ``keys`` are the choices its cost depends on, ``shape`` their option counts, and ``ops`` the op for each combination
    (row-major; None where the slot is skipped, or left out by the depth). The open ones come in this order: the slot's block, the
    width before it, the width after it, the depth, the resolution. ``options`` are the slot's own, one of which may be all there is.
    """

    slot: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    ops: tuple[Op | None, ...]
    options: tuple[str, ...] = ()
