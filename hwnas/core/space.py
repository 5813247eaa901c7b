"""Search spaces: which architectures there are.

A space offers *choices* (``"s2.b1"``: which block; ``"s2.width"``: how many channels). *Picks* name one option of every
choice; ``decode`` turns them into an architecture, ``encode`` does the reverse. ``terms`` is the one walk from which the
profiling plan, coverage, prices and gradients of prices all come.

``MacroSpace`` is a chain of stages, each a chain of slots. Cell spaces will be a second subclass of ``SearchSpace``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwnas.core.arch import Architecture, Origin, Picks
from hwnas.core.op import Op, out_size
from hwnas.core.option import SKIP, Factors, factorise, parse_option
from hwnas.document import Document, nearest
from hwnas.errors import SpaceError

Option = str | int


@dataclass(frozen=True)
class Choice:
    """One decision of a search. ``kind`` is ``"op"`` for a slot's block and ``"width"`` for a stage's channels."""

    key: str
    options: tuple[Option, ...]
    kind: Literal["op", "width"]


@dataclass(frozen=True)
class Term:
    """What one slot adds to a network's latency.

    ``keys`` are the choices its cost depends on, ``shape`` their option counts, and ``ops`` the op for each combination
    (row-major; None where the slot is skipped). ``options`` are the slot's own, one of which may be all there is.
    """

    slot: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    ops: tuple[Op | None, ...]
    options: tuple[str, ...] = ()


class SearchSpace(Document):
    """What every kind of space can do. ``kind`` tells the kinds apart in a file."""

    SCHEMA: ClassVar[str] = "hwnas.space"

    name: str

    @cached_property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The open decisions in order. A choice with one option left is no choice."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """One term per slot, fixed slots included (``keys`` empty)."""

    @abstractmethod
    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture of ``picks``. Raises SpaceError on a missing, unknown or impossible pick."""

    @abstractmethod
    def encode(self, arch: Architecture) -> Picks:
        """Picks that decode to ``arch``. Raises SpaceError where the space does not hold it."""

    @abstractmethod
    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options at the named choices."""

    @property
    def ops(self) -> tuple[Op, ...]:
        """The profiling plan: every op that any architecture of the space can contain, in order of appearance."""
        return tuple(dict.fromkeys(op for term in self.terms() for op in term.ops if op is not None))

    @property
    def size(self) -> int:
        """Number of picks: the product of the option counts."""
        return math.prod(len(choice.options) for choice in self.choices)

    def sample(self, rng: np.random.Generator) -> Picks:
        """Uniform random picks."""
        return {choice.key: choice.options[rng.integers(len(choice.options))] for choice in self.choices}

    def index(self, picks: Mapping[str, Option]) -> np.ndarray:
        """Picks as option positions in the order of ``choices``: int64 [choices]."""
        self.check(picks)
        return np.array([choice.options.index(picks[choice.key]) for choice in self.choices], dtype=np.int64)

    def at(self, index: Sequence[int] | np.ndarray) -> Picks:
        """The reverse of ``index``."""
        return {choice.key: choice.options[int(i)] for choice, i in zip(self.choices, index, strict=True)}

    def check(self, picks: Mapping[str, Option]) -> None:
        """Raise SpaceError unless ``picks`` names one known option of every choice, and nothing else."""
        known = {choice.key: choice.options for choice in self.choices}
        for key, option in picks.items():
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")
            if option not in known[key]:
                raise SpaceError(f"choice {key!r} of space {self.name} has no option {option!r}; known: {', '.join(map(str, known[key]))}.")
        missing = [key for key in known if key not in picks]
        if missing:
            raise SpaceError(
                f"picks for space {self.name} lack {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: pick an option there."
            )


class Stage(BaseModel):
    """Slots in a row that share an output width. The first slot changes width and stride.

    ``residual`` says which slots add their input to their output: all but the first (``"after_first"``: TuNAS), or every
    slot whose shapes match (``"matching"``: MobileNetV2). ``widths`` with several entries makes the width a choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[int, ...] = Field(min_length=1)
    stride: int = 1
    slots: tuple[tuple[str, ...], ...] = Field(min_length=1)
    act: str | None = None
    residual: Literal["after_first", "matching"] = "after_first"


@dataclass(frozen=True)
class Slot:
    """A place for one block: its options, and the width choices before and after it."""

    key: str
    stage: int
    options: tuple[str, ...]
    in_key: str
    in_widths: tuple[int, ...]
    out_key: str
    out_widths: tuple[int, ...]
    size: int
    stride: int
    act: str
    first: bool
    residual: Literal["after_first", "matching"]

    def op(self, option: str, in_ch: int, out_ch: int) -> Op | None:
        """The op of ``option`` between two widths; None for skip."""
        block = parse_option(option)
        if block is None:
            return None
        matching = in_ch == out_ch and self.stride == 1 and block.kind != "cn"
        residual = matching and (not self.first or self.residual == "matching")
        return block.op(in_ch, out_ch, self.size, self.stride, self.act, residual)

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


class MacroSpace(SearchSpace):
    """A chain of stages, stem first, head last, then pooling and a classifier.

    Example:
        >>> from hwnas.core.spaces import proxylessnas
        >>> space = proxylessnas()
        >>> picks = space.sample(np.random.default_rng(0))
        >>> space.encode(space.decode(picks)) is not None
        True
    """

    kind: Literal["macro"] = "macro"
    resolution: int = Field(gt=0)
    in_channels: int = 3
    classes: int = Field(gt=0)
    act: str = "relu"
    bn_eps: float = Field(default=1e-3, gt=0)
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for i, stage in enumerate(self.stages):
            if len(set(stage.widths)) != len(stage.widths) or min(stage.widths) < 1:
                raise ValueError(f"stage s{i} needs different widths above 0, got {list(stage.widths)}")
        for slot in self.slots:
            if len(set(slot.options)) != len(slot.options) or not slot.options:
                raise ValueError(f"slot {slot.key} needs one or more different options, got {list(slot.options)}")
            if SKIP in slot.options and slot.first:
                raise ValueError(f"slot {slot.key} changes the shape, so it cannot offer 'skip'")
            for option in slot.options:
                for in_ch, out_ch in slot.widths:
                    slot.op(option, in_ch, out_ch)
        return self

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots in order, with the shapes around them."""
        slots = []
        in_widths: tuple[int, ...] = (self.in_channels,)
        size, in_key = self.resolution, "input"
        for i, stage in enumerate(self.stages):
            for j, options in enumerate(stage.slots):
                stride = stage.stride if j == 0 else 1
                out_key = f"s{i}.width"
                slots.append(
                    Slot(
                        f"s{i}.b{j}",
                        i,
                        options,
                        in_key,
                        in_widths,
                        out_key,
                        stage.widths,
                        size,
                        stride,
                        stage.act or self.act,
                        j == 0,
                        stage.residual,
                    )
                )
                size, in_key, in_widths = out_size(size, stride), out_key, stage.widths
        return tuple(slots)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Per stage its slots, then its width (TuNAS's post-order), where more than one option is open."""
        found = []
        for i, stage in enumerate(self.stages):
            found += [Choice(f"s{i}.b{j}", options, "op") for j, options in enumerate(stage.slots) if len(options) > 1]
            found += [Choice(f"s{i}.width", stage.widths, "width")] if len(stage.widths) > 1 else []
        return tuple(found)

    @property
    def decisions(self) -> int:
        """Raw combinations of separate decisions (kernel, expansion, skip, width), redundant ones counted.

        This is the number that TuNAS's README calls the size of the space.
        """
        slots = math.prod(n for slot in self.slots for n in slot.factors.decisions)
        return slots * math.prod(len(stage.widths) for stage in self.stages)

    def terms(self) -> tuple[Term, ...]:
        """One term per slot and one for the classifier."""
        open_keys = {choice.key for choice in self.choices}
        terms = []
        for slot in self.slots:
            axes: list[tuple[str, tuple[Option, ...]]] = [(slot.key, slot.options)]
            axes += [(slot.in_key, slot.in_widths)] if slot.first else []
            axes += [(slot.out_key, slot.out_widths)]
            ops = tuple(slot.op(str(values[0]), int(values[1]), int(values[-1])) for values in product(*(options for _, options in axes)))
            kept = [(key, len(options)) for key, options in axes if key in open_keys]
            terms.append(Term(slot.key, tuple(key for key, _ in kept), tuple(n for _, n in kept), ops, slot.options))
        last = self.stages[-1].widths
        key = (f"s{len(self.stages) - 1}.width",) if len(last) > 1 else ()
        terms.append(Term("classifier", key, (len(last),) if key else (), tuple(self._classifier(width) for width in last)))
        return tuple(terms)

    def _classifier(self, width: int) -> Op:
        return Op("classifier", out_size(self.slots[-1].size, self.slots[-1].stride), width, self.classes)

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture of ``picks``: open choices from ``picks``, the others have one option."""
        self.check(picks)
        blocks: list[Op] = []
        channels = self.in_channels
        for slot in self.slots:
            width = int(picks.get(slot.out_key, slot.out_widths[0]))
            op = slot.op(str(picks.get(slot.key, slot.options[0])), channels, width)
            blocks += [op] if op is not None else []
            channels = width
        blocks.append(self._classifier(channels))
        origin = Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks))
        return Architecture(
            name=name or f"{self.name}-sample", in_channels=self.in_channels, bn_eps=self.bn_eps, blocks=tuple(blocks), origin=origin
        )

    def encode(self, arch: Architecture) -> Picks:
        """Picks of ``arch``, from its origin where that is this space, else by matching blocks to slots."""
        if arch.origin is not None and arch.origin.space_sha256 == self.sha256:
            if self.decode(arch.origin.picks).blocks != arch.blocks:
                raise SpaceError(
                    f"the blocks of architecture {arch.name!r} are not those of its origin's picks: correct or remove its origin."
                )
            return dict(arch.origin.picks)
        matched = self._match(arch.ops(), 0, 0, self.in_channels)
        if matched is None:
            raise SpaceError(f"architecture {arch.name!r} is not in space {self.name}: no picks give its {len(arch.ops())} blocks.")
        open_keys = {choice.key for choice in self.choices}
        return {key: matched[key] for key in matched if key in open_keys}

    def _match(self, ops: tuple[Op, ...], position: int, slot_index: int, channels: int) -> Picks | None:
        """Match the blocks from ``position`` on to the slots from ``slot_index`` on, kept blocks before skips."""
        if slot_index == len(self.slots):
            return {} if ops[position:] == (self._classifier(channels),) else None
        slot = self.slots[slot_index]
        for width in slot.out_widths if slot.first else (channels,):
            for option in slot.options:
                op = slot.op(option, channels, width)
                if op is None or (position < len(ops) and ops[position] == op):
                    rest = self._match(ops, position + (op is not None), slot_index + 1, width)
                    if rest is not None:
                        return {slot.key: option, slot.out_key: width, **rest}
        return None

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options, in this space's order. Fixed choices may be named too."""
        known = {f"s{i}.b{j}" for i, stage in enumerate(self.stages) for j in range(len(stage.slots))}
        known |= {f"s{i}.width" for i in range(len(self.stages))}
        for key in allowed:
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")
        stages = []
        for i, stage in enumerate(self.stages):
            slots = tuple(_kept(f"s{i}.b{j}", options, allowed) for j, options in enumerate(stage.slots))
            widths = _kept(f"s{i}.width", stage.widths, allowed)
            stages.append(stage.model_copy(update={"slots": slots, "widths": widths}))
        content = {**self.model_dump(), "stages": [stage.model_dump() for stage in stages], "name": name or self.name}
        return type(self).model_validate(content)


T = TypeVar("T", str, int)


def _kept(key: str, options: tuple[T, ...], allowed: Mapping[str, Sequence[Option]]) -> tuple[T, ...]:
    if key not in allowed:
        return options
    unknown = [option for option in allowed[key] if option not in options]
    if unknown or not allowed[key]:
        raise SpaceError(f"choice {key!r} cannot be restricted to {list(allowed[key])}: its options are {', '.join(map(str, options))}.")
    return tuple(option for option in options if option in allowed[key])
