"""A super-net begins with the weights of another, slot by slot.

``inherit``: the backbone of a super-net of detectors, with those of a trained super-net of classifiers. ``carry``: the super-net of a
shrunk space, with those of the super-net that it was shrunk from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.core.stage import Slot
from hwnas.errors import ConfigError
from hwnas.nn.cells import CellSupernet
from hwnas.nn.elastic import ElasticConv
from hwnas.nn.supernet import IMAGE, Producer, SharedNetwork, Supernet, read_supernet


@dataclass(frozen=True)
class Inherited:
    """Keys of the slots that took weights, and of those that did not."""

    taken: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        rest = f"; {', '.join(self.left[:5])}{' ...' if len(self.left) > 5 else ''} begin anew" if self.left else ""
        return f"{len(self.taken)} of {len(self.taken) + len(self.left)} slots have inherited weights{rest}"


def inherit(supernet: Supernet, path: Path) -> Inherited:
    """Copy the weights of every slot that is the same in the super-net file: options, widths, stride and sharing.

    Sizes of images may differ. Raises CheckpointError where the file is corrupt, ConfigError where no slot is the same.
    """
    source = read_supernet(path)
    if not isinstance(source, Supernet):
        raise ConfigError(f"the super-net {path} is one of cells, which no detector has: name one of {supernet.space.name}'s blocks.")
    there = {_sizeless(slot): module for slot, module in zip(source.proxy.slots, source.slots, strict=True)}
    taken, left = [], []
    for slot, module in zip(supernet.proxy.slots, supernet.slots, strict=True):
        other = there.get(_sizeless(slot))
        if other is not None and _shapes(other) == _shapes(module):
            module.load_state_dict(other.state_dict())
            taken.append(slot.key)
        else:
            left.append(slot.key)
    if not taken:
        raise ConfigError(
            f"the super-net {path} of space {source.space.name} has no slot in common with space {supernet.space.name}: train it on the "
            "same space and width, with the same strategy and search.supernet settings."
        )
    return Inherited(tuple(taken), tuple(left))


def _sizeless(slot: Slot) -> Slot:
    return replace(slot, sizes=())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    state: dict[str, Tensor] = module.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@torch.no_grad()
def carry(source: SharedNetwork, target: SharedNetwork) -> None:
    """Give the super-net of a shrunk space the weights of the one it was shrunk from: every network left is what it was.

    Where ``target`` shares less (``operation_on``), each of its copies begins as the weights that were shared until then. Exact unless
    narrower layers are averages of wider ones (``channels = "interpolation"``) and the widest option has gone.
    """
    if isinstance(target, CellSupernet):
        there = source.state_dict()
        target.load_state_dict({name: there[name] for name in target.state_dict()})
    else:
        assert isinstance(source, Supernet) and isinstance(target, Supernet)
        _carry_slots(source, target)


def _carry_slots(source: Supernet, target: Supernet) -> None:
    """``carry`` for blocks in a row."""
    training = source.training
    source.eval()  # random channels are for training: here the first ones
    there = {slot.key: position for position, slot in enumerate(source.proxy.slots)}
    for slot, module, producers in zip(target.proxy.slots, target.slots, target.producers, strict=True):
        mine: Any = module
        theirs: Any = source.slots[there[slot.key]]
        known = source.producers[there[slot.key]]
        numbers = [known.index(_seen_by(source, target, there, producer)) for producer in producers]
        for number, copy in zip(numbers, mine.copies, strict=False):  # one copy where they share
            layers = theirs.copies[number if len(theirs.copies) > 1 else 0]
            for name, layer in copy.items():
                _take(layer, layers[name], numbers)
    if target.space.detector is not None:
        target.detector.load_state_dict(source.detector.state_dict())
    else:
        target.classifier.weight.copy_(source.classifier.weight[:, : target.classifier.in_features])
        target.classifier.bias.copy_(source.classifier.bias)
    source.train(training)


def _seen_by(source: Supernet, target: Supernet, there: dict[str, int], producer: Producer) -> Producer:
    """What ``source`` calls a producer of ``target``."""
    position, option = producer
    if producer == IMAGE:
        return IMAGE
    return there[target.proxy.slots[position].key], option if source.config.operation_on == "op" else ""


def _take(layer: ElasticConv, source: ElasticConv, numbers: list[int]) -> None:
    """Copy the part of a layer's weights that a narrower one keeps. ``numbers``: which of the source's BNs each BN of ``layer`` was."""
    kept = replace(layer.widest, kernel=layer.conv.kernel_size[0])
    for norm, number in zip(range(max(1, len(layer.norms))), numbers, strict=False):
        tensors = source.sliced(kept, *source.narrow(kept), number if len(source.norms) > 1 else 0)
        mine = layer.sliced(kept, *layer.narrow(kept), norm)
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    for kernel, transform in layer.transforms.items():
        transform.copy_(source.transforms[kernel])
