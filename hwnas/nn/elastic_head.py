"""What comes after the slots of a super-net, and every architecture of the space
shares: here the classifier.

The detector is in ``hwnas.nn.elastic_detector``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.space import MacroSpace
from hwnas.nn.blocks import initialise
from hwnas.nn.detector import Outputs
from hwnas.nn.elastic import Sharing
from hwnas.nn.slot import Width

Maps = Sequence[tuple[Tensor, Width]]
"""The feature maps [N, C, size, size] behind the ``tapped`` slots, with their widths."""


class ElasticHead(nn.Module, ABC):
    """The end of a super-net, allocated for the widest slots before it. Made from a
    space, the super-net's settings and its sharing.

    ``tapped`` are the positions of the slots that it looks behind.
    """

    NAME: ClassVar[str]
    """Its name in the super-net, and so that of its weights in a file."""
    ONE_SIZE: ClassVar[str] = ""
    """What of it is for images of one size alone, for messages; nothing where it takes any size."""

    tapped: frozenset[int]

    @abstractmethod
    def outputs(self, maps: Maps, tracks: bool = True) -> Tensor | Outputs:
        """The tapped feature maps -> logits [N, classes], or the ``Outputs`` of a
        detector. ``tracks``: BN's statistics, where kept.
        """

    @abstractmethod
    def initialise(self, generator: torch.Generator, how: str) -> None:
        """Fill its weights from ``generator``."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of its weights without L2."""

    @abstractmethod
    def copy_into(self, network: Any) -> None:
        """Give a stand-alone network the weights that it uses."""

    @abstractmethod
    def copy_weights(self, source: Any) -> None:
        """Begin with the weights of another head of its kind, which is as wide or wider."""

    @abstractmethod
    def angle_weights(self, width: int) -> list[Tensor]:
        """Its weights in an architecture whose last slot is so wide, for ``hwnas.search.angle``."""


class ElasticClassifier(nn.Linear, ElasticHead):
    """Pooling and a linear layer, of which narrower architectures use the first
    columns. Dropout is on the pooled features.
    """

    NAME = "classifier"

    def __init__(self, space: MacroSpace, config: SupernetConfig, sharing: Sharing) -> None:
        del sharing
        super().__init__(max(space.stages[-1].widths), space.classes)
        self.dropout = nn.Dropout(config.dropout)
        self.tapped = frozenset({len(space.slots) - 1})

    def outputs(self, maps: Maps, tracks: bool = True) -> Tensor:
        """The last feature map -> logits [N, classes]."""
        [(x_NCHW, _)] = maps
        pooled_NC = self.dropout(F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1))
        return F.linear(pooled_NC, self.weight[:, : pooled_NC.shape[1]], self.bias)

    def initialise(self, generator: torch.Generator, how: str) -> None:
        """As the slots."""
        initialise(self, generator, how)

    def no_weight_decay(self) -> set[str]:
        """The weights, but not the biases, which have none anyway (as in TuNAS's code)."""
        return {"weight"}

    def copy_into(self, network: Any) -> None:
        """Give a stand-alone classifier its columns."""
        linear = network.blocks[-1].linear
        linear.weight.copy_(self.weight[:, : linear.in_features])
        linear.bias.copy_(self.bias)

    def copy_weights(self, source: ElasticClassifier) -> None:
        """Begin with the first columns of a wider one."""
        self.weight.copy_(source.weight[:, : self.in_features])
        self.bias.copy_(source.bias)

    def angle_weights(self, width: int) -> list[Tensor]:
        """The columns that are used."""
        return [self.weight[:, :width]]
