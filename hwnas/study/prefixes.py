"""Networks evaluated one after another by weights that they share: the blocks that two
have in common, from the input on, run once.

What a block makes depends on what came before it, BN's re-estimated statistics
included. Two networks whose first blocks are alike are alike up to there, so the second
goes on from what the first has made. Judged in the order of their blocks, N random
networks of L slots with K options run about sum_i min(1, K^i / N) of L slots anew. The
numbers are those of whole passes, bit for bit.

Networks of cells, whose blocks are no row, share nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hwnas.core.ops import Op
from hwnas.nn.bn import recalibrating
from hwnas.nn.classifier import ClassificationNetwork

PART_OF_MEMORY = 1 / 6
"""Of this machine's memory, or its accelerator's, for the maps that are kept (ours).
Two are in use where networks are evaluated with BN statistics estimated anew and as they
stand. Behind the last block whose maps fit, batches pass one by one.
"""

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says what a container may have of the machine's memory: bytes, or ``max``."""


def memory_for_maps(device: torch.device) -> int:
    """Bytes of maps to keep on a device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = CGROUP.read_text().strip() if CGROUP.is_file() else ""
        total = min(total, int(limit)) if limit.isdigit() else total
    return int(PART_OF_MEMORY * total)


@dataclass(frozen=True)
class Maps:
    """What the blocks so far have made of batches of images: those that BN statistics
    are of, and those that are evaluated.
    """

    estimating: Sequence[Tensor]
    evaluated: Sequence[Tensor]

    def size(self, op: Op) -> int:
        """Bytes of what ``op`` makes of them."""
        images = sum(len(x_NCHW) for x_NCHW in (*self.estimating, *self.evaluated))
        return images * op.out_ch * op.out_size**2 * self.evaluated[0].element_size()


@dataclass(frozen=True)
class _Kept:
    """A block, as it was extracted, and what was made by the blocks up to it, of so many bytes."""

    op: Op
    tensors: Mapping[str, Tensor]
    maps: Maps
    size: int


class Prefixes:
    """Runs networks on the same images.

    BN's statistics are averages over ``images.estimating``, whose batches pass by their
    own. Without such images they are those that the network has, or with ``by_batch``
    those of each batch that is evaluated. ``memory``: bytes of maps that are kept; None:
    see above.
    """

    def __init__(self, images: Maps, *, by_batch: bool = False, memory: int | None = None) -> None:
        self.images, self.by_batch = images, by_batch
        self.memory = memory_for_maps(images.evaluated[0].device) if memory is None else memory
        self._kept: list[_Kept] = []

    @torch.inference_mode()
    def logits(self, network: ClassificationNetwork) -> list[Tensor]:
        """Of the batches that are evaluated: [N, classes] each. The network is used up: BN
        is estimated only of blocks that ran.
        """
        if network.arch.graph:
            return list(self._through(network, self.images).evaluated)
        blocks, ops = list(network.blocks), list(network.arch.ops())
        at = self._common(blocks, ops)
        del self._kept[at:]
        maps = self._kept[-1].maps if self._kept else self.images
        left = self.memory - sum(each.size for each in self._kept)
        while at < len(blocks) and (size := maps.size(ops[at])) <= left:
            tensors = {name: tensor.clone() for name, tensor in blocks[at].state_dict().items()}
            maps = self._through(blocks[at], maps)
            self._kept.append(_Kept(ops[at], tensors, maps, size))
            at, left = at + 1, left - size
        return list(self._through(nn.Sequential(*blocks[at:]), maps).evaluated)

    def _common(self, blocks: Sequence[nn.Module], ops: Iterable[Op]) -> int:
        """How many blocks at the front are those that are kept."""
        for number, (kept, block, op) in enumerate(zip(self._kept, blocks, ops, strict=False)):
            tensors = block.state_dict()
            if kept.op != op or not all(
                torch.equal(tensor, tensors[name]) for name, tensor in kept.tensors.items()
            ):
                return number
        return min(len(self._kept), len(blocks))

    def _through(self, block: nn.Module, maps: Maps) -> Maps:
        """What a block, or several in a row, make of the maps before."""
        block.eval()
        if not maps.estimating and not self.by_batch:
            return Maps((), [block(x_NCHW) for x_NCHW in maps.evaluated])
        with recalibrating(block):
            made = [block(x_NCHW) for x_NCHW in maps.estimating or maps.evaluated]
        return (
            Maps(made, [block(x_NCHW) for x_NCHW in maps.evaluated])
            if maps.estimating
            else Maps((), made)
        )
