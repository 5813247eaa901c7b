"""Several standalone networks behind the interface of a super-net, for searches
without weight sharing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture, Picks
from hwnas.core.gates import Gates, Probes
from hwnas.core.space import Option, SearchSpace
from hwnas.nn.detector import Outputs
from hwnas.nn.network import Network, network_of
from hwnas.nn.shared import GatedNetworks, resized


class IndependentNetworks(GatedNetworks):
    """The networks of ``members``, each with its own weights. Gates select the one that
    runs.

    Networks that a step does not run get no gradient, so training them in turns equals
    training each of them separately.
    """

    shares = False

    def __init__(
        self, space: SearchSpace, members: Sequence[Picks], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.space = self.proxy = space
        # it says how weights are shared, so here it has no effect
        self.config = SupernetConfig()
        self.members: list[tuple[int, ...]] = []
        self.networks = nn.ModuleList()
        for picks in members:
            self.members.append(_indices(space, picks))
            self.networks.append(network_of(space.decode(picks), generator=generator))
        self.fraction = 0.0
        self.tracking = True

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): the
        classifiers'.
        """
        names: set[str] = set()
        for i, network in enumerate(self._networks()):
            names |= {f"networks.{i}.{name}" for name in network.no_weight_decay()}
        return names

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Run the network that one-hot ``gates`` select: images [N, channels, size,
        size] -> its outputs, as in ``MacroSupernet.forward``.
        """
        assert not probes and not skip_dropout, "networks that share nothing have nothing to probe"
        indices = tuple(int(gates[choice.key].argmax()) for choice in self.space.choices)
        network = self._network(indices)
        outputs: Tensor | Outputs = network(resized(x_NCHW, network.arch.size))
        return outputs

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture of ``picks``."""
        return self.space.decode(picks)

    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A copy of the network of ``picks``, including its BN statistics."""
        return copy.deepcopy(self._network(_indices(self.space, picks)))

    def save(self, path: Path) -> None:
        """Write nothing: there are no shared weights, and the search keeps the best
        network as its winner.
        """

    def _networks(self) -> list[Network]:
        return [cast(Network, network) for network in self.networks]

    def _network(self, indices: tuple[int, ...]) -> Network:
        """The member with these option indices."""
        return self._networks()[self.members.index(indices)]


def _indices(space: SearchSpace, picks: Mapping[str, Option]) -> tuple[int, ...]:
    """The index of the picked option of every choice."""
    return tuple(int(i) for i in space.index(picks))
