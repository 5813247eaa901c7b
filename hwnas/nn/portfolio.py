"""Several stand-alone networks behind the interface of a super-net, for searches that share nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture, Picks
from hwnas.core.space import Option, SearchSpace
from hwnas.nn.detector import DetectionNetwork, Outputs
from hwnas.nn.network import AnyNetwork, network_of
from hwnas.nn.supernet import Gates, Probes, resized


class Portfolio(nn.Module):
    """The networks of ``members``, each with weights of its own; gates say which one runs.

    Networks that a step does not run get no gradient, so training them in turns is training each of them alone.
    """

    def __init__(self, space: SearchSpace, members: Sequence[Picks], generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        self.members = [tuple(int(i) for i in space.index(picks)) for picks in members]
        self.networks = nn.ModuleList(network_of(space.decode(picks), generator=generator) for picks in members)
        self.fraction = 0.0

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifiers'."""
        classifiers = [(i, network) for i, network in enumerate(self.networks) if not isinstance(network, DetectionNetwork)]
        return {f"networks.{i}.{name}" for i, network in classifiers for name in network.no_weight_decay()}  # type: ignore[operator]

    def forward(self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0) -> Tensor | Outputs:
        """Images [N, channels, size, size] through the network that one-hot ``gates`` name -> its outputs, as ``Supernet.forward``."""
        assert not probes and not skip_dropout, "networks that share nothing have nothing to probe"
        network: Any = self.networks[self.members.index(tuple(int(gates[choice.key].argmax()) for choice in self.space.choices))]
        outputs: Tensor | Outputs = network(resized(x_NCHW, network.arch.resolution))
        return outputs

    @property
    def proxies(self) -> Sequence[SearchSpace]:
        """The space itself: nothing is left out."""
        return (self.space,)

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture of ``picks``."""
        return self.space.decode(picks)

    def extract(self, picks: Mapping[str, Option]) -> AnyNetwork:
        """A copy of the network of ``picks``, its BN statistics included."""
        network = copy.deepcopy(self.networks[self.members.index(tuple(int(i) for i in self.space.index(picks)))])
        assert isinstance(network, AnyNetwork)
        return network
