"""``SearchSpace``, the base class of all search spaces: choices, cost terms, and the
conversion between picks and architectures.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from hwnas.core.arch import Architecture, Picks, Position
from hwnas.core.choice import RESOLUTION, Choice, Option, Term
from hwnas.core.detector import DetectorSpec
from hwnas.core.detectors import AnySpec
from hwnas.core.ops import Op
from hwnas.core.size import SizeField, square
from hwnas.core.space_head import Classifiers, Detectors, SpaceHead
from hwnas.document import Document, nearest
from hwnas.errors import ConfigError, SpaceError

__all__ = ["RESOLUTION", "Choice", "Option", "SearchSpace", "Term", "truncate"]


class SearchSpace(Document):
    """Base class of all search spaces. The field ``kind`` names the subclass in a file.

    ``resolution`` is the height = width of the input in pixels, or both of them (the
    largest one, if the resolution is searched), ``bn_eps`` the epsilon of every BN.
    """

    SCHEMA: ClassVar[str] = "hwnas.space"
    SPARSE_FIELDS: ClassVar[tuple[str, ...]] = ("detector",)
    CHAIN: ClassVar[bool] = False
    """Whether the networks are chains of blocks. Otherwise they are made of cells,
    whose blocks run in parallel.
    """
    ADDITIVE: ClassVar[bool] = True
    """Whether the cost of a network is the sum of its ``terms``. Only then does the
    space have ops to measure.
    """

    name: str
    resolution: SizeField
    in_channels: int = 3
    classes: int = Field(gt=0)
    bn_eps: float = Field(default=1e-3, gt=0)
    detector: AnySpec | None = None

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit empty ``SPARSE_FIELDS``: documents written before these fields existed
        keep their hash.
        """
        content: dict[str, Any] = handler(self)
        for name in self.SPARSE_FIELDS:
            if name in content and not content[name]:
                del content[name]
        return content

    @property
    def side(self) -> int:
        """Height = width of the input, for spaces that only take squares. Raises
        SpaceError if it is none.
        """
        return square(self.resolution, self.name)

    @property
    def head(self) -> SpaceHead:
        """The end of every network of the space: a classifier or a detector."""
        if self.detector is None:
            return Classifiers(self.classes)
        return Detectors(self.classes, self.detector)

    @property
    def task(self) -> str:
        """The task of the networks: ``"detect"`` if they carry a detector, else
        ``"classify"``.
        """
        return self.head.task

    @cached_property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The open decisions in order; decisions with a single option are left out."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """One term per slot, fixed slots included (``keys`` empty)."""

    @abstractmethod
    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture that ``picks`` describe. Raises SpaceError if a pick is
        missing, unknown or impossible.
        """

    @abstractmethod
    def encode(self, arch: Architecture) -> Picks:
        """Picks that decode to ``arch``. Raises SpaceError if there are none."""

    @abstractmethod
    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space that keeps only the ``allowed`` options of the named choices."""

    def with_detector(self, spec: DetectorSpec | None = None, *, name: str | None = None) -> Self:
        """A new space whose networks carry a detector: SSDLite, if ``spec`` names no
        other. Raises ConfigError if networks of this kind of space cannot.
        """
        raise ConfigError(
            f"space {self.name!r} is made of cells, but detectors are searched on chains of blocks:"
            " choose another space."
        )

    def positions(self, arch: Architecture) -> tuple[Position, ...]:
        """The ops of ``arch``, input to output, with the names of their positions.

        If ``arch`` comes from this space, the positions are the slots of the space,
        including those that its picks leave empty.
        """
        origin = arch.origin
        if origin is None or origin.space_sha256 != self.sha256:
            return arch.positions()
        return self._positions(arch, origin.picks)

    def _positions(self, arch: Architecture, picks: Picks) -> tuple[Position, ...]:
        """``positions`` for a member of this space. Spaces that name them override
        it.
        """
        del picks
        return arch.positions()

    @property
    def notation(self) -> str:
        """The pattern of the space's own notation for architectures, for messages;
        empty if it has none.
        """
        return ""

    def read(self, text: str) -> Picks:
        """Parse picks: a JSON object of picks, or one option position per choice, as
        ``"0 12 3"`` or ``"0123"``.

        Spaces with a ``notation`` of their own accept it as well. Raises SpaceError if
        ``text`` is none of these.
        """
        text = text.strip()
        if text.startswith("{"):
            return self._read_json(text)
        return self._read_positions(text)

    def _read_json(self, text: str) -> Picks:
        """Picks from a JSON object."""
        try:
            picks: Picks = dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise SpaceError(
                f"{truncate(text)} is not valid JSON ({error}): write picks as an object."
            ) from error

        for key, option in picks.items():
            # not isinstance: JSON's true is an int in Python and would pass as option 1
            if type(option) not in (str, int):
                raise SpaceError(
                    f"pick {key!r} is {option!r}: give the name or number of an option."
                )
        self.check(picks)
        return picks

    def _read_positions(self, text: str) -> Picks:
        """Picks from one option position per choice."""
        parts = text.split()
        if len(parts) <= 1:
            # without whitespace every character is a position: "0123"
            parts = list(text)

        # at most 9 digits: int() raises an error of its own for thousands of digits
        if not parts or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            own = f"{self.notation}, " if self.notation else ""
            raise SpaceError(
                f"{truncate(text)} is not an architecture of space {self.name}: give {own}the"
                " positions of its options ('0 12 3', or '0123'), or its picks as a JSON object."
            )
        if len(parts) != len(self.choices):
            raise SpaceError(
                f"{truncate(text)} has {len(parts)} positions, but space {self.name} has"
                f" {len(self.choices)} choices: give one for each."
            )

        for part, choice in zip(parts, self.choices, strict=True):
            if int(part) >= len(choice.options):
                raise SpaceError(
                    f"{truncate(text)} has position {part} at choice {choice.key!r}, whose options"
                    f" are 0 to {len(choice.options) - 1}."
                )
        return self.at([int(part) for part in parts])

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops that profiling measures: every distinct op that an architecture of
        the space can contain, in order of appearance.
        """
        # a dict keeps the order of insertion, unlike a set
        distinct: dict[Op, None] = {}
        for term in self.terms():
            for op in term.ops:
                if op is not None:
                    distinct[op] = None
        return tuple(distinct)

    def write(self, picks: Mapping[str, Option]) -> str:
        """Format picks in the space's own notation, or as a JSON object if it has none.
        Raises SpaceError as ``check`` does.
        """
        self.check(picks)
        return json.dumps(dict(picks))

    @property
    def size(self) -> int:
        """Number of combinations of options: the product of the option counts."""
        return math.prod(len(choice.options) for choice in self.choices)

    @property
    def architectures(self) -> int:
        """Number of distinct architectures. Picks that differ only in parts that the
        network leaves out (see ``canonical``) count once.
        """
        return self.size

    def sample(self, rng: np.random.Generator) -> Picks:
        """Draw picks uniformly at random."""
        return {
            choice.key: choice.options[rng.integers(len(choice.options))] for choice in self.choices
        }

    def index(self, picks: Mapping[str, Option]) -> np.ndarray:
        """Picks as option positions, in the order of ``choices``: int64 [choices]."""
        self.check(picks)
        positions = [choice.options.index(picks[choice.key]) for choice in self.choices]
        return np.array(positions, dtype=np.int64)

    def at(self, index: Sequence[int] | np.ndarray) -> Picks:
        """The picks at some option positions: the inverse of ``index``."""
        positions = zip(self.choices, index, strict=True)
        return {choice.key: choice.options[int(position)] for choice, position in positions}

    def is_kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether the block that choice ``key`` decides is part of the network of
        ``picks``. The depth of its stage, or the node it leads to, may leave it out.
        """
        return True

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices], with choices that make no difference set to 0.
        Equal architectures have equal canonical positions.
        """
        return index_C

    def check(self, picks: Mapping[str, Option]) -> None:
        """Raise SpaceError unless ``picks`` has exactly one known option for every
        choice, and no other keys.
        """
        known = {choice.key: choice.options for choice in self.choices}
        for key, option in picks.items():
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")
            if option not in known[key]:
                raise SpaceError(
                    f"choice {key!r} of space {self.name} has no option {option!r}; known:"
                    f" {', '.join(map(str, known[key]))}."
                )
        missing = [key for key in known if key not in picks]
        if missing:
            ellipsis = " ..." if len(missing) > 3 else ""
            raise SpaceError(
                f"picks for space {self.name} lack {', '.join(missing[:3])}{ellipsis}: pick an"
                " option for each."
            )


def truncate(text: str) -> str:
    """Quote the text of an architecture for a message, shortened to 60 characters."""
    if len(text) > 60:
        text = f"{text[:56]} ..."
    return repr(text)
