"""Search spaces: the set of architectures that a search chooses from.

A space offers *choices* (``"s2.b1"``: which block; ``"s2.width"``: how many channels;
``"s2.depth"``: how many blocks; ``"resolution"``: pixels of the image). *Picks* name
one option for every choice; ``decode`` turns them into an architecture, ``encode`` does
the reverse.

A *term* is what one slot adds to the cost of a network: its op for every combination of
the options that it depends on (``terms``). Terms tell which ops have to be profiled,
whether a latency table (the measured time of every op on a device) covers the space,
and what every architecture costs.

``MacroSpace`` is a chain of stages, each a chain of slots; ``hwnas.core.cells`` holds
the cell-based spaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from hwnas.core.arch import Architecture, Origin, Picks, Position
from hwnas.core.choice import open_choices
from hwnas.core.detection import NUMBERS, SSDLITE
from hwnas.core.detector import DetectorSpec
from hwnas.core.ops import Op
from hwnas.core.option import make_divisible
from hwnas.core.search_space import RESOLUTION, Choice, Option, SearchSpace, Term
from hwnas.core.size import Rectangle, Size
from hwnas.core.space_head import last_stages
from hwnas.core.space_stage import Slot, SpaceStage, block_key, depth_key, width_key
from hwnas.document import nearest
from hwnas.errors import SpaceError

__all__ = ["Choice", "MacroSpace", "Option", "SearchSpace", "Slot", "SpaceStage", "Term"]


class MacroSpace(SearchSpace):
    """A chain of stages from stem to head, followed by pooling and a classifier. With a
    ``detector``, the chain is a backbone and some of its stages feed the detector.

    ``resolutions`` with several entries makes the input resolution a choice; the
    largest is ``resolution``. ``act`` is the activation of stages that name none.

    Example:
        >>> from hwnas.core.spaces import proxylessnas
        >>> space = proxylessnas()
        >>> picks = space.sample(np.random.default_rng(0))
        >>> space.encode(space.decode(picks)) == picks
        True
    """

    SPARSE_FIELDS = ("resolutions", "detector")
    CHAIN = True

    kind: Literal["macro"] = "macro"
    resolutions: tuple[int, ...] = ()
    act: str = "relu"
    stages: tuple[SpaceStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        sizes = self.resolutions
        if sizes and (
            len(set(sizes)) != len(sizes) or min(sizes) < 1 or max(sizes) != self.resolution
        ):
            raise ValueError(
                "resolutions must be different, and the largest must be resolution ="
                f" {self.resolution}, got {list(sizes)}"
            )
        for i, stage in enumerate(self.stages):
            stage.check(f"s{i}")
        for slot in self.slots:
            slot.check()
        self.head.check(self.slots)
        return self

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots in order, each with its input and output shapes."""
        slots: list[Slot] = []
        in_key = "input"  # the image: not the key of a choice
        in_widths: tuple[int, ...] = (self.in_channels,)
        sizes: tuple[Size, ...] = self.resolutions or (self.resolution,)

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
                    stride=stage.stride if j == 0 else 1,  # only the first slot has the stride
                    act=stage.act or self.act,
                    residual=stage.residual,
                )
                slots.append(slot)
                in_key = slot.out_key
                in_widths = stage.widths
                sizes = slot.out_sizes

        return tuple(slots)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """For every stage its slots, its width and its depth (the order of TuNAS's
        code); then the resolution. Choices with a single option are left out.
        """
        all_choices: list[Choice] = []
        for i, stage in enumerate(self.stages):
            for j, options in enumerate(stage.slots):
                all_choices.append(Choice(block_key(i, j), options, "op"))
            all_choices.append(Choice(width_key(i), stage.widths, "width"))
            all_choices.append(Choice(depth_key(i), stage.depths, "depth"))
        all_choices.append(Choice(RESOLUTION, self.resolutions, "resolution"))
        return open_choices(all_choices)

    @property
    def decisions(self) -> int:
        """Number of raw combinations of separate decisions (kernel, expansion, skip,
        width, depth, resolution), redundant ones included.

        TuNAS's README calls this number the size of the space.
        """
        count = 1
        for slot in self.slots:
            count *= math.prod(slot.factors.decisions)
        for choice in self.choices:
            if choice.kind != "op":
                count *= len(choice.options)
        return count

    @property
    def architectures(self) -> int:
        """Number of distinct architectures; options of blocks that the depth leaves out
        do not count.
        """
        count = 1
        for stage in self.stages:
            depths = stage.depths or (len(stage.slots),)
            # a depth d has the combinations of options of its first d slots
            count *= sum(math.prod(map(len, stage.slots[:depth])) for depth in depths)
        for choice in self.choices:
            if choice.kind in ("width", "resolution"):
                count *= len(choice.options)
        return count

    def terms(self) -> tuple[Term, ...]:
        """One term per slot, then one for the classifier, or one for each extra and
        each head of the detector.
        """
        return (*map(self._term, self.slots), *self.head.terms(self.slots))

    def _term(self, slot: Slot) -> Term:
        """The term of one slot."""
        # Within a stage all blocks share one width, so only the first one has an input
        # width of its own; None stands for "the same as the output width".
        inputs: tuple[int | None, ...] = slot.in_widths if slot.first else (None,)
        # If every depth keeps the slot, its cost does not depend on the depth: the full
        # depth stands for all.
        depths = slot.depths if slot.elective else (len(self.stages[slot.stage].slots),)

        ops: list[Op | None] = []
        combinations = product(slot.options, inputs, slot.out_widths, depths, slot.sizes)
        for option, in_width, out_width, depth, size in combinations:
            if slot.index >= depth:
                ops.append(None)
            else:
                ops.append(slot.op(option, in_width or out_width, out_width, size))

        # in the order of the product above: ``ops`` is row-major
        counts = {slot.key: len(slot.options)}
        if slot.first:
            counts[slot.in_key] = len(inputs)
        counts[slot.out_key] = len(slot.out_widths)
        counts[slot.depth_key] = len(depths)
        counts[RESOLUTION] = len(slot.sizes)
        return Term.over(slot.key, counts, ops, slot.options)

    def walk(self, picks: Mapping[str, Option]) -> tuple[tuple[Slot, Op | None], ...]:
        """Every slot with the op that ``picks`` put there; None if it is skipped or
        left out by the depth.
        """
        size_index = 0
        if RESOLUTION in picks:
            size_index = self.resolutions.index(int(picks[RESOLUTION]))

        steps: list[tuple[Slot, Op | None]] = []
        channels = self.in_channels
        for slot in self.slots:
            # choices with a single option are not in the picks
            width = int(picks.get(slot.out_key, slot.out_widths[0]))
            # without a choice of depth, every slot is kept: any depth above its index
            depth = int(picks.get(slot.depth_key, slot.index + 1))
            option = str(picks.get(slot.key, slot.options[0]))
            op = None
            if slot.index < depth:
                op = slot.op(option, channels, width, slot.sizes[size_index])
            steps.append((slot, op))
            channels = width
        return tuple(steps)

    def decode(self, picks: Mapping[str, Option], name: str | None = None) -> Architecture:
        """The architecture that ``picks`` describe. Decisions with a single option need
        no pick. Raises SpaceError if a pick is missing or unknown.
        """
        self.check(picks)
        origin = Origin(space=self.name, space_sha256=self.sha256, picks=dict(picks))
        kept: list[tuple[Slot, Op]] = []
        for slot, op in self.walk(picks):
            if op is not None:
                kept.append((slot, op))
        return self.network(kept, name or f"{self.name}-sample", origin)

    def network(
        self, kept: Sequence[tuple[Slot, Op]], name: str, origin: Origin | None = None
    ) -> Architecture:
        """The architecture made of the ops of the kept slots and the classifier or
        detector that follows them.
        """
        blocks = [op for _, op in kept]
        last = blocks[-1]
        return Architecture(
            name=name,
            in_channels=self.in_channels,
            bn_eps=self.bn_eps,
            blocks=(*blocks, *self.head.blocks(last.out_ch, last.out_size)),
            detector=self.head.detector(kept),
            origin=origin,
        )

    def _positions(self, arch: Architecture, picks: Picks) -> tuple[Position, ...]:
        """One position per slot, then those of the head. A skipped slot passes its
        input on.
        """
        positions = []
        channels = arch.in_channels
        size = arch.size
        for slot, op in self.walk(picks):
            if op is not None:
                channels = op.out_ch
                size = op.out_size
            positions.append(Position(slot.key, op, channels, size))
        return (*positions, *self.head.positions(arch))

    def is_kept(self, key: str, picks: Mapping[str, Option]) -> bool:
        """Whether the depth keeps the block that choice ``key`` decides. Other choices
        are always kept.
        """
        for slot in self.slots:
            if slot.key == key:
                # without a choice of depth, every slot is kept: any depth above its index
                return slot.index < int(picks.get(slot.depth_key, slot.index + 1))
        return True

    def canonical(self, index_C: np.ndarray) -> np.ndarray:
        """Option positions [choices], with those of blocks that the depth leaves out
        set to 0.
        """
        position = {choice.key: i for i, choice in enumerate(self.choices)}
        canonical_C = index_C.copy()
        for slot in self.slots:
            if slot.depth_key in position and slot.key in position:
                depth = slot.depths[int(index_C[position[slot.depth_key]])]
                if slot.index >= depth:
                    canonical_C[position[slot.key]] = 0
        return canonical_C

    def encode(self, arch: Architecture) -> Picks:
        """Picks that decode to ``arch``. If ``arch`` was decoded by this space, its
        origin records the picks; otherwise the blocks are matched to the slots.

        The picks of slots that the depth leaves out do not affect ``arch``; matching
        gives these slots their first option. Raises SpaceError if ``arch`` is not in
        the space, or if its blocks differ from those of its origin's picks.
        """
        if arch.origin is not None and arch.origin.space_sha256 == self.sha256:
            decoded = self.decode(arch.origin.picks)
            if (decoded.blocks, decoded.detector) != (arch.blocks, arch.detector):
                raise SpaceError(
                    f"the blocks of architecture {arch.name!r} are not those of its origin's picks:"
                    " correct or remove its origin."
                )
            return dict(arch.origin.picks)

        sizes: tuple[Size, ...] = self.resolutions or (self.resolution,)
        matched = None
        if arch.size in sizes:
            size_index = sizes.index(arch.size)
            matched = self._match(arch.blocks, 0, self.in_channels, size_index)
        if matched is None:
            raise SpaceError(
                f"architecture {arch.name!r} is not in space {self.name}: no picks give its"
                f" {len(arch.ops())} blocks."
            )

        matched[RESOLUTION] = arch.resolution
        picks = {choice.key: matched[choice.key] for choice in self.choices}
        if self.decode(picks).detector != arch.detector:
            raise SpaceError(
                f"architecture {arch.name!r} is not in space {self.name}: its blocks match,"
                " but its detector differs."
            )
        return picks

    def _match(
        self, ops: tuple[Op, ...], position: int, channels: int, size_index: int
    ) -> Picks | None:
        """Match ``ops`` to the slots from ``position`` on, at the resolution with index
        ``size_index``. ``channels`` is the input width. None if they do not match.

        This is a backtracking search: at every slot it tries the options in order; if
        none leads to a match, it ends the stage before this slot, provided that a depth
        allows that.
        """
        # all slots are matched: only the classifier, if any, must remain
        if position == len(self.slots):
            end = self.head.blocks(channels, self.slots[-1].out_sizes[size_index])
            return {} if ops == end else None

        slot = self.slots[position]
        # the blocks of a stage share one width, which its first slot has chosen
        widths = slot.out_widths if slot.first else (channels,)
        for width in widths:
            for option in slot.options:
                op = slot.op(option, channels, width, slot.sizes[size_index])
                if op is None:  # skip consumes no op
                    remaining = ops
                elif ops[:1] == (op,):
                    remaining = ops[1:]
                else:
                    continue
                rest = self._match(remaining, position + 1, width, size_index)
                if rest is not None:
                    # On equal keys ``rest`` wins: a later slot of the stage sets a larger
                    # depth.
                    picks: Picks = {
                        slot.key: option,
                        slot.out_key: width,
                        slot.depth_key: slot.index + 1,
                    }
                    return picks | rest

        # no option matches: end the stage before this slot, if a depth allows that
        if slot.index not in slot.depths:
            return None
        left_out = [later for later in self.slots[position:] if later.stage == slot.stage]
        rest = self._match(ops, position + len(left_out), channels, size_index)
        if rest is None:
            return None
        unused: Picks = {later.key: later.options[0] for later in left_out}
        return unused | {slot.depth_key: slot.index} | rest

    def restrict(self, allowed: Mapping[str, Sequence[Option]], name: str | None = None) -> Self:
        """A new space that keeps only the ``allowed`` options of the named choices, in
        the order of this space. Decisions with a single option may be named as well.

        Slots beyond the largest remaining depth are removed. Raises SpaceError on an
        unknown choice or option.
        """
        known = {RESOLUTION}
        for slot in self.slots:
            known |= {slot.key, slot.out_key, slot.depth_key}
        for key in allowed:
            if key not in known:
                raise SpaceError(f"space {self.name} has no choice {key!r}; {nearest(key, known)}")

        stages = []
        for i, stage in enumerate(self.stages):
            slots = [
                _allowed_options(block_key(i, j), options, allowed)
                for j, options in enumerate(stage.slots)
            ]
            depths = _allowed_options(depth_key(i), stage.depths or (len(slots),), allowed)
            update = {
                "widths": _allowed_options(width_key(i), stage.widths, allowed),
                "depths": depths if len(depths) > 1 else (),
                "slots": tuple(slots[: max(depths)]),
            }
            stages.append(stage.model_copy(update=update))

        if isinstance(self.resolution, Rectangle):
            if RESOLUTION in allowed:
                raise SpaceError(
                    f"space {self.name} takes images of {self.resolution} px, so its resolution"
                    " cannot be restricted: remove it."
                )
            return self._changed(stages, name)
        sizes = _allowed_options(RESOLUTION, self.resolutions or (self.resolution,), allowed)
        resolutions = sizes if len(sizes) > 1 else ()
        return self._changed(stages, name, resolution=max(sizes), resolutions=resolutions)

    def scaled(
        self,
        width: float,
        *,
        name: str | None = None,
        first: float | None = None,
        last: float | None = None,
    ) -> Self:
        """A new space in which every stage is ``width`` times as wide, rounded to a
        multiple of 8 channels. Width options that become equal are merged.

        The last stage before a classifier is never made narrower, as in MobileNetV2 and
        ProxylessNAS, because the classifier needs its features. ``first`` and ``last``
        replace the factor of the first and of the last stage, for networks whose
        published scaling differs. Raises SpaceError if ``width`` is not a finite number
        above 0.

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
        if first is not None:
            factors[0] = first
        if last is not None:
            factors[-1] = last
        elif self.head.needs_features:
            factors[-1] = max(width, 1.0)
        else:
            # not redundant: in a space of one stage, ``first`` has set this factor
            factors[-1] = width

        stages = []
        for stage, factor in zip(self.stages, factors, strict=True):
            widths = [make_divisible(channels * factor) for channels in stage.widths]
            # Rounding can make widths equal. A dict merges them and keeps the order.
            stages.append(stage.model_copy(update={"widths": tuple(dict.fromkeys(widths))}))
        return self._changed(stages, name or f"{self.name}-w{width:g}")

    def with_detector(self, spec: DetectorSpec | None = None, *, name: str | None = None) -> Self:
        """A new space of detectors: SSDLite, or the detector of ``spec``, on the
        backbones of this space, as ``core.detection.with_detector`` adds it to a single
        architecture.

        Stages that exist only for the classifier are left out: pooled heads and the
        last 1 x 1 convolution. The *taps* are the stages whose outputs feed the
        detector: the last stage at each of the lowest resolutions. Raises SpaceError if
        the remaining stages have too few resolutions, or if the input resolution is
        searched.

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

        # A space needs at least one stage. If the backbone has none, keep the stages of
        # the classifier for now: they have no two resolutions, so the check below raises.
        spec = spec or SSDLITE
        stages = self.head.backbone(self.stages)
        bare_name = name or f"{self.name}-{spec.KIND}"
        bare = self._changed(stages or self.stages, bare_name, detector=None)
        ends = last_stages(bare.slots)
        if len(ends) < spec.LEVELS:
            raise SpaceError(
                f"space {self.name} cannot carry a detector: it needs feature maps at"
                f" {NUMBERS[spec.LEVELS]} resolutions."
            )
        tapped = {**spec.model_dump(), "taps": ends[-spec.LEVELS :]}
        return bare._changed(bare.stages, None, detector=tapped)

    def _changed(self, stages: Sequence[SpaceStage], name: str | None, **update: Any) -> Self:
        """A copy with other stages and fields. It is validated again, unlike
        ``model_copy``.
        """
        content = {
            **self.model_dump(),
            **update,
            "stages": [stage.model_dump() for stage in stages],
            "name": name or self.name,
        }
        return type(self).model_validate(content)


T = TypeVar("T", str, int)


def _allowed_options(
    key: str, options: tuple[T, ...], allowed: Mapping[str, Sequence[Option]]
) -> tuple[T, ...]:
    """The options of choice ``key`` that ``allowed`` keeps: all if it does not name the
    choice. Raises SpaceError if it names unknown options, or none.
    """
    if key not in allowed:
        return options
    unknown = [option for option in allowed[key] if option not in options]
    if unknown or not allowed[key]:
        raise SpaceError(
            f"choice {key!r} cannot be restricted to {list(allowed[key])}: its options are"
            f" {', '.join(map(str, options))}."
        )
    return tuple(option for option in options if option in allowed[key])
