"""The network of an architecture, whatever its task."""

from __future__ import annotations

import torch

from hwnas.core.arch import Architecture
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.detector import DetectionNetwork

Network = ClassificationNetwork | DetectionNetwork


def network_of(
    arch: Architecture, *, dropout: float = 0.0, generator: torch.Generator | None = None
) -> Network:
    """The network of an architecture: a detector if it has one, else a classifier.

    ``dropout`` goes before the last layer of a classifier; detectors have none.
    ``generator`` draws the initial weights; without one, they stay PyTorch's defaults.
    """
    if arch.detector is not None:
        return DetectionNetwork(arch, generator=generator)
    return ClassificationNetwork(arch, dropout=dropout, generator=generator)
