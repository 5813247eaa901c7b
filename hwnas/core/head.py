"""The head of a network, which makes its outputs: a classifier, which is the last
block, or a detector on its feature maps.

``Architecture.head`` chooses the class; code that depends on the head calls its
methods.
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
    """The task of networks with this head."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes, without the background."""

    @property
    @abstractmethod
    def after(self) -> dict[str, Op]:
        """The ops of the head that run after the blocks of the network, by name and in
        order.
        """

    @property
    @abstractmethod
    def wiring(self) -> tuple[str, ...]:
        """The blocks that the head reads; empty if it reads just the last one."""

    @abstractmethod
    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Raise ValueError if the head does not fit the blocks."""


@dataclass(frozen=True)
class ClassifierHead(Head):
    """The last block gives the logits."""

    task = "classify"
    last: Op

    @property
    def classes(self) -> int:
        """Number of outputs of the last block."""
        return self.last.out_ch

    @property
    def after(self) -> dict[str, Op]:
        """Empty: the classifier is a block."""
        return {}

    @property
    def wiring(self) -> tuple[str, ...]:
        """Empty: it reads the last block."""
        return ()

    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Accept any blocks: the classifier is one of them."""


@dataclass(frozen=True)
class DetectorHead(Head):
    """A neck on some of the blocks, and predictors on feature maps."""

    task = "detect"
    detector: Detector

    @property
    def classes(self) -> int:
        """Number of classes, without the background."""
        return self.detector.classes

    @property
    def after(self) -> dict[str, Op]:
        """``extra 0``, ``extra 1``, ... (or ``neck 0``, ...), then ``head 0``, ..."""
        neck = dict(zip(self.detector.neck_names, self.detector.neck, strict=True))
        return neck | {f"head {i}": op for i, op in enumerate(self.detector.heads)}

    @property
    def wiring(self) -> tuple[str, ...]:
        """The taps, as ``tap5``, and what the neck does besides a chain of ops."""
        taps = tuple(f"tap{tap}" for tap in self.detector.taps)
        return (*taps, *self.detector.wiring)

    def check(self, blocks: Sequence[Op], graph: Sequence[Step]) -> None:
        """Raise ValueError if taps, feature maps and anchors do not agree, or if there
        is a graph.
        """
        # taps are positions in a chain
        if graph:
            raise ValueError("a network with a graph cannot carry a detector")
        self.detector.check(blocks)
