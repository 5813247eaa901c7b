"""What every kind of search space is: choices, the terms that its costs come from, and
from picks to architectures and back.
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

from hwnas.core.arch import Architecture, Picks, Placed
from hwnas.core.choice import RESOLUTION, Choice, Option, Term
from hwnas.core.detector import Scores
from hwnas.core.ops import Op
from hwnas.core.space_head import Classifiers, Detectors, SpaceHead
from hwnas.core.ssdlite import EXTRAS, DetectorSpec
from hwnas.document import Document, nearest
from hwnas.errors import ConfigError, SpaceError

__all__ = ["RESOLUTION", "Choice", "Option", "SearchSpace", "Term", "truncate"]


class SearchSpace(Document):
    """What every kind of space can do. ``kind`` tells the kinds apart in a file."""

    SCHEMA: ClassVar[str] = "hwnas.space"
    SPARSE_FIELDS: ClassVar[tuple[str, ...]] = ("detector",)
    CHAIN: ClassVar[bool] = False
    """Whether its networks are blocks in a row; those of others are cells, in which
    blocks run side by side.
    """
    ADDITIVE: ClassVar[bool] = True
    """Whether costs of its networks are sums of ``terms``, so that it has a profiling plan."""

    name: str
    resolution: int = Field(gt=0)
    in_channels: int = 3
    classes: int = Field(gt=0)
    bn_eps: float = Field(default=1e-3, gt=0)
    detector: DetectorSpec | None = None

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the ``SPARSE_FIELDS`` fields where they are empty, so that documents from
        before them keep their hash.
        """
        return {
            name: value
            for name, value in handler(self).items()
            if name not in self.SPARSE_FIELDS or value
        }

    @property
    def head(self) -> SpaceHead:
        """What its networks end with."""
        return (
            Classifiers(self.classes)
            if self.detector is None
            else Detectors(self.classes, self.detector)
        )

    @property
    def task(self) -> str:
        """The name of the task that its networks are for: ``"detect"`` with a detector
        on them, else ``"classify"``.
        """
        return self.head.task

    @cached_property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The open decisions in order. A choice with one option left is no choice."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """One term per slot, fixed slots included (``keys`` empty)."""

    @abstractmethod
    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture of ``picks``. Raises SpaceError on a missing, unknown or
        impossible pick.
        """

    @abstractmethod
    def encode(self, arch: Architecture) -> Picks:
        """Picks that decode to ``arch``. Raises SpaceError where the space does not hold it."""

    @abstractmethod
    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options at the named choices."""

    def with_detector(
        self, *, extras: Sequence[int] = EXTRAS, scores: Scores = "softmax", name: str | None = None
    ) -> Self:
        """A new space whose networks carry a detector. Raises ConfigError where no
        network of this kind of space can.
        """
        raise ConfigError(
            f"space {self.name!r} is one of cells, and detectors are searched on blocks in a row:"
            " choose another space."
        )

    def placed(self, arch: Architecture) -> tuple[Placed, ...]:
        """The ops of ``arch``, input to output, by the names of their places; where its
        origin is this space, those of the space, the ones that its picks leave empty
        among them.
        """
        origin = arch.origin
        return (
            arch.placed()
            if origin is None or origin.space_sha256 != self.sha256
            else self._placed(arch, origin.picks)
        )

    def _placed(self, arch: Architecture, picks: Picks) -> tuple[Placed, ...]:
        """``placed`` of a member of this space; a space whose places have names overrides it."""
        del picks
        return arch.placed()

    @property
    def notation(self) -> str:
        """How architectures are written in the space's own notation, for messages;
        empty where it has none.
        """
        return ""

    def read(self, text: str) -> Picks:
        """The picks that ``text`` stands for: a JSON object of picks, or the positions
        of all options, ``"0 12 3"`` or ``"0123"``.

        Spaces with a ``notation`` of their own take that, too. Raises SpaceError where
        the text is none of these.
        """
        text = text.strip()
        if text.startswith("{"):
            try:
                picks: Picks = dict(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise SpaceError(
                    f"{truncate(text)} is not valid JSON ({error}): write picks as an object."
                ) from error
            # True equals 1
            wrong = next(
                (key for key, option in picks.items() if type(option) not in (str, int)), None
            )
            if wrong is not None:
                raise SpaceError(
                    f"pick {wrong!r} is {picks[wrong]!r}: give the name or number of an option."
                )
            self.check(picks)
            return picks
        parts = text.split() if len(text.split()) > 1 else list(text)
        if not parts or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            own = f"{self.notation}, " if self.notation else ""
            how = (
                f"{own}the positions of its options ('0 12 3', or '0123'), or its picks as a JSON"
                " object"
            )
            raise SpaceError(
                f"{truncate(text)} is no architecture of space {self.name}: give {how}."
            )
        if len(parts) != len(self.choices):
            raise SpaceError(
                f"{truncate(text)} has {len(parts)} positions, but space {self.name} has"
                f" {len(self.choices)} choices: give one for each."
            )
        for part, choice in zip(parts, self.choices, strict=True):
            if int(part) >= len(choice.options):
                raise SpaceError(
                    f"position {part} at choice {choice.key!r} of {truncate(text)}: its options"
                    f" are 0 to {len(choice.options) - 1}."
                )
        return self.at([int(part) for part in parts])

    @property
    def ops(self) -> tuple[Op, ...]:
        """The profiling plan: every op that any architecture of the space can contain,
        in order of appearance.
        """
        return tuple(
            dict.fromkeys(op for term in self.terms() for op in term.ops if op is not None)
        )

    def write(self, picks: Mapping[str, Option]) -> str:
        """Picks as text: in the space's own notation, or, where it has none, as a JSON
        object. Raises SpaceError as ``check`` does.
        """
        self.check(picks)
        return json.dumps(dict(picks))

    @property
    def size(self) -> int:
        """Number of picks: the product of the option counts."""
        return math.prod(len(choice.options) for choice in self.choices)

    @property
    def architectures(self) -> int:
        """Number of picks that ``canonical`` tells apart: those that differ in what a
        network leaves out count once.
        """
        return self.size

    def sample(self, rng: np.random.Generator) -> Picks:
        """Uniform random picks."""
        return {
            choice.key: choice.options[rng.integers(len(choice.options))] for choice in self.choices
        }

    def index(self, picks: Mapping[str, Option]) -> np.ndarray:
        """Picks as option positions in the order of ``choices``: int64 [choices]."""
        self.check(picks)
        return np.array(
            [choice.options.index(picks[choice.key]) for choice in self.choices], dtype=np.int64
        )

    def at(self, index: Sequence[int] | np.ndarray) -> Picks:
        """The reverse of ``index``."""
        return {
            choice.key: choice.options[int(i)]
            for choice, i in zip(self.choices, index, strict=True)
        }

    def kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether what a choice of blocks decides is in the network of ``picks``: the
        depth, or a node, may leave it out.
        """
        return True

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices] with those choices at 0 that make no difference:
        equal for equal architectures.
        """
        return index_C

    def check(self, picks: Mapping[str, Option]) -> None:
        """Raise SpaceError unless ``picks`` names one known option of every choice, and
        nothing else.
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
            raise SpaceError(
                f"picks for space {self.name} lack"
                f" {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: pick an option"
                " there."
            )


def truncate(text: str) -> str:
    """An architecture's text as messages quote it."""
    return repr(text if len(text) <= 60 else f"{text[:56]} ...")
