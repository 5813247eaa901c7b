"""BN recalibration: re-estimates the running statistics of a network with inherited
weights before it is evaluated.

Every sub-net has statistics of its own, and a super-net keeps none. Without this step,
ranking by accuracy is close to chance: Kendall tau on NAS-Bench-201 is 0.04 without it
and 0.54 with it (computed from AngleNAS's published data, megvii-model/AngleNAS).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set all running statistics to the plain average over ``batches`` of images [N, C,
    H, W]. Weights are not changed.
    """
    with recalibrating(network):
        for x_NCHW in batches:
            network(x_NCHW)


@contextmanager
def recalibrating(network: nn.Module) -> Iterator[None]:
    """A context in which every forward pass normalises by the statistics of its batch
    and averages them. On exit, the network is in eval mode.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    # only the BNs are in training mode: dropout would distort the statistics after it
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        # None makes torch average cumulatively, so that every batch counts the same
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
