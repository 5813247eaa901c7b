"""The head of a super-net: what follows the slots and is shared by every architecture
of the space.

Here are the interface and the classifier; the detector is in
``hwnas.nn.elastic_detector``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.ops import Classifier
from hwnas.core.space import MacroSpace
from hwnas.nn.blocks import initialise
from hwnas.nn.detector import Outputs
from hwnas.nn.elastic import Sharing
from hwnas.nn.remapping import TargetBlock
from hwnas.nn.slot import Width

Maps = Sequence[tuple[Tensor, Width]]
"""The feature maps [N, C, size, size] after the ``tapped`` slots, with their widths.
"""


class ElasticHead(nn.Module, ABC):
    """The head of a super-net, allocated for the widest slots before it. It is built
    from a space, the super-net's settings and the sharing.

    ``tapped`` holds the positions of the slots whose outputs it reads.
    """

    NAME: ClassVar[str]
    """Its name in the super-net, which prefixes its weights in a file."""
    ONE_SIZE: ClassVar[str] = ""
    """For messages: what ties the head to images of one size; empty if nothing does."""

    tapped: frozenset[int]

    @abstractmethod
    def outputs(self, maps: Maps, tracks: bool = True) -> Tensor | Outputs:
        """The tapped feature maps -> logits [N, classes], or the ``Outputs`` of a
        detector. ``tracks`` lets BN update its running statistics, if it keeps any.
        """

    @abstractmethod
    def initialise(self, generator: torch.Generator, how: str) -> None:
        """Fill the weights, drawing from ``generator``; ``how`` as in
        ``blocks.initialise``.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of the weights without weight decay."""

    @abstractmethod
    def copy_into(self, network: Any) -> None:
        """Copy the weights that a standalone network uses into it."""

    @abstractmethod
    def copy_weights(self, source: Any) -> None:
        """Start from the weights of another head of the same kind, as wide or wider."""

    def target_blocks(self) -> list[TargetBlock]:
        """What may start from the weights of another network: nothing by default."""
        return []

    @abstractmethod
    def angle_weights(self, width: int) -> list[Tensor]:
        """The weights used in an architecture whose last slot has ``width`` channels
        (for ``hwnas.search.angle``).
        """


class ElasticClassifier(nn.Linear, ElasticHead):
    """Pooling, dropout and a linear layer, of which narrower architectures use the
    first columns.
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
        """Initialise as the slots are."""
        initialise(self, generator, how)

    def no_weight_decay(self) -> set[str]:
        """The weights, as in TuNAS's code. Biases never have weight decay."""
        return {"weight"}

    def copy_into(self, network: Any) -> None:
        """Copy the columns that a standalone classifier uses into it."""
        linear = network.blocks[-1].linear
        linear.weight.copy_(self.weight[:, : linear.in_features])
        linear.bias.copy_(self.bias)

    def copy_weights(self, source: ElasticClassifier) -> None:
        """Start from the first columns of a classifier that is as wide or wider."""
        self.weight.copy_(source.weight[:, : self.in_features])
        self.bias.copy_(source.bias)

    def target_blocks(self) -> list[TargetBlock]:
        """The classifier, for the widest network."""
        op = Classifier(1, self.in_features, self.out_features)
        state = {"linear.weight": self.weight.detach(), "linear.bias": self.bias.detach()}
        return [TargetBlock([(op, state)], begins_stage=True)]

    def angle_weights(self, width: int) -> list[Tensor]:
        """The first ``width`` columns."""
        return [self.weight[:, :width]]
