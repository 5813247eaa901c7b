"""What a search trains: architectures of a space behind gates, whether they share weights or not.

``GatedNetworks`` is what all kinds can do: run under gates, and give one of the
architectures as a network of its own. A ``Supernet`` is a super-net.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.space import Option, SearchSpace, Slot
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import save_tensors_atomically
from hwnas.nn.detector import Outputs
from hwnas.nn.network import Network
from hwnas.nn.transfer import Transferred

Gates = Mapping[str, Any]
"""Choice key -> weight vector [options], numpy or torch. Options at zero are not executed."""

Probes = Mapping[str, Sequence[int]]
"""Choice key -> options at weight zero whose gradient is wanted all the same."""


class GatedNetworks(nn.Module, ABC):
    """Architectures of a space in one module; gates say which of them runs, or what mixture.

    ``shares`` says that they share weights: what is learnt by training some holds for
    all. ``fraction`` is how much of the training is over; path dropout grows with it.
    ``tracking`` lets passes in training mode update the running statistics of BN, where
    it keeps any (``bn_track``).
    """

    shares: ClassVar[bool]
    space: SearchSpace
    proxy: SearchSpace
    """The space that is trained: narrower, shallower or smaller where the configuration
    says so, with the same choices.
    """
    config: SupernetConfig
    fraction: float
    tracking: bool

    @abstractmethod
    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes], or
        the ``Outputs`` of a detector.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifier's (as in TuNAS's code)."""

    @abstractmethod
    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture that ``picks`` are in this super-net: the space's own, but
        for the proxies.
        """

    @abstractmethod
    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A stand-alone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.
        """

    @property
    def proxies(self) -> Sequence[SearchSpace]:
        """The spaces that are trained one after another: more than one where the
        super-net grows.
        """
        return (self.proxy,)

    def grow(self, number: int) -> bool:
        """Go on with super-net ``number`` of those that follow one another; whether
        another one ran until now.
        """
        raise AssertionError(f"{type(self).__name__} does not grow to {number}")

    def load_backbone(self, path: Path) -> Transferred:
        """Begin with the weights of every slot that is the same in a super-net's file:
        options, widths, stride and sharing.

        Sizes of images may differ. Raises CheckpointError where the file is corrupt,
        ConfigError where no slot is the same.
        """
        raise AssertionError(f"{type(self).__name__} has no slots to take from {path}")

    def copy_weights(self, source: Supernet) -> None:
        """Begin with the weights of the super-net of a space that this one's was shrunk
        from: every network left is what it was.

        Where this one shares less (``operation_on``), each of its copies begins as the
        weights that were shared until then. Exact unless narrower layers are averages
        of wider ones (``channels = "interpolation"``) and the widest option has gone.
        """
        raise AssertionError(
            f"{type(self).__name__} takes nothing over from {type(source).__name__}"
        )

    @abstractmethod
    def save(self, path: Path) -> None:
        """Keep what another run can go on with; networks that share nothing leave no file."""


class Supernet(GatedNetworks):
    """All architectures of a space in one module."""

    shares = True

    @classmethod
    @abstractmethod
    def check(cls, space: Any, config: SupernetConfig) -> None:
        """Raise ConfigError where a super-net of ``space`` cannot be made so, without
        making one.
        """

    @classmethod
    def shared_by(cls, config: SupernetConfig, sharing: str, kernels: str) -> SupernetConfig:
        """The settings in which a search method says how options share weights, where
        there is anything to share and they leave it open.
        """
        del sharing, kernels
        return config

    @abstractmethod
    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The parts whose weights the angle of ``picks`` is of
        (``hwnas.search.angle``), and how often each of them counts.
        """

    @abstractmethod
    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The weights of a part: the same for all architectures that have it."""

    def proxy_resolution(self) -> int | None:
        """The height = width of the images that the training is on at present, where it
        is not the network's.
        """
        return (
            self.config.proxy_resolution
            if self.training and self.fraction < 1 - self.config.full_resolution
            else None
        )

    @property
    def by_slot(self) -> Mapping[Slot, nn.Module]:
        """The weights of every slot, for another super-net to inherit; nothing where
        there are no slots.
        """
        return {}

    def save(self, path: Path) -> None:
        """The whole super-net as safetensors, its space and configuration in the
        metadata, written atomically.
        """
        save_tensors_atomically(
            self, path, {"space": self.space.to_json(), "supernet": self.config.model_dump_json()}
        )


def resized(x_NCHW: Tensor, size: int | None) -> Tensor:
    """Images scaled to a height = width; as they are where they have it, or where it is None."""
    if size is None or x_NCHW.shape[-1] == size:
        return x_NCHW
    return F.interpolate(x_NCHW, size=(size, size), mode="bilinear", antialias=True).contiguous(
        memory_format=torch.channels_last
    )


def resolve_config(
    config: SupernetConfig | None, initialisation: Literal["he", "torch"]
) -> SupernetConfig:
    """The settings with the initialisation that ``auto`` stands for: a file of a
    super-net says how it began.
    """
    config = config or SupernetConfig()
    return (
        config.model_copy(update={"initialisation": initialisation})
        if config.initialisation == "auto"
        else config
    )


def check_proxy_resolution(space: SearchSpace, config: SupernetConfig, multiple: int = 1) -> None:
    """Raise ConfigError where ``proxy_resolution`` is no size below the space's that
    its networks can halve as often as they do.
    """
    size = config.proxy_resolution
    if size is not None and (size >= space.resolution or size % multiple):
        of = f", in multiples of {multiple}" if multiple > 1 else ""
        raise ConfigError(
            f"search.supernet.proxy_resolution = {size} is no size below the {space.resolution} px"
            f" of space {space.name}{of}: choose another, or remove it."
        )
