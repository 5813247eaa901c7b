"""The end of the networks of a macro space: a classifier, or a detector on some of the
stages.

``SearchSpace.head`` chooses the class; code that depends on the end of the networks
calls its methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from hwnas.core.arch import Architecture, Position
from hwnas.core.choice import RESOLUTION, Term
from hwnas.core.detector import Detector, DetectorSpec
from hwnas.core.head import ClassifierHead, DetectorHead
from hwnas.core.ops import Classifier, Op
from hwnas.core.option import parse_option
from hwnas.core.size import Size
from hwnas.core.space_stage import Slot, SpaceStage, has_pooled_head


class SpaceHead(ABC):
    """The end of every network of a space."""

    task: ClassVar[str]
    """The task of the networks."""
    needs_features: ClassVar[bool]
    """Whether the last stage keeps its width when the other stages are made narrower.
    """

    @abstractmethod
    def check(self, slots: Sequence[Slot]) -> None:
        """Raise ValueError if the head does not fit the slots."""

    @abstractmethod
    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """The stages that can carry a detector: all that do not exist for this head
        alone.
        """

    @abstractmethod
    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """One term for every op of the head, in the order of ``Architecture.ops``."""

    @abstractmethod
    def blocks(self, channels: int, size: Size) -> tuple[Op, ...]:
        """The ops of the head that are blocks of the network, on a feature map of
        ``channels`` and this ``size``.
        """

    @abstractmethod
    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> Detector | None:
        """The detector of the architecture with these ops in the slots; None for a
        classifier.
        """

    @abstractmethod
    def positions(self, arch: Architecture) -> tuple[Position, ...]:
        """The positions of the head's ops in an architecture of the space."""


@dataclass(frozen=True)
class Classifiers(SpaceHead):
    """Pooling and a fully connected layer after the last slot."""

    task = ClassifierHead.task
    needs_features = True
    classes: int

    def check(self, slots: Sequence[Slot]) -> None:
        """Accept any slots."""

    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """The stages without pooled heads and without the last 1 x 1 convolution."""
        kept = [stage for stage in stages if not any(map(has_pooled_head, stage.slots))]
        if kept and _is_pointwise(kept[-1]):
            kept.pop()
        return kept

    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """One term, which depends on the width of the last stage and the resolution."""
        last = slots[-1]
        inputs = product(last.out_widths, last.out_sizes)
        ops = tuple(Classifier(size, width, self.classes) for width, size in inputs)
        counts = {last.out_key: len(last.out_widths), RESOLUTION: len(last.out_sizes)}
        return (Term.over("classifier", counts, ops),)

    def blocks(self, channels: int, size: Size) -> tuple[Op, ...]:
        """The classifier."""
        return (Classifier(size, channels, self.classes),)

    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> None:
        """None: there is no detector."""

    def positions(self, arch: Architecture) -> tuple[Position, ...]:
        """The classifier."""
        return (Position.of("classifier", arch.blocks[-1]),)


@dataclass(frozen=True)
class Detectors(SpaceHead):
    """A detector as the document of the space specifies it."""

    task = DetectorHead.task
    needs_features = False
    classes: int
    spec: DetectorSpec

    def check(self, slots: Sequence[Slot]) -> None:
        """Raise ValueError if there are several resolutions, a slot pools, or a tap is
        not the last stage at its resolution.
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
                    f"slot {slot.key} pools, so it leaves no feature map for a detector: remove its"
                    " stage"
                )

        # The stage after such a tap begins with a stride, so it is never skipped as a
        # whole, and the tap can be recognized by the blocks of an architecture.
        taps = self.spec.taps
        ends = last_stages(slots)
        ascending = list(taps) == sorted(set(taps))
        if not taps or not ascending or not set(taps) <= set(ends) or taps[-1] != ends[-1]:
            raise ValueError(
                f"the taps {list(taps)} of the detector must be ascending stages, each the last at"
                f" its resolution (one of {list(ends)}), and end with {ends[-1]}, the last stage"
            )

    def backbone(self, stages: Sequence[SpaceStage]) -> list[SpaceStage]:
        """All stages: none of them pools."""
        return list(stages)

    def terms(self, slots: Sequence[Slot]) -> tuple[Term, ...]:
        """One term per op of the neck and one per head. Only ops that read a tap depend
        on a choice: the width of the tapped stage.
        """
        last_slot = {slot.stage: slot for slot in slots}
        tapped = [last_slot[tap] for tap in self.spec.taps]
        # any widths will do: the ops that depend on them are replaced below
        maps = [(slot.out_widths[0], slot.out_sizes[0]) for slot in tapped]
        positions = tuple(range(len(tapped)))
        detector = self.spec.detector(positions, maps, self.classes)
        terms: list[Term] = []
        for name, op in DetectorHead(detector).after.items():
            counts: dict[str, int] = {}
            ops = [op]
            if name in detector.readers:
                slot = tapped[detector.readers[name]]
                ops = [replace(op, in_ch=width) for width in slot.out_widths]
                counts[slot.out_key] = len(ops)
            terms.append(Term.over(name.replace(" ", ""), counts, ops))
        return tuple(terms)

    def blocks(self, channels: int, size: Size) -> tuple[Op, ...]:
        """Empty: the neck and the heads come after the blocks."""
        return ()

    def detector(self, kept: Sequence[tuple[Slot, Op]]) -> Detector:
        """The detector whose taps are the last kept blocks of the specified stages."""
        stages = [slot.stage for slot, _ in kept]
        # stages ascend, so this is the position of the last block of stage ``tap``
        taps = tuple(bisect_right(stages, tap) - 1 for tap in self.spec.taps)
        maps = [(kept[tap][1].out_ch, kept[tap][1].out_size) for tap in taps]
        return self.spec.detector(taps, maps, self.classes)

    def positions(self, arch: Architecture) -> tuple[Position, ...]:
        """One position per op of the neck and per head."""
        return tuple(Position.of(name, op) for name, op in arch.head.after.items())


def last_stages(slots: Sequence[Slot]) -> tuple[int, ...]:
    """The last stage at each resolution, fine to coarse. Pooled heads do not count."""
    # later slots overwrite earlier ones of the same size
    last = {slot.out_sizes[0]: slot.stage for slot in slots if not slot.pooled}
    return tuple(last.values())


def _is_pointwise(stage: SpaceStage) -> bool:
    """Whether a stage is a single 1 x 1 convolution of stride 1."""
    if len(stage.slots) > 1 or stage.stride != 1:
        return False
    blocks = map(parse_option, stage.slots[0])
    return all(block and (block.kind, block.kernel) == ("cn", 1) for block in blocks)
