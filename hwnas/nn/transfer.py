"""Slots that begin with the weights of another super-net's.

``load_backbone``: the backbone of a super-net of detectors, with those of a trained super-net
of classifiers. ``copy_weights``: a slot of a shrunk space, with those of the slot that it
was shrunk from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from hwnas.core.space_stage import Slot
from hwnas.nn.elastic import ElasticConv
from hwnas.nn.slot import ElasticSlot


@dataclass(frozen=True)
class Transferred:
    """Keys of the slots that took weights, and of those that did not."""

    taken: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        rest = ""
        if self.left:
            more = " ..." if len(self.left) > 5 else ""
            rest = f"; {', '.join(self.left[:5])}{more} begin anew"
        return (
            f"{len(self.taken)} of {len(self.taken) + len(self.left)} slots have inherited"
            f" weights{rest}"
        )


def load_backbone(
    slots: Mapping[Slot, nn.Module], sources: Mapping[Slot, nn.Module]
) -> Transferred:
    """Copy the weights of every slot that is the same among the sources: options,
    widths, stride and sharing, not the images' size.
    """
    there = {_sizeless(slot): module for slot, module in sources.items()}
    taken, left = [], []
    for slot, module in slots.items():
        other = there.get(_sizeless(slot))
        if other is not None and _shapes(other) == _shapes(module):
            module.load_state_dict(other.state_dict())
            taken.append(slot.key)
        else:
            left.append(slot.key)
    return Transferred(tuple(taken), tuple(left))


def _sizeless(slot: Slot) -> Slot:
    return replace(slot, sizes=())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    state: dict[str, Tensor] = module.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@torch.no_grad()
def copy_weights(slot: ElasticSlot, source: ElasticSlot, numbers: Sequence[int]) -> None:
    """Copy what a slot with fewer options, or less sharing, keeps of another's weights.

    ``numbers``: by producer of the slot's input, which of the source's producers it was.
    """
    for number, copy in zip(numbers, _copies(slot), strict=False):  # one copy where they share
        theirs = _copies(source)
        layers = theirs[number if len(theirs) > 1 else 0]
        for name, layer in copy.items():
            _take(cast(ElasticConv, layer), cast(ElasticConv, layers[name]), numbers)


def _copies(slot: ElasticSlot) -> list[nn.ModuleDict]:
    return [cast(nn.ModuleDict, copy) for copy in slot.copies]


def _take(layer: ElasticConv, source: ElasticConv, numbers: Sequence[int]) -> None:
    """Copy the part of a layer's weights that a narrower one keeps. ``numbers``: which
    of the source's BNs each BN of ``layer`` was.
    """
    kept = replace(layer.widest, kernel=layer.conv.kernel_size[0])
    for norm, number in zip(range(max(1, len(layer.norms))), numbers, strict=False):
        tensors = source.sliced(kept, *source.narrow(kept), number if len(source.norms) > 1 else 0)
        mine = layer.sliced(kept, *layer.narrow(kept), norm)
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    for kernel, transform in layer.transforms.items():
        transform.copy_(source.transforms[kernel])
