"""The backbone of a super-net of detectors begins with the weights of a trained super-net of classifiers, slot by slot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from hwnas.core.stage import Slot
from hwnas.errors import ConfigError
from hwnas.nn.supernet import Supernet, read_supernet


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
