"""Search spaces: which architectures there are.

A space offers *choices* (``"s2.b1"``: which block; ``"s2.width"``: how many channels;
``"s2.depth"``: how many blocks; ``"resolution"``: pixels of the image). *Picks* name
one option of every choice; ``decode`` turns them into an architecture, ``encode`` does
the reverse. ``terms`` is the one walk from which the profiling plan, coverage, prices
and gradients of prices all come.

``MacroSpace`` is a chain of stages, each a chain of slots; ``hwnas.core.cells`` holds
the spaces of cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from hwnas.core.arch import Architecture, Origin, Picks, Placed
from hwnas.core.detector import Scores
from hwnas.core.ops import Op
from hwnas.core.option import make_divisible
from hwnas.core.search_space import RESOLUTION, Choice, Option, SearchSpace, Term
from hwnas.core.space_head import last_stages
from hwnas.core.space_stage import Slot, SpaceStage, block_key, depth_key, width_key
from hwnas.core.ssdlite import EXTRAS, DetectorSpec
from hwnas.document import nearest
from hwnas.errors import SpaceError

__all__ = ["Choice", "MacroSpace", "Option", "SearchSpace", "Slot", "SpaceStage", "Term"]


class MacroSpace(SearchSpace):
    """A chain of stages, stem first, head last, then pooling and a classifier; or, of a
    backbone, a ``detector`` on some of them.

    Example:
        >>> from hwnas.core.spaces import proxylessnas
        >>> space = proxylessnas()
        >>> picks = space.sample(np.random.default_rng(0))
        >>> space.encode(space.decode(picks)) is not None
        True
    """

    SPARSE_FIELDS = ("resolutions", "detector")
    CHAIN = True

    kind: Literal["macro"] = "macro"
    resolutions: tuple[int, ...] = ()
    act: str = "relu"
    stages: tuple[SpaceStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        sizes = self.resolutions or (self.resolution,)
        if len(set(sizes)) != len(sizes) or min(sizes) < 1 or max(sizes) != self.resolution:
            raise ValueError(
                f"resolutions are different, and the largest is resolution = {self.resolution}, got"
                f" {list(sizes)}"
            )
        for i, stage in enumerate(self.stages):
            stage.check(f"s{i}")
        for slot in self.slots:
            slot.check()
        self.head.check(self.slots)
        return self

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots in order, with the shapes around them."""
        slots: list[Slot] = []
        in_widths: tuple[int, ...] = (self.in_channels,)
        in_key, sizes = "input", self.resolutions or (self.resolution,)
        for i, stage in enumerate(self.stages):
            for j, options in enumerate(stage.slots):
                slot = Slot(
                    key=block_key(i, j),
                    stage=i,
                    index=j,
                    options=options,
                    in_key=in_key,
                    in_widths=in_widths,
                    out_key=width_key(i),
                    out_widths=stage.widths,
                    depth_key=depth_key(i),
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
        """Per stage its slots, its width, its depth, where more than one option is open
        (TuNAS's post-order); then the resolution.
        """
        found = []
        for i, stage in enumerate(self.stages):
            found += [
                Choice(block_key(i, j), options, "op") for j, options in enumerate(stage.slots)
            ]
            found += [
                Choice(width_key(i), stage.widths, "width"),
                Choice(depth_key(i), stage.depths, "depth"),
            ]
        found.append(Choice(RESOLUTION, self.resolutions, "resolution"))
        return tuple(choice for choice in found if len(choice.options) > 1)

    @property
    def decisions(self) -> int:
        """Raw combinations of separate decisions (kernel, expansion, skip, width,
        depth, resolution), redundant ones counted.

        This is the number that TuNAS's README calls the size of the space.
        """
        slots = math.prod(n for slot in self.slots for n in slot.factors.decisions)
        return slots * math.prod(
            len(choice.options) for choice in self.choices if choice.kind != "op"
        )

    @property
    def architectures(self) -> int:
        """Blocks that the depth leaves out do not count."""
        depths = (
            sum(
                math.prod(map(len, stage.slots[:depth]))
                for depth in stage.depths or (len(stage.slots),)
            )
            for stage in self.stages
        )
        return math.prod(depths) * math.prod(
            len(choice.options) for choice in self.choices if choice.kind in ("width", "resolution")
        )

    def terms(self) -> tuple[Term, ...]:
        """One term per slot and one for the classifier, or one per extra and one per
        head of the detector.
        """
        return (*map(self._term, self.slots), *self.head.terms(self.slots))

    def _term(self, slot: Slot) -> Term:
        inputs: tuple[int | None, ...] = slot.in_widths if slot.first else (None,)
        depths = slot.depths if slot.elective else (len(self.stages[slot.stage].slots),)

        def op(option: str, input_: int | None, output: int, depth: int, size: int) -> Op | None:
            if slot.index >= depth:
                return None
            return slot.op(option, output if input_ is None else input_, output, size)

        ops = tuple(
            op(*chosen)
            for chosen in product(slot.options, inputs, slot.out_widths, depths, slot.sizes)
        )
        counts = {slot.key: len(slot.options)} | ({slot.in_key: len(inputs)} if slot.first else {})
        counts |= {
            slot.out_key: len(slot.out_widths),
            slot.depth_key: len(depths),
            RESOLUTION: len(slot.sizes),
        }
        shape = {key: count for key, count in counts.items() if count > 1}
        return Term(slot.key, tuple(shape), tuple(shape.values()), ops, slot.options)

    def walk(self, picks: Mapping[str, Option]) -> tuple[tuple[Slot, Op | None], ...]:
        """Every slot with the op that ``picks`` put there; None where it is skipped, or
        left out by the depth.
        """
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
        """The architecture of ``picks``: open choices from ``picks``, the others have
        one option.
        """
        self.check(picks)
        origin = Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks))
        kept = [(slot, op) for slot, op in self.walk(picks) if op is not None]
        return self.network(kept, name or f"{self.name}-sample", origin)

    def network(
        self, kept: Sequence[tuple[Slot, Op]], name: str, origin: Origin | None = None
    ) -> Architecture:
        """The architecture of the kept slots' ops, with what comes after them: the
        classifier or the detector.
        """
        blocks, last = [op for _, op in kept], kept[-1][1]
        return Architecture(
            name=name,
            in_channels=self.in_channels,
            bn_eps=self.bn_eps,
            blocks=(*blocks, *self.head.blocks(last.out_ch, last.out_size)),
            detector=self.head.detector(kept),
            origin=origin,
        )

    def _placed(self, arch: Architecture, picks: Picks) -> tuple[Placed, ...]:
        """A place per slot, through which a skip lets its input; then the head's."""
        found, channels, size = [], arch.in_channels, arch.resolution
        for slot, op in self.walk(picks):
            if op is not None:
                channels, size = op.out_ch, op.out_size
            found.append(Placed(slot.key, op, channels, size))
        return (*found, *self.head.placed(arch))

    def kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether the depth keeps a block."""
        slot = next((slot for slot in self.slots if slot.key == key), None)
        return slot is None or slot.index < int(picks.get(slot.depth_key, slot.index + 1))

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
        """Picks of ``arch``, from its origin where that is this space, else by matching
        blocks to slots.

        Blocks that the depth leaves out may be anything; matching gives their first option.
        """
        if arch.origin is not None and arch.origin.space_sha256 == self.sha256:
            there = self.decode(arch.origin.picks)
            if (there.blocks, there.detector) != (arch.blocks, arch.detector):
                raise SpaceError(
                    f"the blocks of architecture {arch.name!r} are not those of its origin's picks:"
                    " correct or remove its origin."
                )
            return dict(arch.origin.picks)
        sizes = self.resolutions or (self.resolution,)
        matched = (
            self._match(arch.blocks, 0, self.in_channels, sizes.index(arch.resolution))
            if arch.resolution in sizes
            else None
        )
        if matched is None:
            raise SpaceError(
                f"architecture {arch.name!r} is not in space {self.name}: no picks give its"
                f" {len(arch.ops())} blocks."
            )
        matched[RESOLUTION] = arch.resolution
        picks = {choice.key: matched[choice.key] for choice in self.choices}
        if self.decode(picks).detector != arch.detector:
            raise SpaceError(
                f"architecture {arch.name!r} is not in space {self.name}: its blocks are, but its"
                " detector is another."
            )
        return picks

    def _match(self, ops: tuple[Op, ...], position: int, channels: int, at: int) -> Picks | None:
        """Match ``ops`` to the slots from ``position`` on at resolution number ``at``,
        kept blocks before skips before depths.
        """
        if position == len(self.slots):
            return {} if ops == self.head.blocks(channels, self.slots[-1].out_sizes[at]) else None
        slot = self.slots[position]
        for width in slot.out_widths if slot.first else (channels,):
            for option in slot.options:
                op = slot.op(option, channels, width, slot.sizes[at])
                if op is None or ops[:1] == (op,):
                    rest = self._match(ops[op is not None :], position + 1, width, at)
                    if rest is not None:
                        return {
                            slot.key: option,
                            slot.out_key: width,
                            slot.depth_key: slot.index + 1,
                            **rest,
                        }
        if slot.index not in slot.depths:
            return None
        left_out = [later for later in self.slots[position:] if later.stage == slot.stage]
        rest = self._match(ops, position + len(left_out), channels, at)
        return (
            None
            if rest is None
            else {
                **{later.key: later.options[0] for later in left_out},
                slot.depth_key: slot.index,
                **rest,
            }
        )

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space with only the ``allowed`` options, in this space's order. Fixed
        choices may be named too.

        Slots beyond the deepest depth that is left are gone.
        """
        known = {RESOLUTION}
        for slot in self.slots:
            known |= {slot.key, slot.out_key, slot.depth_key}
        for key in allowed:
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")
        stages = []
        for i, stage in enumerate(self.stages):
            slots = tuple(
                _kept(block_key(i, j), options, allowed) for j, options in enumerate(stage.slots)
            )
            depths = _kept(depth_key(i), stage.depths or (len(slots),), allowed)
            update = {
                "widths": _kept(width_key(i), stage.widths, allowed),
                "depths": depths if len(depths) > 1 else (),
            }
            stages.append(stage.model_copy(update={**update, "slots": slots[: max(depths)]}))
        sizes = _kept(RESOLUTION, self.resolutions or (self.resolution,), allowed)
        return self._changed(
            stages, name, resolution=max(sizes), resolutions=sizes if len(sizes) > 1 else ()
        )

    def scaled(
        self,
        width: float,
        *,
        name: str | None = None,
        first: float | None = None,
        last: float | None = None,
    ) -> Self:
        """A new space with every stage ``width`` times as wide, rounded to multiples of
        8; equal widths merge.

        The last stage before a classifier is only ever widened, as in MobileNetV2 and
        ProxylessNAS: it needs the features. ``first`` and ``last`` are factors of the
        first and the last stage, where a network's own rule has others.

        Example:
            >>> from hwnas.core.spaces import proxylessnas
            >>> [stage.widths[0] for stage in proxylessnas().scaled(0.5).stages]
            [16, 8, 16, 24, 40, 48, 96, 160, 1280]
        """
        if not 0 < width < math.inf:
            raise SpaceError(
                f"space {self.name} cannot be {width} times as wide: give a width above 0, for"
                " instance 0.5."
            )
        factors = [width] * len(self.stages)
        factors[0] = width if first is None else first
        usual = max(width, 1.0) if self.head.needs_features else width
        factors[-1] = usual if last is None else last
        stages = [
            stage.model_copy(
                update={
                    "widths": tuple(
                        dict.fromkeys(
                            make_divisible(channels * factor) for channels in stage.widths
                        )
                    )
                }
            )
            for stage, factor in zip(self.stages, factors, strict=True)
        ]
        return self._changed(stages, name or f"{self.name}-w{width:g}")

    def with_detector(
        self, *, extras: Sequence[int] = EXTRAS, scores: Scores = "softmax", name: str | None = None
    ) -> Self:
        """A new space of detectors: SSDLite on the backbones of this one, as
        ``core.ssdlite.with_detector`` puts it on each.

        What belongs to the classifier is left out: stages of pooled heads and the last
        1 x 1 convolution. Taps are the last stage at each of the last two resolutions.
        Raises SpaceError where there is one only, or where the input's resolution is
        open.

        Example:
            >>> from hwnas.core.spaces import proxylessnas
            >>> space = proxylessnas(resolution=320, classes=90).with_detector()
            >>> space.detector.taps, [term.slot for term in space.terms()[-3:]]
            ((5, 7), ['head3', 'head4', 'head5'])
        """
        if len(self.resolutions) > 1:
            raise SpaceError(
                f"space {self.name} has several input resolutions"
                f" ({', '.join(map(str, self.resolutions))}), and a detector's anchors are for one:"
                " keep one of them, for instance by space.restrict = {resolution ="
                f" [{self.resolution}]}}."
            )
        stages = self.head.backbone(self.stages)
        bare = self._changed(stages or self.stages, name or f"{self.name}-ssdlite", detector=None)
        ends = last_stages(bare.slots)
        if len(ends) < 2:
            raise SpaceError(
                f"space {self.name} cannot carry a detector: it has no two resolutions to tap."
            )
        spec = DetectorSpec(taps=ends[-2:], extras=tuple(extras), scores=scores)
        return bare._changed(bare.stages, None, detector=spec.model_dump())

    def _changed(self, stages: Sequence[SpaceStage], name: str | None, **update: Any) -> Self:
        content = {
            **self.model_dump(),
            **update,
            "stages": [stage.model_dump() for stage in stages],
            "name": name or self.name,
        }
        return type(self).model_validate(content)


T = TypeVar("T", str, int)


def _kept(
    key: str, options: tuple[T, ...], allowed: Mapping[str, Sequence[Option]]
) -> tuple[T, ...]:
    if key not in allowed:
        return options
    unknown = [option for option in allowed[key] if option not in options]
    if unknown or not allowed[key]:
        raise SpaceError(
            f"choice {key!r} cannot be restricted to {list(allowed[key])}: its options are"
            f" {', '.join(map(str, options))}."
        )
    return tuple(option for option in options if option in allowed[key])
