"""Evaluate many networks with shared weights one after another: blocks that a network
has in common with the one before, counted from the input, run only once.

The output of a block depends on everything before it, re-estimated BN statistics
included. Two networks with the same first blocks have the same maps up to there, so the
second continues from the maps of the first. Evaluated in the order of their blocks, N
random networks of L slots with K options run about sum_i min(1, K^i / N) of L slots.
The results are those of complete forward passes, bit for bit.

Networks of cells have no sequence of blocks, so nothing is shared between them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hwnas.core.ops import Op
from hwnas.core.size import area
from hwnas.nn.bn import recalibrating
from hwnas.nn.classifier import ClassificationNetwork

MEMORY_FRACTION = 1 / 6
"""The part of the memory of this machine, or of its accelerator, for the maps that are
kept (our choice). Two such sets are in use if networks are evaluated both with
re-estimated BN statistics and with the existing ones. After the last block whose maps
fit, batches pass one by one.
"""

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Where Linux holds the memory limit of a container: bytes, or ``max``."""


def memory_for_maps(device: torch.device) -> int:
    """The number of bytes of maps to keep on a device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = CGROUP.read_text().strip() if CGROUP.is_file() else ""
        if limit.isdigit():
            total = min(total, int(limit))
    return int(MEMORY_FRACTION * total)


@dataclass(frozen=True)
class Maps:
    """The feature maps after a number of blocks, by batch of images: those that BN
    statistics are estimated from, and those that are evaluated.
    """

    estimating: Sequence[Tensor]
    evaluated: Sequence[Tensor]

    def size(self, op: Op) -> int:
        """The size in bytes of the output of ``op`` for these maps."""
        images = sum(len(x_NCHW) for x_NCHW in (*self.estimating, *self.evaluated))
        return images * op.out_ch * area(op.out_size) * self.evaluated[0].element_size()


@dataclass(frozen=True)
class _Kept:
    """A block: its op, its tensors before it ran, the maps after it, and their size in
    bytes.
    """

    op: Op
    tensors: Mapping[str, Tensor]
    maps: Maps
    size: int


class Prefixes:
    """Runs networks on the same images.

    BN uses averages of the batch statistics over ``images.estimating``. Without such
    images it uses the statistics of the network or, with ``by_batch``, those of each
    evaluated batch. ``memory`` is the number of bytes of maps to keep; None means
    ``memory_for_maps``.
    """

    def __init__(self, images: Maps, *, by_batch: bool = False, memory: int | None = None) -> None:
        self.images = images
        self.by_batch = by_batch
        self.memory = memory_for_maps(images.evaluated[0].device) if memory is None else memory
        self._kept: list[_Kept] = []

    @torch.inference_mode()
    def logits(self, network: ClassificationNetwork) -> list[Tensor]:
        """The logits of the evaluated batches: [N, classes] each. The network cannot be
        used again: BN is re-estimated only in the blocks that run.
        """
        if network.arch.graph:
            return list(self._through(network, self.images).evaluated)
        blocks = list(network.blocks)
        ops = list(network.arch.ops())
        position = self._common(blocks, ops)
        del self._kept[position:]
        maps = self._kept[-1].maps if self._kept else self.images
        free = self.memory - sum(kept.size for kept in self._kept)
        while position < len(blocks):
            block = blocks[position]
            op = ops[position]
            size = maps.size(op)
            if size > free:
                break
            # A copy, because re-estimation changes the BN statistics of the block.
            tensors = {name: tensor.clone() for name, tensor in block.state_dict().items()}
            maps = self._through(block, maps)
            self._kept.append(_Kept(op, tensors, maps, size))
            position += 1
            free -= size
        return list(self._through(nn.Sequential(*blocks[position:]), maps).evaluated)

    def _common(self, blocks: Sequence[nn.Module], ops: Iterable[Op]) -> int:
        """The number of leading blocks that are the same as the kept ones."""
        for number, (kept, block, op) in enumerate(zip(self._kept, blocks, ops, strict=False)):
            tensors = block.state_dict()
            # Equal ops can still have different weights, for instance per producer.
            if kept.op != op or not all(
                torch.equal(tensor, tensors[name]) for name, tensor in kept.tensors.items()
            ):
                return number
        return min(len(self._kept), len(blocks))

    def _through(self, block: nn.Module, maps: Maps) -> Maps:
        """The maps after a block, or after several in sequence."""
        block.eval()
        if maps.estimating:
            # Statistics are complete only after the last batch, so the evaluated batches
            # must wait.
            with recalibrating(block):
                estimating = [block(x_NCHW) for x_NCHW in maps.estimating]
            return Maps(estimating, [block(x_NCHW) for x_NCHW in maps.evaluated])
        with recalibrating(block) if self.by_batch else nullcontext():
            return Maps((), [block(x_NCHW) for x_NCHW in maps.evaluated])
