"""Search spaces: which architectures there are.

A space offers *choices* (``"s2.b1"``: which block; ``"s2.width"``: how many channels; ``"s2.depth"``: how many blocks;
``"resolution"``: pixels of the image). *Picks* name one option of every choice; ``decode`` turns them into an architecture,
``encode`` does the reverse. ``terms`` is the one walk from which the profiling plan, coverage, prices and gradients of prices all
come.

``MacroSpace`` is a chain of stages, each a chain of slots. Cell spaces will be a second subclass of ``SearchSpace``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hwnas.core.arch import Architecture, Origin, Picks
from hwnas.core.op import Op
from hwnas.core.option import make_divisible
from hwnas.core.stage import Slot, Stage
from hwnas.document import Document, nearest
from hwnas.errors import SpaceError

__all__ = ["Choice", "MacroSpace", "Option", "SearchSpace", "Slot", "Stage", "Term"]

Option = str | int
RESOLUTION = "resolution"
"""The key of the choice of the image size."""


@dataclass(frozen=True)
class Choice:
    """One decision of a search.

    ``kind`` is ``"op"`` for a slot's block, ``"width"`` for a stage's channels, ``"depth"`` for a stage's number of slots and
    ``"resolution"`` for the height = width of the image.
    """

    key: str
    options: tuple[Option, ...]
    kind: Literal["op", "width", "depth", "resolution"]


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

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices] with those choices at 0 that make no difference: equal for equal architectures."""
        return index_C

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
    resolutions: tuple[int, ...] = ()
    in_channels: int = 3
    classes: int = Field(gt=0)
    act: str = "relu"
    bn_eps: float = Field(default=1e-3, gt=0)
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        sizes = self.resolutions or (self.resolution,)
        if len(set(sizes)) != len(sizes) or min(sizes) < 1 or max(sizes) != self.resolution:
            raise ValueError(f"resolutions are different, and the largest is resolution = {self.resolution}, got {list(sizes)}")
        for i, stage in enumerate(self.stages):
            stage.check(f"s{i}")
        for slot in self.slots:
            slot.check()
        return self

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``resolutions`` where there are none, so that documents from before it keep their hash."""
        return {name: value for name, value in handler(self).items() if name != "resolutions" or value}

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots in order, with the shapes around them."""
        slots: list[Slot] = []
        in_widths: tuple[int, ...] = (self.in_channels,)
        in_key, sizes = "input", self.resolutions or (self.resolution,)
        for i, stage in enumerate(self.stages):
            for j, options in enumerate(stage.slots):
                slot = Slot(
                    key=f"s{i}.b{j}",
                    stage=i,
                    index=j,
                    options=options,
                    in_key=in_key,
                    in_widths=in_widths,
                    out_key=f"s{i}.width",
                    out_widths=stage.widths,
                    depth_key=f"s{i}.depth",
                    depths=stage.depths,
                    sizes=sizes,
                    stride=stage.stride if j == 0 else 1,
                    act=stage.act or self.act,
                    residual=stage.residual,
                )
                slots.append(slot)
                in_key, in_widths, sizes = slot.out_key, stage.widths, slot.out_sizes
        return tuple(slots)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Per stage its slots, its width, its depth, where more than one option is open (TuNAS's post-order); then the resolution."""
        found = []
        for i, stage in enumerate(self.stages):
            found += [Choice(f"s{i}.b{j}", options, "op") for j, options in enumerate(stage.slots)]
            found += [Choice(f"s{i}.width", stage.widths, "width"), Choice(f"s{i}.depth", stage.depths, "depth")]
        found.append(Choice(RESOLUTION, self.resolutions, "resolution"))
        return tuple(choice for choice in found if len(choice.options) > 1)

    @property
    def decisions(self) -> int:
        """Raw combinations of separate decisions (kernel, expansion, skip, width, depth, resolution), redundant ones counted.

        This is the number that TuNAS's README calls the size of the space.
        """
        slots = math.prod(n for slot in self.slots for n in slot.factors.decisions)
        return slots * math.prod(len(choice.options) for choice in self.choices if choice.kind != "op")

    def terms(self) -> tuple[Term, ...]:
        """One term per slot and one for the classifier."""
        return (*map(self._term, self.slots), self._classifier_term())

    def _term(self, slot: Slot) -> Term:
        inputs: tuple[int | None, ...] = slot.in_widths if slot.first else (None,)
        depths = slot.depths if slot.elective else (len(self.stages[slot.stage].slots),)
        ops = tuple(
            slot.op(option, output if input_ is None else input_, output, size) if slot.index < depth else None
            for option, input_, output, depth, size in product(slot.options, inputs, slot.out_widths, depths, slot.sizes)
        )
        counts = {slot.key: len(slot.options)} | ({slot.in_key: len(inputs)} if slot.first else {})
        counts |= {slot.out_key: len(slot.out_widths), slot.depth_key: len(depths), RESOLUTION: len(slot.sizes)}
        shape = {key: count for key, count in counts.items() if count > 1}
        return Term(slot.key, tuple(shape), tuple(shape.values()), ops, slot.options)

    def _classifier_term(self) -> Term:
        last = self.slots[-1]
        ops = tuple(self._classifier(width, size) for width, size in product(last.out_widths, last.out_sizes))
        shape = {key: n for key, n in ((last.out_key, len(last.out_widths)), (RESOLUTION, len(last.out_sizes))) if n > 1}
        return Term("classifier", tuple(shape), tuple(shape.values()), ops)

    def _classifier(self, width: int, size: int) -> Op:
        return Op("classifier", size, width, self.classes)

    def walk(self, picks: Mapping[str, Option]) -> tuple[tuple[Slot, Op | None], ...]:
        """Every slot with the op that ``picks`` put there; None where it is skipped, or left out by the depth."""
        at = self.resolutions.index(int(picks[RESOLUTION])) if RESOLUTION in picks else 0
        found = []
        channels = self.in_channels
        for slot in self.slots:
            width = int(picks.get(slot.out_key, slot.out_widths[0]))
            kept = slot.index < int(picks.get(slot.depth_key, slot.index + 1))
            option = str(picks.get(slot.key, slot.options[0]))
            found.append((slot, slot.op(option, channels, width, slot.sizes[at]) if kept else None))
            channels = width
        return tuple(found)

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture of ``picks``: open choices from ``picks``, the others have one option."""
        self.check(picks)
        blocks = [op for _, op in self.walk(picks) if op is not None]
        blocks.append(self._classifier(blocks[-1].out_ch, blocks[-1].out_size))
        origin = Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks))
        return Architecture(
            name=name or f"{self.name}-sample", in_channels=self.in_channels, bn_eps=self.bn_eps, blocks=tuple(blocks), origin=origin
        )

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices], those of blocks that the depth leaves out at 0."""
        position = {choice.key: i for i, choice in enumerate(self.choices)}
        found = index_C.copy()
        for slot in self.slots:
            if slot.depth_key in position and slot.key in position:
                left_out = slot.index >= slot.depths[int(index_C[position[slot.depth_key]])]
                found[position[slot.key]] = 0 if left_out else found[position[slot.key]]
        return found

    def encode(self, arch: Architecture) -> Picks:
        """Picks of ``arch``, from its origin where that is this space, else by matching blocks to slots.

        Blocks that the depth leaves out may be anything; matching gives their first option.
        """
        if arch.origin is not None and arch.origin.space_sha256 == self.sha256:
            if self.decode(arch.origin.picks).blocks != arch.blocks:
                raise SpaceError(
                    f"the blocks of architecture {arch.name!r} are not those of its origin's picks: correct or remove its origin."
                )
            return dict(arch.origin.picks)
        sizes = self.resolutions or (self.resolution,)
        matched = self._match(arch.ops(), 0, self.in_channels, sizes.index(arch.resolution)) if arch.resolution in sizes else None
        if matched is None:
            raise SpaceError(f"architecture {arch.name!r} is not in space {self.name}: no picks give its {len(arch.ops())} blocks.")
        matched[RESOLUTION] = arch.resolution
        return {choice.key: matched[choice.key] for choice in self.choices}

    def _match(self, ops: tuple[Op, ...], position: int, channels: int, at: int) -> Picks | None:
        """Match ``ops`` to the slots from ``position`` on at resolution number ``at``, kept blocks before skips before depths."""
        if position == len(self.slots):
            return {} if ops == (self._classifier(channels, self.slots[-1].out_sizes[at]),) else None
        slot = self.slots[position]
        for width in slot.out_widths if slot.first else (channels,):
            for option in slot.options:
                op = slot.op(option, channels, width, slot.sizes[at])
                if op is None or ops[:1] == (op,):
                    rest = self._match(ops[op is not None :], position + 1, width, at)
                    if rest is not None:
                        return {slot.key: option, slot.out_key: width, slot.depth_key: slot.index + 1, **rest}
        if slot.index not in slot.depths:
            return None
        left_out = [later for later in self.slots[position:] if later.stage == slot.stage]
        rest = self._match(ops, position + len(left_out), channels, at)
        return None if rest is None else {**{later.key: later.options[0] for later in left_out}, slot.depth_key: slot.index, **rest}

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options, in this space's order. Fixed choices may be named too.

        Slots beyond the deepest depth that is left are gone.
        """
        known = {f"s{i}.b{j}" for i, stage in enumerate(self.stages) for j in range(len(stage.slots))} | {RESOLUTION}
        known |= {f"s{i}.{kind}" for i in range(len(self.stages)) for kind in ("width", "depth")}
        for key in allowed:
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")
        stages = []
        for i, stage in enumerate(self.stages):
            slots = tuple(_kept(f"s{i}.b{j}", options, allowed) for j, options in enumerate(stage.slots))
            depths = _kept(f"s{i}.depth", stage.depths or (len(slots),), allowed)
            update = {"widths": _kept(f"s{i}.width", stage.widths, allowed), "depths": depths if len(depths) > 1 else ()}
            stages.append(stage.model_copy(update={**update, "slots": slots[: max(depths)]}))
        sizes = _kept(RESOLUTION, self.resolutions or (self.resolution,), allowed)
        return self._changed(stages, name, resolution=max(sizes), resolutions=sizes if len(sizes) > 1 else ())

    def scaled(self, width: float, *, name: str | None = None) -> Self:
        """A new space with every stage ``width`` times as wide, rounded to multiples of 8; equal widths merge.

        The last stage is only ever widened, as in MobileNetV2 and ProxylessNAS: the classifier needs its features.

        Example:
            >>> from hwnas.core.spaces import proxylessnas
            >>> [stage.widths[0] for stage in proxylessnas().scaled(0.5).stages]
            [16, 8, 16, 24, 40, 48, 96, 160, 1280]
        """
        if not 0 < width < math.inf:
            raise SpaceError(f"space {self.name} cannot be {width} times as wide: give a width above 0, for instance 0.5.")
        factors = [*[width] * (len(self.stages) - 1), max(width, 1.0)]
        stages = [
            stage.model_copy(update={"widths": tuple(dict.fromkeys(make_divisible(channels * factor) for channels in stage.widths))})
            for stage, factor in zip(self.stages, factors, strict=True)
        ]
        return self._changed(stages, name or f"{self.name}-w{width:g}")

    def _changed(self, stages: Sequence[Stage], name: str | None, **update: Any) -> Self:
        content = {**self.model_dump(), **update, "stages": [stage.model_dump() for stage in stages], "name": name or self.name}
        return type(self).model_validate(content)


T = TypeVar("T", str, int)


def _kept(key: str, options: tuple[T, ...], allowed: Mapping[str, Sequence[Option]]) -> tuple[T, ...]:
    if key not in allowed:
        return options
    unknown = [option for option in allowed[key] if option not in options]
    if unknown or not allowed[key]:
        raise SpaceError(f"choice {key!r} cannot be restricted to {list(allowed[key])}: its options are {', '.join(map(str, options))}.")
    return tuple(option for option in options if option in allowed[key])
