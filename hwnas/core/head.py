"""What makes the outputs of a network: a classifier, which is its last block, or a
detector on its feature maps.

``Architecture.head`` chooses between them; whatever depends on the end of a network is asked of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hwnas.core.detector import Detector
from hwnas.core.graph import Step
from hwnas.core.ops import Op


class Head(ABC):
    """The end of a network."""

    task: ClassVar[str]
    """The name of the task that its networks are for."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes, a background not counted."""

    @property
    @abstractmethod
    def after(self) -> dict[str, Op]:
        """Its ops that come after the blocks of the network, by name, in the order in
        which they run.
        """

    @property
    @abstractmethod
    def wiring(self) -> tuple[str, ...]:
        """Which blocks it reads, where that is more than the last one."""

    @abstractmethod
    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Raise ValueError where it does not fit on the blocks."""


@dataclass(frozen=True)
class ClassifierHead(Head):
    """The last block gives the logits."""

    task = "classify"
    last: Op

    @property
    def classes(self) -> int:
        """Outputs of the last block."""
        return self.last.out_ch

    @property
    def after(self) -> dict[str, Op]:
        """Nothing."""
        return {}

    @property
    def wiring(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Blocks that fit each other can end anyhow."""


@dataclass(frozen=True)
class DetectorHead(Head):
    """Extras after the last block, and predictors on the feature maps."""

    task = "detect"
    detector: Detector

    @property
    def classes(self) -> int:
        """What is told apart beside the background."""
        return self.detector.classes

    @property
    def after(self) -> dict[str, Op]:
        """``extra 0``, ``extra 1``, ..., then ``head 0``, ``head 1``, ..."""
        extras = {f"extra {i}": op for i, op in enumerate(self.detector.extras)}
        return extras | {f"head {i}": op for i, op in enumerate(self.detector.heads)}

    @property
    def wiring(self) -> tuple[str, ...]:
        """Its taps: ``tap5``."""
        return tuple(f"tap{tap}" for tap in self.detector.taps)

    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Taps, maps and anchors have to agree. Taps are positions in a chain, so there
        is no graph.
        """
        if graph:
            raise ValueError("a network with a graph carries no detector")
        self.detector.check(blocks)
