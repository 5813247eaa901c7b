"""Losses as qualities, 1 / (1 + loss), for all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hwnas.data.images import Batch
from hwnas.engine import Criterion
from hwnas.nn.network import Network


@torch.inference_mode()
def of_mean_loss(network: Network, batches: Iterable[Batch], criterion: Criterion) -> float:
    """1 / (1 + mean loss per image)."""
    network.eval()
    device = next(network.parameters()).device
    criterion.to(device)
    total = 0.0
    count = 0
    for x_NCHW, y in batches:
        outputs = network(x_NCHW.to(device, memory_format=torch.channels_last))
        loss, _ = criterion(outputs, y.to(device))
        # the criterion is a mean over its batch, and the last batch may be smaller
        total += float(loss) * len(y)
        count += len(y)
    return of_loss(total / count)


def of_loss(loss: float) -> float:
    """1 / (1 + loss); a loss that is not finite is the worst."""
    return 1 / (1 + loss) if math.isfinite(loss) else 0.0
