"""Standalone classifiers: the blocks of an architecture in sequence, or wired as its
graph says.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.nn.blocks import build, initialise
from hwnas.nn.freezing import Freezable
from hwnas.nn.graph import run_graph


class ClassificationNetwork(Freezable):
    """The torch module of an architecture without a detector.

    Example:
        >>> from hwnas.core.spaces import published
        >>> arch = published("mobilenet_v2", resolution=64)
        >>> ClassificationNetwork(arch).eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    drop_path: float = 0.0
    """In a graph of cells: the probability that an image loses the op of an edge in
    training. See ``hwnas.nn.graph.edge_points``.
    """

    def __init__(
        self, arch: Architecture, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        assert arch.detector is None, f"{arch.name} has a detector: build a DetectionNetwork"
        self.arch = arch
        self.blocks = nn.Sequential(
            *(build(op, bn_eps=arch.bn_eps, dropout=dropout) for op in arch.ops())
        )
        if generator is not None:
            initialise(self, generator)

    @property
    def backbone_blocks(self) -> int:
        """All blocks but the classifier."""
        return len(self.blocks) - 1

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): the classifier's,
        as in TuNAS's code.
        """
        return {f"blocks.{len(self.blocks) - 1}.linear.weight"}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> logits [N, classes]."""
        if self.arch.graph:
            last = len(self.arch.graph)
            drop_path = self.drop_path if self.training else 0.0
            [logits_NK] = run_graph(
                self.arch.graph,
                self.blocks,
                [x_NCHW],
                [last],
                side=self.arch.resolution,
                drop_path=drop_path,
            )
            return logits_NK
        logits: Tensor = self.blocks(x_NCHW)
        return logits
