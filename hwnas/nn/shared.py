"""What every kind of super-net can do: run under gates, and give one of its architectures as a network of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.space import Option, SearchSpace
from hwnas.errors import ConfigError
from hwnas.nn.detector import Outputs
from hwnas.nn.network import AnyNetwork

Gates = Mapping[str, Any]
"""Choice key -> weight vector [options], numpy or torch. Options at zero are not executed."""

Probes = Mapping[str, Sequence[int]]
"""Choice key -> options at weight zero whose gradient is wanted all the same."""


class SharedNetwork(nn.Module, ABC):
    """All architectures of a space in one module.

    ``fraction`` is how much of the training is over; path dropout grows with it. ``tracking`` lets passes in training mode update
    the running statistics of BN, where it keeps any (``bn_track``).
    """

    space: SearchSpace
    proxy: SearchSpace
    """The space that is trained: narrower, shallower or smaller where the configuration says so, with the same choices."""
    config: SupernetConfig
    fraction: float
    tracking: bool

    @classmethod
    @abstractmethod
    def check(cls, space: Any, config: SupernetConfig) -> None:
        """Raise ConfigError where a super-net of ``space`` cannot be made so, without making one."""

    @abstractmethod
    def forward(self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0) -> Tensor | Outputs:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes], or the ``Outputs`` of a detector."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifier's (as in TuNAS's code)."""

    @abstractmethod
    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture that ``picks`` are in this super-net: the space's own, but for the proxies."""

    @abstractmethod
    def extract(self, picks: Mapping[str, Option]) -> AnyNetwork:
        """A stand-alone network with copies of the weights that ``picks`` use. Its BN statistics are not estimated yet."""

    @abstractmethod
    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The parts whose weights the angle of ``picks`` is of (``hwnas.search.angle``), and how often each of them counts."""

    @abstractmethod
    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The weights of a part: the same for all architectures that have it."""

    def proxy_resolution(self) -> int | None:
        """The height = width of the images that the training is on at present, where it is not the network's."""
        return self.config.proxy_resolution if self.training and self.fraction < 1 - self.config.full_resolution else None

    @property
    def proxies(self) -> Sequence[SearchSpace]:
        """The spaces that are trained one after another: more than one where the super-net grows."""
        return (self.proxy,)

    def grow(self, number: int) -> bool:
        """Go on with super-net ``number`` of those that follow one another; whether another one ran until now."""
        raise AssertionError(f"{type(self).__name__} does not grow to {number}")

    def finished(self) -> SharedNetwork:
        """The super-net that is left when the training is over."""
        return self


def resized(x_NCHW: Tensor, size: int | None) -> Tensor:
    """Images scaled to a height = width; as they are where they have it, or where it is None."""
    if size is None or x_NCHW.shape[-1] == size:
        return x_NCHW
    return F.interpolate(x_NCHW, size=(size, size), mode="bilinear", antialias=True).contiguous(memory_format=torch.channels_last)


def settled(config: SupernetConfig | None, initialisation: Literal["he", "torch"]) -> SupernetConfig:
    """The settings with the initialisation that ``auto`` stands for: a file of a super-net says how it began."""
    config = config or SupernetConfig()
    return config.model_copy(update={"initialisation": initialisation}) if config.initialisation == "auto" else config


def check_proxy_resolution(space: SearchSpace, config: SupernetConfig, multiple: int = 1) -> None:
    """Raise ConfigError where ``proxy_resolution`` is no size below the space's that its networks can halve as often as they do."""
    size = config.proxy_resolution
    if size is not None and (size >= space.resolution or size % multiple):
        of = f", in multiples of {multiple}" if multiple > 1 else ""
        raise ConfigError(
            f"search.supernet.proxy_resolution = {size} is no size below the {space.resolution} px of space {space.name}{of}: "
            "choose another, or remove it."
        )
