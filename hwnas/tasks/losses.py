"""Losses as qualities: 1 / (1 + loss), for all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hwnas.data.images import Batch
from hwnas.engine import Criterion
from hwnas.nn.network import Network


@torch.inference_mode()
def of_mean_loss(network: Network, batches: Iterable[Batch], criterion: Criterion) -> float:
    """1 / (1 + mean loss of an image)."""
    network.eval()
    device = next(network.parameters()).device
    criterion.to(device)
    total, count = 0.0, 0
    for x_NCHW, y in batches:
        loss, _ = criterion(
            network(x_NCHW.to(device, memory_format=torch.channels_last)), y.to(device)
        )
        total, count = total + float(loss) * len(y), count + len(y)
    return of_loss(total / count)


def of_loss(loss: float) -> float:
    """1 / (1 + loss); a loss that is no number is the worst."""
    return 1 / (1 + loss) if math.isfinite(loss) else 0.0
