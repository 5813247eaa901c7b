"""Weight transfer from the slots of one super-net to those of another.

``load_backbone`` initialises the backbone of a super-net of detectors from a trained
super-net of classifiers. ``copy_weights`` initialises a slot of a shrunk space from the
slot that it was shrunk from.
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
    """Keys of the slots that ``taken`` weights over, and of those ``left`` without."""

    taken: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.left)
        text = f"{len(self.taken)} of {total} slots have inherited weights"
        if not self.left:
            return text
        keys = ", ".join(self.left[:5])
        if len(self.left) > 5:
            keys += " ..."
        return f"{text}; {keys} start from scratch"


def load_backbone(
    slots: Mapping[Slot, nn.Module], sources: Mapping[Slot, nn.Module]
) -> Transferred:
    """Copy the weights of every slot that has an equal one in ``sources``: the same
    options, widths, stride and sharing. Image sizes may differ.
    """
    by_slot = {_sizeless(slot): module for slot, module in sources.items()}
    taken: list[str] = []
    left: list[str] = []
    for slot, module in slots.items():
        source = by_slot.get(_sizeless(slot))
        # equal slots have other shapes if the super-nets share weights differently
        if source is not None and _shapes(source) == _shapes(module):
            module.load_state_dict(source.state_dict())
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
    """Copy the weights of ``source`` into a slot with fewer options or less sharing.

    ``numbers`` has one entry per producer of the slot's input: the index of the same
    producer in ``source``.
    """
    source_copies = _copies(source)
    # not strict: producers that share their weights have a single copy
    for number, copy in zip(numbers, _copies(slot), strict=False):
        source_layers = source_copies[number if len(source_copies) > 1 else 0]
        for name, layer in copy.items():
            source_layer = cast(ElasticConv, source_layers[name])
            _copy_layer(cast(ElasticConv, layer), source_layer, numbers)


def _copies(slot: ElasticSlot) -> list[nn.ModuleDict]:
    return [cast(nn.ModuleDict, copy) for copy in slot.copies]


def _copy_layer(layer: ElasticConv, source: ElasticConv, numbers: Sequence[int]) -> None:
    """Copy the weights of ``source`` that the narrower ``layer`` keeps. ``numbers`` has
    the index in ``source`` of each BN of ``layer``.
    """
    kept = replace(layer.widest, kernel=layer.conv.kernel_size[0])
    # a layer without BNs still has a convolution to copy, hence at least one pass
    for norm, number in zip(range(max(1, len(layer.norms))), numbers, strict=False):
        source_norm = number if len(source.norms) > 1 else 0
        source_tensors = source.sliced(kept, *source.narrow(kept), source_norm)
        tensors = layer.sliced(kept, *layer.narrow(kept), norm)
        for name, tensor in source_tensors.items():
            # at full width, slices are views of the weights, so this writes to them
            tensors[name].copy_(tensor)
    for kernel, transform in layer.transforms.items():
        transform.copy_(source.transforms[kernel])
