"""Networks judged one after another by weights that they share: the blocks that two have in common, from the input on, run once.

What a block makes depends on what came before it, BN's re-estimated statistics included. Two networks whose first blocks are alike
are alike up to there, so the second goes on from what the first has made. Judged in the order of their blocks, N random networks of
L slots with K options run about sum_i min(1, K^i / N) of L slots anew. The numbers are those of whole passes, bit for bit.

A network whose cells read each other is one block here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwnas.nn.bn import recalibrating
from hwnas.nn.network import Network

MEMORY = 2 * 2**30
"""Bytes of maps that are kept (ours). What does not fit runs anew."""


@dataclass(frozen=True)
class Maps:
    """What the blocks so far have made of batches of images: those that BN statistics are of, and those that are judged."""

    estimating: Sequence[Tensor]
    judged: Sequence[Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(each.nbytes for each in (*self.estimating, *self.judged))


@dataclass(frozen=True)
class _Kept:
    """A block, as it was extracted, and what was made by the blocks up to it."""

    kind: object
    tensors: Mapping[str, Tensor]
    maps: Maps


class Prefixes:
    """Runs networks on the same images.

    BN's statistics are averages over ``images.estimating``, whose batches pass by their own. Without such images they are those that the
    network has, or with ``by_batch`` those of each batch that is judged.
    """

    def __init__(self, images: Maps, *, by_batch: bool = False, memory: int = MEMORY) -> None:
        self.images, self.by_batch, self.memory = images, by_batch, memory
        self._kept: list[_Kept] = []

    @torch.inference_mode()
    def logits(self, network: Network) -> list[Tensor]:
        """Of the batches that are judged: [N, classes] each. The network's BN statistics are re-estimated on the way."""
        blocks = [network] if network.arch.graph else list(network.blocks)
        kinds: Sequence[object] = [network.arch.identity] if network.arch.graph else list(network.arch.ops())
        common = self._common(blocks, kinds)
        del self._kept[common:]
        maps = self._kept[-1].maps if self._kept else self.images
        left = self.memory - sum(each.maps.size for each in self._kept)
        for block, kind in zip(blocks[common:], kinds[common:], strict=True):
            tensors = {name: tensor.clone() for name, tensor in block.state_dict().items()}
            maps = self._through(block, maps)
            left -= maps.size
            if left >= 0:
                self._kept.append(_Kept(kind, tensors, maps))
        return list(maps.judged)

    def _common(self, blocks: Sequence[nn.Module], kinds: Sequence[object]) -> int:
        """How many blocks at the front are those that are kept."""
        for number, (kept, block, kind) in enumerate(zip(self._kept, blocks, kinds, strict=False)):
            tensors = block.state_dict()
            if kept.kind != kind or not all(torch.equal(tensor, tensors[name]) for name, tensor in kept.tensors.items()):
                return number
        return min(len(self._kept), len(blocks))

    def _through(self, block: nn.Module, maps: Maps) -> Maps:
        """What a block makes of the maps before it."""
        block.eval()
        if not maps.estimating and not self.by_batch:
            return Maps((), [block(x_NCHW) for x_NCHW in maps.judged])
        with recalibrating(block):
            made = [block(x_NCHW) for x_NCHW in maps.estimating or maps.judged]
        return Maps(made, [block(x_NCHW) for x_NCHW in maps.judged]) if maps.estimating else Maps((), made)
