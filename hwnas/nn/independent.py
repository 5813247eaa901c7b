"""Several stand-alone networks behind the interface of a super-net, for searches that
share nothing.
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
from hwnas.core.space import Option, SearchSpace
from hwnas.nn.detector import Outputs
from hwnas.nn.network import Network, network_of
from hwnas.nn.shared import GatedNetworks, Gates, Probes, resized


class IndependentNetworks(GatedNetworks):
    """The networks of ``members``, each with weights of its own; gates say which one runs.

    Networks that a step does not run get no gradient, so training them in turns is
    training each of them alone.
    """

    shares = False

    def __init__(
        self, space: SearchSpace, members: Sequence[Picks], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.space = self.proxy = space
        self.config = SupernetConfig()  # how weights are shared: here nothing goes by it
        self.members = [tuple(int(i) for i in space.index(picks)) for picks in members]
        self.networks = nn.ModuleList(
            network_of(space.decode(picks), generator=generator) for picks in members
        )
        self.fraction, self.tracking = 0.0, True

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifiers'."""
        found = enumerate(self._members())
        return {
            f"networks.{i}.{name}" for i, network in found for name in network.no_weight_decay()
        }

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Images [N, channels, size, size] through the network that one-hot ``gates``
        name -> its outputs, as ``MacroSupernet.forward``.
        """
        assert not probes and not skip_dropout, "networks that share nothing have nothing to probe"
        network = self._members()[
            self.members.index(
                tuple(int(gates[choice.key].argmax()) for choice in self.space.choices)
            )
        ]
        outputs: Tensor | Outputs = network(resized(x_NCHW, network.arch.resolution))
        return outputs

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture of ``picks``."""
        return self.space.decode(picks)

    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A copy of the network of ``picks``, its BN statistics included."""
        return copy.deepcopy(
            self._members()[self.members.index(tuple(int(i) for i in self.space.index(picks)))]
        )

    def save(self, path: Path) -> None:
        """Nothing: each network is trained for itself, and the best of them is the
        search's winner.
        """

    def _members(self) -> list[Network]:
        return [cast(Network, network) for network in self.networks]
