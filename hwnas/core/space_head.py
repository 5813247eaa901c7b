"""What the networks of a space of blocks in a row end with: a classifier, or SSDLite on
some of its stages.

``SearchSpace.head`` chooses between them; whatever depends on the end of a space's
networks is asked of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from hwnas.core.arch import Architecture, Placed
from hwnas.core.choice import RESOLUTION, Term
from hwnas.core.detector import Detector
from hwnas.core.head import ClassifierHead, DetectorHead
from hwnas.core.ops import Classifier, Op
from hwnas.core.option import parse_option
from hwnas.core.space_stage import Slot, SpaceStage
from hwnas.core.ssdlite import DetectorSpec, extra_op, head_op, ssdlite


class SpaceHead(ABC):
    """The end of all networks of a space."""

    task: ClassVar[str]
    """The name of the task that they are for."""
    needs_features: ClassVar[bool]
    """Whether the last stage is only ever widened where others are made narrower."""

    @abstractmethod
    def check(self, slots: Sequence[Slot]) -> None:
        """Raise ValueError where it does not fit on the slots."""

    @abstractmethod
    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """The stages without those that are only there for it: what can carry a detector."""

    @abstractmethod
    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """A term for each of its ops, in the order of ``Architecture.ops``."""

    @abstractmethod
    def blocks(self, channels: int, size: int) -> tuple[Op, ...]:
        """Its ops that are blocks of the network, where what comes before them leaves
        ``channels`` of ``size`` px.
        """

    @abstractmethod
    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> Detector | None:
        """Its part of the architecture that has these ops in the slots."""

    @abstractmethod
    def placed(self, arch: Architecture) -> tuple[Placed, ...]:
        """The places of its ops in an architecture of the space."""


@dataclass(frozen=True)
class Classifiers(SpaceHead):
    """Pooling and a fully connected layer behind the last slot."""

    task = ClassifierHead.task
    needs_features = True
    classes: int

    def check(self, slots: Sequence[Slot]) -> None:
        """It fits on any slots."""

    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """Without stages of pooled heads, and without the last 1 x 1 convolution."""
        found = [stage for stage in stages if not any(map(_pools, stage.slots))]
        return found[:-1] if found and _narrow(found[-1]) else found

    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """One, which depends on the width of the last stage and on the resolution."""
        last = slots[-1]
        ops = tuple(
            Classifier(size, width, self.classes)
            for width, size in product(last.out_widths, last.out_sizes)
        )
        shape = {
            key: n
            for key, n in ((last.out_key, len(last.out_widths)), (RESOLUTION, len(last.out_sizes)))
            if n > 1
        }
        return (Term("classifier", tuple(shape), tuple(shape.values()), ops),)

    def blocks(self, channels: int, size: int) -> tuple[Op, ...]:
        """The classifier."""
        return (Classifier(size, channels, self.classes),)

    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> None:
        """None."""

    def placed(self, arch: Architecture) -> tuple[Placed, ...]:
        """The classifier."""
        return (Placed.of("classifier", arch.blocks[-1]),)


@dataclass(frozen=True)
class Detectors(SpaceHead):
    """SSDLite as a space's document specifies it."""

    task = DetectorHead.task
    needs_features = False
    classes: int
    spec: DetectorSpec

    def check(self, slots: Sequence[Slot]) -> None:
        """A tap that is the last stage of its resolution is known by its block: what
        follows begins with a stride, never a skip.
        """
        sizes = slots[0].sizes
        if len(sizes) > 1:
            raise ValueError(
                "a detector's anchors are for one input resolution, and this space has"
                f" {', '.join(map(str, sizes))}: keep one of them (space.restrict = {{resolution ="
                " [...]})"
            )
        for slot in slots:
            if slot.pooled:
                raise ValueError(
                    f"slot {slot.key} pools, so it leaves no feature map for a detector: leave its"
                    " stage out"
                )
        taps, ends = self.spec.taps, last_stages(slots)
        if list(taps) != sorted(set(taps)) or not set(taps) <= set(ends) or taps[-1] != ends[-1]:
            raise ValueError(
                f"the taps {list(taps)} of the detector are no ascending stages, each the last at"
                f" its resolution ({list(ends)} are), that end with {ends[-1]}, the last stage"
            )

    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """All: none of them pools."""
        return list(stages)

    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """One per extra and one per head. Only what reads a tap depends on a choice:
        the width of its stage.
        """
        last = {slot.stage: slot for slot in slots}
        taps = [last[tap] for tap in self.spec.taps]
        extras: list[Term] = []
        size, widths, keys = taps[-1].out_sizes[0], taps[-1].out_widths, _open(taps[-1])
        maps = [(slot.out_sizes[0], slot.out_widths, _open(slot)) for slot in taps]
        for i, width in enumerate(self.spec.extras):
            ops = tuple(extra_op(size, channels, width) for channels in widths)
            extras.append(Term(f"extra{i}", keys, (len(widths),) if keys else (), ops))
            size, widths, keys = ops[0].out_size, (width,), ()
            maps.append((size, widths, keys))
        heads = (
            Term(
                f"head{i}",
                keys,
                (len(widths),) if keys else (),
                tuple(head_op(size, width, self.classes) for width in widths),
            )
            for i, (size, widths, keys) in enumerate(maps)
        )
        return (*extras, *heads)

    def blocks(self, channels: int, size: int) -> tuple[Op, ...]:
        """None."""
        return ()

    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> Detector:
        """SSDLite whose taps are the last kept blocks of the specified stages."""
        taps = tuple(sum(slot.stage <= tap for slot, _ in kept) - 1 for tap in self.spec.taps)
        return ssdlite(
            [op for _, op in kept],
            taps,
            self.classes,
            extras=self.spec.extras,
            scores=self.spec.scores,
        )

    def placed(self, arch: Architecture) -> tuple[Placed, ...]:
        """Extras and heads."""
        return tuple(Placed.of(name, op) for name, op in arch.head.after.items())


def last_stages(slots: Sequence[Slot]) -> tuple[int, ...]:
    """The last stage at each resolution, fine to coarse."""
    last = {slot.out_sizes[0]: slot.stage for slot in slots if not slot.pooled}
    return tuple(last.values())


def _open(slot: Slot) -> tuple[str, ...]:
    """The key of a slot's output width, where that is a choice."""
    return (slot.out_key,) if len(slot.out_widths) > 1 else ()


def _pools(options: tuple[str, ...]) -> bool:
    return any(block is not None and block.kind == "hd" for block in map(parse_option, options))


def _narrow(stage: SpaceStage) -> bool:
    """Whether a stage is a 1 x 1 convolution and nothing else."""
    blocks = [parse_option(option) for options in stage.slots for option in options]
    return (
        len(stage.slots) == 1
        and stage.stride == 1
        and all(block and (block.kind, block.kernel) == ("cn", 1) for block in blocks)
    )
